"""Gigabytes of records are read by several processes: `python -m lib.record.parallel`, which runs until it is ended.

Each takes one path after the other, a line of JSON, and answers with a line: the record's row in a table, or why the
file is none. What is checked is the same, by the same code; nothing of it is kept for another time. What a process left
unanswered, killed for its memory, say, is read here.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

from lib.paths import ROOT
from lib.record import files, series

MOST_ALONE = 200 << 20  # bytes, up to which starting the others takes longer than it saves
MOST_PROCESSES = 8  # 0.1 GB each
COMMAND = [sys.executable, "-m", "lib.record.parallel"]
MOMENTS = ("started_at", "finished_at")


def rows(paths: list[Path], once: Callable[[dict], dict]) -> Callable[[Path], dict]:
    """What gives the row of each of the `paths` and raises what `files.row` does; they are read by now where they are
    so many that it pays. `once`: lets rows share what is the same in many."""
    processes = min(_cores(), MOST_PROCESSES)
    answers: dict[Path, dict | ValueError] = {}
    if processes > 1 and sum(map(_bytes, paths)) > MOST_ALONE:
        with ThreadPoolExecutor(processes) as threads:
            for part in range(processes):
                threads.submit(_ask, paths[part::processes], once, answers)

    def row(path: Path) -> dict:
        found = answers.pop(path) if path in answers else once(files.row(path))
        if isinstance(found, ValueError):
            raise found
        return found

    return row


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _ask(paths: list[Path], once: Callable[[dict], dict], answers: dict[Path, dict | ValueError]) -> None:
    """Has a process of its own read the paths, as far as it comes."""
    where = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"PYTHONPATH": where}
    with (
        contextlib.suppress(OSError, json.JSONDecodeError),
        subprocess.Popen(COMMAND, env=environment, text=True, encoding="utf-8", **pipes) as process,
    ):
        try:
            for path in paths:
                print(json.dumps(str(path)), file=process.stdin, flush=True)
                answer = json.loads(process.stdout.readline())
                answers[path] = ValueError(answer["why"]) if "why" in answer else once(_row(answer, path))
        finally:
            process.kill()


def _row(answer: dict, path: Path) -> dict:
    """The row that `_answer` has written."""
    moments = {name: answer["row"][name] and datetime.fromisoformat(answer["row"][name]) for name in MOMENTS}
    long = {name: series.unpacked(found, path) for name, found in answer["series"].items()}
    return answer["row"] | moments | long


def main() -> None:
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        for line in sys.stdin:
            print(json.dumps(_answer(Path(json.loads(line)))), flush=True)


def _answer(path: Path) -> dict:
    try:
        row = files.row(path)
    except files.REFUSED as error:
        return {"why": files.why(error)}
    long = {name: series.packed(values) for name, values in row.items() if name.startswith("series_")}
    moments = {name: row[name] and row[name].isoformat() for name in MOMENTS}
    return {"row": {name: None if name in long else value for name, value in row.items()} | moments, "series": long}


if __name__ == "__main__":
    main()
