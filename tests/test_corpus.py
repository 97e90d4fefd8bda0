"""Conversations become rows that keep every token, in an order that depends on the seed alone."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import hub
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lib.data import conversations, corpus
from lib.errors import UsageError
from lib.paths import ROOT


def turn(role, content):
    return {"role": role, "content": content}


TALK = []
for n in range(60):
    answer = f"It is {n}, as {n} always is." * (1 + n % 3)
    TALK.append(
        {"dataset": "d", "id": str(n), "messages": [turn("user", f"How many is {n}?"), turn("assistant", answer)]}
    )


GIVEN = {
    "dataset_revision": "", "tokenizer": "builtin", "context": 32, "turns": "roles", "packing": False,
    "train_on_padding": False, "validation_share": 0.2, "batch_size": 1, "accumulation": 1,
}  # fmt: skip


@pytest.fixture
def talk_file(tmp_path):
    def write(rows=TALK, suffix=".jsonl"):
        path = tmp_path / f"talk{suffix}"
        if suffix == ".parquet":
            pd.DataFrame(rows).to_parquet(path)
        else:
            text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
            path.write_text(text + "\n", encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(autouse=True)
def own_dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def load(path, **changes):
    return corpus.load(SimpleNamespace(**(GIVEN | {"dataset": path} | changes)))


def test_the_builtin_corpus_is_about_4_mb_of_prose_and_the_same_each_time():
    talks = conversations.builtin()
    text = "".join(turn["content"] for talk in talks for turn in talk)
    assert 3.5e6 < len(text) < 5e6
    answers = [talk[1]["content"] for talk in talks]
    assert len(set(answers)) == len(answers) and min(map(len, answers)) >= 80
    conversations.builtin.cache_clear()
    assert conversations.builtin() == talks


def test_the_builtin_corpus_is_read_without_importing_its_packages():
    code = (
        "import sys, importlib.util; from lib.data.conversations import builtin; before = set(sys.modules); builtin();"
        "print([m for m in set(sys.modules) - before if m.startswith(('pandas', 'matplotlib'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl"])
def test_local_files_of_each_form_give_the_same_rows(talk_file, suffix):
    assert load(talk_file(suffix=suffix)).facts == load(talk_file()).facts


def test_a_row_is_a_conversation_with_roles_and_its_end_padded_on_the_right(talk_file):
    data = load(talk_file(), context=64)
    ids, labels = data.train.batch(np.array([0]))
    length = int(data.train.lengths[0])
    text = corpus.load_tokenizer("builtin").decode(ids[0, :length].tolist())
    assert text.startswith("<|user|>\nHow many is") and "\n<|assistant|>\nIt is" in text
    assert text.endswith("<|endoftext|>")
    assert (labels[0, length:] == -100).all() and (labels[0, :length] == ids[0, :length]).all()
    assert 0 < data.facts["padding_share"] < 1


def as_said(talk):
    return "".join(f"<|{one['role']}|>\n{one['content']}\n" for one in talk["messages"])


def test_the_side_of_a_conversation_is_that_of_its_text_s_hash(talk_file, monkeypatch):
    """Every conversation is on one of the two sides and in their order, though they are read in several batches."""
    monkeypatch.setattr(conversations, "BATCH", 25)
    data, words = load(talk_file(), context=512, validation_share=0.21), corpus.load_tokenizer("builtin")
    sides = {"train": [], "validation": []}
    for text in map(as_said, TALK):
        share = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64
        sides["validation" if share < 0.21 else "train"].append(text)
    for name, texts in sides.items():
        part = getattr(data, name)
        rows = [part.batch(np.array([row]))[0][0, : part.lengths[row]].tolist() for row in range(len(part))]
        assert [words.decode(row) for row in rows] == [f"{text}<|endoftext|>" for text in texts] != []
    assert data.facts["conversations"] == 60


def test_every_row_is_the_begin_of_its_own_conversation_and_the_facts_are_counted_from_them(talk_file):
    """All conversations but the shortest are longer than a row: whoever counts from the cut ones is a row off."""
    words = corpus.load_tokenizer("builtin")
    own = {text: [*words(text)["input_ids"], words.eos_token_id] for text in map(as_said, TALK)}
    context = sorted(map(len, own.values()))[29]  # there are some that just fit
    data = load(talk_file(), context=context)
    sides = {}
    for text, ids in own.items():
        is_validation = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < 0.2
        sides.setdefault("validation" if is_validation else "train", []).append(ids)
    for name, of_side in sides.items():
        ids, labels = getattr(data, name).batch(np.arange(len(of_side)))
        for row, told, wanted in zip(of_side, ids.tolist(), labels.tolist(), strict=True):
            filled = context - min(len(row), context)
            assert told == row[:context] + [words.eos_token_id] * filled and wanted == row[:context] + [-100] * filled
    sizes, trained = [len(ids) for ids in own.values()], [min(len(ids), context) for ids in sides["train"]]
    expected = {
        "conversations": 60, "empty_conversations": 0, "empty_turns": 0, "unlabelled_conversations": 0,
        "cut_conversations": sum(size > context for size in sizes),
        "tokens_in_no_row": sum(max(0, size - context) for size in sizes),
        "train_sequences": len(sides["train"]), "validation_sequences": len(sides["validation"]),
        "train_tokens": sum(trained), "padding_share": pytest.approx(1 - sum(trained) / len(trained) / context),
    }  # fmt: skip
    assert {name: data.facts[name] for name in expected} == expected
    assert 0 < expected["cut_conversations"] < 60 and sizes.count(context) > 0 and expected["padding_share"] != 0


@pytest.mark.parametrize(
    ("packing", "starts", "lengths"),
    [(False, [0, 3, 12, 19], [3, 8, 7, 2]), (True, [0, 8], [8, 8]), ("documents", [0, 8], [8, 8])],
)
def test_rows_are_cut_from_the_tokens_as_with_a_pencil(packing, starts, lengths):
    """Conversations of 3, 9, 7 and 2 tokens in rows of 8."""
    rows = corpus._rows(np.arange(21, dtype=np.uint32), np.array([3, 9, 7, 2]), 8, packing, 0)
    assert (rows.starts.tolist(), rows.lengths.tolist()) == (starts, lengths)
    ids, labels = rows.batch(np.arange(len(rows)))
    assert [row[:size].tolist() for row, size in zip(ids, lengths, strict=True)] == [
        list(range(start, start + size)) for start, size in zip(starts, lengths, strict=True)
    ]
    assert (labels == -100).sum() == {False: 32 - 20, True: 0, "documents": 2}[packing]  # 3 and 12 begin documents
    exact = corpus._rows(np.arange(16, dtype=np.uint32), np.array([10, 6]), 8, packing, 0)
    assert len(exact) == 2


def test_packing_fills_every_row_and_loses_only_the_last_tokens(talk_file):
    packed, padded = load(talk_file(), packing=True), load(talk_file(), context=10_000)
    assert packed.facts["padding_share"] == 0 and (packed.train.lengths == 32).all()
    assert 0 <= len(padded.train.tokens) - packed.facts["train_tokens"] < 32
    assert np.array_equal(packed.train.tokens, padded.train.tokens)


def test_documents_of_a_packed_row_are_kept_apart(talk_file):
    """The same rows as packed ones; each token knows its document, and what begins one is predicted by nothing."""
    data, packed, padded = (load(talk_file(), packing=way) for way in ("documents", True, False))
    whole = load(talk_file(), context=10_000).train
    rows = np.arange(len(data.train))
    ids, labels = data.train.batch(rows)
    assert np.array_equal(ids, packed.train.batch(rows)[0]) and packed.train.seq_idx(rows) is None
    of_token = np.repeat(np.arange(len(whole)), whole.lengths)[: ids.numel()].reshape(ids.shape)
    assert np.array_equal(data.train.seq_idx(rows), of_token)
    begins = of_token[:, 1:] != of_token[:, :-1]
    assert begins.any() and np.array_equal(labels[:, 1:] == corpus.IGNORED, begins)
    assert np.array_equal(labels[:, 1:][~begins], ids[:, 1:][~begins])
    crossed = [len({*range(start // 32, (end - 1) // 32 + 1)}) > 1 for start, end in _spans(data)]
    assert data.facts["cut_conversations"] == sum(crossed) > 0 == packed.facts["cut_conversations"]
    fingerprints = {one.facts["token_sha256"] for one in (data, packed, padded)}
    assert len(fingerprints) == 3


def _spans(data):
    for part in (data.train, data.validation):
        yield from zip([0, *part.ends[:-1]], part.ends, strict=True)


@pytest.mark.parametrize(("packing", "lengths"), [(False, [4, 3]), (True, [8]), ("documents", [8])])
def test_a_conversation_of_one_token_is_no_row_of_its_own(packing, lengths):
    """Alone in a batch it has no label, and its loss would be 0 / 0."""
    rows = corpus._rows(np.arange(9, dtype=np.uint32), np.array([1, 4, 1, 3]), 8, packing, 0)
    assert rows.lengths.tolist() == lengths
    assert (rows.batch(np.arange(len(rows)))[1][:, 1:] != corpus.IGNORED).any(1).all()


def test_copies_of_a_conversation_fall_on_the_same_side(talk_file):
    once, twice = load(talk_file()), load(talk_file(TALK + TALK))
    assert twice.facts["validation_sequences"] == 2 * once.facts["validation_sequences"] > 0


def test_empty_turns_are_dropped_and_counted(talk_file):
    blank = {"messages": [turn("user", "  "), turn("assistant", None)]}
    half = {"messages": [turn("user", "yes?"), turn("assistant", "")]}
    facts = load(talk_file([*({"messages": talk["messages"]} for talk in TALK), blank, half])).facts
    assert (facts["empty_turns"], facts["empty_conversations"], facts["conversations"]) == (3, 1, 61)


def test_words_that_a_tokenizer_does_not_know_are_counted(tmp_path, talk_file):
    """One that knows three words: of "How many is 7? It is 7, as 7 always is." all signs but four are unknown."""
    known = {"[UNK]": 0, corpus.END_OF_TEXT: 1, "How": 2, "many": 3, "is": 4}
    words = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    own = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=corpus.END_OF_TEXT, unk_token="[UNK]")
    own.save_pretrained(tmp_path / "few words")
    found = load(talk_file(), tokenizer=str(tmp_path / "few words"), turns="joined").facts
    signs = [re.findall(r"\w+|[^\w\s]+", " ".join(one["content"] for one in talk["messages"])) for talk in TALK]
    assert found["unknown_tokens"] == sum(sign not in known for text in signs for sign in text) > 0


def test_the_fingerprint_follows_the_tokens(talk_file):
    changed = json.loads(json.dumps(TALK))
    changed[7]["messages"][0]["content"] = "How much is 7?"
    fingerprints = [load(talk_file(rows)).facts["token_sha256"] for rows in (TALK, TALK, changed)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_the_fingerprint_is_of_tokens_and_borders_of_both_parts():
    """A SHA-256 that was worked out without the function, and another one for each thing that is another."""

    def made(tokens=(1, 2, 3, 4), starts=(0, 2), lengths=(2, 2)):
        return corpus.Rows(np.array(tokens, np.uint16), np.array(starts), np.array(lengths), 2, 0)

    def bytes_of(rows):
        arrays = (rows.tokens.astype("<u4"), rows.starts.astype("<i8"), rows.lengths.astype("<i8"))
        return b"".join(array.tobytes() for array in arrays)

    other = (made(tokens=(1, 2, 3, 5)), made(starts=(0, 1)), made(lengths=(2, 1)))
    pairs = [(made(), made()), *((made(), one) for one in other), *((one, made()) for one in other)]
    found = [corpus.fingerprint({"train": train, "validation": validation}) for train, validation in pairs]
    assert len(set(found)) == len(pairs)
    assert found == [hashlib.sha256(bytes_of(one) + bytes_of(two)).hexdigest() for one, two in pairs]


@given(rows=st.integers(1, 40), count=st.integers(1, 130), seed=st.integers(0, 9))
@settings(deadline=None)
def test_the_order_visits_every_row_once_a_round(rows, count, seed):
    part = corpus.Rows(np.zeros(rows), np.arange(rows), np.ones(rows), 1, 0)
    order = part.order(count, seed)
    assert len(order) == count and np.array_equal(order, part.order(count, seed))
    for first in range(0, count - rows + 1, rows):
        assert sorted(order[first : first + rows]) == list(range(rows))
    longer = part.order(count + 17, seed)
    assert np.array_equal(longer[:count], order)


def test_every_seed_and_every_round_has_an_order_of_its_own():
    part = corpus.Rows(np.zeros(30), np.arange(30), np.ones(30), 1, 0)
    rounds = [tuple(part.order(90, seed)[first : first + 30]) for seed in range(3) for first in (0, 30, 60)]
    assert len({*rounds, tuple(range(30))}) == 10


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "no messages"}], "has the columns text; it needs `messages`"),
        ([{"messages": [{"role": "user", "content": " "}]}], "holds no conversation with a word in it"),
        ([{"messages": [{"who": "user", "text": "hi"}]}], "a turn must be {role: text, content: text}"),
        ([{"messages": [{"role": "user", "content": "alone"}]}], "leaves no sequence of 32 tokens"),
    ],
)
def test_data_that_cannot_be_used_is_said_in_one_sentence(talk_file, rows, said):
    with pytest.raises(UsageError) as error:
        load(talk_file(rows))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ("nowhere.parquet", "there is no data file"),
        ("no-such-user/no-such-data", "cannot load 'no-such-user/no-such-data' from the hub"),
    ],
)
def test_data_that_is_not_there_is_said_in_one_sentence(dataset, said):
    with pytest.raises(UsageError) as error:
        load(dataset)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_broken_file_and_a_tokenizer_that_is_not_there_are_said_in_one_sentence(tmp_path, talk_file):
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    for changes in (
        {"path": str(tmp_path / "broken.parquet")},
        {"path": talk_file(), "tokenizer": "no-such/tokenizer"},
    ):
        with pytest.raises(UsageError) as error:
            load(changes.pop("path"), **changes)
        assert str(error.value).startswith("cannot") and "\n" not in str(error.value)


def test_a_tokenizer_saved_to_a_folder_is_the_same_one(tmp_path, talk_file):
    corpus.builtin_tokenizer().save_pretrained(tmp_path / "tokenizer")
    folder = load(talk_file(), tokenizer=str(tmp_path / "tokenizer"))
    assert folder.facts["token_sha256"] == load(talk_file()).facts["token_sha256"]


def test_human_and_gpt_are_user_and_assistant(talk_file):
    names = {"user": "human", "assistant": "gpt"}
    told = [[{"from": names[one["role"]], "value": one["content"]} for one in talk["messages"]] for talk in TALK]
    shared_by_gpt = load(talk_file([{"conversations": turns} for turns in told]))
    assert shared_by_gpt.facts["token_sha256"] == load(talk_file()).facts["token_sha256"]


def test_turns_can_be_joined_by_spaces_as_the_published_study_did(talk_file):
    data = load(talk_file(), turns="joined", context=64)
    ids, _ = data.train.batch(np.array([0]))
    text = corpus.load_tokenizer("builtin").decode(ids[0, : data.train.lengths[0]].tolist())
    assert text.startswith("How many is") and "? It is" in text and "<|user|>" not in text


def test_padding_is_trained_on_where_asked_for_and_never_validated_on(talk_file):
    data = load(talk_file(), train_on_padding=True, context=64)
    for part, labelled in ((data.train, True), (data.validation, False)):
        ids, labels = part.batch(np.array([0]))
        padding = slice(int(part.lengths[0]), None)
        assert (labels[0, padding] == (ids[0, padding] if labelled else -100)).all()
    plain = load(talk_file(), context=64)
    assert plain.facts == data.facts


def test_tokens_are_made_once_and_read_from_the_cache(talk_file, monkeypatch):
    path = talk_file()
    first = load(path)
    monkeypatch.setattr(corpus, "_tokenize", lambda *_: pytest.fail("tokenized again"))
    again = load(path, context=48, packing=True)  # other rows of the same tokens
    assert np.array_equal(again.train.tokens, first.train.tokens) and isinstance(again.train.tokens, np.memmap)


def shared(*names):
    """What lies beside the project on some machines, and is never copied into it."""
    found = next((up / "shared" / Path(*names) for up in ROOT.parents if (up / "shared" / Path(*names)).exists()), None)
    return str(found) if found else pytest.skip(f"{names[-1]} is not on this machine")


def end_token_counts(path, **changes):
    """How often the end-of-text token stands in both parts, and the number of conversations."""
    data = load(path, context=4096, **changes)
    end = data.train.padding_id
    found = sum(int((part.tokens == end).sum()) for part in (data.train, data.validation))
    return found, data.facts["conversations"]


@pytest.mark.parametrize("turns", ["roles", "joined"])
@pytest.mark.parametrize("tokenizer", ["builtin", "saved", "gpt2"])
def test_the_end_of_text_stands_at_ends_alone_whatever_a_text_spells(tmp_path, talk_file, tokenizer, turns):
    if tokenizer == "saved":
        corpus.builtin_tokenizer().save_pretrained(tmp_path / "saved")
        tokenizer = str(tmp_path / "saved")
    elif tokenizer == "gpt2":
        tokenizer = shared("tokenizers", "gpt2")
    spelled = [{"messages": [turn("user", f"{n} <|endoftext|> in it<|endoftext|>"), turn("assistant", "<|endoftext|>")]}
               for n in range(40)]  # fmt: skip
    found, conversations_ = end_token_counts(talk_file(spelled), tokenizer=tokenizer, turns=turns)
    assert found == conversations_ == 40


def test_a_tokenizer_that_makes_its_end_of_text_of_a_text_is_refused_by_the_row(talk_file, monkeypatch):
    """One without a fast implementation may; nothing that it cuts is trained on as an end."""
    encode = corpus._encode

    def careless(encoder, texts):
        return [
            [*ids, encoder.eos_token_id] if "many is 7?" in text else ids
            for text, ids in zip(texts, encode(encoder, texts), strict=True)
        ]

    monkeypatch.setattr(corpus, "_encode", careless)
    with pytest.raises(UsageError, match=r"talk\.jsonl, line 8: the tokenizer 'builtin' makes its end-of-text token"):
        load(talk_file(), validation_share=0.25)  # which no other test keeps in the cache


def test_what_fills_no_row_and_what_is_dropped_stands_in_the_facts(talk_file):
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}
    rows = [{**TALK[0], "messages": [*TALK[0]["messages"], call, turn("tool", "<|user|>\nno")]}, *TALK[1:]]
    packed, cut = load(talk_file(rows), packing=True).facts, load(talk_file(rows), context=8).facts
    whole = load(talk_file(rows), context=4096)
    total = int(whole.train.lengths.sum() + whole.validation.lengths.sum())
    assert whole.facts["tokens_in_no_row"] == 0
    for facts, context in ((packed, 32), (cut, 8)):
        sequences = facts["train_sequences"] + facts["validation_sequences"]
        assert facts["tokens_in_no_row"] > 0 and (context == 8 or facts["tokens_in_no_row"] == total - 32 * sequences)
        assert facts["dropped_turn_fields"] == {"tool_calls": 1} and facts["turns_without_text"] == 1
        assert facts["dropped_row_fields"] == {"dataset": 60, "id": 60} and facts["escaped_lines"] == 1
        assert facts["empty_turns"] == 0


@pytest.mark.parametrize("changed", [{"turns": "joined"}, {"validation_share": 0.3}])
def test_what_changes_the_tokens_is_not_taken_from_the_cache(talk_file, changed):
    path = talk_file()
    assert load(path).facts["token_sha256"] != load(path, **changed).facts["token_sha256"]


def test_a_file_that_changed_is_read_again(talk_file):
    before = load(talk_file()).facts
    after = load(talk_file(TALK[:50])).facts  # the same path
    assert (before["conversations"], after["conversations"]) == (60, 50)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_cache_is_made_anew(talk_file, monkeypatch, tmp_path, damage):
    monkeypatch.setenv("ATTENTION_STUDY_CACHE", str(tmp_path / "own"))
    path = talk_file()
    before = load(path).facts
    for file in (tmp_path / "own").rglob("train.tokens"):
        file.write_bytes(file.read_bytes()[:-10]) if damage == "cut" else file.unlink()
    assert load(path).facts == before


def test_more_rows_in_a_step_than_there_are_is_said(talk_file):
    with pytest.raises(
        UsageError, match=r"makes \d+ sequences of 32 tokens to train on, fewer than the 80 of one step"
    ):
        load(talk_file(), batch_size=8, accumulation=10)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000, "cannot read"),
        ('{"messages": ' * 5_000 + "1" + "}" * 5_000, "cannot read"),
        (json.dumps(TALK[0], ensure_ascii=False).replace("How", "Wié").encode("latin-1") * 2, "cannot read"),
        (b"\x00" * 1000, "cannot read"),
        ("", "holds no conversation|cannot read"),
        ('{"messages": null}\n' * 3, "holds no conversation"),
        ('{"messages": [null]}\n', "a turn must be"),
        ('{"messages": "hello"}\n', "a turn must be"),
        ('{"messages": [{"role": null, "content": "x"}]}\n', "a turn must be"),
        ('{"messages": [{"role": "user", "content": ["a", "b"]}]}\n', "a turn must be"),
        ('{"messages": [{"role": "user"}]}\n', "a turn must be"),
        ("messages,role\n1,2\n", "cannot read"),
    ],
    ids=["deep list", "deep object", "latin-1", "zeros", "empty", "null", "null turn", "text", "no role",
         "list content", "no content", "csv"],
)  # fmt: skip
def test_a_hostile_file_is_one_sentence(tmp_path, content, said):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=said) as error:
        load(str(path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_line_of_100_mb_is_a_conversation_like_any_other(talk_file):
    rows = [*TALK[:30], TALK[30] | {"id": "x" * 100_000_000}, *TALK[31:]]
    assert load(talk_file(rows)).facts == load(talk_file()).facts


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
turns = st.fixed_dictionaries({"role": words, "content": st.none() | words})


@given(talks=st.lists(st.lists(turns, max_size=4), min_size=1, max_size=12), cut=st.none() | st.integers(0, 400))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_gives_its_conversations_or_one_sentence(talk_file, talks, cut):
    path = talk_file([{"messages": talk} for talk in talks])
    if cut is not None:
        os.truncate(path, max(0, os.path.getsize(path) - cut))
    try:
        data = load(path, context=2, validation_share=0.5)
    except UsageError as error:
        assert "\n" not in str(error)
        return
    said = sum(any((turn["content"] or "").strip() for turn in talk) for talk in talks)
    found = data.facts["conversations"]
    assert found == said if cut is None else 0 < found <= said
    assert data.facts["train_sequences"] + data.facts["validation_sequences"] == found


def test_a_tokenizer_whose_tokens_do_not_fit_its_vocabulary_is_said(tmp_path, talk_file):
    folder = tmp_path / "tokenizer"
    corpus.builtin_tokenizer().save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] = {word: 70_000 + number for word, number in content["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="beyond its vocabulary of"):
        load(talk_file(), tokenizer=str(folder))


HUB = """
import json, sys
from types import SimpleNamespace
from lib.data import corpus
from lib.errors import UsageError

