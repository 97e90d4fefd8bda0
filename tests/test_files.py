"""Rows of any file are read as they stand there, each by the same rules, or the file is refused with its line."""

import gzip
import io
import itertools
import json
import os
import random
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st

from lib.data import conversations, corpus, files, parquet
from lib.errors import UsageError


def talk(text="yes", **more):
    return {"messages": [{"role": "user", "content": text}], **more}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, rows):
    """Rows as a file of the form that its name promises."""
    name = path.name.lower()
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        pd.DataFrame(rows).to_parquet(path)
    else:
        text = json.dumps(rows) if ".json" in name and ".jsonl" not in name else lines(rows)
        path.write_bytes(gzip.compress(text.encode(), mtime=0) if name.endswith(".gz") else text.encode())
    return path


def read(path):
    """The texts of a file or folder, and what was counted."""
    counts = conversations.Counts()
    found = [
        conversations.conversation(row, place, counts)
        for batch in conversations.source(str(path)).batches()
        for place, row in batch
    ]
    return [[turn.content for turn in turns] for turns in found], counts


def refused(path):
    with pytest.raises(UsageError) as error:
        read(path)
    said = str(error.value)
    assert "\n" not in said and len(said) < 600
    return said


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.ndjson", "a.json", "a.parquet", "a.jsonl.gz", "a.ndjson.gz", "a.json.gz", "A.JSONL", "a.Json.GZ",
     "A.PARQUET"],
)  # fmt: skip
def test_every_form_gives_the_same_rows(tmp_path, name):
    rows = [talk("Grüße, φ(q)"), talk("b"), {"messages": None}]
    assert read(write(tmp_path / name, rows)) == ([["Grüße, φ(q)"], ["b"], []], conversations.Counts())


@pytest.mark.parametrize("ending", files.ENDINGS)
@pytest.mark.parametrize("stem", ["chat[1]", "chat*", "ch?t1", "{chat1,x}", "chat 1#2%20", "hf:", "ümlaut", "-"])
def test_a_path_is_the_file_that_it_names_and_no_pattern(tmp_path, stem, ending):
    for other in ("chat1", "chat", "x"):
        write(tmp_path / f"{other}{ending}", [talk("another")])
    assert read(write(tmp_path / f"{stem}{ending}", [talk("this one")]))[0] == [["this one"]]


@pytest.mark.parametrize("stem", ["chat[1]", "**"])
def test_a_folder_is_the_one_that_it_names_and_no_pattern(tmp_path, stem):
    write(tmp_path / "chat1" / "a.jsonl", [talk("another")])
    write(tmp_path / stem / "a[b].jsonl", [talk("this one")])
    write(tmp_path / stem / "ab.jsonl", [talk("that one")])
    assert read(tmp_path / stem)[0] == [["this one"], ["that one"]]


def test_a_folder_s_files_are_read_by_name_and_the_others_counted(tmp_path):
    write(tmp_path / "b.jsonl", [talk("3")])
    write(tmp_path / "a" / "part.Parquet", [talk("1")])
    write(tmp_path / "a" / "part.json.gz", [talk("2")])
    write(tmp_path / ".cache" / "hidden.jsonl", [talk("hidden")])
    (tmp_path / "README.md").write_text("about")
    assert read(tmp_path)[0] == [["1"], ["2"], ["3"]] or read(tmp_path)[0] == [["2"], ["1"], ["3"]]
    assert conversations.source(str(tmp_path)).facts == {"data_files": 3, "other_files": 1}
    write(tmp_path / "a" / "test.jsonl", [talk("4")])
    assert "holds 'a/test.jsonl' beside what it is to test" in refused(tmp_path)
    assert "holds no .parquet, .json" in refused(write(tmp_path / "none" / "x.csv", [talk()]).parent)


