"""Runs one after the other, each in a kernel of its own; what has a record is not run again."""

import contextlib
import json
import os
import signal
import sys
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
from filelock import FileLock, Timeout

from lib import attention, parameters, paths, record
from lib.errors import UsageError, is_out_of_memory
from lib.study import plan


class Data:
    """What runs would be trained on if they began now. Each data set is looked at once, when it is first asked for."""

    def __init__(self):
        self.seen: dict[str, str] = {}

    def token_sha256(self, run: dict) -> str:
        """The fingerprint of a run's tokens. Raises UsageError for data that it cannot be trained on."""
        from lib.data import corpus  # here, because its seconds would be added to every run of the workflow

        setting = parameters.setting(run["values"])
        if setting not in self.seen:
            self.seen[setting] = corpus.load(SimpleNamespace(**run["values"])).facts["token_sha256"]
        return self.seen[setting]


def _examined(run: dict, folder: Path, data: Data | None) -> tuple[record.Record | None, str | None]:
    """A run's record where it is there, or why what stands in its place is not: made with another file or data."""
    path = folder / f"{parameters.run_name(run['values'])}.json"
    if not path.exists():
        return None, None
    try:
        found = record.load(path)
        if found.attention_sha256 != attention.source_sha256(run["values"]["attention"]):
            return None, "its variant's file has changed since"
    except (OSError, ValueError):
        return None, "its record is damaged"
    if data is not None and found.data.get("token_sha256") != data.token_sha256(run):
        return None, f"{run['values']['dataset']} has changed since"
    return found, None


def finished(run: dict, folder: Path, data: Data | None) -> record.Record | None:
    """The record of just this run, of the variant's file as it is now and of the tokens that `data` holds, where it is
    there. Without `data` of any tokens: for the process that has just trained on them."""
    return _examined(run, folder, data)[0]


def is_finished(run: dict, folder: Path, data: Data | None) -> bool:
    return finished(run, folder, data) is not None


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

    `session` goes on where it is named: only for who knows that machine, device and code are those of its runs so far,
    and the pause short. At most `most` runs; the others are left for the next time.
    """
    folder, data = paths.out_folder(), data or Data()
    todo = [run for run in runs if not is_finished(run, folder, data)]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished already")
    session, begin, failed = session or new_session(), time.monotonic(), {}
    set_aside(todo[:most], folder, data, session)
    for number, run in enumerate(todo[:most]):
        name = parameters.run_name(run["values"])
        left = (time.monotonic() - begin) / number * (len(todo) - number) if number else None
        about = f", about {_minutes(left)} left" if left else ""
        print(f"[{number + 1}/{len(todo)}] {name}{about} ...", flush=True)
        problem = run_one(run, profile, session, folder, data)
        if problem:
            failed[name] = problem
    return failed


def new_session() -> str:
    """What tells the runs of one process, one after the other, from all others."""
    return uuid.uuid4().hex[:12]


def set_aside(runs: list[dict], folder: Path, data: Data, session: str) -> None:
    """Moves records that stand in the place of runs, but are of other data or of an older file, out of their way, and
    says so: they are measurements too. Raises UsageError where they cannot be moved."""
    old = {parameters.run_name(run["values"]): _examined(run, folder, data)[1] for run in runs}
    old = {name: reason for name, reason in old.items() if reason}
    if not old:
        return
    aside = folder / record.INCOMPLETE / f"{record.now():%Y-%m-%dT%H%M%SZ}-before-{session}"
    try:
        aside.mkdir(parents=True)
        for path in [path for name in old for path in sorted(folder.glob(f"{name}.*"))]:
            os.replace(path, aside / path.name)
    except OSError as error:
        raise UsageError(f"{folder.name}/ cannot be written: {error.strerror}; {OTHER_FOLDER}") from error
    for reason, count in Counter(old.values()).items():
        print(f"{count} of the runs to do {'was' if count == 1 else 'were'} made before, but {reason}")
    print(f"what was measured then is kept in {os.path.relpath(aside)}/")


def run_one(run: dict, profile: str, session: str, folder: Path, data: Data | None = None) -> str | None:
    """One run in a kernel of its own; says how it went, and returns why it failed. A failure is noted in `folder`.

    Where `data` is given, a run that saw other tokens has failed: the others would not be comparable with it.
    """
    name = parameters.run_name(run["values"])
    context = {"profile": profile, "session": session, "block": run["block"], "position": run["position"]}
    started = time.monotonic()
    problem = execute(plan.NOTEBOOKS / "train.ipynb", folder / f"{name}.ipynb", run["given"], context)
    if problem is None and not is_finished(run, folder, None):
        problem = "error", _why_unfinished(run, folder)
    if problem is None and not is_finished(run, folder, data):
        problem = "wrong_input", "the data changed while the study ran; start it again when nobody writes to them"
    if problem is None:
        metrics, failed = record.load(folder / f"{name}.json").metrics, None
        outcome = f"validation loss {metrics.validation_loss:.3f}, window {metrics.time_s:.1f} s"
    else:
        _note_failure(run, context, *problem, folder)
        failed = outcome = f"{record.FAILURES[problem[0]]}: {problem[1]}"
    print(f"      {_minutes(time.monotonic() - started)}: {outcome}", flush=True)
    return failed


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


def summarize(folder: Path) -> str | None:
    """summary.ipynb over the records of `folder`, its figures beside them; returns None, or what went wrong."""
    where = os.path.relpath(folder, paths.ROOT)
    given = {"records_folder": where, "figures_folder": os.path.join(where, "figures")}
    problem = execute(plan.NOTEBOOKS / "summary.ipynb", folder / "summary.ipynb", given, {})
    return problem and problem[1]


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


RUNS_LEFT = 3  # exit status of a study that was to make some of its runs and has made them


def study(runs: list[dict], profile: str, folder: Path, session: str | None = None, most: int | None = None) -> int:
    """All runs, then the summary; returns the exit status. Raises UsageError, before any run, for unusable data.

    With `most` runs at a time the summary waits for the last of them; until then the status is `RUNS_LEFT`. `session`:
    see `run_all`.
    """
    data = load_data(runs)
    left = sum(not is_finished(run, folder, data) for run in runs) - (len(runs) if most is None else most)
    failed = run_all(runs, profile, session, most, data)
    if left > 0:
        print(f"left to run: {left}; the same command goes on")
    else:
        problem = summarize(folder)
        if problem:
            failed["summary"] = problem
        else:
            print(f"tables and figures: {os.path.relpath(folder)}/summary.ipynb and figures/")
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    return 1 if failed else RUNS_LEFT if left > 0 else 0