for dataset, revision, tokenizer in json.loads(sys.argv[1]):
    p = {"dataset": dataset, "dataset_revision": revision, "tokenizer": tokenizer}
    try:
        print(json.dumps(corpus.load(SimpleNamespace(**json.loads(sys.argv[2]) | p)).facts))
    except UsageError as error:
        print(error)
"""


def ask(asked, **environment):
    command = [sys.executable, "-c", HUB, json.dumps(asked), json.dumps(GIVEN)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_hub_s_data_and_tokenizer_come_at_a_commit_and_stay_when_the_hub_is_gone(tmp_path, talk_file):
    (tmp_path / "talk" / "data").mkdir(parents=True)
    shutil.copy(talk_file(suffix=".parquet"), tmp_path / "talk" / "data" / "train-00000-of-00001.parquet")
    corpus.builtin_tokenizer().save_pretrained(tmp_path / "words")
    repositories = {"datasets/org/talk": tmp_path / "talk", "org/words": tmp_path / "words"}
    here = {"HF_HOME": str(tmp_path / "hf"), "ATTENTION_STUDY_CACHE": str(tmp_path / "own"), "HF_HUB_OFFLINE": "0"}
    with hub.serving(
        {**repositories, "datasets/org/gated": tmp_path / "talk"}, gated=("datasets/org/gated",)
    ) as address:
        asked = [
            ("org/talk", "", "org/words"), ("org/talk", hub.COMMIT, "builtin"), ("org/talk", "nope", "builtin"),
            ("org/gated", "", "builtin"), ("org/none", "", "builtin"), ("org/talk", "", "org/none"),
        ]  # fmt: skip
        newest, pinned, no_revision, gated, none, no_words = ask(asked, HF_ENDPOINT=address, **here)
    facts = json.loads(newest)
    assert facts == json.loads(pinned) and facts.pop("dataset_commit") == hub.COMMIT
    assert facts == load(talk_file(suffix=".parquet")).facts
    assert "Revision 'nope' doesn't exist" in no_revision
    assert "gated" in gated and "hf auth login" in gated
    assert "'org/none' doesn't exist on the Hub" in none and "cannot load the tokenizer 'org/none'" in no_words

    gone = [("org/talk", "", "builtin"), ("org/talk", "0" * 40, "builtin"), ("org/none", "", "builtin")]
    cached, other, none = ask(gone, **here | {"HF_HUB_OFFLINE": "1"})
    assert json.loads(cached) == json.loads(pinned)
    assert "cannot be had without the hub" in other and hub.COMMIT[:12] in other
    assert "cannot load 'org/none' from the hub" in none
