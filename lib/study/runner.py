"""Runs one after the other, each in a kernel of its own; what has a record is not run again."""

import contextlib
import html
import itertools
import json
import os
import re
import signal
import sys
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from lib import parameters, paths, record
from lib.errors import UsageError, is_out_of_memory
from lib.startup import quick_imports
from lib.study import blocks, plan
from lib.study.blocks import Data, is_finished

GIB = 2**30


class Stopped(BaseException):
    """Ctrl-C or a signal to end: not an error of a run, so nothing that catches those catches it."""


@contextlib.contextmanager
def stoppable():
    """Within it SIGINT, SIGTERM and SIGHUP raise Stopped, once: a second Ctrl-C would leave kernels behind."""

    def stop(number, _):
        for each in handled:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name)

    handled = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, stop) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill_kernels() -> None:
    kernels = psutil.Process().children(recursive=True)
    for kernel in kernels:
        with contextlib.suppress(psutil.NoSuchProcess):
            kernel.kill()
    psutil.wait_procs(kernels, timeout=10)


def execute(notebook: Path, output: Path, given: dict, context: dict) -> tuple[str, str] | None:
    """Papermill in a kernel of its own; returns None, or why it failed: one of `record.FAILURES` and one line."""
    with quick_imports():
        import papermill
        from nbclient.exceptions import DeadKernelError

    os.environ[record.POSITION_VARIABLE] = json.dumps(context)
    killed_before = killed_for_memory()
    options = {"progress_bar": False, "kernel_name": "python3", "start_timeout": 300}
    # Papermill takes braces in a path for parameters to fill in.
    notebook, output = (str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, output))
    options["shutdown_kernel"] = "immediate"  # all it made is written; asked to end, Python clears a second long
    try:
        # In a thread of its own, because in the main one nbclient replaces the handlers of signals.
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(papermill.execute_notebook, notebook, output, given, **options)
            try:
                running.result()
            except Stopped:
                _kill_kernels()
                raise
    except papermill.PapermillExecutionError as error:
        return _reason(error.ename, str(error.evalue))
    except DeadKernelError:
        if killed_for_memory() > killed_before:
            return "out_of_memory", "the system killed the process because memory had run out; lower batch_size"
        return "killed", "the process of the notebook was killed"
    except Exception as error:  # a folder that cannot be written, a full disk: the study goes on
        return "error", f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    finally:
        del os.environ[record.POSITION_VARIABLE]
    return None


def _reason(kind: str, said: str) -> tuple[str, str]:
    said = record.printable((said.strip().splitlines() or [""])[0])
    if kind == "OutOfMemory" or is_out_of_memory(said) or kind == "MemoryError":
        return "out_of_memory", said
    if kind == "LossNotFinite":
        return "loss_not_finite", said
    if kind == "UsageError":
        return "wrong_input", said
    return "error", f"{kind}: {said}"