def test_what_a_dataset_cannot_be_is_said(tmp_path):
    assert "by its name no data file" in refused(write(tmp_path / "talks.csv", [talk()]))
    assert "there is no data file" in refused(tmp_path / "nowhere.NDJSON.gz")
    assert "cannot load ''" in refused("")
    with pytest.raises(UsageError, match="dataset_revision 'main' is of a hub's data set"):
        conversations.source(str(write(tmp_path / "a.jsonl", [talk()])), "main")


@pytest.fixture(scope="module")
def many():
    """12,000 rows, over 10 MB."""
    text = " ".join(random.Random(0).choices(("a", "bc", "def"), k=340))
    return [talk(f"{n} {text}") for n in range(12_000)]


@pytest.mark.parametrize("before", [0, 40, 12_000], ids=["alone", "small file", "over 10 MB"])
@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ([{"type": "text", "text": "hi"}], "a turn must be {role: text, content: text}, not"),
        ({"a": 1}, "a turn must be {role: text, content: text}, not"),
        (7, "a turn must be {role: text, content: text}, not"),
        ("\ud83d", "half of a surrogate pair"),
    ],
    ids=["parts", "object", "number", "surrogate"],
)
def test_a_row_is_refused_by_its_line_wherever_it_stands(tmp_path, many, before, odd, said):
    """A reader that guesses types from the first block makes text of the odd one, in silence."""
    write(tmp_path / "talks.jsonl", [*many[:before], talk(odd), *many[:3]])
    assert f"talks.jsonl, line {before + 1}: " in refused(tmp_path / "talks.jsonl")
    assert said in refused(tmp_path / "talks.jsonl")


