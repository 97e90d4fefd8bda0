"""`python -m lib.record FOLDER [FOLDER ...]`: is each file in these folders, and below, a record as it was written?

A line for each file that is not, with what is wrong and the way out, and one for each folder: how many records of each
kind, and what else lies there. Exit status 0 where all is well, 1 where a file is wrong, 2 where it was asked wrongly.
What is to be contributed is asked more: `python -m lib.analysis.contributed FOLDER`.
"""

import argparse
import json
import sys
from pathlib import Path

from lib.errors import UsageError
from lib.record import folders
from lib.record.folders import Looked
from lib.record.names import printable

CALLED = {
    "run": ("run", "runs"),
    "failure": ("note of a failed run", "notes of failed runs"),
    "probe": ("probe", "probes"),
    "scaling": ("record of scaling", "records of scaling"),
    "steps": ("record of steps", "records of steps"),
    "benchmark": ("benchmark", "benchmarks"),
    "prediction": ("prediction", "predictions"),
}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lib.record", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a folder that holds records")
    parser.add_argument("--json", action="store_true", help="the same as JSON, for programs")
    given = parser.parse_args(words)
    found = []
    try:
        for one in folders.look(given.folders):
            found.append(one)
            if not given.json:
                for line in (*one.wrong, *summary(one)):
                    print(line)
        if given.json:
            print(json.dumps({"folders": list(map(_plain, found))}, indent=1))
        if not any(one.kinds or one.wrong for one in found):
            named = ", ".join(printable(folder) for folder in given.folders)
            raise UsageError(f"no .json file lies in {named} or below; name the folder that your runs wrote to")
    except UsageError as error:
        print(f"python -m lib.record: {error}", file=sys.stderr)
        return 2
    return 1 if any(one.wrong for one in found) else 0


def summary(one: Looked) -> list[str]:
    """A line on a folder: what it holds, and how well; none where it is empty but for folders."""
    counted = [f"{one.kinds[kind]} {CALLED[kind][one.kinds[kind] > 1]}" for kind in CALLED if one.kinds[kind]]
    if not (counted or one.wrong or one.aside):
        return []
    state = f"{len(one.wrong)} wrong" if one.wrong else "all well" if counted else None
    said = ", ".join([*(counted or ["no record"]), *([state] if state else [])])
    return [f"{one.name}: {said}{f'; left aside: {folders.several(one.aside)}' if one.aside else ''}"]


def _plain(one: Looked) -> dict:
    return {"folder": one.name, "kinds": dict(one.kinds), "wrong": list(map(str, one.wrong)), "left_aside": one.aside}


if __name__ == "__main__":
    sys.exit(main())
