"""`python -m lib.record` goes through folders: a line for each file that is wrong, whatever it is, and never more."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make import make_record, write_blocks

from lib import paths, record
from lib.paths import ROOT
from lib.record import folders
from lib.record.__main__ import main


def copied(folder, name="steps.json"):
    return shutil.copy(ROOT / "records" / "steps-gpu" / "steps.json", folder / name)


def changed(path):
    text = copied(path.parent, path.name).read_text()
    path.write_text(text.replace('"heads": 12', '"heads": 6', 1))


def renamed(path):
    record.write(make_record(), path.parent).rename(path)


def unreadable(path, monkeypatch):
    path.write_text("{}")
    opened = os.open

    def refuse(of, *words, **named):
        if os.fspath(of) == os.fspath(path):
            raise PermissionError(13, "Permission denied")
        return opened(of, *words, **named)

    monkeypatch.setattr(paths.os, "open", refuse)


def written(content):
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


ODD = {
    "changed": (changed, "its checksum does not fit; put back the file as it was written"),
    "renamed": (renamed, "it is a copy, or renamed: its name is sdpa-seed0-"),
    "deep": (written("[" * 10**5), "it is nested too deeply; "),
    "deep and whole": (written("[" * 10**5 + "]" * 10**5), "it is nested too deeply; "),
    "huge": (written('{"a": ' + "1" * 6000 + "}"), "a whole number is beyond what is counted; take it out"),
    "big": (written('{"a": 1e300}'), "1e+300 is beyond what is measured; take it out"),
    "nan": (written('{"a": NaN}'), "NaN is no number; take it out"),
    "bytes": (written(b"\xff\xfe{}"), "it is no text in UTF-8; take it out"),
    "empty": (written(""), "it is no whole JSON (Expecting value: line 1 column 1 (char 0)); take it out"),
    "cut": (written('{"kind": "steps", "schema'), "it is no whole JSON"),
    "twice": (written('{"a": 1, "a": 2}'), "it names 'a' twice; take it out"),
    "list": (written("[1]"), "it is JSON of another kind; take it out, if it is no record"),
    "foreign": (written('{"kind": "survey"}'), "its kind is 'survey', this code knows run"),
    "older": (written('{"schema_version": 1}'), "`python scripts/convert_records.py FOLDER` converts older ones"),
    "newer": (written('{"kind": "probe", "schema_version": 9}'), "schema_version: Input should be 1"),
    "escape": (written('{"kind": "\\u001b[2J"}'), "a text is not printable"),
    "fifo": (os.mkfifo, "it is no regular file; take it out"),
    "folder": (os.mkdir, "it is a folder, called like a record; give it another name"),
    "link out": (lambda path: path.symlink_to("/etc/hostname"), "it is a link, out of the folder or to nothing; put"),
    "link to itself": (lambda path: path.symlink_to(path), "it is a link, out of the folder or to nothing; put"),
    "unreadable": (unreadable, "Permission denied; make it readable"),
}


@pytest.mark.parametrize("name", ODD)
def test_each_odd_file_is_one_line_with_the_way_out(name, tmp_path, capsys, monkeypatch):
    make, says = ODD[name]
    copied(tmp_path)
    make(tmp_path / "odd.json", *([monkeypatch] if make is unreadable else []))
    assert main([str(tmp_path)]) == 1
    line, summary = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}/odd.json: ") and says in line
    assert "; " in line or "`python " in line
    assert summary == f"{tmp_path}: 1 record of steps, 1 wrong"


def test_a_folder_that_is_well_is_said_so_with_what_else_lies_there(tmp_path, capsys):
    write_blocks(tmp_path / "runs", blocks=2)
    copied(tmp_path)
    for name in ("notes.txt", ".hidden.json", "b\x1b[2J.csv"):
        (tmp_path / name).write_text("odd")
    (tmp_path / "runs" / "a.json").symlink_to("../steps.json")  # what it leads to is read where it lies
    (tmp_path / "everything").symlink_to("/")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "odd.json").write_text("{")
    assert main([str(tmp_path), str(tmp_path / "runs")]) == 0
    aside = ".hidden.json, .ipynb_checkpoints, b\\x1b[2J.csv, everything (a link), notes.txt"
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}: 1 record of steps, all well; left aside: {aside}",
        f"{tmp_path}/runs: 6 runs, all well; left aside: a.json (a link)",  # once, though it is named too
    ]


def test_the_same_is_had_as_json(tmp_path, capsys):
    copied(tmp_path)
    (tmp_path / "odd.json").write_text("[]")
    assert main([str(tmp_path), "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["folders"]
    assert found["kinds"] == {"steps": 1} and found["left_aside"] == [] and found["folder"] == str(tmp_path)
    assert [line.partition(": ")[0] for line in found["wrong"]] == [f"{tmp_path}/odd.json"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "there is no folder {path}, seen from "),
        (lambda path: path.write_text("{}"), "{path} is no folder; name the folder in which the records lie"),
        (os.mkdir, "no .json file lies in {path} or below; name the folder that your runs wrote to"),
    ],
)
def test_what_is_no_folder_of_records_was_asked_wrongly(make, says, tmp_path, capsys):
    make(tmp_path / "x")
    assert main([str(tmp_path / "x")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says.format(path=tmp_path / "x") in line


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path, capsys, monkeypatch):
    copied(tmp_path)
    (tmp_path / "shut").mkdir()
    listed = os.scandir

    def refuse(path):
        if os.path.basename(path) == "shut":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(folders.os, "scandir", refuse)
    assert main([str(tmp_path)]) == 1
    assert f"{tmp_path}/shut: it cannot be listed (Permission denied); make it readable" in capsys.readouterr().out


def test_an_error_that_nobody_thought_of_is_a_line_too_and_the_others_are_read(tmp_path, capsys, monkeypatch):
    write_blocks(tmp_path)
    copied(tmp_path)

    def broken(path):
        raise KeyError("of\nours")

    monkeypatch.setitem(folders.kinds.LOADERS, "steps", broken)
    assert main([str(tmp_path)]) == 1
    wrong, summary = capsys.readouterr().out.splitlines()
    assert wrong.startswith(f"{tmp_path}/steps.json: it cannot be read (KeyError: 'of\\nours'); take it out")
    assert summary == f"{tmp_path}: 3 runs, 1 wrong"


def test_folders_in_folders_are_followed_deeper_than_python_calls_itself(tmp_path, capsys):
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1010):
            os.mkdir("d")
            os.chdir("d")
        Path("odd.json").write_text("[]")
        assert main([str(tmp_path)]) == 1
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # Python's own calls itself
    wrong, summary = capsys.readouterr().out.splitlines()
    assert wrong.endswith(": it is JSON of another kind; take it out, if it is no record")
    assert summary.endswith(": no record, 1 wrong")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
NAMED = st.dictionaries(st.sampled_from(["kind", "schema_version", "name", "rounds", "content_sha256"]), JSON)


@settings(max_examples=60, deadline=None)
@given(content=JSON | NAMED | st.binary(max_size=60), tag=st.sampled_from(["", *folders.kinds.LOADERS]))
def test_no_file_gets_more_than_a_line(tmp_path_factory, content, tag):
    folder = tmp_path_factory.mktemp("hostile")
    if tag and isinstance(content, dict):
        content |= {"kind": tag}
    (folder / "x.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    (found,) = folders.look([folder])
    assert not found.kinds
    (line,) = map(str, found.wrong)
    assert line.isprintable() and line.startswith(f"{folder}/x.json: ") and len(line) < 1200
