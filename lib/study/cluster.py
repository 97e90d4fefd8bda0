"""The study through Snakemake: what workflow/Snakefile needs. `python -m lib.study.cluster RUN SESSION` is one run.

A block counts only if all of it ran in one session on one device. So its runs are a chain, on a cluster one job, and
its session is the Snakemake process that runs this chain: here the only one, on a cluster the one inside the job.
An incomplete block (killed, failed, requeued, changed) is moved aside and run again as a whole, never patched.
"""

import atexit
import contextlib
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lib import parameters, paths, record
from lib.errors import UsageError
from lib.study import forecast, plan, runner
from lib.study.blocks import FINISHED, INCOMPLETE, TO_RUN, by_number, examined

OPTIONS = {"profile": str, "variants": list, "blocks": int, "gpus": int, "records": list}
LIBRARIES = ("OMP", "GOTO", "OPENBLAS", "MKL", "NUMEXPR")
THREADS = (*(f"{library}_NUM_THREADS" for library in LIBRARIES), "VECLIB_MAXIMUM_THREADS")
MOST_GPUS = 8  # workflow/profiles/default/config.yaml has one resource for each


@contextlib.contextmanager
def one_sentence():
    """Ends the process with what a user can put right, where Snakemake would show our traceback behind it."""
    try:
        yield
    except UsageError as error:
        sys.exit(f"snakemake: {error}")


def planned(config: dict, check: bool = True, words: Sequence[str] = ()) -> list[dict]:
    """The runs that `--config` asks for, as `lib.study.plan` orders them, each with all that its own process must know.

    `name` of its record, `before` (the run before it in its block, or None), `profile`, and the `gpu` that its block
    belongs to, None where there is but one. Raises UsageError. By the `words` of its command line a job of the workflow
    plans the blocks of its own runs alone: a plan of a thousand blocks has as many jobs as runs.
    """
    parameters.check_names(config, OPTIONS)
    for name, value in config.items():
        if type(value) is not OPTIONS[name]:
            way_out = f"; write '{name}=[{value}]'" if OPTIONS[name] is list else ""
            raise UsageError(f"{name} must be {OPTIONS[name].__name__}, not {value!r}{way_out}")
    gpus = config.get("gpus", 1)
    if not 1 <= gpus <= MOST_GPUS:
        raise UsageError(f"gpus must be a number from 1 to {MOST_GPUS}, not {gpus!r}")
    asked = (config.get(name) for name in ("profile", "variants", "blocks"))
    runs, profile = plan.chosen(*asked, check, _of_runs(words))
    names = [parameters.run_name(run["values"]) for run in runs]
    labels = {number: [parameters.display_name(run["values"]) for run in part] for number, part in blocks(runs).items()}
    return [
        run
        | {
            "name": name,
            "variants": labels[run["block"]],
            "before": names[index - 1] if run["position"] else None,
            "profile": profile,
        }
        | {"gpu": run["block"] % gpus if gpus > 1 else None}
        for index, (run, name) in enumerate(zip(runs, names, strict=True))
    ]


def of_job(runs: list[dict], words: Sequence[str]) -> list[dict]:
    """The runs whose rules a process of the workflow needs, by its command line: the main one all, a job those that it
    is allowed. Each rule takes Snakemake some time."""
    asked = _allowed(words)
    return runs if asked is None else [run for run in runs if run["name"] in asked]


def _allowed(words: Sequence[str]) -> set[str] | None:
    option = "--allowed-rules"
    if option not in words:
        return None
    return set(itertools.takewhile(lambda word: not word.startswith("--"), words[words.index(option) + 1 :]))


def _of_runs(words: Sequence[str]) -> set[int] | None:
    """The blocks of the runs that a job is allowed, by their seeds; None where it is more than runs, so needs all."""
    seeds = [re.search(r"-seed(\d+)-[0-9a-f]{8}$", name) for name in _allowed(words) or [""]]
    return None if None in seeds else {int(seed[1]) for seed in seeds}


def folder() -> Path:
    """Where the records go, as Snakemake's rules name it. Raises UsageError for a name that they would fill in."""
    found = os.path.relpath(paths.out_folder())
    if "{" in found or "}" in found:
        raise UsageError(
            f"the output folder {found} has braces in its name, which Snakemake takes for wildcards; "
            f"{runner.OTHER_FOLDER}"
        )
    return Path(found)