def killed_for_memory() -> int:
    """How many processes Linux has killed because memory ran out; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="utf-8").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def run_all(
    runs: list[dict], profile: str, session: str | None = None, most: int | None = None, data: Data | None = None
) -> dict[str, str]:
    """Runs what is not finished; returns what failed, name to one line. Each failure is noted beside the records.

    An incomplete block is set aside and run again as a whole (`lib.study.blocks`). `session` goes on where it is named:
    only for who knows that machine, device and code are those of its runs so far, and the pause short. At most `most`
    runs; the others are left for the next time.
    """
    folder, data = paths.out_folder(), data or Data()
    found = blocks.examined(runs, folder, data, session)
    todo = sum(len(block.todo) for block in found)
    if todo < len(runs):
        print(f"{len(runs) - todo} of {len(runs)} runs are finished already")
    print(*blocks.about(found), sep="\n", end="\n" if blocks.about(found) else "")
    going = _Going(profile, session or new_session(), folder, data, todo, todo if most is None else most)
    for block in found:
        tried = going.through(block, block.todo, repeats=block.state == blocks.INCOMPLETE)
        if block.state == blocks.WITHOUT and any(one is None for one in tried):
            going.todo += len(block.runs)
            going.left += len(block.runs)  # they are of this block, which nobody counted twice beforehand
            going.through(block, block.runs, repeats=True)
    return going.failed


class _Going:
    """A study under way: how many of its runs are done, how many may follow, and what failed."""

    def __init__(self, profile: str, session: str, folder: Path, data: Data, todo: int, most: int):
        self.profile, self.session, self.folder, self.data = profile, session, folder, data
        self.todo, self.left, self.done = todo, most, 0
        self.begin, self.failed = time.monotonic(), {}

    def through(self, block: blocks.Block, runs: list[dict], repeats: bool) -> list[str | None]:
        """Makes runs of a block, as many as may follow, what stands in their place set aside first; returns of each
        why it failed. `repeats`: all of the block is set aside."""
        runs = runs[: self.left]
        if runs:
            set_aside(block.runs if repeats else runs, self.folder, self.data, self.session, repeats)
        return [self._one(run, block) for run in runs]

    def _one(self, run: dict, block: blocks.Block) -> str | None:
        name = parameters.run_name(run["values"])
        left = (time.monotonic() - self.begin) / self.done * (self.todo - self.done) if self.done else None
        about = f", about {_minutes(left)} left" if left else ""
        self.done, self.left = self.done + 1, self.left - 1
        print(f"[{self.done}/{self.todo}] {name}{about} ...", flush=True)
        run = run | {"variants": [parameters.display_name(one["values"]) for one in block.runs]}
        problem = run_one(run, self.profile, self.session, self.folder, self.data)
        self.failed.pop(name, None)
        if problem:
            self.failed[name] = problem
        return problem


def new_session() -> str:
    """What tells the runs of one process, one after the other, from all others."""
    return uuid.uuid4().hex[:12]


def set_aside(runs: list[dict], folder: Path, data: Data, session: str, whole: bool = False) -> None:
    """Moves records that stand in the place of runs, but are of other data or of an older file, out of their way, and
    says so: they are measurements too. `whole`: all of these runs', of a block that is repeated. Raises UsageError
    where they cannot be moved."""
    seen = {parameters.run_name(run["values"]): blocks.examined_run(run, folder, data) for run in runs}
    old = {name: reason for name, (made, reason) in seen.items() if reason or (whole and made)}
    if not old:
        return
    aside = folder / record.INCOMPLETE / f"{record.now():%Y-%m-%dT%H%M%SZ}-before-{session}"
    if whole:
        aside = aside.with_name(f"{aside.name}-block-{runs[0]['block']}")
    try:
        aside.mkdir(parents=True)
        for path in [path for name in old for path in sorted(folder.glob(f"{name}.*"))]:
            os.replace(path, aside / path.name)
    except OSError as error:
        raise UsageError(f"{folder.name}/ cannot be written: {error.strerror}; {OTHER_FOLDER}") from error
    for reason, count in Counter(reason for reason in old.values() if reason).items():
        print(f"{count} of the runs to do {'was' if count == 1 else 'were'} made before, but {reason}")
    print(f"what was measured then is kept in {os.path.relpath(aside)}/")


def run_one(run: dict, profile: str, session: str, folder: Path, data: Data | None = None) -> str | None:
    """One run in a kernel of its own; says how it went, and returns why it failed. A failure is noted in `folder`.

    Where `data` is given, a run that saw other tokens has failed: the others would not be comparable with it.
    """
    name = parameters.run_name(run["values"])
    context = {"profile": profile, "session": session, "block": run["block"], "position": run["position"]}
    context["variants"] = run.get("variants")
    started = time.monotonic()
    problem = execute(plan.NOTEBOOKS / "train.ipynb", folder / f"{name}.ipynb", run["given"], context)
    if problem is None and not is_finished(run, folder, None):
        problem = "error", _why_unfinished(run, folder)
    if problem is None and not is_finished(run, folder, data):
        problem = "wrong_input", "the data changed while the study ran; start it again when nobody writes to them"
    if problem is None:
        metrics, failed = record.load(folder / f"{name}.json").metrics, None
        outcome = told(metrics)
    else:
        _note_failure(run, context, *problem, folder)
        failed = outcome = f"{record.FAILURES[problem[0]]}: {problem[1]}"
    print(f"      {_minutes(time.monotonic() - started)}: {outcome}", flush=True)
    return failed


def told(metrics: record.Metrics) -> str:
    """A run's own numbers on the terminal, with the digits of summary.ipynb's table: joules and the GPU's memory, or
    without a GPU what was measured there."""
    parts = {
        "validation loss {:.3f}": metrics.validation_loss,
        "window {:.2f} s": metrics.time_s,
        "{:,.0f} J": metrics.energy_j,
        "CPU {:.2f} s": metrics.cpu_time_s if metrics.peak_memory_bytes is None else None,
        "peak GPU {:,.2f} GiB": metrics.peak_memory_bytes and metrics.peak_memory_bytes / GIB,
        "peak resident {:,.2f} GiB": metrics.peak_resident_bytes and metrics.peak_resident_bytes / GIB,
    }
    return ", ".join(form.format(value) for form, value in parts.items() if value is not None)


def _why_unfinished(run: dict, folder: Path) -> str:
    """What is wrong where a notebook ran to its end and its run is not finished."""
    try:
        record.load(folder / f"{parameters.run_name(run['values'])}.json")
    except (OSError, ValueError):
        return "the notebook ended, but left no record"
    file = record.printable(run["values"]["attention"])
    return f"{file} was changed since the study began; its record is of the other text; start the study again"


def _note_failure(run: dict, context: dict, reason: str, says: str, folder: Path) -> None:
    note = record.Failure(
        name=parameters.run_name(run["values"]),
        label=parameters.display_name(run["values"]),
        setting=parameters.setting(run["values"]),
        study=record.StudyPosition(**context),
        finished_at=record.now(),
        reason=reason,
        says=record.printable(says),
    )
    try:
        record.write_failure(note, folder)
    except OSError as error:
        print(f"      its failure could not be noted: {error.strerror}", file=sys.stderr)


def summarize(folder: Path, own_metrics: dict | None = None) -> str | None:
    """summary.ipynb over the records of `folder`, its figures beside them; returns None, or what went wrong.

    `own_metrics`: those that the study's profile asks for (`lib.record.own`).
    """
    where = os.path.relpath(folder, paths.ROOT)
    given = {"records_folder": where, "figures_folder": os.path.join(where, "figures")}
    given |= {"own_metrics": own_metrics} if own_metrics else {}
    problem = execute(plan.notebook_path("summary.ipynb"), folder / "summary.ipynb", given, {})
    return problem and problem[1]


def answer(page: Path) -> list[str]:
    """What an executed summary.ipynb begins with, as lines for a terminal: the page's own words and numbers."""
    with quick_imports():
        import nbformat  # here, because its time would be added to every job of a workflow

    try:
        cells = nbformat.read(page, as_version=4).cells
        (shown,) = [output.data["text/html"] for cell in cells if cell.id == "conclusion" for output in cell.outputs]
    except (OSError, ValueError, KeyError, AttributeError):
        return []  # then the page is to be opened
    return [html.unescape(re.sub("<[^>]*>", "", said)) for said in re.findall("<p>(.*?)</p>", shown)]


