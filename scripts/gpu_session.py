#!/usr/bin/env python3
"""Everything that a GPU is needed for, in one command, for a machine that is lent for minutes and has no network.

Stages run in the order of what is lost if the machine goes away: facts; a training step of every variant with its
intervals (`lib.study.steps`), which keeps each round; blocks of whole runs, which keep each run; CUDA tests and
benchmarks, which can be had again. A stage that fails or takes too long is reported and stops nothing else. What is
finished is on disk at once; at the end everything is packed into a few flat files, after a signal too. Standard library
only; no setting of the GPU is ever changed.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import uuid
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Stage(NamedTuple):
    """A command that starts if `at_least_s` are left, and is ended after `at_most_s`. See `Session.run` for {words}."""

    name: str
    command: tuple[str, ...]
    at_least_s: float
    at_most_s: float = float("inf")
    fine: tuple[int, ...] = (0,)  # exit codes that are no failure
    output: str = ""  # file name under which its output comes back by itself
    rehearsed: tuple[str, ...] = ()  # added to the command in a rehearsal


class Blocks(NamedTuple):
    """A profile whose blocks are run one run after the other, in so many seconds each until some have been seen.

    A block counts only if all its runs were made in one session. A call that ends in the middle of one leaves it open,
    and the next call goes on with it on the same machine: not restarted since, the same GPU, the same code and profile,
    `PAUSE_S` later at most. Elsewhere it begins anew, and what was made of it is kept apart. So without `--kept`, by
    which somebody says that there will be a next call on this machine, only what fits as a whole is begun.
    """

    profile: str
    runs: int  # in a block
    first_guess_s: float
    most: float = float("inf")


# Imports what lib/ and its tests import, so that a wheel that was forgotten is named here and not in every run's log.
VERSIONS = """
import importlib, platform, sys
names = "torch transformers tokenizers datasets papermill ipykernel ipywidgets zeus pynvml pydantic psutil numpy "
names += "filelock platformdirs "
names += "pandas matplotlib seaborn scipy statsmodels yaml tqdm pytest hypothesis nbval"
missing = []
print("python", platform.python_version())
for name in names.split():
    try:
        print(name, getattr(importlib.import_module(name), "__version__", "?"))
    except ImportError as error:
        missing.append(f"{name} ({error})")
import torch
print("CUDA", torch.version.cuda, torch.cuda.get_device_name() if torch.cuda.is_available() else "sees no device")
sys.exit("missing: " + ", ".join(missing) if missing else 0)
"""

# A test file that cannot be imported must not keep the others from running.
CUDA_TESTS = ("{python}", "-m", "pytest", "-q", "-ra", "-m", "cuda", "--continue-on-collection-errors", "tests")
FIRST = (
    Stage("nvidia_smi", ("nvidia-smi", "-q"), 5, 30, output="nvidia-smi.txt"),
    Stage("versions", ("{python}", "-c", VERSIONS), 5, 60),
)
STEPS_COMMAND = ("{python}", "-m", "lib.study.steps", "{profile}", "--write", "{file}", "--within-s", "{within_s}")
STEPS = tuple(Stage(profile, STEPS_COMMAND, 120) for profile in ("steps_gpu", "steps_gpu_today", "steps_gpu_long"))
# Seconds of a run on an H100: the arithmetic is in the profiles' comments.
BLOCKS = (Blocks("gpu_512", 9, 120), Blocks("gpu_4096", 9, 120), Blocks("gpu_phases", 9, 180, most=1))
BLOCK_COMMAND = (
    "{python}", "-m", "lib.study", "{profile}", "--blocks", "{number}", "--session", "{session}", "--runs", "{runs}"
)  # fmt: skip
RUNS_LEFT = 3  # how `lib.study` ends that was to make some of its runs and has made them
# Whatever fits behind the blocks; what a benchmark writes to the folder {out} comes back in benchmarks.tar.gz.
OVERHEAD = ("{python}", "scripts/instrument_overhead.py", "{profile}", "--out", "{out}/overhead.json", "--steps", "50")
NANOGPT = ROOT / ".gpu" / "nanogpt" / "model.py"


def beside_others(name: str, words: str, at_most_s: float) -> Stage:
    command = ("{python}", "scripts/benchmark_attention.py", *words.split(), "--out", f"{{out}}/{name}.json")
    tiny = "--lengths 64 --batch 1 --rounds 1 --vocabulary 64"
    return Stage(name, command, 60, at_most_s, rehearsed=tuple(tiny.split()))


def training_step(name: str, words: str) -> Stage:
    """Compiled steps of GPT-2 124M with its vocabulary padded, as nanoGPT's own settings have it."""
    nanogpt = f" --nanogpt {NANOGPT}" if NANOGPT.is_file() else ""
    return beside_others(name, f"step --compile --vocabulary 50304 --variants sdpa baseline {words}{nanogpt}", 240)