def blocks(runs: list[dict]) -> dict[int, list[dict]]:
    """The runs by block."""
    return by_number(runs)


def states(runs: list[dict], folder: Path) -> dict[int, str]:
    """Of each block in a folder: `finished` (all of it, in one session on one device, on the tokens of now),
    `incomplete`, or `to run`. Raises UsageError where there are records, but not their data."""
    found = examined(runs, folder, runner.Data(), patch=False)
    return {block.number: block.state if block.state in (FINISHED, TO_RUN) else INCOMPLETE for block in found}


def show(runs: list[dict], found: dict[int, str], folder: Path, records=None) -> None:
    """Prints the plan: what is there already by `states`, what is to run, and what that will take."""
    print(
        f"{len(runs)} runs in {len(found)} block{'s' if len(found) > 1 else ''}, records in {os.path.relpath(folder)}/"
    )
    for state, says in (
        ("finished", "finished"),
        ("incomplete", "incomplete, to be run again as a whole"),
        ("to run", "to run"),
    ):
        numbers = [str(number) for number in found if found[number] == state]
        if numbers:
            print(f"blocks {says}: {', '.join(numbers)}")
    print(plan.about_order(runs))
    todo = [run for run in runs if found[run["block"]] != "finished"]
    print("\n".join(forecast.lines(todo, forecast.earlier(records))), flush=True)


def left(block: list[dict], folder: Path) -> list[str]:
    """What a block's runs left behind: records, executed notebooks, notes of failures."""
    return sorted(str(path) for run in block for path in folder.glob(f"{run['name']}.*"))


def begin(runs: list[dict], folder: Path) -> None:
    """Before the first job: no other study may run in the folder until this process ends, and unusable data is said
    once. Raises UsageError."""
    atexit.register(runner.alone_in(folder).release)
    runner.load_data(runs)


def refusal(run: dict, session: str, folder: Path) -> str | None:
    """Why a run would only patch its block: what came before it, or its own first try, is not of this going."""
    again = "start the workflow again, and the whole block is"
    if run["before"]:
        try:
            before = record.load(folder / f"{run['before']}.json").study.session
        except (OSError, ValueError):
            before = None
        if before != session:
            return f"{run['before']}, which comes before it in its block, is not of this session; {again}"
    try:
        note = record.load_failure(folder / f"{run['name']}.{record.FAILED}")
    except (OSError, ValueError):
        return None
    return f"it failed in this session; {again}" if note.study.session == session else None


def threads_as_given() -> str:
    """Shell commands that undo what Snakemake sets in every job: one thread, where a study takes what it is given."""
    quoted = {name: shlex.quote(os.environ[name]) for name in THREADS if name in os.environ}
    given = (f"export {name}={quoted[name]}" if name in quoted else f"unset {name}" for name in THREADS)
    return "; ".join(given)


def use_gpu(gpu: int) -> None:
    """From here on this process and its kernel see one GPU: the `gpu`-th of those that it sees now."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = seen.split(",") if seen else [str(index) for index in range(MOST_GPUS)]
    if gpu >= len(gpus):
        raise UsageError(f"there is no GPU {gpu}: CUDA_VISIBLE_DEVICES names {len(gpus)}")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[gpu]


def main(words: list[str]) -> int:
    """`RUN SESSION`: the run that a JSON text of `planned` describes; no words, or a JSON text of the metrics of
    one's own: the summary of all records."""
    folder = paths.out_folder()
    try:
        with runner.stoppable():
            if len(words) < 2:
                problem = runner.summarize(folder, json.loads(words[0]) if words else None)
                if not problem:
                    runner.show_page(folder)
            else:
                run, session = json.loads(words[0]), words[1]
                if run["gpu"] is not None:
                    use_gpu(run["gpu"])
                print(f"block {run['block']} position {run['position']}: {run['name']} ...", flush=True)
                problem = refusal(run, session, folder) or runner.run_one(run, run["profile"], session, folder)
    except UsageError as error:
        problem = str(error)
    except runner.Stopped as signal_name:
        problem = f"stopped by {signal_name}"
    if problem:
        print(f"FAILED {run['name'] if len(words) > 1 else 'summary'}: {problem}", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