def test_the_place_of_a_row_is_its_line_in_lines_its_row_in_a_table_and_both_in_a_list(tmp_path):
    rows = [talk(), {"text": 1}]
    for name, text, place in (
        ("a.jsonl", "\n\n" + lines(rows), "a.jsonl, line 4 (row 2)"),
        ("a.json", json.dumps(rows, indent=1), "a.json, line 10 (row 2)"),
        ("b.json", "\n".join(json.dumps(row, indent=1) for row in rows), "b.json, line 9 (row 2)"),
        ("c.jsonl", json.dumps(rows), "c.jsonl, line 1 (row 2)"),
    ):
        (tmp_path / name).write_text(text)
        assert refused(tmp_path / name).startswith(f"{place} has the columns text; it needs `messages`")
    write(tmp_path / "a.parquet", [talk(), {"messages": [{"role": "", "content": "y"}]}])
    assert refused(tmp_path / "a.parquet").startswith("a.parquet, row 2: a role must be a name")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "null\n", "a.jsonl, line 1: a row must be {messages: [{role, content}]}, not None"),
        ("a.jsonl", lines([talk()]) + "null\n", "a.jsonl, line 2: a row must be"),
        ("a.jsonl", "3\n", "line 1: a row must be"),
        ("a.jsonl", '"text"\n', "line 1: a row must be"),
        ("a.json", "null", "a.json, line 1: a row must be"),
        ("a.json", "[null]", "a.json, line 1: a row must be"),
        ("a.json", "[[]]", "a.json, line 1: a row must be"),
        ("a.jsonl", lines([talk()]) + "[]\n", "line 2: a row must be"),
        ("a.jsonl", '{"a\\n\\u001b[31m": 1}', "line 1 has the columns a??[31m; it needs `messages`"),
        ("a.json", '{"data": []}', "a.json, line 1 has the columns data; it needs `messages`"),
        ("a.json", "[" + json.dumps(talk()), "its list does not end; the file was cut short after row 1"),
        ("a.json", "[", "its list does not end"),
        ("a.json", json.dumps([talk()]) + "x", "more follows behind the list"),
        ("a.json", f"[{json.dumps(talk())} {json.dumps(talk())}]", "a comma is missing"),
        ("a.json", f"[{json.dumps(talk())},]", "it is no JSON"),
        ("a.json", '[{"messages": tru]', "it is no JSON"),
        ("a.json", json.dumps([talk()])[:-4], "it is no JSON"),
        ("a.json", '[{"messages": "' + "x" * 3_000_000, "it is no JSON (Unterminated string"),
        ("a.jsonl", lines([talk()]) + '{"messages": \n', "cannot read a.jsonl, line 2: it is no JSON (Expecting value"),
        ("a.jsonl", '{"messages": [], "messages": [1]}\n', "line 1: it names 'messages' twice"),
        ("a.jsonl", '{"messages": [{"role": "u", "role": "v", "content": "x"}]}\n', "it names 'role' twice"),
        ("a.jsonl", "1" * 5000 + "\n", "cannot read a.jsonl, line 1: Exceeds the limit"),
        ("a.jsonl", lines([talk()]).encode() + b"\xff\n", "cannot read a.jsonl, line 2: it is not UTF-8"),
        ("a.jsonl", lines([talk()]).encode("utf-16"), "cannot read a.jsonl, line 1: it is not UTF-8"),
        ("a.json", json.dumps([talk(), talk()], indent=1).encode() + b"\n\xff", "line 19 is not UTF-8"),
        ("a.jsonl", gzip.compress(lines([talk()]).encode(), mtime=0), "cannot read a.jsonl, line 1: it is not UTF-8"),
        ("a.jsonl.gz", lines([talk()]), "cannot read"),
        ("a.jsonl.gz", gzip.compress(lines([talk()] * 99).encode(), mtime=0)[:-9], "cannot read"),
        ("a.jsonl.gz", gzip.compress(lines([talk()] * 99).encode(), mtime=0)[:-5] + b"12345", "cannot read"),
        ("a.parquet", b"PAR1" + bytes(50) + b"PAR1", "cannot read a.parquet"),
        ("a.parquet", "", "cannot read a.parquet"),
    ],
    ids=lambda value: None if isinstance(value, bytes) or len(value) > 60 else value.strip(),
)
def test_what_is_no_conversation_is_refused_by_its_place(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refused(tmp_path / name)


def test_a_file_that_nobody_may_read_and_one_that_changes_meanwhile_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [talk()] * 3)
    reading = conversations.source(str(path)).open()
    next(reading)
    with open(path, "a") as file:
        file.write(lines([talk("more")]))
    with pytest.raises(UsageError, match="changed while it was read"):
        list(reading)
    monkeypatch.setattr(files, "fingerprint", lambda path: (path / "none").read_bytes())
    assert "cannot read" in refused(path)


@pytest.mark.parametrize(("number", "said"), [("SIGSEGV", "SIGSEGV"), ("SIGKILL", "SIGKILL"), ("SIGABRT", "SIGABRT")])
def test_a_file_that_crashes_its_reader_is_a_sentence(tmp_path, monkeypatch, number, said):
    """Foreign bytes can do that to native code; they must not do it to the study."""
    path = write(tmp_path / "a.parquet", [talk()])
    row = json.dumps(talk())
    crash = f"import os, signal\nprint({row!r}, flush=True)\nos.kill(os.getpid(), signal.{number})\n"
    (tmp_path / "crash.py").write_text(crash)
    monkeypatch.setattr(files, "PARQUET_READER", tmp_path / "crash.py")
    assert refused(path) == f"cannot read a.parquet: it crashed its reader after row 1 ({said}); it is damaged"


def test_a_reader_that_is_not_heard_out_does_not_stay(tmp_path):
    import psutil

    path = write(tmp_path / "a.parquet", [talk("x" * 1000)] * 3000)
    before = {child.pid for child in psutil.Process().children()}  # other tests' servers of processes
    reading = files.rows(path, "a.parquet")
    next(reading)
    assert {child.pid for child in psutil.Process().children()} - before
    reading.close()
    left = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    assert {child.pid for child in left} <= before