BENCHMARKS = (
    Stage("cuda_tests", CUDA_TESTS, 30, 180, fine=(0, 5)),  # 5: no test is for CUDA
    Stage("instrument_overhead", (*OVERHEAD, "--repeats", "8"), 90, 240, rehearsed=("--steps", "2", "--repeats", "2")),
    beside_others("layer_short", "layer --lengths 512 2048 --batch 16", 150),
    beside_others("layer_long", "layer --lengths 8192 32768 65536", 240),
    training_step("step_512", "--lengths 512 --batch 16"),
    training_step("step_4096", "--lengths 4096 --batch 2"),
    beside_others(
        "step_llama",
        "step --compile --vocabulary 50304 --architecture llama --variants sdpa linear,sdpa --batch 16",
        240,
    ),
)

RESERVE_S = 20.0  # kept for packing
ENDING_S = 10.0  # that `lib.study.steps` needs to end by itself, before it is ended
MARGIN = 1.1  # a run is predicted to take this much more than the slowest of its profile so far
PAUSE_S = 900.0  # after which an open block is not gone on with: the machine has cooled
PACK_BYTES = 16_000_000  # the most that one file may have to come back
ALL_PACKS_BYTES = 60_000_000
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# With these a profile becomes one that a laptop rehearses in seconds; what it says of variants and data stays.
TINY = {
    "layers": "1",
    "width": "64",
    "heads": "4",
    "positions": "256",
    "context": "64",
    "validation_sequences": "4",
    "batch_size": "2",
    "steps_per_epoch": "3",
    "epochs": "1",
    "warmup_steps": "1",
    "inference_contexts": "[16, 64]",
    "new_tokens": "2",
    "inference_repeats": "1",
    "idle_s": "0",
}
REHEARSED_RUN_S = 8.0
TINY_STEPS = """
layers: 1
width: 32
heads: 4
vocabulary: 64
sizes: [{context: 32, batch_size: 2}, {context: 64, batch_size: 1}]
window_s: 0.05
rounds: 2
"""

HELP = """
Before, in the repository's root on a workstation: wheels of what the GPU machine's python3 lacks into .gpu/wheels
(`pip download --no-deps --only-binary=:all: --python-version ... --platform ... -d .gpu/wheels NAME==VERSION ...`; the
stage `versions` names what is missing), conversations and a tokenizer where params/gpu_*.yaml look for them. Where
this project is built, with its environment in .venv and the team's shared folder in $SHARED, that is:

  PATH=.venv/bin:$PATH bash $SHARED/offline_gpu/collect_wheels.sh .gpu/wheels && mkdir -p .gpu/data .gpu/tokenizers &&
  cp $SHARED/data/tulu_v2_components.parquet .gpu/data/ && cp -r $SHARED/tokenizers/gpt2 .gpu/tokenizers/

For the study no extra names are needed: the script's own list and what the machine has (torch, transformers,
tokenizers, numpy, pandas, pyarrow, matplotlib, seaborn, scipy, statsmodels, pytest, hypothesis) cover all that lib/ and
the tests marked cuda import. The benchmarks take fla-core (name it and einops behind .gpu/wheels) and nanoGPT's
model.py (as .gpu/nanogpt/model.py) where they find them, and name them as absent where not. .gpu/ is ignored by git, so
name it where ignored folders have to be named to be carried along.

There, in the repository's root (the budget has to leave the installation's seconds to the call's limit):

  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/site .gpu/wheels/*.whl
  PYTHONPATH=/tmp/site:$PWD python3 scripts/gpu_session.py --out "$OUT" --budget-s 540

The next call goes on where this one ended: keep what came back, put it into .gpu/earlier, and add --from .gpu/earlier.
A block of whole runs takes longer than such a call. Where the machine is kept, add --kept to every call: each begins
what it can, and the next one, on the same machine and within a quarter of an hour, goes on inside the block.

Exit codes: 0 all that started went well; 1 something failed, was cut or did not fit its pack; 2 no GPU, or wrong use;
128 + n after signal n.
"""


