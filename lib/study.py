"""`python -m lib.study [params/PROFILE.yaml]`: train.ipynb by papermill for every variant and seed, then summary.ipynb.

Runs come in blocks: every variant once, and `sdpa` a second time as the null variant, whose difference from itself is
the smallest difference that means anything. The seed is the block's number; the order within blocks is balanced by a
Williams square. What has a record is not run again; what fails is reported at the end and stops nothing else.
"""

import argparse
import json
import os
import sys
import time
import uuid
from pathlib import Path

import nbformat
import yaml

from lib import attention, compare, parameters, record
from lib.errors import UsageError

NOTEBOOKS = record.ROOT / "notebooks"
NULL_VARIANT = {"attention": compare.REFERENCE, "label": compare.NULL}
STUDY_KEYS = {"variants": list, "blocks": int}


def known_parameters() -> dict[str, parameters.Declared]:
    """The parameters that train.ipynb declares, with their defaults."""
    cells = nbformat.read(NOTEBOOKS / "train.ipynb", as_version=4).cells
    (source,) = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    return parameters.declared(source)


def read_profile(path: str | None) -> tuple[dict, dict]:
    """A profile's overrides of the notebook's defaults, and its `study` part. Raises UsageError with the way out."""
    if path is None:
        return {}, {}
    try:
        profile = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        there = ", ".join(f"params/{file.name}" for file in sorted((record.ROOT / "params").glob("*.yaml")))
        raise UsageError(f"there is no profile {path}; there are: {there}, or none for the quick one") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
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
    known = known_parameters()
    parameters.check_names(profile, known)
    for name in ("attention", "knobs", "label", "seed"):
        if name in profile:
            raise UsageError(f"{name} belongs to a run, not to a profile; list it under study: variants in {path}")
    return parameters.check_types(profile, known), about_study


def plan(overrides: dict, variants: list, blocks: int) -> list[dict]:
    """The parameters of every run, in order, all checked. A variant is a name, a path, or a mapping of parameters."""
    known = known_parameters()
    entries = [entry if isinstance(entry, dict) else {"attention": str(entry)} for entry in variants]
    runs = []
    for block, order in enumerate(orders(len(entries), blocks)):
        for position, which in enumerate(order):
            given = overrides | entries[which] | {"seed": block}
            parameters.check_names(given, known)
            values = parameters.check_types({name: line.default for name, line in known.items()} | given, known)
            runs.append({"values": values, "given": given, "block": block, "position": position})
    for run in runs[: len(entries)]:
        parameters.check_values(run["values"])
    names = [parameters.display_name(run["values"]) for run in runs[: len(entries)]]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UsageError(f"two variants are called {doubled[0]!r}; give one of them another label")
    return runs


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


def is_finished(run: dict, folder: Path) -> bool:
    """Whether a record of just this run is there, of the variant's file as it is now."""
    path = folder / f"{parameters.run_name(run['values'])}.json"
    try:
        return record.load(path).attention_sha256 == attention.source_sha256(run["values"]["attention"])
    except (OSError, ValueError):
        return False


def execute(notebook: Path, output: Path, given: dict, context: dict) -> str | None:
    """Papermill in a kernel of its own; returns None, or one line that says what went wrong."""
    import papermill

    os.environ[record.SITTING_VARIABLE] = json.dumps(context)
    try:
        papermill.execute_notebook(
            notebook, output, given, progress_bar=False, kernel_name="python3", start_timeout=300
        )
    except papermill.PapermillExecutionError as error:
        said = str(error.evalue).strip().splitlines() or [""]
        return said[0] if error.ename == "UsageError" else f"{error.ename}: {said[0]}"
    except Exception as error:  # a kernel that died, a folder that cannot be written: the study goes on
        said = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {said[0]}"
    finally:
        del os.environ[record.SITTING_VARIABLE]
    return None


def run_all(runs: list[dict], profile: str) -> dict[str, str]:
    """Runs what is not finished; returns what failed, name to reason."""
    folder = record.out_folder()
    todo = [run for run in runs if not is_finished(run, folder)]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished already")
    sitting, begin, failed = uuid.uuid4().hex[:12], time.monotonic(), {}
    for number, run in enumerate(todo):
        name = parameters.run_name(run["values"])
        left = (time.monotonic() - begin) / number * (len(todo) - number) if number else None
        about = f", about {_minutes(left)} left" if left else ""
        print(f"[{number + 1}/{len(todo)}] {name}{about} ...", flush=True)
        context = {"profile": profile, "sitting": sitting, "block": run["block"], "position": run["position"]}
        started = time.monotonic()
        problem = execute(NOTEBOOKS / "train.ipynb", folder / f"{name}.ipynb", run["given"], context)
        if problem is None and not is_finished(run, folder):
            problem = "the notebook ended, but left no record"
        if problem is None:
            metrics = record.load(folder / f"{name}.json").metrics
            outcome = f"validation loss {metrics.validation_loss:.3f}, window {metrics.time_s:.1f} s"
        else:
            failed[name] = outcome = problem.splitlines()[0]
        print(f"      {_minutes(time.monotonic() - started)}: {outcome}", flush=True)
    return failed


def summarize(folder: Path) -> str | None:
    """summary.ipynb over the records of `folder`, its figures beside them; returns None, or what went wrong."""
    where = os.path.relpath(folder, record.ROOT)
    given = {"records_folder": where, "figures_folder": os.path.join(where, "figures")}
    return execute(NOTEBOOKS / "summary.ipynb", folder / "summary.ipynb", given, {})


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.study", description=__doc__.split("\n\n")[0])
    parser.add_argument("profile", nargs="?", help="a YAML file of overrides; without one the notebook's defaults")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="names or .py files instead of the profile's")
    parser.add_argument("--blocks", type=int, metavar="N", help="how many blocks (seeds 0 to N - 1)")
    parser.add_argument("--plan", action="store_true", help="only check and list the runs")
    options = parser.parse_args(words)
    try:
        overrides, about_study = read_profile(options.profile)
        variants = options.variants or about_study.get("variants") or [*attention.variants(), NULL_VARIANT]
        blocks = options.blocks if options.blocks is not None else about_study.get("blocks", 1)
        if blocks < 1:
            raise UsageError(f"blocks must be at least 1, not {blocks}")
        runs = plan(overrides, variants, blocks)
        folder = record.out_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except (UsageError, OSError) as error:
        print(f"python -m lib.study: {error}", file=sys.stderr)
        return 2
    if options.plan:
        for run in runs:
            state = "finished" if is_finished(run, folder) else "to run"
            print(f"block {run['block']} position {run['position']}: {parameters.run_name(run['values'])} ({state})")
        return 0
    failed = run_all(runs, Path(options.profile).stem if options.profile else "quick")
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