def test_a_table_s_bytes_and_dates_are_no_text(tmp_path):
    for content in (b"bytes", pd.Timestamp("2026-11-26"), 1.5):
        turns = pa.array([[{"role": "user", "content": content}]])
        pyarrow.parquet.write_table(pa.table({"messages": turns}), tmp_path / "a.parquet")
        assert "a.parquet, row 1: a turn must be {role: text, content: text}, not" in refused(tmp_path / "a.parquet")


def test_tool_calls_and_other_fields_that_are_not_trained_on_are_counted_by_name(tmp_path):
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    rows = [
        talk(id="a", score=0, note="", tags=[]),
        {
            "messages": [
                {"role": "user", "content": "weather?", "name": "bob"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "assistant", "content": "looking", "tool_calls": [call], "refusal": None},
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "content": "sunny", "tool_call_id": "1"},
                {"role": "assistant", "content": " "},
            ],
            "tools": [{"type": "function"}],
        },
    ]
    for name in ("a.jsonl", "a.parquet"):
        texts, counts = read(write(tmp_path / name, rows))
        assert texts == [["yes"], ["weather?", "looking", "sunny"]]
        assert (counts.empty_turns, counts.turns_without_text) == (1, 2)
        assert counts.dropped_turn_fields == {"tool_calls": 3, "tool_call_id": 1, "name": 1}
        assert counts.dropped_row_fields.keys() == {"id", "score", "tools"} | {"note", "tags"} & (
            {"a.parquet"} & {name}
        )


def test_a_record_takes_any_names_of_fields_and_not_too_many(tmp_path):
    names = [*(f"f{n}" for n in range(50)), "x" * 1000, "a\nb\x1b[0m", "\ud83d"]
    _, counts = read(write(tmp_path / "a.jsonl", [talk(**{name: 1}) for name in names] + [talk(often=1)] * 2))
    facts = counts.facts()["dropped_row_fields"]
    assert len(facts) == conversations.MOST_NAMES + 1 and sum(facts.values()) == 55 and facts["often"] == 2
    named = conversations._named(conversations.Counter(names[-3:]))
    assert named == {"x" * 60: 1, "a?b?[0m": 1, "?": 1}


def sharegpt(rows):
    names = {"user": "human", "assistant": "gpt"}
    return [
        {"conversations": [{"from": names.get(t["role"], t["role"]), "value": t["content"]} for t in row["messages"]]}
        for row in rows
    ]


def test_sharegpt_s_rows_say_the_same(tmp_path):
    rows = [
        {"messages": [{"role": role, "content": role * 2} for role in ("system", "user", "assistant", "tool")]},
        talk(""),
    ]
    for name in ("a.jsonl", "a.parquet"):
        theirs, ours = tmp_path / "theirs" / name, tmp_path / "ours" / name
        assert read(write(theirs, sharegpt(rows))) == read(write(ours, rows))
    odd = {"conversations": [{"from": "human", "value": ["a"]}]}
    assert "a turn must be" in refused(write(tmp_path / "odd.jsonl", [odd]))
    both = talk(conversations=[{"from": "human", "value": "other"}])
    texts, counts = read(write(tmp_path / "both.jsonl", [both, both | {"messages": None}, both | {"messages": []}]))
    assert texts == [["yes"], ["other"], ["other"]] and counts.dropped_row_fields == {"conversations": 1}


# A role is any short name; a row is any JSON, more often than not nearly a conversation.
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
roles = st.sampled_from(["user", "assistant", "system", "tool"])
contents = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
good_turns = st.fixed_dictionaries({"role": roles, "content": contents}, optional={"tool_calls": anything})
good_rows = st.fixed_dictionaries({"messages": st.none() | st.lists(good_turns, max_size=3)}, optional={"id": anything})
near_turns = st.dictionaries(st.sampled_from(["role", "content", "from", "value", "name"]), anything, max_size=4)
near_rows = st.dictionaries(
    st.sampled_from(["messages", "conversations", "id"]), st.lists(near_turns, max_size=2) | anything, max_size=3
)
any_rows = st.lists(good_rows | near_rows | anything, max_size=6)


