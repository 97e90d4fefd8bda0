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
from make import NINTH, STALLING, TINY, timeless, tiny_profile, wait_for

from lib import paths, record
from lib.data import cache, corpus
from lib.errors import UsageError
from lib.study import runner
from lib.study.__main__ import main

GREEDY = NINTH.replace(
    "        v, T =",
    "        if self.training and hidden_states.shape[1] == 16: torch.empty(1 << 50)\n        v, T =",
)


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.OUT_VARIABLE, str(tmp_path / "out"))
    return tmp_path / "out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A profile with data and a tokenizer of its own, and variants that stall or ask for too much."""
    folder = tmp_path_factory.mktemp("faults")
    tiny_profile(folder)
    (folder / "stalling.py").write_text(STALLING)
    (folder / "greedy.py").write_text(GREEDY)
    return folder


def start(folder, out, *variants, **environment):
    command = [sys.executable, "-m", "lib.study", str(folder / "tiny.yaml"), "--variants", *variants]
    environment = os.environ | {paths.OUT_VARIABLE: str(out)} | environment
    return subprocess.Popen(
        command, cwd=paths.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def gone(processes, within_s=30):
    return not psutil.wait_procs(processes, timeout=within_s)[1]


RUNS_ALONE = """
import sys
from lib.study import plan, runner

assert not runner.run_all(plan.runs_of(plan.read_profile(sys.argv[1])[0], sys.argv[2:], 1), "tiny")
"""


def test_a_study_that_is_killed_is_resumed_to_the_records_of_an_undisturbed_one(folder, tmp_path):
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    variants = ("sdpa", str(folder / "stalling.py"))
    killed = start(folder, out, *variants, STALL=str(tmp_path / "reached"))
    wait_for((tmp_path / "reached").exists, killed)
    kernels = psutil.Process(killed.pid).children(recursive=True)
    assert kernels
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert gone(kernels)  # a kernel notices that nobody is left to work for
    (before,) = record.load_all(out)
    assert before.label == "sdpa"

    resumed = start(folder, out, *variants)
    said, errors = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, errors
    assert "1 of 2 runs are finished already" in said
    runs_alone = ["-c", RUNS_ALONE, str(folder / "tiny.yaml"), *variants]
    environment = os.environ | {paths.OUT_VARIABLE: str(undisturbed)}
    undisturbed.mkdir()
    subprocess.run([sys.executable, *runs_alone], cwd=paths.ROOT, env=environment, check=True)
    ours, theirs = record.load_all(out), record.load_all(undisturbed)
    assert [timeless(found) for found in ours] == [timeless(found) for found in theirs] and len(ours) == 2
    assert before in ours
    assert {path.name for path in out.glob("*-seed0-*")} == {path.name for path in undisturbed.iterdir()}


def test_a_signal_stops_a_study_and_its_kernel(folder, tmp_path):
    stopped = start(folder, tmp_path / "out", str(folder / "stalling.py"), STALL=str(tmp_path / "reached"))
    wait_for((tmp_path / "reached").exists, stopped)
    kernels = psutil.Process(stopped.pid).children(recursive=True)
    stopped.send_signal(signal.SIGINT)
    _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert errors.strip().splitlines()[-1] == "stopped by SIGINT; the same command finishes what is missing"
    assert kernels and gone(kernels)
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_each_of_the_signals_that_ask_to_stop_is_heard(number):
    with pytest.raises(runner.Stopped, match=number.name), runner.stoppable():
        signal.raise_signal(number)


def test_a_killed_kernel_and_one_that_asks_for_too_much_are_noted_and_the_study_goes_on(folder, tmp_path):
    out = tmp_path / "out"
    variants = (str(folder / "stalling.py"), str(folder / "greedy.py"), "sdpa")
    study_process = start(folder, out, *variants, STALL=str(tmp_path / "reached"))
    wait_for((tmp_path / "reached").exists, study_process)
    second = start(folder, out, "sdpa")  # two studies at once in one folder
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 2 and "another study runs in out/" in errors
    (kernel, *_) = psutil.Process(study_process.pid).children()
    kernel.kill()
    _, errors = study_process.communicate(timeout=600)
    assert study_process.returncode == 1
    assert [found.label for found in record.load_all(out)] == ["sdpa"]
    noted = record.failures(out).set_index("variant")
    assert noted.loc["stalling", "why"] == "its process was killed"
    assert noted.loc["greedy", "why"] == "out of memory" and "lower batch_size" in noted.loc["greedy", "it said"]
    assert "FAILED stalling-seed0" in errors and "FAILED greedy-seed0" in errors
    assert (out / "summary.ipynb").exists() and "out of memory" in (out / "summary.ipynb").read_text()


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


def test_a_study_on_a_full_disk_says_so_and_leaves_nothing_half_written(folder, small_disk):
    (small_disk / "filler").write_bytes(bytes(200_000))  # room for a record and a note, not for a notebook
    stopped = start(folder, small_disk, "sdpa")
    said, errors = stopped.communicate(timeout=300)
    assert stopped.returncode == 1 and "No space left on device" in errors, said
    whole = [path.name for path in small_disk.glob("*.json") if not path.name.endswith(record.FAILED)]
    assert [f"{found.name}.json" for found in record.load_all(small_disk)] == whole
    assert not list(small_disk.glob("*.tmp"))


def test_a_full_disk_while_tokens_are_written_is_one_sentence(small_disk, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(small_disk / "cache"))
    data = {"dataset": "builtin", "dataset_revision": "", "tokenizer": "builtin", "turns": "roles"}
    p = SimpleNamespace(**data, validation_share=0.02)
    with pytest.raises(UsageError, match="cannot be written: No space left on device"):
        corpus.load(p)
