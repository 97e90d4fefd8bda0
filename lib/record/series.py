"""Series of records in a table: short ones as they are, long ones read when they are asked for.

A record of 20,000 steps has a megabyte of them, and most pages need none. Of what stays in a file, the path is kept,
and of a curve so many points as a figure draws; counts that only grow are kept whole, as narrow differences.
"""

import base64
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from lib.errors import UsageError

SHORT = 64  # entries, up to which a series stays in memory as it is
ALWAYS = ("validation", "epoch_time_s", "epoch_energy_j", "epoch_edges_j", "inference", "phases", "slope")
MOST_DRAWN = 1000  # points of a curve: of a longer one every so many-th is drawn, and kept


def every(length: int) -> int:
    """Every how many-th point of a curve of so many is drawn."""
    return 1 + length // MOST_DRAWN


def held(series: dict, path: Path) -> dict:
    """A record's series as a table holds them, by the record that was read from `path`."""
    status = path.stat()
    version = status.st_mtime_ns, status.st_size, status.st_ino
    found = {}
    for name, values in series.items():
        if name in ALWAYS or len(values) <= SHORT:
            found[name] = values
        elif name == "non_padding_tokens":
            found[name] = Counts(values)
        else:
            found[name] = InFile(path, version, name, values if name == "train_loss" else None, len(values))
    return found


class Seen(list):
    """Numbers of a record that were looked at all together, with the array that they were then."""

    def __init__(self, values: list, array: np.ndarray):
        super().__init__(values)
        self.array = array


def _array(values: list, kind: type) -> np.ndarray:
    return values.array if isinstance(values, Seen) else np.asarray(values, dtype=kind)


class _Listed(Sequence):
    """What looks like the list that it stands for. Subclasses have `values`, all of it, and `__len__`."""

    def __getitem__(self, which):
        return self.values()[which]

    def __iter__(self):
        return iter(self.values())

    def __eq__(self, other):
        return len(self) == len(other) and self.values() == list(other)

    __hash__ = None


class Counts(_Listed):
    """Whole numbers that never become fewer, such as the tokens seen after each step."""

    def __init__(self, values: list[int]):
        steps = np.diff(_array(values, np.int64))
        self.first, self.length = values[0], len(values)
        is_even = len(steps) and (steps == steps[0]).all()
        self.steps = int(steps[0]) if is_even else steps.astype(np.min_scalar_type(int(steps.max(initial=0))))

    def __len__(self):
        return self.length

    def values(self) -> list[int]:
        return self.array().tolist()

    def array(self) -> np.ndarray:
        if isinstance(self.steps, int):
            return self.first + self.steps * np.arange(self.length, dtype=np.int64)
        return self.first + np.concatenate([[0], np.cumsum(self.steps, dtype=np.int64)])


class InFile(_Listed):
    """A series that stays in its record's file. Raises UsageError where that is no longer the file that was read."""

    def __init__(self, path: Path, version: tuple, name: str, curve: list[float] | None, length: int):
        self.path, self.version, self.name, self.length = path, version, name, length
        self.curve = None if curve is None else np.asarray(curve[:: every(length)], dtype=float)

    def __len__(self):
        return self.length

    def __getitem__(self, which):
        if self.curve is not None and which == slice(None, None, every(self.length)):
            return self.curve.tolist()
        return super().__getitem__(which)

    def values(self) -> list:
        try:
            status = self.path.stat()
            text = self.path.read_text(encoding="utf-8")
        except OSError:
            status = text = None
        if status is None or (status.st_mtime_ns, status.st_size, status.st_ino) != self.version:
            raise UsageError(f"{self.path.name} has changed or gone since it was read; read the records again")
        return json.loads(text)["series"][self.name]


def packed(values) -> object:
    """What `held` gave, as values that JSON can hold; `unpacked` turns it back."""
    if isinstance(values, Counts):
        even = isinstance(values.steps, int)
        return {"first": values.first, "length": values.length, "steps": values.steps if even else _text(values.steps)}
    if isinstance(values, InFile):
        curve = None if values.curve is None else _text(values.curve)
        return {"version": values.version, "name": values.name, "curve": curve, "length": values.length}
    return values


def unpacked(found, path: Path):
    """Of what `packed` gave, what it was made of; `path`: of the record."""
    if not isinstance(found, dict) or "length" not in found:
        return found
    if "steps" in found:
        counts = object.__new__(Counts)
        counts.first, counts.length, steps = found["first"], found["length"], found["steps"]
        counts.steps = steps if isinstance(steps, int) else _of_text(steps)
        return counts
    series = InFile(path, tuple(found["version"]), found["name"], None, found["length"])
    series.curve = None if found["curve"] is None else _of_text(found["curve"])
    return series


def _text(array: np.ndarray) -> list[str]:
    return [array.dtype.str, base64.b64encode(array.tobytes()).decode()]


def _of_text(found: list[str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(found[1]), dtype=found[0])


def as_array(counts: Sequence) -> np.ndarray:
    """Counts of a table, however they are held there."""
    return counts.array() if isinstance(counts, Counts) else np.asarray(counts, dtype=np.int64)


def only_grows(values: list[int]) -> bool:
    """Whether no count is below the one before it. They fit 64 bits: the schema bounds each."""
    if len(values) <= SHORT:
        return all(before <= after for before, after in pairwise(values))
    return bool((np.diff(_array(values, np.int64)) >= 0).all())