class Session:
    """Runs stages within `budget_s` seconds; leaves results in `folder`, and the rest in a work folder under it."""

    def __init__(self, folder: Path, budget_s: float, clock=time.monotonic):
        self.folder, self.clock = folder, clock
        self.end_s = clock() + budget_s - RESERVE_S
        # Three folders deep, where a machine that returns few files does not look, should this be killed outright.
        self.work = folder / "work" / "session"
        self.runs, self.cut, self.logs = self.work / "runs", self.work / "cut", self.work / "logs"
        self.steps, self.benchmarks = self.work / "steps", self.work / "benchmarks"
        self.run_s: dict[str, list[float]] = {}  # profile: seconds of a run, from each stage that made some
        self.open: dict[str, dict] = {}  # profile: its block that was begun and not ended, and where
        self.signal: int | None = None
        self.failed = False
        self.report = {"started": _now(), "budget_s": budget_s, "stages": [], "not_started": [], "left_out": []}
        self.report |= {"run_s": self.run_s, "open": self.open}
        for path in (self.runs, self.cut, self.logs, self.steps, self.benchmarks):
            path.mkdir(parents=True)

    @property
    def left_s(self) -> float:
        return self.end_s - self.clock()

    def take_in(self, earlier: Path) -> int:
        """Copies the records of an earlier session, its packs or loose files; returns how many were new.

        Records of a block that was left open come along where this session may go on with it, else they are kept apart.
        """
        copied, report = 0, {}
        with contextlib.suppress(OSError, ValueError):
            report = json.loads((earlier / "session.json").read_text(encoding="utf-8"))
        for profile, seconds in report.get("run_s", {}).items():
            self.run_s.setdefault(profile, []).extend(seconds)
        left_open = report.get("open", {})
        self.open |= {profile: block for profile, block in left_open.items() if _goes_on(block)}
        for name, data in _earlier_records(earlier):
            with contextlib.suppress(ValueError, KeyError, TypeError, FileExistsError):
                facts = json.loads(data)
                target = self.steps / name
                if facts.get("kind") != "steps":
                    study = facts["study"]
                    profile = Path(study["profile"]).name
                    began = left_open.get(profile, {}).get("block") == study["block"]
                    target = (self.cut if began and profile not in self.open else self.runs) / profile / name
                target.parent.mkdir(exist_ok=True)
                with open(target, "xb") as file:
                    file.write(data)
                copied += 1
        return copied

    def run(self, stage: Stage, env: dict | None = None, **words: str) -> dict | None:
        """Runs a stage if it fits; its entry in the report, or None. {python} and {out} are known to every command."""
        if self.signal or self.left_s < stage.at_least_s:
            why = "stopped" if self.signal else f"needs {stage.at_least_s:.0f} s, {max(0, self.left_s):.0f} s left"
            self.report["not_started"].append({"name": stage.name, "why": why})
            print(f"{stage.name}: not started ({why})", flush=True)
            return None
        limit_s = min(stage.at_most_s, self.left_s)
        words |= {"python": sys.executable, "out": str(self.benchmarks), "within_s": f"{limit_s - ENDING_S:.0f}"}
        # Not str.format, which would trip over braces in a command's own code.
        command = [re.sub(r"\{(\w+)\}", lambda at: words.get(at[1], at[0]), word) for word in stage.command]
        log = self.logs / f"{len(self.report['stages']):02d}-{stage.name}.log"
        entry = {"name": stage.name, "command": command, "started": _now(), "seconds": None, "exit_code": None}
        entry |= {"outcome": "running", "fine": False}
        self.report["stages"].append(entry)
        self.save()
        print(f"{stage.name}: at most {limit_s:.0f} s ...", flush=True)
        begin_s = self.clock()
        entry["exit_code"] = self._execute(command, log, begin_s + limit_s, env or {})
        entry["seconds"] = round(self.clock() - begin_s, 1)
        entry["outcome"] = _outcome(log.read_text(encoding="utf-8", errors="replace"))
        if entry["exit_code"] is None:
            why = f"by signal {self.signal}" if self.signal else f"after {limit_s:.0f} s"
            entry["outcome"] = f"cut {why}: {entry['outcome']}"
        entry["fine"] = entry["exit_code"] in stage.fine
        self.failed |= not entry["fine"]
        print(f"{stage.name}: {entry['seconds']:.0f} s, {entry['outcome']}", flush=True)
        if stage.output:
            shutil.copyfile(log, self.folder / stage.output)
        self.save()
        return entry

    def _execute(self, command: list[str], log: Path, until_s: float, env: dict) -> int | None:
        """The exit code of a command, or None if it was ended at `until_s` or by a signal to this script."""
        with open(log, "wb") as output:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment() | env,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                output.write(f"cannot start {command[0]}: {error.strerror}\n".encode())
                return 127
            while process.poll() is None and not self.signal and self.clock() < until_s:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
            code = process.poll()
            end_tree(process)
            return code

    def run_blocks(self, profiles: dict[Blocks, Path], kept: bool = False) -> None:
        """Blocks, always of the profile that has the fewest, for as long as one is predicted to fit; what was left open
        first, and, on a machine that is `kept`, of what does not fit as many runs as do."""
        todo = list(profiles)
        while todo and not self.signal:
            todo = [blocks for blocks in todo if self.finished_blocks(blocks) < blocks.most]
            fitting = [blocks for blocks in todo if self.predicted_s(blocks, kept) <= self.left_s]
            if not fitting:
                break
            blocks = min(fitting, key=lambda each: (each.profile not in self.open, self.finished_blocks(each)))
            if not self.run_block(blocks, profiles[blocks]):
                todo.remove(blocks)  # it would fail again, and take time from what works
        for blocks in todo:
            name = f"{blocks.profile} block {self.finished_blocks(blocks) + 1}"
            self.run(Stage(name, (), self.predicted_s(blocks, kept)))

    def run_block(self, blocks: Blocks, path: Path) -> bool:
        """As many runs of a profile's next block as fit; whether some left a record."""
        number, profile = self.finished_blocks(blocks) + 1, blocks.profile
        here = _here(path) | {"block": number - 1, "session": uuid.uuid4().hex[:12], "seen": _now()}
        opened = self.open.setdefault(profile, here)
        folder, before = self.runs / profile, self.made(profile, number - 1)
        folder.mkdir(exist_ok=True)
        runs = max(1, int(self.left_s // self.predicted_run_s(blocks)))
        words = {"profile": str(path), "number": str(number), "session": opened["session"], "runs": str(runs)}
        stage = Stage(f"{profile} block {number}", BLOCK_COMMAND, 0, fine=(0, RUNS_LEFT))
        entry = self.run(stage, {"ATTENTION_STUDY_OUT": str(folder)}, **words)
        if entry is None:
            return False
        there = self.made(profile, number - 1)
        made, opened["seen"] = there - before, _now()
        entry |= {"profile": profile, "runs": made, "came_to_end": bool(there) and entry["exit_code"] in (0, 1)}
        if made:
            self.run_s.setdefault(profile, []).append(max(0.1, round(entry["seconds"] / made, 1)))
        if entry["came_to_end"] or not there:
            del self.open[profile]
        self.save()
        return bool(made)

    def predicted_run_s(self, blocks: Blocks) -> float:
        seen = self.run_s.get(blocks.profile)
        return MARGIN * max(seen) if seen else blocks.first_guess_s

    def predicted_s(self, blocks: Blocks, kept: bool) -> float:
        """Of what has to fit for a profile to be gone on with: its block's other runs, or, where that may be left open,
        one of them."""
        left = blocks.runs - self.made(blocks.profile, self.finished_blocks(blocks))
        return (1 if kept else max(1, left)) * self.predicted_run_s(blocks)

    def made(self, profile: str, block: int) -> int:
        """How many runs of a block have records."""
        return sum(facts["study"]["block"] == block for _, facts in self.records(profile))

    def finished_blocks(self, blocks: Blocks) -> int:
        """How many blocks of a profile came to their end; their numbers begin at 0."""
        begun = 1 + max((facts["study"]["block"] for _, facts in self.records(blocks.profile)), default=-1)
        return self.open[blocks.profile]["block"] if blocks.profile in self.open else begun

    def records(self, profile: str) -> list[tuple[Path, dict]]:
        found = []
        for path in sorted((self.runs / profile).glob("*.json")):
            if path.name.endswith(".failed.json"):  # the note of a run that left none
                continue
            with contextlib.suppress(ValueError, KeyError, TypeError):
                facts = json.loads(path.read_bytes())
                if isinstance(facts["study"]["block"], int):
                    found.append((path, facts))
        return found

    def save(self) -> None:
        """What must not be lost, whole at every moment: the report, and the records so far, which are small."""
        self._write_report()
        self._pack("records", self._records(), PACK_BYTES)

    def _write_report(self) -> None:
        self.report["ended"] = _now()
        _write(self.folder / "session.json", (json.dumps(self.report, indent=1) + "\n").encode())

    def _records(self) -> dict[str, Path]:
        """All records by their name in the pack; those of a block that was left open are no block yet."""
        found = self._files(self.steps, "*.json") | self._files(self.cut, "*/*.json")
        begun = {
            path for profile, block in self.open.items() for path, facts in self.records(profile)
            if facts["study"]["block"] == block["block"]
        }  # fmt: skip
        for name, path in self._files(self.runs, "*/*.json").items():
            found[f"open/{name.removeprefix('runs/')}" if path in begun else name] = path
        return found

    def pack(self) -> None:
        """The packs, what is hardest to get again first; executed notebooks get the room that the others leave."""
        self.report["left_out"], left_bytes = [], ALL_PACKS_BYTES
        study = self._files(self.runs, "*/*")
        packs = {
            "records": self._records(),
            "logs": self._files(self.logs, "*"),
            "figures": self._files(self.runs, "*/figures/**/*"),
            "benchmarks": self._files(self.benchmarks, "**/*"),
            "notebooks": {name: path for name, path in study.items() if path.suffix == ".ipynb"},
        }
        for name, files in packs.items():
            try:
                left_bytes -= self._pack(name, files, min(PACK_BYTES, left_bytes))
            except OSError as error:
                self.report["left_out"].append(f"{name}.tar.gz: {error.strerror}")
        self.failed |= bool(self.report["left_out"])
        self._write_report()
        if not self.report["left_out"]:
            shutil.rmtree(self.work.parent, ignore_errors=True)

    def _files(self, folder: Path, pattern: str) -> dict[str, Path]:
        paths = sorted(path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith("."))
        return {path.relative_to(self.work).as_posix(): path for path in paths}

    def _pack(self, name: str, files: dict[str, Path], limit_bytes: int) -> int:
        """Writes NAME.tar.gz of at most `limit_bytes`; returns its size. Notebooks are left out first, then the largest
        files, each named in the report."""
        if not files:
            return 0
        kept = dict(sorted(files.items(), key=lambda item: (item[1].suffix == ".ipynb", item[1].stat().st_size)))
        while True:
            data = _tar(kept)
            excess_bytes = len(data) - limit_bytes
            if excess_bytes <= 0:
                break
            while kept and excess_bytes > 0:
                dropped, path = kept.popitem()
                excess_bytes -= len(zlib.compress(path.read_bytes()))
                self.report["left_out"].append(f"{dropped}: {name}.tar.gz would be over {limit_bytes:,} bytes")
            if not kept:
                return 0
        _write(self.folder / f"{name}.tar.gz", data)
        return len(data)

    def table(self) -> str:
        """What happened, short enough for the tail of an output."""
        rows = [("stage", "seconds", "exit", "outcome")]
        for stage in self.report["stages"]:
            code = "cut" if stage["exit_code"] is None else stage["exit_code"]
            rows.append((stage["name"], f"{stage['seconds'] or 0:.0f}", code, stage["outcome"][:100]))
        rows += [(stage["name"], "-", "-", f"not started: {stage['why']}") for stage in self.report["not_started"]]
        width = max(len(row[0]) for row in rows)
        lines = [f"{name:<{width}}{seconds:>9}{code:>6}  {outcome}" for name, seconds, code, outcome in rows]
        lines += [f"LEFT OUT {what}" for what in self.report["left_out"]]
        sizes = [f"{path.name} {path.stat().st_size:,}" for path in sorted(self.folder.iterdir()) if path.is_file()]
        return "\n".join([*lines, f"bytes: {', '.join(sizes)}"])


def end_tree(process: subprocess.Popen) -> None:
    """Ends what a stage left: its process group, and those of its descendants, since Jupyter's kernels have their own
    and would go on computing. Politely first, then not."""
    groups = {process.pid}
    for pid in descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            groups.add(os.getpgid(pid))
    groups.discard(os.getpgrp())
    for number, patience_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 2.0)):
        for group in groups:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)
        give_up_s = time.monotonic() + patience_s
        while any(map(_is_alive, groups)) and time.monotonic() < give_up_s:
            process.poll()  # a finished child stays in its group until it is asked for
            time.sleep(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):  # what hangs in the driver cannot even be killed
        process.wait(2)


