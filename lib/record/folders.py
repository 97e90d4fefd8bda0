"""Folders of records, looked through: of each file what it is, or in one line what is wrong with it."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lib.errors import UsageError
from lib.record import kinds
from lib.record.names import printable
from lib.record.schema import Strict

WAYS_OUT = {  # by what stands in the sentence that refuses a file; the first that fits
    "`python ": "",  # it says one itself
    "checksum": "put back the file as it was written: no number of a record is changed by hand",
    "a copy, or renamed": "call it so again, or take it out",
    "Permission denied": "make it readable",
    "another kind": "take it out, if it is no record",
    "its kind is": "take it out, or update this code",
}
MOST_NAMED = 5
TAKE_IT_OUT = "take it out, or have what wrote it write it anew"


class Wrong(NamedTuple):
    """What is wrong with a file or folder, and the way out, as a line."""

    where: str
    says: str

    def __str__(self):
        return f"{self.where}: {self.says}"


@dataclass
class Looked:
    """One folder without those below it: what was kept of each record, what is wrong with others, and the names of what
    else lies there."""

    path: Path
    kinds: Counter = field(default_factory=Counter)
    kept: list = field(default_factory=list)
    wrong: list[Wrong] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return printable(self.path)


def look(
    folders: Iterable[Path], keep: Callable[[Path, str, Strict], object] = lambda path, kind, found: kind
) -> Iterator[Looked]:
    """Folders and all below them, each once, by path; `keep` of each record's path, kind and content is what is kept.

    Links are not followed, nor folders and files whose names begin with a dot. Whatever lies there, this ends without
    an error. Raises UsageError, before anything is read, for a folder that is not there.
    """
    todo = [(path, os.path.realpath(path)) for path in map(_there, folders)][::-1]
    return _looked(todo, keep)


def _looked(todo: list[tuple[Path, str]], keep) -> Iterator[Looked]:
    """Of each folder, and the one that was named and that it lies in: no link leads out of that."""
    seen = set()
    while todo:
        path, root = todo.pop()
        found = Looked(path)
        try:
            status = os.stat(path)
            if (sign := (status.st_dev, status.st_ino)) in seen:
                continue
            seen.add(sign)
            todo += [(below, root) for below in reversed(_take(found, root, keep))]
        except OSError as error:
            _refuse(found, path, f"it cannot be listed ({error.strerror}); make it readable, or take it out")
        yield found


def _there(folder: Path) -> Path:
    folder, called = Path(folder), printable(folder)
    if folder.is_dir():
        return folder
    if os.path.lexists(folder):
        raise UsageError(f"{called} is no folder; name the folder in which the records lie")
    raise UsageError(
        f"there is no folder {called}, seen from {printable(Path.cwd().name)}/; name one that holds records"
    )


def _take(found: Looked, root: str, keep) -> list[Path]:
    """Looks at what lies in one folder; returns the folders in it. Raises OSError where it cannot be listed."""
    with os.scandir(found.path) as entries:
        lying = sorted(entries, key=lambda entry: entry.name)
    below = []
    for entry in lying:
        path, is_record = Path(entry.path), entry.name.endswith(".json")
        if entry.name.startswith("."):
            found.aside.append(printable(entry.name))
        elif entry.is_symlink():
            real = Path(os.path.realpath(path))
            if is_record and not (real.is_relative_to(root) and real.is_file()):
                _refuse(found, path, "it is a link, out of the folder or to nothing; put the file itself there")
            else:
                found.aside.append(f"{printable(entry.name)} (a link)")
        elif entry.is_dir(follow_symlinks=False):
            if is_record:
                _refuse(found, path, "it is a folder, called like a record; give it another name")
            else:
                below.append(path)
        elif is_record:
            _read(found, path, keep)
        else:
            found.aside.append(printable(entry.name))
    return below


def _read(found: Looked, path: Path, keep) -> None:
    try:
        kind, content = kinds.load(path)
        found.kept.append(keep(path, kind, content))
        found.kinds[kind] += 1
    except UsageError as error:
        said = str(error)
        way_out = next((way for sign, way in WAYS_OUT.items() if sign in said), TAKE_IT_OUT)
        said = said.removeprefix(printable(path.name)).removeprefix(":").strip()
        _refuse(found, path, f"{said}; {way_out}" if way_out else said)
    except Exception as error:  # of files that strangers made, so none may stop the rest
        _refuse(found, path, f"it cannot be read ({type(error).__name__}: {printable(error, 200)}); {TAKE_IT_OUT}")


def _refuse(found: Looked, path: Path, says: str) -> None:
    found.wrong.append(Wrong(printable(path), says))


def several(names: list[str]) -> str:
    """Names as a line has room for: the first five, and how many more."""
    more = len(names) - MOST_NAMED
    return f"{', '.join(names[:MOST_NAMED])}{f' and {more} more' if more > 0 else ''}"
