"""Conversations become rows that keep every token, in an order that depends on the seed alone."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import corpus
from lib.errors import UsageError


def turn(role, content):
    return {"role": role, "content": content}


TALK = []
for n in range(60):
    answer = f"It is {n}, as {n} always is." * (1 + n % 3)
    TALK.append(
        {"dataset": "d", "id": str(n), "messages": [turn("user", f"How many is {n}?"), turn("assistant", answer)]}
    )


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
    given = {"tokenizer": "builtin", "context": 32, "packing": False, "validation_share": 0.2} | changes
    return corpus.load(path, **given)


def test_the_builtin_corpus_is_about_4_mb_of_prose_and_the_same_each_time():
    talks = corpus.builtin()
    text = "".join(turn["content"] for talk in talks for turn in talk)
    assert 3.5e6 < len(text) < 5e6
    corpus.builtin.cache_clear()
    assert corpus.builtin() == talks


def test_the_builtin_corpus_is_read_without_importing_its_packages():
    import subprocess
    import sys

    code = (
        "import sys, importlib.util; from lib.corpus import builtin; before = set(sys.modules); builtin();"
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


def test_packing_fills_every_row_and_loses_only_the_last_tokens(talk_file):
    packed, padded = load(talk_file(), packing=True), load(talk_file(), context=10_000)
    assert packed.facts["padding_share"] == 0 and (packed.train.lengths == 32).all()
    assert 0 <= len(padded.train.tokens) - packed.facts["train_tokens"] < 32
    assert np.array_equal(packed.train.tokens, padded.train.tokens)


def test_copies_of_a_conversation_fall_on_the_same_side(talk_file):
    once, twice = load(talk_file()), load(talk_file(TALK + TALK))
    assert twice.facts["validation_rows"] == 2 * once.facts["validation_rows"] > 0


def test_empty_turns_are_dropped_and_counted(talk_file):
    blank = {"messages": [turn("user", "  "), turn("assistant", None)]}
    half = {"messages": [turn("user", "yes?"), turn("assistant", "")]}
    facts = load(talk_file([*({"messages": talk["messages"]} for talk in TALK), blank, half])).facts
    assert (facts["empty_turns"], facts["empty_conversations"], facts["conversations"]) == (3, 1, 61)


def test_the_fingerprint_follows_the_tokens(talk_file):
    changed = json.loads(json.dumps(TALK))
    changed[7]["messages"][0]["content"] = "How much is 7?"
    fingerprints = [load(talk_file(rows)).facts["token_sha256"] for rows in (TALK, TALK, changed)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


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


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "no messages"}], "has the columns text; it needs `messages`"),
        ([{"messages": [{"role": "user", "content": " "}]}], "holds no conversation with a word in it"),
        ([{"messages": [{"who": "user", "text": "hi"}]}], "a turn must be {role, content}"),
        ([{"messages": [{"role": "user", "content": "alone"}]}], "leaves no row of 32 tokens"),
    ],
)
def test_data_that_cannot_be_used_is_said_in_one_sentence(talk_file, rows, said):
    with pytest.raises(UsageError) as error:
        load(talk_file(rows))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("dataset", "said"),
    [("nowhere.parquet", "there is no data file"), ("no-such-user/no-such-data", "cannot load from the hub")],
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
            load(**changes)
        assert str(error.value).startswith("cannot") and "\n" not in str(error.value)


def test_a_tokenizer_saved_to_a_folder_is_the_same_one(tmp_path, talk_file):
    corpus.builtin_tokenizer().save_pretrained(tmp_path / "tokenizer")
    folder = load(talk_file(), tokenizer=str(tmp_path / "tokenizer"))
    assert folder.facts["token_sha256"] == load(talk_file()).facts["token_sha256"]