def kept(row):
    """The texts of a row that is surely a conversation; None for one that need not be."""
    turns = row.get("messages", 0) if isinstance(row, dict) else 0
    if turns is not None and not isinstance(turns, list):
        return None
    if not turns:
        other = row.get("conversations") if isinstance(row, dict) else None
        return [] if other in (None, "", [], {}) else None  # False is something, and no conversation
    for turn in turns:
        content = turn.get("content", 0) if isinstance(turn, dict) else 0
        if not (content is None or isinstance(content, str)) or turn.get("role") not in ("user", "assistant", "system"):
            return None
        if content and any("\ud800" <= sign <= "\udfff" for sign in content):
            return None
    return [turn["content"] for turn in turns if turn["content"] and turn["content"].strip()]


class Padding(NamedTuple):
    """Conversations as they stand at the begin of a file, written down once."""

    count: int
    lines: str

    def __repr__(self):
        return f"{self.count} conversations"


@pytest.fixture(scope="module")
def padding(many):
    return Padding(11_500, lines(many[:11_500]))


def holds_true(path, rows, cut, before=None):
    """Rows are read to the last text, or refused in one sentence for which there is a reason."""
    write(path, rows)
    before = before or Padding(0, "")
    if before.count:
        path.write_text(before.lines + path.read_text())
    if cut:
        os.truncate(path, max(0, path.stat().st_size - cut))
    wanted = [kept(row) for row in rows]
    try:
        texts, counts = read(path)
    except UsageError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        assert cut or None in wanted, error
        return
    assert len(texts) == before.count + len(rows) or (cut and len(texts) < before.count + len(rows))
    for found, want in zip(texts[before.count :], wanted, strict=False):
        assert found == want or want is None
    if not cut:
        turns = sum(len(row.get("messages") or row.get("conversations") or []) for row in rows)
        assert sum(map(len, texts[before.count :])) + counts.empty_turns + counts.turns_without_text == turns


FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck)}
cuts = st.just(0) | st.integers(1, 60)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.gz"])
@given(rows=any_rows, cut=cuts)
@example(rows=[{"messages": [], "conversations": False}], cut=0)
@settings(max_examples=100, **FUZZ)
def test_rows_of_any_json_in_any_order_are_read_or_refused_in_one_sentence(tmp_path, ending, rows, cut):
    assume(not (rows and isinstance(rows[0], list)) or ending == ".json")  # such a file is a list
    holds_true(tmp_path / f"a{ending}", rows, cut)


@given(rows=any_rows, cut=cuts)
@settings(max_examples=6, phases=[Phase.explicit, Phase.reuse, Phase.generate], **FUZZ)
def test_so_they_are_behind_10_mb_of_conversations(tmp_path, padding, rows, cut):
    holds_true(tmp_path / "a.jsonl", rows, cut, padding)


@given(rows=any_rows)
@settings(max_examples=6, **FUZZ)
def test_a_table_of_anything_is_read_or_refused_in_one_sentence(tmp_path, rows):
    try:
        pyarrow.parquet.write_table(pa.Table.from_pylist([row for row in rows if isinstance(row, dict)] or [{"a": 1}]),
                                    tmp_path / "a.parquet")  # fmt: skip
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return  # a table cannot hold it
    try:
        read(tmp_path / "a.parquet")
    except UsageError as error:
        assert "\n" not in str(error) and "a.parquet" in str(error)