def show_page(folder: Path) -> None:
    """Prints what the study's summary begins with, and where it and its figures are."""
    page = folder.resolve() / "summary.ipynb"
    print(*answer(page), f"tables: {page}", f"figures: {page.parent / 'figures'}", sep="\n", flush=True)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


OTHER_FOLDER = f"name another folder by the environment variable {paths.OUT_VARIABLE}"


def alone_in(folder: Path) -> FileLock:
    """The lock of a study's folder: two studies at once would measure each other. It ends with the process.

    Raises UsageError where another study holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".study.lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise UsageError(
            f"another study runs in {folder.name}/ and would be disturbed; wait for it, or {OTHER_FOLDER}"
        ) from None
    except OSError as error:
        raise UsageError(f"{folder.name}/ cannot be written: {error.strerror}; {OTHER_FOLDER}") from None
    return lock


def load_data(runs: list[dict]) -> Data:
    """Wrong data is said once, before any run (raises UsageError); the tokens are then in the cache."""
    data = Data()
    for run in runs:
        data.token_sha256(run)
    return data


def check_data(runs: list[dict], data: Data) -> None:
    """As `load_data`, for a plan: raises the same UsageError. What would have to be downloaded is only asked for."""
    from lib.data import conversations, corpus

    for values in {parameters.setting(run["values"]): run["values"] for run in runs}.values():
        if conversations.is_here(values["dataset"]):
            data.token_sha256({"values": values})
        else:
            conversations.source(values["dataset"], values["dataset_revision"])
            corpus.load_tokenizer(values["tokenizer"])


def _check_whole(found: list[blocks.Block], most: int) -> None:
    """Raises UsageError where so many runs would end inside a block: the next call would begin it anew."""
    if len(found) == 1:
        return
    ends = list(itertools.accumulate(len(block.todo) for block in found if block.todo))
    if ends and most < ends[-1] and most not in ends:
        below = max((end for end in ends if end < most), default=ends[0])
        raise UsageError(
            f"--runs {most} would end inside a block, whose runs count only together; give --runs {below}, or name by "
            "--session the session that goes on"
        )


RUNS_LEFT = 3  # exit status of a study that was to make some of its runs and has made them


def study(
    runs: list[dict],
    profile: str,
    folder: Path,
    session: str | None = None,
    most: int | None = None,
    own_metrics: dict | None = None,
) -> int:
    """All runs, then the summary; returns the exit status. Raises UsageError, before any run, for unusable data.

    With `most` runs at a time the summary waits for the last of them; until then the status is `RUNS_LEFT`. `session`:
    see `run_all`; `own_metrics`: see `summarize`.
    """
    data = load_data(runs)
    later = blocks.settled(runs, folder, data)
    runs = later.runs
    print(*later.says, sep="\n", end="\n" if later.says else "")
    found = blocks.examined(runs, folder, data, session)
    if most is not None and session is None:
        _check_whole(found, most)
    left = sum(len(block.todo) for block in found) - (len(runs) if most is None else most)
    failed = run_all(runs, profile, session, most, data)
    if left > 0:
        print(f"left to run: {left}; the same command goes on")
    else:
        problem = summarize(folder, own_metrics)
        if problem:
            failed["summary"] = problem
        else:
            show_page(folder)
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    return 1 if failed else RUNS_LEFT if left > 0 else 0
