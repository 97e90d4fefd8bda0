#!/usr/bin/env python3
"""Everything that a GPU is needed for, in one command, for a machine that is lent for minutes and has no network.

Stages run in the order of what they are worth: facts, CUDA tests, whole blocks of the study, benchmarks. A stage that
fails or takes too long is reported and stops nothing else. What is finished is on disk at once; at the end everything
is packed into a few flat files, after a signal too. Standard library only; no setting of the GPU is ever changed.
"""

import argparse
import contextlib
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
    """A profile whose blocks are run whole or not at all; the guess holds until a block of it has been seen."""

    profile: str
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
    Stage("cuda_tests", CUDA_TESTS, 30, 180, fine=(0, 5)),  # 5: no test is for CUDA
)
# Guesses for nine runs on an H200: the arithmetic is in the profiles' comments.
BLOCKS = (Blocks("gpu_512", 505), Blocks("gpu_4096", 480), Blocks("gpu_phases", 510, most=1))
BLOCK_COMMAND = ("{python}", "-m", "lib.study", "{profile}", "--blocks", "{number}")
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
    Stage("instrument_overhead", (*OVERHEAD, "--repeats", "8"), 90, 240, rehearsed=("--steps", "2", "--repeats", "2")),
    beside_others("layer_short", "layer --lengths 512 2048 --batch 16", 150),
    beside_others("layer_long", "layer --lengths 8192 32768 65536", 240),
    training_step("step_512", "--lengths 512 --batch 16"),
    training_step("step_4096", "--lengths 4096 --batch 2"),
)

RESERVE_S = 20.0  # kept for packing
MARGIN = 1.05  # a block is predicted to take this much more than the slowest of its profile so far
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
REHEARSED_BLOCK_S = 60.0

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