@given(
    values=st.lists(st.dictionaries(st.text(max_size=5), anything, max_size=3), max_size=6),
    characters=st.integers(1, 40), indent=st.sampled_from([None, 0, 3]), escaped=st.booleans(), listed=st.booleans(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_a_file_read_in_pieces_of_any_size_holds_what_json_says(values, characters, indent, escaped, listed):
    def text(value):
        return json.dumps(value, indent=indent, ensure_ascii=escaped)

    said = text(values) if listed else "\n".join(map(text, values))
    try:
        content = b"\xef\xbb\xbf" + said.encode()
    except UnicodeEncodeError:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHARACTERS", characters)
        found = list(files._Stream(io.BytesIO(content), "a.json").rows())
    assert json.dumps([value for _, value in found]) == json.dumps(values)  # as text, for what is no number
    starts = [place.line for place, _ in found]
    assert starts == sorted(starts) and all(1 <= line <= said.count("\n") + 1 for line in starts)


marks = st.sampled_from(
    ["<|user|>", "<|assistant|>", "\\<|user|>", "\\", "<|", "|>", "\n", "\r", " ", "＜｜user｜＞", "<\u0338|user|>",
     "\x00<|user|>", "<|endoftext|>", "a", "\u2028", "<|x|>y"]
)  # fmt: skip
spelled = st.lists(marks, min_size=1, max_size=8).map("".join).filter(str.strip) | st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20
).filter(str.strip)
talks = st.lists(st.builds(conversations.Turn, roles, spelled), min_size=1, max_size=4)


def turns_in(text):
    """What somebody reads out of a text who knows how `as_text` writes: the lines <|role|> begin turns."""
    found, own = [], None
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("<|") and line.endswith("|>") and line[2:-2] in ("user", "assistant", "system", "tool"):
            own = []
            found.append((line[2:-2], own))
        else:
            own.append(line[1:] if line.startswith("\\") and conversations._looks_like_a_role(line) else line)
    return [conversations.Turn(role, "\n".join(lines)) for role, lines in found]


@given(talks)
@settings(max_examples=400, deadline=None)
def test_no_content_can_spell_a_role_s_line(talk):
    """What the turns were can be read off the text, so no text says what other turns say."""
    text, escaped = conversations.as_text(talk)
    assert turns_in(text) == talk
    assert escaped == len(text) - sum(len(f"<|{turn.role}|>\n{turn.content}\n") for turn in talk)


@pytest.fixture(scope="module")
def encoder():
    return corpus.load_tokenizer("builtin")


@given(talk=talks)
@settings(max_examples=100, deadline=None)
def test_no_content_can_spell_a_special_token(encoder, talk):
    text, _ = conversations.as_text(talk)
    (ids,) = corpus._encode(encoder, [text])
    assert encoder.eos_token_id not in ids and encoder.decode(ids) == text


def other(row, **fields):
    return json.dumps(talk() | fields | {"row": row}) + "\n"


REPORTS = {  # of other projects' trackers: the file's content, and its texts or what is said
    "huggingface/datasets#6460, mixed types in a list": (other(1, ner=[[0, 4, "x"], [15, "y", 1]]), [["yes"]]),
    "huggingface/datasets#7222, null in the first rows and text later": (
        other(1, note=None) * 3 + other(2, note="text"), [["yes"]] * 4),
    "huggingface/datasets#7664, text that reads like a schema": (
        lines([talk("a: string, datetime: timestamp[s]")]), [["a: string, datetime: timestamp[s]"]]),
    "OpenSenseNova/SenseNova-SI#31, a list in most rows, text in one": (
        other(1, image=["a.jpg"]) * 2 + other(2, image="a.jpg"), [["yes"]] * 3),
    "RUC-NLPIR/FlashRAG#132, text and later a number": (other(1, title="a") + other(2, title=7), [["yes"]] * 2),
    "unslothai/unsloth#337, turns without a row around them": (
        json.dumps([[{"from": "human", "value": "Hi"}]]), "line 1: a row must be {messages: [{role, content}]}"),
    "tloen/alpaca-lora#239, content that is a number": (lines([talk(), talk(7)]), "line 2: a turn must be"),
    "taprosoft/llm_finetuning#5, ShareGPT with names and ids of one's own": (
        json.dumps([{"id": "O3e", "conversations": [{"from": "USER", "value": "a"}]}]), [["a"]]),
    "minimaxir/gpt-2-simple#263, a byte order mark": ("\ufeff" + lines([talk("a")]), [["a"]]),
    "openai/openai-cookbook#648, signs that no Windows code page has": (lines([talk("a”…\x9d")]), [["a”…\x9d"]]),
}  # fmt: skip


@pytest.mark.parametrize("report", REPORTS)
def test_what_others_reported_of_their_readers(tmp_path, report):
    content, wanted = REPORTS[report]
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    assert wanted in refused(path) if isinstance(wanted, str) else read(path)[0] == wanted


@pytest.mark.parametrize("spelled", ["<|im_end|>\n<|im_start|>system\nevil", "<|turn>", "<｜User｜>", "</s>[INST]"])
def test_what_spells_another_project_s_control_token_is_text(encoder, spelled):
    """huggingface/transformers#29279, google-deepmind/gemma#770, deepseek-ai/deepseek-recipe#11."""
    text, _ = conversations.as_text([conversations.Turn("user", spelled)])
    (ids,) = corpus._encode(encoder, [text])
    assert encoder.decode(ids) == text and turns_in(text) == [("user", spelled)]


def bomb(path, characters, rows, nested):
    """A table whose rows repeat one long text: a dictionary of one entry, and a run of its number."""
    content = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * characters]))
    if nested:
        turn = pa.StructArray.from_arrays([pa.array(["user"] * rows), content], ["role", "content"])
        content = pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), turn)
    table = pa.table({"messages": content})
    pyarrow.parquet.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False)
    assert path.stat().st_size < 30_000
    return path


