"""`python -m lib.study [params/PROFILE.yaml]`: train.ipynb by papermill for every variant and seed, then summary.ipynb.

Runs come in blocks: every variant once, and `sdpa` a second time as the null variant, whose difference from itself is
the smallest difference that means anything. The seed is the block's number; the order within blocks is balanced by a
Williams square. What has a record is not run again; what fails is reported at the end and stops nothing else.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import yaml
from filelock import FileLock, Timeout

from lib import attention, compare, forecast, parameters, record
from lib.errors import UsageError, is_out_of_memory

NOTEBOOKS = record.ROOT / "notebooks"
NULL_VARIANT = {"attention": compare.REFERENCE, "label": compare.NULL}
STUDY_KEYS = {"variants": list, "blocks": int}


def known_parameters(notebook: str = "train.ipynb") -> dict[str, parameters.Declared]:
    """The parameters that a notebook declares, with their defaults."""
    cells = nbformat.read(NOTEBOOKS / notebook, as_version=4).cells
    (source,) = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    return parameters.declared(source)


def read_profile(path: str | None, notebook: str = "train.ipynb") -> tuple[dict, dict]:
    """A profile's overrides of the notebook's defaults, and its `study` part. Raises UsageError with the way out."""
    if path is None:
        return {}, {}
    try:
        profile = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        there = ", ".join(f"params/{file.name}" for file in sorted((record.ROOT / "params").glob("*.yaml")))
        raise UsageError(f"there is no profile {path}; there are: {there}, or none for the quick one") from None
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"the profile {path} cannot be read as YAML: {reason}") from None
    if not isinstance(profile, dict):
        raise UsageError(f"the profile {path} must be lines of `name: value`")
    about_study = profile.pop("study", {})
    if not isinstance(about_study, dict):
        raise UsageError(f"`study` in {path} must hold {' and '.join(STUDY_KEYS)}")
    parameters.check_names(about_study, STUDY_KEYS)
    for name, value in about_study.items():
        if type(value) is not STUDY_KEYS[name]:
            raise UsageError(f"{name} in {path} must be {STUDY_KEYS[name].__name__}, not {value!r}")
    known = known_parameters(notebook)
    parameters.check_names(profile, known)
    for name in ("attention", "knobs", "label", "seed"):
        if name in profile:
            raise UsageError(f"{name} belongs to a run, not to a profile; list it under study: variants in {path}")
    return parameters.check_types(profile, known), about_study


def plan(overrides: dict, variants: list, blocks: int, check: bool = True) -> list[dict]:
    """The parameters of every run, in order, all checked. A variant is a name, a path, or a mapping of parameters.

    Without `check` their values are not looked at, which takes seconds: for a process of a study that has begun.
    """
    known = known_parameters()
    entries = [entry if isinstance(entry, dict) else {"attention": str(entry)} for entry in variants]
    runs = []
    nulls = [index for index, entry in enumerate(entries) if entry.get("label") == compare.NULL]
    others = [index for index in range(len(entries)) if index not in nulls]
    for block, square in enumerate(orders(len(others), blocks)):
        order = [others[which] for which in square]
        for null in nulls:  # it wanders through all places, and leaves the balance of the others as it is
            order.insert(block % len(entries), null)
        for position, which in enumerate(order):
            given = overrides | entries[which] | {"seed": block}
            parameters.check_names(given, known)
            values = parameters.check_types({name: line.default for name, line in known.items()} | given, known)
            values = parameters.portable(values)
            given = {name: values[name] for name in given}
            runs.append({"values": values, "given": given, "block": block, "position": position})
    for run in runs[: len(entries)] if check else ():
        parameters.check_values(run["values"])
    names = [parameters.display_name(run["values"]) for run in runs[: len(entries)]]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UsageError(f"two variants are called {doubled[0]!r}; give one of them another label")
    return runs


def chosen(
    path: str | None, variants: list | None = None, blocks: int | None = None, check: bool = True
) -> tuple[list[dict], str]:
    """The plan of a profile's file, other variants or blocks than its own where given, and the profile's name."""
    overrides, about_study = read_profile(path)
    variants = variants or about_study.get("variants") or [*attention.variants(), NULL_VARIANT]
    blocks = blocks if blocks is not None else about_study.get("blocks", 1)
    if type(blocks) is not int or blocks < 1:
        raise UsageError(f"blocks must be a whole number, at least 1, not {blocks!r}")
    return plan(overrides, variants, blocks, check), Path(path).stem if path else "quick"


def orders(variants: int, blocks: int) -> list[list[int]]:
    """Orders of `variants` runs for each block, from a Williams square (Williams 1949): over a whole square every
    variant stands in every position, and follows every other, equally often."""
    zigzag = [0]
    for step in range(1, variants):
        zigzag.append((zigzag[-1] + (step if step % 2 else -step)) % variants)
    square = [[(place + shift) % variants for place in zigzag] for shift in range(variants)]
    if variants % 2:
        square += [row[::-1] for row in square]
    return [square[block % len(square)] for block in range(blocks)]


def finished(run: dict, folder: Path) -> record.Record | None:
    """The record of just this run, of the variant's file as it is now, where it is there."""
    try:
        found = record.load(folder / f"{parameters.run_name(run['values'])}.json")
        return found if found.attention_sha256 == attention.source_sha256(run["values"]["attention"]) else None
    except (OSError, ValueError):
        return None


def is_finished(run: dict, folder: Path) -> bool:
    return finished(run, folder) is not None


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

    os.environ[record.SITTING_VARIABLE] = json.dumps(context)
    killed_before = killed_for_memory()
    options = {"progress_bar": False, "kernel_name": "python3", "start_timeout": 300}
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
        del os.environ[record.SITTING_VARIABLE]
    return None


