"""Nothing is taken from the surroundings: no other repository's commit, no locale's encoding, no folder's name."""

import ast
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from make import TINY, record_of

from lib import attention, paths, record
from lib.data import corpus
from lib.measure import environment
from lib.study import plan, runner

C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.OUT_VARIABLE, str(tmp_path / "out"))
    return tmp_path / "out"


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(["git", *who, *words], cwd=folder, env=own, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit, and a folder in it that is none."""
    folder = tmp_path / "repository ümlaut"
    (folder / "project").mkdir(parents=True)
    (folder / "project" / "file").write_text("1")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def test_a_commit_is_the_project_s_own_or_null_with_its_reason(repository, tmp_path, monkeypatch):
    commit = git(repository, "rev-parse", "HEAD")
    assert environment.git_state(repository) == (commit, False, None)
    assert environment.git_state(repository / "project") == (None, None, "no_repository")
    (tmp_path / "none").mkdir()
    assert environment.git_state(tmp_path / "none") == (None, None, "no_repository")
    git(repository, "worktree", "add", "-q", str(tmp_path / "tree"))
    (tmp_path / "link").symlink_to(repository)
    assert environment.git_state(tmp_path / "tree") == environment.git_state(tmp_path / "link") == (commit, False, None)
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init", "-q")
    assert environment.git_state(tmp_path / "empty") == (None, None, "git_refuses")
    (repository / "project" / "file").write_text("2")
    assert environment.git_state(repository) == (commit, True, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.git_state(repository) == (None, None, "git_unavailable")


@pytest.mark.parametrize(
    "name", ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_CEILING_DIRECTORIES", "GIT_CONFIG"]
)
def test_what_git_is_told_for_another_purpose_does_not_count(repository, tmp_path, monkeypatch, name):
    """As within a hook, where these variables name the repository of the hook."""
    was = environment.git_state(repository)
    (tmp_path / "other").mkdir()
    monkeypatch.setenv(name, str(tmp_path / "other"))
    assert environment.git_state(repository) == was and was[0]
    assert environment.git_state(tmp_path / "other") == (None, None, "no_repository")


def test_a_record_without_a_commit_says_why(monkeypatch):
    import torch

    for state in ((None, None, "no_repository"), ("a" * 40, False, None)):
        monkeypatch.setattr(environment, "git_state", lambda state=state: state)
        facts = environment.describe(torch.device("cpu"))
        assert (facts["commit"], facts["commit_modified"], facts["commit_null_reason"]) == state
        assert state[2] is None or state[2] in record.REASONS


OPENS = {"open": 1, "read_text": 0, "write_text": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0, "fdopen": 1}


def in_the_locale_s_encoding(source):
    """The lines of a source that open a file as text and do not say in which encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        whose = getattr(getattr(node.func, "value", None), "id", "")
        if name in OPENS and "encoding" not in given and whose not in ("os", "tarfile", "zipfile", "self"):
            modes = [arg.value for arg in [*node.args, *given.values()] if isinstance(arg, ast.Constant)]
            binary = any(isinstance(mode, str) and "b" in mode and len(mode) <= 3 for mode in modes)
            if not binary and name not in ("TemporaryFile",) and not (name == "NamedTemporaryFile" and not modes):
                yield node.lineno
        if name in ("run", "Popen", "check_output") and ("text" in given or "universal_newlines" in given):
            yield from [] if "encoding" in given else [node.lineno]


def test_every_text_file_is_utf_8_wherever_it_is_read_or_written():
    assert list(in_the_locale_s_encoding("open(a)\nopen(a, 'w')\np.read_text()\nrun(b, text=True)")) == [1, 2, 3, 4]
    assert not list(in_the_locale_s_encoding("open(a, 'rb')\np.read_text(encoding='utf-8')\nread(a)"))
    paths_read = [path for room in ("lib", "scripts") for path in sorted((paths.ROOT / room).rglob("*.py"))]
    found = {
        f"{path.relative_to(paths.ROOT)}:{line}"
        for path in paths_read
        for line in in_the_locale_s_encoding(path.read_text(encoding="utf-8"))
    }
    assert not found


def under_c(code, *words, **environment_):
    """A Python of its own where no letter but ASCII can be written to a terminal."""
    done = subprocess.run(
        [sys.executable, "-c", f"exec({code!a})", *words], env=os.environ | C_LOCALE | environment_, cwd=paths.ROOT,
        capture_output=True,
    )  # fmt: skip
    return done.returncode, done.stdout.decode("ascii"), done.stderr.decode("ascii")


RUNS = """
import json, sys
from lib.study import plan, runner

overrides = json.loads(sys.argv[1])
runner.execute = lambda notebook, output, given, context: (
    ("error", "RuntimeError: Größe 3 ≠ 4 in φ(q) \\ud83d") if given["attention"] == "sdpa" else ("error", "second")
)
failed = runner.run_all(plan.runs_of(overrides, ["sdpa", "gqa"], 1), "tiny")
print(sorted(failed.values()))
"""


def test_what_a_terminal_cannot_show_ends_no_study(out):
    status, said, errors = under_c(RUNS, json.dumps(TINY))
    assert status == 0 and not errors
    assert "[2/2] gqa-seed0" in said and "\\u03c6(q)" in said
    noted = record.failures(out).set_index("variant")
    assert noted.loc["sdpa", "it said"] == "RuntimeError: Größe 3 ≠ 4 in φ(q) \\ud83d"
    assert noted.loc["gqa", "it said"] == "second"


def test_files_are_utf_8_where_the_locale_is_c(tmp_path):
    path = tmp_path / "a.json"
    code = f"from pathlib import Path; from lib import paths; paths.write_whole(Path({str(path)!r}), 'Größe φ')"
    assert under_c(code) == (0, "", "")
    assert path.read_text(encoding="utf-8") == "Größe φ"


def talks(count):
    rows = ({"messages": [{"role": "user", "content": f"What is {n} and {n}? It is {2 * n}."}]} for n in range(count))
    return "".join(json.dumps(row) + "\n" for row in rows)


def written_by(values):
    """The record that a run with these values would leave now, in the place of an executed notebook."""
    tokens = corpus.load(SimpleNamespace(**values)).facts["token_sha256"]
    kind = attention.source_sha256(values["attention"])
    return record_of({"values": values, "block": 0}, attention_sha256=kind, data={"token_sha256": tokens})


def parameters_name(values):
    from lib import parameters

    return parameters.run_name(values)


@pytest.fixture
def runs(tmp_path, out, monkeypatch):
    """The plan of two variants on a file of somebody's own, and an `execute` that leaves records without training."""
    mine, made = tmp_path / "mine.jsonl", []
    mine.write_text(talks(60))
    overrides = TINY | {"dataset": str(mine), "tokenizer": "builtin", "validation_share": 0.2}
    planned = {names: plan.runs_of(overrides, list(names), 1) for names in (("sdpa", "gqa"), ("sdpa", "gqa", "linear"))}
    by_notebook = {f"{parameters_name(run['values'])}.ipynb": run["values"] for run in planned["sdpa", "gqa", "linear"]}

    def execute(notebook, output, given, context):
        made.append(given["attention"])
        out.mkdir(exist_ok=True)
        output.write_text("{}")
        record.write(written_by(by_notebook[output.name]), out)

    monkeypatch.setattr(runner, "execute", execute)
    return SimpleNamespace(mine=mine, planned=planned, made=made)


def test_runs_on_a_file_that_changed_since_are_made_anew_and_the_old_ones_are_kept(runs, out, capsys):
    two, three = runs.planned.values()
    assert not runner.run_all(two, "tiny") and len(runs.made) == 2
    assert not runner.run_all(two, "tiny") and len(runs.made) == 2
    assert "2 of 2 runs are finished already" in capsys.readouterr().out
    old = {path.name: path.read_bytes() for path in out.glob("*.json")}

    runs.mine.write_text(talks(70))
    assert not runner.run_all(three, "tiny")
    said = capsys.readouterr().out
    assert "finished already" not in said and "mine.jsonl has changed since" in said
    assert sorted(runs.made[2:]) == ["gqa", "linear", "sdpa"]
    assert {one.data["token_sha256"] for one in record.load_all(out)} == {
        corpus.load(SimpleNamespace(**three[0]["values"])).facts["token_sha256"]
    }
    (aside,) = (out / record.INCOMPLETE).iterdir()
    assert {path.name: path.read_bytes() for path in aside.glob("*.json")} == old
    assert len(list(aside.glob("*.ipynb"))) == 2

    runs.mine.write_text(talks(70))  # the same content at another time is the same data
    os.utime(runs.mine, (0, 0))
    assert not runner.run_all(three, "tiny") and len(runs.made) == 5


def test_a_run_that_saw_other_data_than_the_study_has_failed(runs, out, capsys):
    (one, other) = runs.planned["sdpa", "gqa"]
    data = runner.load_data([one, other])
    runs.mine.write_text(talks(80))
    assert "the data changed while the study ran" in runner.run_one(one, "tiny", "s1", out, data)
    assert record.failures(out)["why"].tolist() == [record.FAILURES["wrong_input"]]


@pytest.mark.parametrize("name", ["{ut}", "out{", "a b", "ümlaut", "[x]", "%d", "{{}}", "out*"])
def test_an_output_folder_may_have_any_name(tmp_path, name, monkeypatch):
    """Papermill and Snakemake fill in what stands in braces; the latter is refused in a sentence (test_cluster.py)."""
    notebook = {"cells": [], "metadata": {"kernelspec": {"name": "python3", "display_name": "a", "language": "python"}},
                "nbformat": 4, "nbformat_minor": 5}  # fmt: skip
    (tmp_path / name).mkdir()
    (tmp_path / name / "in.ipynb").write_text(json.dumps(notebook))
    monkeypatch.setattr(
        "papermill.execute.papermill_engines.execute_notebook_with_engine", lambda *given, **_: given[1]
    )
    problem = runner.execute(tmp_path / name / "in.ipynb", tmp_path / name / "out.ipynb", {}, {})
    assert problem is None
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name / "out.ipynb").exists()
