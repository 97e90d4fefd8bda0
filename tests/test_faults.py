"""Whatever happens to a study, nothing is lost, nothing doubled, nothing invented, and the same command finishes it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from make import STALLING, TINY, kernels, timeless, tiny_profile, wait_for, when_it_stalls

from lib import paths, record
from lib.data import cache, corpus
from lib.errors import UsageError
from lib.study import plan, runner
from lib.study.__main__ import main


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.OUT_VARIABLE, str(tmp_path / "out"))
    return tmp_path / "out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A profile with data and a tokenizer of its own, and a variant that stalls."""
    folder = tmp_path_factory.mktemp("faults")
    tiny_profile(folder)
    (folder / "stalling.py").write_text(STALLING)
    return folder


def words(folder, *variants):
    return [str(folder / "tiny.yaml"), "--variants", *variants]


def gone(processes, within_s=30):
    return not psutil.wait_procs(processes, timeout=within_s)[1]


def test_a_study_that_is_killed_is_resumed_to_the_records_of_an_undisturbed_one(
    folder, out, tmp_path, monkeypatch, capsys
):
    stalling = str(folder / "stalling.py")
    command = [sys.executable, "-m", "lib.study", *words(folder, "sdpa", stalling)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    killed = subprocess.Popen(command, cwd=paths.ROOT, env=os.environ | {"STALL": str(tmp_path / "reached")}, **pipes)
    wait_for((tmp_path / "reached").exists, killed)
    left_behind = psutil.Process(killed.pid).children(recursive=True)
    assert left_behind
    assert main(words(folder, "sdpa")) == 2  # two studies at once in one folder
    assert "another study runs in out/" in capsys.readouterr().err
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert gone(left_behind)  # a kernel notices that nobody is left to work for
    (before,) = record.load_all(out)
    assert before.label == "sdpa"
    sdpa_as_it_was = (out / f"{before.name}.json").read_bytes()
    monkeypatch.setattr(runner, "summarize", lambda *_: None)  # test_study.py has one drawn

    assert main(words(folder, "sdpa", stalling)) == 0
    assert "1 of 2 runs are finished already" in capsys.readouterr().out
    assert (out / f"{before.name}.json").read_bytes() == sdpa_as_it_was
    monkeypatch.setenv(paths.OUT_VARIABLE, str(tmp_path / "undisturbed"))
    (tmp_path / "undisturbed").mkdir()
    runs = plan.runs_of(plan.read_profile(str(folder / "tiny.yaml"))[0], ["sdpa", stalling], 1)
    assert not runner.run_all(runs[1:], "tiny")
    ((undisturbed,), resumed) = record.load_all(tmp_path / "undisturbed"), record.load_all(out)
    assert [found.label for found in resumed] == ["sdpa", "stalling"]
    assert timeless(resumed[1]) == timeless(undisturbed)
    names = {f"{found.name}{ending}" for found in resumed for ending in (".json", ".ipynb")}
    assert {path.name for path in out.glob("*-seed0-*")} == names


def test_a_signal_stops_a_study_and_its_kernel(folder, out, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STALL", str(tmp_path / "reached"))
    running = []

    def interrupt():
        running.extend(kernels())
        os.kill(os.getpid(), signal.SIGINT)

    when_it_stalls(tmp_path / "reached", interrupt)
    assert main(words(folder, str(folder / "stalling.py"))) == 130
    errors = capsys.readouterr().err
    assert errors.strip().splitlines()[-1] == "stopped by SIGINT; the same command finishes what is missing"
    assert running and gone(running)
    assert not list(out.glob("*.json"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_each_of_the_signals_that_ask_to_stop_is_heard(number):
    with pytest.raises(runner.Stopped, match=number.name), runner.stoppable():
        signal.raise_signal(number)


def test_a_process_killed_because_memory_ran_out_is_told_from_one_that_was_killed(monkeypatch, tmp_path):
    """The kernel's death looks the same; the system's count of such kills does not."""
    from nbclient.exceptions import DeadKernelError

    def dies(*_, **__):
        raise DeadKernelError("Kernel died")

    monkeypatch.setattr("papermill.execute_notebook", dies)
    counts = iter([3, 4, 4, 4])
    monkeypatch.setattr(runner, "killed_for_memory", lambda: next(counts))
    assert runner.execute(Path("a"), Path("b"), {}, {})[0] == "out_of_memory"
    assert runner.execute(Path("a"), Path("b"), {}, {})[0] == "killed"


@pytest.mark.parametrize(
    ("kind", "said", "reason"),
    [
        ("OutOfMemory", "out of memory (...); lower batch_size", "out_of_memory"),
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 20.00 GiB", "out_of_memory"),
        ("RuntimeError", "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", "out_of_memory"),
        ("MemoryError", "", "out_of_memory"),
        ("LossNotFinite", "the loss is not finite from step 3 on", "loss_not_finite"),
        ("UsageError", "there is no data file", "wrong_input"),
        ("ZeroDivisionError", "division by zero\nsecond line", "error"),
    ],
)
def test_every_failure_has_its_kind(kind, said, reason):
    assert runner._reason(kind, said)[0] == reason
    assert "\n" not in runner._reason(kind, said)[1]


@pytest.mark.parametrize("where", ["a file", "below a file"])
def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(where, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" if where == "a file" else tmp_path / "file" / "out"
    monkeypatch.setenv(paths.OUT_VARIABLE, str(folder))
    assert main(["--variants", "sdpa"]) == 2
    said = capsys.readouterr().err.strip()
    assert "cannot be written" in said and paths.OUT_VARIABLE in said and "\n" not in said


def test_unusable_data_is_said_once_before_any_run(folder, out, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(json.dumps(TINY | {"dataset": "nowhere.jsonl"}))
    assert main([str(tmp_path / "mine.yaml")]) == 2
    said = capsys.readouterr()
    assert "there is no data file 'nowhere.jsonl'" in said.err and "[1/" not in said.out
    assert not list(out.glob("*.ipynb"))


BUILD = """
import os, pathlib, sys, time
from lib.data import cache

def build(folder):
    with open(sys.argv[1], "a") as file:
        file.write("built\\n")
    time.sleep(1)
    (folder / "what").write_text("whole")

print((cache.made_once({"a": 1}, build) / "what").read_text())
"""


def test_what_two_processes_ask_for_at_once_is_built_once(tmp_path):
    environment = os.environ | {cache.CACHE_VARIABLE: str(tmp_path / "cache")}
    command = [sys.executable, "-c", BUILD, str(tmp_path / "count")]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ["whole\n"] * 3
    assert (tmp_path / "count").read_text() == "built\n"


def test_a_killed_build_leaves_nothing_that_counts(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    command = [sys.executable, "-c", BUILD.replace("sleep(1)", "sleep(600)"), str(tmp_path / "count")]
    killed = subprocess.Popen(command)
    wait_for((tmp_path / "count").exists, killed)
    killed.kill()
    killed.wait()

    def build(folder):
        (folder / "what").write_text("anew")

    folder = cache.made_once({"a": 1}, build)
    assert (folder / "what").read_text() == "anew"
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted([folder.name, f"{folder.name}.lock"])


def test_a_full_disk_under_the_cache_is_one_sentence(small_disk, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(small_disk / "cache"))

    def build(folder):
        (folder / "tokens").write_bytes(bytes(1 << 20))

    with pytest.raises(UsageError, match=r"cannot be written: No space left on device; free some space") as said:
        cache.made_once({"a": 1}, build)
    assert cache.CACHE_VARIABLE in str(said.value)
    assert [path.suffix for path in (small_disk / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("error", [TimeoutError("an alarm"), FileNotFoundError(2, "No such file", "/elsewhere/talks")])
def test_what_a_build_dies_of_is_not_laid_to_the_cache(error, tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))

    def build(folder):
        raise error

    with pytest.raises(type(error)) as said:
        cache.made_once({"a": 1}, build)
    assert said.value is error and not list((tmp_path / "cache").glob("*/"))


def test_an_error_without_a_text_of_the_system_s_says_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))

    def build(folder):
        raise OSError("4096 requested and 0 written")  # NumPy's

    with pytest.raises(UsageError, match="cannot be written: 4096 requested and 0 written; free some space"):
        cache.made_once({"a": 1}, build)


def test_a_study_on_a_full_disk_says_so_and_leaves_nothing_half_written(folder, small_disk, monkeypatch, capsys):
    (small_disk / "filler").write_bytes(bytes(200_000))  # room for a record and a note, not for a notebook
    monkeypatch.setenv(paths.OUT_VARIABLE, str(small_disk))
    assert main(words(folder, "sdpa")) == 1
    assert "No space left on device" in capsys.readouterr().err
    whole = [path.name for path in small_disk.glob("*.json") if not path.name.endswith(record.FAILED)]
    assert [f"{found.name}.json" for found in record.load_all(small_disk)] == whole
    assert not list(small_disk.glob("*.tmp"))


def test_a_full_disk_while_tokens_are_written_is_one_sentence(small_disk, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(small_disk / "cache"))
    data = {"dataset": "builtin", "dataset_revision": "", "tokenizer": "builtin", "turns": "roles"}
    p = SimpleNamespace(**data, validation_share=0.02)
    with pytest.raises(UsageError, match="cannot be written: No space left on device"):
        corpus.load(p)