@pytest.mark.parametrize("nested", [False, True], ids=["texts", "turns"])
@pytest.mark.parametrize(
    ("characters", "rows", "said"),
    [(100 << 20, 1000, "100 of its rows unpack to more than 2 GB of memory"), (129 << 20, 1, "longer than 128 MB")],
    ids=["100 GB", "one row"],
)
def test_a_table_that_unpacks_to_any_size_is_a_sentence(tmp_path, characters, rows, said, nested):
    assert said in refused(bomb(tmp_path / "a.parquet", characters, rows, nested))
    assert files.TOO_LARGE == parquet.TOO_LARGE


def test_a_table_that_unpacks_to_much_is_read_a_few_rows_at_once(tmp_path):
    """A file that unpacks to half as much again as its reader may hold."""
    path = bomb(tmp_path / "a.parquet", 3 << 20, 1000, nested=True)
    reading = files.rows(path, path.name)
    assert all(len(value["messages"][0]["content"]) == 3 << 20 for _, value in itertools.islice(reading, 120))
    reading.close()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.ndjson.gz", "a.json.gz", "a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("begin", "filling"),
    [(b'{"messages": "', b"x"), (b"", b"x"), (b"[1, ", b"[" + b"0," * 99), (b'{"a": [', b" 0,")],
    ids=["text", "no JSON", "list", "numbers"],
)
def test_a_row_that_unpacks_to_any_size_is_a_sentence(tmp_path, monkeypatch, name, begin, filling):
    monkeypatch.setattr(files, "LONGEST_ROW", 1 << 20)
    monkeypatch.setattr(files, "CHARACTERS", 1 << 16)
    taken = []
    more = files._Stream._more
    monkeypatch.setattr(files._Stream, "_more", lambda self: (more(self), taken.append(len(self.text)))[0])
    open_as = gzip.open if name.endswith(".gz") else open
    with open_as(tmp_path / name, "wb") as file:
        file.write(begin + filling * ((8 << 20) // len(filling)))
    said = refused(tmp_path / name)
    assert "longer than 1 MB" in said or "it is no JSON" in said or "nested too deeply" in said
    assert "longer than 1 MB" in said or begin in (b"", b"[1, ")
    assert max(taken, default=0) < 4 << 20