def _reason(kind: str, said: str) -> tuple[str, str]:
    said = (said.strip().splitlines() or [""])[0]
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
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def run_all(runs: list[dict], profile: str) -> dict[str, str]:
    """Runs what is not finished; returns what failed, name to one line. Each failure is noted beside the records."""
    folder = record.out_folder()
    todo = [run for run in runs if not is_finished(run, folder)]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished already")
    sitting, begin, failed = new_sitting(), time.monotonic(), {}
    for number, run in enumerate(todo):
        name = parameters.run_name(run["values"])
        left = (time.monotonic() - begin) / number * (len(todo) - number) if number else None
        about = f", about {_minutes(left)} left" if left else ""
        print(f"[{number + 1}/{len(todo)}] {name}{about} ...", flush=True)
        problem = run_one(run, profile, sitting, folder)
        if problem:
            failed[name] = problem
    return failed


def new_sitting() -> str:
    """What tells the runs of one process, one after the other, from all others."""
    return uuid.uuid4().hex[:12]


def run_one(run: dict, profile: str, sitting: str, folder: Path) -> str | None:
    """One run in a kernel of its own; says how it went, and returns why it failed. A failure is noted in `folder`."""
    name = parameters.run_name(run["values"])
    context = {"profile": profile, "sitting": sitting, "block": run["block"], "position": run["position"]}
    started = time.monotonic()
    problem = execute(NOTEBOOKS / "train.ipynb", folder / f"{name}.ipynb", run["given"], context)
    if problem is None and not is_finished(run, folder):
        problem = "error", "the notebook ended, but left no record"
    if problem is None:
        metrics, failed = record.load(folder / f"{name}.json").metrics, None
        outcome = f"validation loss {metrics.validation_loss:.3f}, window {metrics.time_s:.1f} s"
    else:
        _note_failure(run, context, *problem, folder)
        failed = outcome = f"{record.FAILURES[problem[0]]}: {problem[1]}"
    print(f"      {_minutes(time.monotonic() - started)}: {outcome}", flush=True)
    return failed


def _note_failure(run: dict, context: dict, reason: str, says: str, folder: Path) -> None:
    note = record.Failure(
        name=parameters.run_name(run["values"]),
        label=parameters.display_name(run["values"]),
        setting=parameters.setting(run["values"]),
        sitting=record.Sitting(**context),
        finished_at=record.now(),
        reason=reason,
        says=says,
    )
    try:
        record.write_failure(note, folder)
    except OSError as error:
        print(f"      its failure could not be noted: {error.strerror}", file=sys.stderr)


def summarize(folder: Path) -> str | None:
    """summary.ipynb over the records of `folder`, its figures beside them; returns None, or what went wrong."""
    where = os.path.relpath(folder, record.ROOT)
    given = {"records_folder": where, "figures_folder": os.path.join(where, "figures")}
    problem = execute(NOTEBOOKS / "summary.ipynb", folder / "summary.ipynb", given, {})
    return problem and problem[1]


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.study", description=__doc__.split("\n\n")[0])
    parser.add_argument("profile", nargs="?", help="a YAML file of overrides; without one the notebook's defaults")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="names or .py files instead of the profile's")
    parser.add_argument("--blocks", type=int, metavar="N", help="how many blocks (seeds 0 to N - 1)")
    parser.add_argument("--plan", action="store_true", help="only check and list the runs, and what they will take")
    parser.add_argument("--records", nargs="+", metavar="FOLDER", help="where --plan finds earlier records")
    options = parser.parse_args(words)
    lock = None
    try:
        runs, profile = chosen(options.profile, options.variants, options.blocks)
        folder = record.out_folder()
        if options.plan:
            states = ["finished" if is_finished(run, folder) else "to run" for run in runs]
            for run, state in zip(runs, states, strict=True):
                print(
                    f"block {run['block']} position {run['position']}: {parameters.run_name(run['values'])} ({state})"
                )
            todo = [run for run, state in zip(runs, states, strict=True) if state == "to run"]
            print("\n".join(forecast.lines(todo, forecast.earlier(options.records))))
            return 0
        lock = alone_in(folder)
        with stoppable():
            return study(runs, profile, folder)
    except UsageError as error:
        print(f"python -m lib.study: {error}", file=sys.stderr)
        return 2
    except Stopped as signal_name:
        print(f"\nstopped by {signal_name}; the same command finishes what is missing", file=sys.stderr)
        return 130
    finally:
        if lock is not None:
            lock.release()


def alone_in(folder: Path) -> FileLock:
    """The lock of a study's folder: two studies at once would measure each other. It ends with the process.

    Raises UsageError where another study holds it, or the folder cannot be written.
    """
    other = f"name another folder by the environment variable {record.OUT_VARIABLE}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".study.lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise UsageError(
            f"another study runs in {folder.name}/ and would be disturbed; wait for it, or {other}"
        ) from None
    except OSError as error:
        raise UsageError(f"{folder.name}/ cannot be written: {error.strerror}; {other}") from None
    return lock


def load_data(runs: list[dict]) -> None:
    """Wrong data is said once, before any run (raises UsageError); the tokens are then in the cache."""
    from lib import corpus  # here, because its seconds would be added to every run of the workflow

    corpus.load(SimpleNamespace(**runs[0]["values"]))


def study(runs: list[dict], profile: str, folder: Path) -> int:
    """All runs, then the summary; returns the exit status. Raises UsageError, before any run, for unusable data."""
    load_data(runs)
    failed = run_all(runs, profile)
    problem = summarize(folder)
    if problem:
        failed["summary"] = problem
    else:
        print(f"tables and figures: {os.path.relpath(folder)}/summary.ipynb and figures/")
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