The next call goes on where this one ended: keep what came back, put it into .gpu/earlier, and add
--from .gpu/earlier --skip cuda_tests.

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
        self.benchmarks = self.work / "benchmarks"
        self.block_s: dict[str, list[float]] = {}  # profile: seconds of each block that came to its end
        self.signal: int | None = None
        self.failed = False
        self.report = {"started": _now(), "budget_s": budget_s, "stages": [], "not_started": [], "left_out": []}
        self.report["block_s"] = self.block_s
        for path in (self.runs, self.cut, self.logs, self.benchmarks):
            path.mkdir(parents=True)

    @property
    def left_s(self) -> float:
        return self.end_s - self.clock()

    def take_in(self, earlier: Path) -> int:
        """Copies the records of an earlier session, its packs or loose files; returns how many were new."""
        copied = 0
        for name, data in _earlier_records(earlier):
            with contextlib.suppress(ValueError, KeyError, TypeError, FileExistsError):
                profile = json.loads(data)["study"]["profile"]
                target = self.runs / Path(profile).name / name
                target.parent.mkdir(exist_ok=True)
                with open(target, "xb") as file:
                    file.write(data)
                copied += 1
        with contextlib.suppress(OSError, ValueError):
            seen = json.loads((earlier / "session.json").read_text(encoding="utf-8")).get("block_s", {})
            for profile, seconds in seen.items():
                self.block_s.setdefault(profile, []).extend(seconds)
        return copied

    def run(self, stage: Stage, env: dict | None = None, **words: str) -> dict | None:
        """Runs a stage if it fits; its entry in the report, or None. {python} and {out} are known to every command."""
        if self.signal or self.left_s < stage.at_least_s:
            why = "stopped" if self.signal else f"needs {stage.at_least_s:.0f} s, {max(0, self.left_s):.0f} s left"
            self.report["not_started"].append({"name": stage.name, "why": why})
            print(f"{stage.name}: not started ({why})", flush=True)
            return None
        words |= {"python": sys.executable, "out": str(self.benchmarks)}
        # Not str.format, which would trip over braces in a command's own code.
        command = [re.sub(r"\{(\w+)\}", lambda at: words.get(at[1], at[0]), word) for word in stage.command]
        limit_s = min(stage.at_most_s, self.left_s)
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

    def run_blocks(self, profiles: dict[Blocks, Path]) -> None:
        """Whole blocks, always of the profile that has the fewest, for as long as one is predicted to fit."""
        open_profiles = list(profiles)
        while open_profiles and not self.signal:
            open_profiles = [blocks for blocks in open_profiles if self.finished_blocks(blocks) < blocks.most]
            fitting = [blocks for blocks in open_profiles if self.predicted_s(blocks) <= self.left_s]
            if not fitting:
                break
            blocks = min(fitting, key=self.finished_blocks)
            if not self.run_block(blocks, profiles[blocks]):
                open_profiles.remove(blocks)  # it would fail again, and take time from what works
        for blocks in open_profiles:
            number = self.finished_blocks(blocks) + 1
            self.run(Stage(f"{blocks.profile} block {number}", (), self.predicted_s(blocks)))

    def run_block(self, blocks: Blocks, path: Path) -> bool:
        """The next block of a profile; whether it came to its end and left a record. A cut block's records are kept
        apart: a later session would finish it in another session, and such a block does not count."""
        number = self.finished_blocks(blocks) + 1
        folder = self.runs / blocks.profile
        folder.mkdir(exist_ok=True)
        stage = Stage(f"{blocks.profile} block {number}", BLOCK_COMMAND, 0)
        env = {"ATTENTION_STUDY_OUT": str(folder)}
        entry = self.run(stage, env, profile=str(path), number=str(number))
        if entry is None:
            return False
        ended = entry["exit_code"] is not None
        entry |= {"profile": blocks.profile, "came_to_end": ended and self.finished_blocks(blocks) == number}
        if entry["came_to_end"]:
            self.block_s.setdefault(blocks.profile, []).append(entry["seconds"])
        if not ended:
            for record, facts in self.records(blocks.profile):
                if facts["study"]["block"] == number - 1:
                    (self.cut / blocks.profile).mkdir(exist_ok=True)
                    record.rename(self.cut / blocks.profile / record.name)
        self.save()
        return entry["came_to_end"]

    def predicted_s(self, blocks: Blocks) -> float:
        seen = self.block_s.get(blocks.profile)
        return MARGIN * max(seen) if seen else blocks.first_guess_s

    def finished_blocks(self, blocks: Blocks) -> int:
        """How many blocks of a profile have records; their numbers begin at 0."""
        return 1 + max((facts["study"]["block"] for _, facts in self.records(blocks.profile)), default=-1)

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
        _write(self.folder / "session.json", (json.dumps(self.report, indent=1) + "\n").encode())
        self._pack("records", self._files(self.runs, "*/*.json") | self._files(self.cut, "*/*.json"), PACK_BYTES)

    def pack(self) -> None:
        """The packs, what is hardest to get again first; executed notebooks get the room that the others leave."""
        self.report["left_out"], left_bytes = [], ALL_PACKS_BYTES
        study = self._files(self.runs, "*/*")
        packs = {
            "records": self._files(self.runs, "*/*.json") | self._files(self.cut, "*/*.json"),
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
        self.report["ended"] = _now()
        _write(self.folder / "session.json", (json.dumps(self.report, indent=1) + "\n").encode())
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
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
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
                if member.isfile() and member.name.startswith("runs/"):
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


def has_gpu() -> bool:
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0 and "GPU " in found.stdout


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in FIRST + BENCHMARKS] + [blocks.profile for blocks in BLOCKS]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder for the results")
    parser.add_argument("--budget-s", type=float, default=540, metavar="S", help="seconds for all of it (540)")
    resumed = "what earlier sessions left; their runs are not run again"
    parser.add_argument("--from", dest="earlier", type=Path, nargs="+", default=[], metavar="DIR", help=resumed)
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
        profiles, overhead_profile = {}, ROOT / "params" / "gpu_512.yaml"
        for blocks in BLOCKS:
            path = ROOT / "params" / f"{blocks.profile}.yaml"
            if options.rehearse:
                blocks = Blocks(f"rehearsal_{blocks.profile}", REHEARSED_BLOCK_S)
                rehearsed = session.work / f"{blocks.profile}.yaml"
                rehearsed.write_text(tiny(path.read_text(encoding="utf-8")), encoding="utf-8")
                path = overhead_profile = rehearsed
            if blocks.profile.removeprefix("rehearsal_") not in options.skip:
                profiles[blocks] = path
        session.run_blocks(profiles)
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
