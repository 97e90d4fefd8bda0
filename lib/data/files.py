"""The rows of data files, one after the other, each as JSON has it and with its place; a file is never held whole.

JSON and JSON lines, also packed by gzip, and Parquet. Nothing is guessed: a path is a file or a folder and no pattern,
and no row's type follows from the rows before it. What a row must hold is said in `lib.data.conversations`.
"""

import codecs
import contextlib
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lib.errors import UsageError

ENDINGS = (".parquet", ".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz")
KNOWN = f"'builtin', a hub id, a {', '.join(ENDINGS)} file, or a folder of such files"
OTHER_SPLITS = {"test", "tests", "validation", "valid", "val", "dev", "eval"}
CHARACTERS = 1 << 20  # read at once of a list
LONGEST_ROW = 128 << 20  # bytes, or characters of a list: a file of a few kB can unpack to a line of any length
# The reader's memory has a bound: only what is in use counts, and nothing that a library sets aside for each core.
PARQUET_VARIABLES = {"ARROW_DEFAULT_MEMORY_POOL": "system", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
PARQUET_READER = Path(__file__).with_name("parquet.py")
TOO_LARGE = 3  # its exit status where a file needs too much memory
SPACE = re.compile(r"[ \t\r\n]*")
# The longest sign in a JSON text that can be cut in two, \ud83d\ude00: an error so near the end may be a lack of text.
LONGEST_SIGN = 12


class Place(NamedTuple):
    """Where a row stands: its file, its number from 1, and where the file has lines the one on which it begins."""

    file: str
    row: int
    line: int | None = None

    def __str__(self) -> str:
        if self.line is None:
            return f"{self.file}, row {self.row}"
        return f"{self.file}, line {self.line}" + (f" (row {self.row})" if self.row != self.line else "")


Row = tuple[Place, object]


def ending(name: str) -> str | None:
    """Which of `ENDINGS` a file's name has, in letters of either case; None where it has none."""
    return next((known for known in ENDINGS if name.lower().endswith(known)), None)


def in_folder(folder: Path) -> tuple[list[Path], int]:
    """The data files in and below a folder, by name, and how many other files are not read; hidden ones are nothing.

    Raises UsageError where there is no data file, or where some look like the validation or test part of the others.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    data = [path for path in files if ending(path.name)]
    if not data:
        raise UsageError(f"the folder {folder.name!r} holds no {', '.join(ENDINGS)} file")
    apart = [path for path in data if OTHER_SPLITS & set(re.split("[^a-z]+", _name(path, folder).lower()))]
    if apart and len(apart) < len(data):
        raise UsageError(
            f"the folder {folder.name!r} holds {_name(apart[0], folder)!r} beside what it is to test; name a folder "
            "that holds only what to train on, or one file"
        )
    return data, len(files) - len(data)


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's bytes: what its name and its date say is not what it holds."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rows(path: Path, name: str) -> Iterator[Row]:
    """Every row of one file, with its place; `name` is what places call the file.

    Raises UsageError, with the line, where the file cannot be read. A row is whatever JSON can hold.
    """
    kind = ending(name)
    if kind == ".parquet":
        yield from _parquet(path, name)
        return
    with (gzip.open if kind.endswith(".gz") else open)(path, "rb") as file:
        start = file.peek(1 << 12).removeprefix(codecs.BOM_UTF8).lstrip()
        # A list is a list also where the file's name promises lines.
        in_lines = kind.removesuffix(".gz") != ".json" and not start.startswith(b"[")
        yield from _lines(file, name) if in_lines else _Stream(file, name).rows()


def plain(text: str) -> str:
    """A name out of somebody's file as it can stand in a sentence or a record: on one line, without control signs."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def no_doubled_names(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. Raises ValueError where a name stands twice: JSON would keep the last and lose the rest."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in found if names.count(name) > 1)!r} twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=no_doubled_names)


@contextlib.contextmanager
def _said_of(place: Place):
    """Turns what is wrong with the text of one row into a sentence."""
    try:
        yield
    except UnicodeDecodeError:
        raise UsageError(f"cannot read {place}: it is not UTF-8; save the file as UTF-8") from None
    except RecursionError:
        raise UsageError(f"cannot read {place}: it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise UsageError(
            f"cannot read {place}: it is no JSON ({error.msg} at character {error.colno}); mend it there"
        ) from None
    except ValueError as error:
        raise UsageError(f"cannot read {place}: {' '.join(str(error).split())[:160]}; mend it there") from None


def _too_long(place: Place) -> UsageError:
    return UsageError(f"cannot read {place}: it is longer than {LONGEST_ROW >> 20} MB; split it, or leave it out")


def _cut(file: BinaryIO) -> Iterator[bytes]:
    """A file's lines, the first that is longer than `LONGEST_ROW` only so far, so that it can be refused by its place.

    Bytes end a line at \\n alone; text would at other signs too.
    """
    return iter(partial(file.readline, LONGEST_ROW + 1), b"")


def _lines(file: BinaryIO, name: str) -> Iterator[Row]:
    row = 0
    for number, line in enumerate(_cut(file), 1):
        if len(line) > LONGEST_ROW:
            raise _too_long(Place(name, row + 1, number))
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            row += 1
            place = Place(name, row, number)
            with _said_of(place):
                value = DECODER.decode(line.decode("utf-8"))
            yield place, value


class _Stream:
    """The values in a file of JSON text: those of the one list that it holds, or those that follow each other."""

    def __init__(self, file: BinaryIO, name: str):
        self.file, self.name = file, name
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def rows(self) -> Iterator[Row]:
        listed = self._next_sign() == "["
        self.at += listed
        row = 0
        while sign := self._next_sign():
            if listed and sign == "]":
                self.at += 1
                if self._next_sign():
                    raise UsageError(f"cannot read {Place(self.name, row, self.line)}: more follows behind the list")
                return
            row += 1
            place = Place(self.name, row, self.line)
            if listed and row > 1:
                if sign != ",":
                    raise UsageError(f"cannot read {place}: it is no JSON (a comma is missing before it)")
                self.at += 1
                self._next_sign()
                place = Place(self.name, row, self.line)
            yield place, self._value(place)
        if listed:
            raise UsageError(f"cannot read {self.name}: its list does not end; the file was cut short after row {row}")

    def _more(self) -> bool:
        """Reads on, as much again as is unread, so that a long value costs no more than twice its length."""
        begin = self.text[self.at :]
        content = self.file.read(max(CHARACTERS, len(begin)))
        self.ended = not content
        try:
            self.text, self.at = begin + self.decoder.decode(content, final=self.ended), 0
        except UnicodeDecodeError as error:
            line = self.line + begin.count("\n") + error.object[: error.start].count(b"\n")
            raise UsageError(f"cannot read {self.name}: line {line} is not UTF-8; save the file as UTF-8") from None
        return not self.ended

    def _to(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def _next_sign(self) -> str:
        """The next character that is no space, where the position then is; nothing at the file's end."""
        while True:
            self._to(SPACE.match(self.text, self.at).end())
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def _value(self, place: Place) -> object:
        with _said_of(place):
            while True:
                try:
                    value, end = DECODER.raw_decode(self.text, self.at)
                except json.JSONDecodeError as error:
                    cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - LONGEST_SIGN
                    if cut and len(self.text) - self.at > LONGEST_ROW:
                        raise _too_long(place) from None
                    if cut and self._more():
                        continue
                    raise ValueError(f"it is no JSON ({error.msg})") from None
                self._to(end)
                return value


def _parquet(path: Path, name: str) -> Iterator[Row]:
    command = [sys.executable, "-P", str(PARQUET_READER), str(path)]
    row = 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | PARQUET_VARIABLES,
        )
        try:
            for row, line in enumerate(_cut(process.stdout), 1):
                place = Place(name, row)
                if len(line) > LONGEST_ROW:
                    raise _too_long(place)
                with _said_of(place):
                    value = DECODER.decode(line.decode("ascii"))
                yield place, value
            status = process.wait()
        finally:
            process.kill()
            process.stdout.close()
            process.wait()
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace").strip().splitlines() or ["it does not say why"]
    if status < 0:
        kind = signal.Signals(-status).name
        raise UsageError(f"cannot read {name}: it crashed its reader after row {row} ({kind}); it is damaged")
    if status == TOO_LARGE:
        raise UsageError(f"cannot read {name}: {said[-1]} behind row {row}; make its rows smaller, or leave it out")
    if status:
        raise UsageError(f"cannot read {name}: {plain(said[-1]).rstrip('.')[:200]}; it is damaged, or no Parquet file")