def descendants(pid: int) -> list[int]:
    """Children, their children and so on, from /proc; empty where there is none."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            # The name, in brackets, may hold anything; behind it come state and parent.
            parent = int(stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def environment() -> dict[str, str]:
    """Of every stage: the repository importable from anywhere, and no waiting for a network that is not there."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    offline = {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")}
    return os.environ | offline | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def tiny(profile: str) -> str:
    """A profile in the size of a rehearsal; data that are not on this machine become the built-in ones."""
    lines = []
    for line in profile.splitlines():
        name, colon, value = line.partition(":")
        if colon and name in TINY:
            line = f"{name}: {TINY[name]}"
        elif name in ("dataset", "tokenizer") and not (ROOT / value.strip()).exists():
            line = f"{name}: builtin"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _here(profile: Path) -> dict:
    """What must not have changed for a block to be gone on with: the machine since its start, the GPU, the code."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    code = hashlib.sha256()
    for path in [*sorted((ROOT / "lib").rglob("*.py")), ROOT / "notebooks" / "train.ipynb", profile]:
        code.update(path.read_bytes() if path.is_file() else b"")
    return {
        "boot": boot.read_text(encoding="utf-8").strip() if boot.is_file() else None,
        "gpu": gpu_list(),
        "code": code.hexdigest(),
        "profile": str(profile),
    }


def _goes_on(block: dict) -> bool:
    """Whether a block that an earlier session left open may be gone on with here and now."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        here = _here(Path(block["profile"]))
        paused_s = (datetime.now(UTC) - datetime.fromisoformat(block["seen"])).total_seconds()
        same = all(block[name] == value for name, value in here.items())
        return same and here["boot"] is not None and 0 <= paused_s <= PAUSE_S
    return False


def _outcome(log: str) -> str:
    """One line that says how a command ended: how many runs a study got through and what failed, or its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    runs = re.findall(r"^\[(\d+)/(\d+)\]", log, re.MULTILINE)
    failed = [line for line in lines if line.startswith("FAILED ")]
    if runs:
        return "; ".join(["run {} of {}".format(*runs[-1]), f"{len(failed)} failed", *failed[:1]])
    return lines[-1][:300] if lines else "no output"


def _earlier_records(folder: Path):
    """(file name, content) of the finished records in what a session left: its pack, or loose files."""
    pack = folder / "records.tar.gz"
    if pack.is_file():
        with tarfile.open(pack) as tar:
            for member in tar:
                if member.isfile() and not member.name.startswith("cut/"):
                    yield Path(member.name).name, tar.extractfile(member).read()
    else:
        for path in sorted(folder.rglob("*.json")):
            if "cut" not in path.relative_to(folder).parts:
                yield path.name, path.read_bytes()


def _tar(files: dict[str, Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as tar:
        for name, path in files.items():
            tar.add(path, name, recursive=False)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    half = path.with_name(f".{path.name}.tmp")
    half.write_bytes(data)
    os.replace(half, path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def gpu_list() -> str:
    """The GPUs with their UUIDs, as nvidia-smi lists them; empty where there is none."""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, encoding="utf-8", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout if found.returncode == 0 else ""


def has_gpu() -> bool:
    return "GPU " in gpu_list()


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in (*FIRST, *STEPS, *BENCHMARKS)] + [blocks.profile for blocks in BLOCKS]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder for the results")
    parser.add_argument("--budget-s", type=float, default=540, metavar="S", help="seconds for all of it (540)")
    resumed = "what earlier sessions left; their runs are not run again"
    parser.add_argument("--from", dest="earlier", type=Path, nargs="+", default=[], metavar="DIR", help=resumed)
    kept = "a next call follows on this very machine: blocks that do not fit are begun, and it goes on with them"
    parser.add_argument("--kept", action="store_true", help=kept)
    parser.add_argument("--skip", nargs="+", default=[], choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--rehearse", action="store_true", help="all stages, tiny, on the CPU")
    options = parser.parse_args(words)
    folder = options.out.resolve()
    if options.budget_s <= RESERVE_S:
        parser.error(f"--budget-s must be above the {RESERVE_S:.0f} s that packing may take")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        parser.error(f"{options.out} is not an empty folder; take a new one, and give earlier results to --from")
    for earlier in options.earlier:
        if not earlier.is_dir():
            parser.error(f"there is no folder {earlier} with earlier results")
    gpu = has_gpu()
    if not gpu and not options.rehearse:
        print("There is no NVIDIA GPU here (nvidia-smi finds none); --rehearse tries everything on the CPU.")
        return 2

    session = Session(folder, options.budget_s)

    def stop(number, _frame):
        session.signal = session.signal or number

    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        for earlier in options.earlier:
            print(f"{session.take_in(earlier)} records from {earlier}", flush=True)
        for stage in FIRST:
            if stage.name not in options.skip and (gpu or stage.command[0] != "nvidia-smi"):
                session.run(stage)
        for stage in STEPS:
            profile = ROOT / "params" / f"{stage.name}.yaml"
            if options.rehearse:
                profile = session.work / f"{stage.name}.yaml"
                profile.write_text(TINY_STEPS, encoding="utf-8")
            if stage.name not in options.skip:
                session.run(stage, profile=str(profile), file=str(session.steps / f"{stage.name}.json"))
        profiles, overhead_profile = {}, ROOT / "params" / "gpu_512.yaml"
        for blocks in BLOCKS:
            path = ROOT / "params" / f"{blocks.profile}.yaml"
            if options.rehearse:
                blocks = Blocks(f"rehearsal_{blocks.profile}", blocks.runs, REHEARSED_RUN_S, most=1)
                rehearsed = session.work / f"{blocks.profile}.yaml"
                rehearsed.write_text(tiny(path.read_text(encoding="utf-8")), encoding="utf-8")
                path = overhead_profile = rehearsed
            if blocks.profile.removeprefix("rehearsal_") not in options.skip:
                profiles[blocks] = path
        session.run_blocks(profiles, options.kept)
        for stage in BENCHMARKS:
            if stage.name not in options.skip:
                command = stage.command + stage.rehearsed * options.rehearse
                session.run(stage._replace(command=command), profile=str(overhead_profile))
    finally:
        session.pack()
        print(session.table(), flush=True)
    return 128 + session.signal if session.signal else int(session.failed)


if __name__ == "__main__":
    sys.exit(main())
