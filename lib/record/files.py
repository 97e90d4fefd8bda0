"""Records as files: one JSON file per finished run, written whole or not at all, checked on writing and on reading.

Every file of records, of whatever kind and whoever sent it, comes in by one door, `_opened`: a regular file of bounded
size, JSON that names nothing twice, numbers and texts that can be calculated with and shown. Then its schema holds.
"""

import hashlib
import json
import os
import secrets
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import ValidationError
from pydantic_core import from_json

from lib.errors import UsageError
from lib.paths import out_folder, read_bounded, write_whole
from lib.record import names, series
from lib.record.schema import FAILURES, NUMBERS, SCHEMA_VERSION, Failure, Record, Series, Strict, StudyPosition

POSITION_VARIABLE = "ATTENTION_STUDY_POSITION"  # JSON, set by `lib.study`: profile, session, block, position
FAILED = "failed.json"  # the end of the name of a failed run's note
INCOMPLETE = "incomplete"  # the folder to which `lib.study.cluster` moves what is of no whole block
MOST_BYTES = 64 << 20  # of a file: a run of a million steps has 40 MB
MOST_ITEMS = 10**6  # in one list
DEEPEST = 12  # lists and dictionaries in each other
DEVICE_FOLDER = "device-"  # how the name of each device's folder begins in what `lib.study.gather` made


def study_position() -> StudyPosition:
    """What `lib.study` said about the run that is going on."""
    return StudyPosition(**json.loads(os.environ.get(POSITION_VARIABLE, "{}")))


def write(record: Record, folder: Path | None = None) -> Path:
    """Writes a record to `folder`, by default `out_folder()`; returns its path. A half-written file never shows. A
    record of an earlier going of the same run is a measurement too: it is kept in `incomplete/`, and that is said.

    Raises UsageError where the folder cannot be written; the record then lies in the system's temporary folder.
    """
    folder = folder or out_folder()
    file_name = f"{record.name}.json"
    try:
        text = _signed(record)
    except ValueError as error:
        kept = _keep_elsewhere(file_name, record.model_dump_json(indent=1) + "\n")
        raise UsageError(f"the record is none by its own schema: {_first_of(error)}; {kept or 'it is lost'}") from error
    try:
        _keep_earlier(folder / file_name, text)
        path = write_whole(folder / file_name, text)
        (folder / f"{record.name}.{FAILED}").unlink(missing_ok=True)
    except OSError as error:
        kept = _keep_elsewhere(file_name, text)
        way_out = f"{kept}; make room and move it there" if kept else "make room there and run the cell again"
        raise UsageError(f"the record cannot be written to {folder.name}/: {error.strerror}; {way_out}") from error
    return path


def _keep_earlier(path: Path, text: str) -> None:
    if not path.is_file() or (path.stat().st_size == len(text.encode()) and path.read_text(encoding="utf-8") == text):
        return
    number = 1
    while (aside := path.parent / INCOMPLETE / f"{path.stem}-earlier-{number}" / path.name).exists():
        number += 1
    aside.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, aside)
    print(f"an earlier record of this run is kept in {INCOMPLETE}/{aside.parent.name}/")


def _keep_elsewhere(file_name: str, text: str) -> str:
    """Hours of measuring are not lost to a full disk where another has room; says where they are, if anywhere."""
    try:
        return f"it lies in {write_whole(Path(tempfile.mkdtemp(prefix='attention-study-')) / file_name, text)}"
    except OSError:
        return ""


def write_failure(failure: Failure, folder: Path) -> Path:
    """Notes beside the records that a run failed. The note goes when the run's record is written."""
    return write_whole(folder / f"{failure.name}.{FAILED}", failure.model_dump_json(indent=1) + "\n")


def write_checked(found: Strict, path: Path) -> Path:
    """Writes a model with a `content_sha256`, whole or not at all. Raises UsageError where it cannot be written."""
    try:
        return write_whole(path, _signed(found))
    except OSError as error:
        raise UsageError(f"{path.parent.name}/{path.name} cannot be written: {error.strerror}; name another") from error


def read_checked(kind: type[Strict], path: Path) -> Strict:
    """What `write_checked` wrote. Raises UsageError, in one line, where it is no such file, or one that was changed."""
    called = names.printable(Path(path).name)
    try:
        content, text = _opened(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{called} cannot be read: {names.printable(error)}") from None
    try:
        return _unchanged(kind, content, text)
    except _ChangedError as error:
        raise UsageError(f"{called}: {error}") from None
    except ValueError as error:
        raise UsageError(f"{called} is no {kind.__name__} record: {error}") from None


def _opened(path: Path) -> tuple[dict, str]:
    """The content of a file of JSON, and its text. Raises ValueError, in one line, for what may not come in."""
    text = read_bounded(path, MOST_BYTES)
    return _parsed(text), text


def said_kind(path: Path) -> str | None:
    """What kind of record a file says it is; None where it says nothing. Raises ValueError as `load` does."""
    content, _ = _opened(path)
    kind = content.get("kind", "run" if "schema_version" in content else None)
    return None if kind is None else str(kind)


def _parsed(text: str) -> dict:
    """The content of a text of JSON. Raises ValueError as `_opened` does."""
    content = _content(text)
    _check_bounds(content)
    return content


def _content(text: str) -> dict:
    """The same, of whatever numbers and texts."""
    try:
        content = json.loads(text, object_pairs_hook=_each_once, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no whole JSON ({error})") from None
    except ValueError as error:
        if "set_int_max_str_digits" not in str(error):  # Python's own advice on a number of thousands of digits
            raise
        raise ValueError("a whole number is beyond what is counted") from None
    if not isinstance(content, dict):
        raise ValueError("it is JSON of another kind")
    return content


def _each_once(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, _ in pairs if sum(other == name for other, _ in pairs) > 1)
        raise ValueError(f"it names {names.printable(twice, 60)!r} twice")
    return found


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _check_bounds(value, depth: int = 0) -> None:
    """Raises ValueError for a number or a text that some table or figure would choke on, and for too much of either.

    A ratio of two numbers, its logarithm and a sum of squares stay finite in float64.
    """
    kind = type(value)
    if kind is float:
        if not (value == 0 or 1e-100 <= abs(value) <= 1e100):
            raise ValueError(f"{value} is beyond what is measured")
    elif kind is int:
        if abs(value) > 2**53:
            raise ValueError("a whole number is beyond what is counted")
    elif kind is str:
        if len(value) > names.LONGEST_TEXT or not value.isprintable():
            raise ValueError(f"a text is not printable, not on one line, or too long: {value[:40]!a}")
    elif kind in (list, dict):
        if depth == DEEPEST:
            raise ValueError("it is nested too deeply")
        if len(value) > MOST_ITEMS:
            raise ValueError(f"a part of it has more than {MOST_ITEMS:,} entries")
        if kind is dict:
            for name in value:
                _check_bounds(name)
            value = value.values()
        for one in value:
            _check_bounds(one, depth + 1)


class _ChangedError(ValueError):
    def __init__(self):
        super().__init__("it was changed after it was written: its checksum does not fit")


def _unchanged(kind: type[Strict], content: dict, text: str) -> Strict:
    """What `_opened` gave as a model. Raises ValueError, in one line, where it is none or was changed."""
    try:
        # From the text: strict, so that nothing is taken for what it is not, but for a moment's text.
        found = kind.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(_first_of(error)) from None
    if found.content_sha256 != checksum(content):
        raise _ChangedError
    return found


def _first_of(error: ValueError) -> str:
    """What is wrong first, and where, in one line."""
    if not isinstance(error, ValidationError):
        return names.printable(error)
    first = error.errors(include_url=False, include_input=False)[0]
    where = names.printable(".".join(map(str, first["loc"])) or "it", 200)
    return f"{where}: {names.printable(first['msg'].removeprefix('Value error, '))}"


def _signed(found: Strict) -> str:
    """A model as JSON, validated once more, with the checksum of its content. What could not be read is not written."""
    content = json.loads(type(found).model_validate(found.model_dump()).model_dump_json())
    _check_bounds(content)
    return json.dumps(content | {"content_sha256": checksum(content)}, indent=1) + "\n"


def checksum(content: dict) -> str:
    """SHA-256 of a record's content as JSON, its own field left out."""
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _canonical(content: dict) -> str:
    return json.dumps({name: value for name, value in content.items() if name != "content_sha256"}, sort_keys=True)


LONG = 1000  # characters of a list, from which on its numbers are looked at all together
OF_A_NUMBER = b"-+0123456789.eE, \n"  # and what stands between two of them
CLOSED_UP = bytes.maketrans(b"\n", b" ")  # a number a line, as `_signed` breaks lines: on one line


def _quickly(text: str) -> Record | None:
    """The record of a file with long lists of numbers, in a quarter of the time; None where it must be looked at
    closely.

    Nothing else comes in this way: the schema sees all but the numbers of series, which are parsed as JSON and bounded
    together, and the checksum is of the lists as they are written: a number that Python would write otherwise fails it.
    """
    sign = secrets.token_hex(16)
    aside: dict[str, bytes] = {}
    for name in NUMBERS:
        begin = text.find(f'"{name}": [') + len(name) + 4
        end = text.find("]", begin) + 1
        if end - begin > LONG and begin > len(name) + 3:
            aside[name] = text[begin:end].encode()
            text = f'{text[:begin]}"{sign}{name}"{text[end:]}'
    if not aside:
        return None
    try:
        content = json.loads(text, object_pairs_hook=_each_once, parse_constant=_no_number)
        _check_bounds(content)
        if any(content["series"][name] != f"{sign}{name}" for name in aside):
            return None  # one of this name stood elsewhere
        numbers = {f"{sign}{name}": _numbers(written, NUMBERS[name]) for name, written in aside.items()}
        found = Record.model_validate_json(text, strict=True, context=numbers)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    first, *parts = _canonical(content).split(f'"{sign}')
    digest = hashlib.sha256(first.encode())
    for part in parts:
        name, _, after = part.partition('"')
        digest.update(_on_one_line(aside[name]))
        digest.update(after.encode())
    return found if found.content_sha256 == digest.hexdigest() else None


def _numbers(written: bytes, kind: type) -> series.Seen:
    """A list of JSON, of numbers of a kind. Raises ValueError or TypeError where something else is in it, or a number
    that `_check_bounds` might refuse."""
    if written[1:-1].translate(None, OF_A_NUMBER):
        raise ValueError("there is more than numbers in it")
    values = from_json(written)
    found = np.asarray(values)
    if found.ndim != 1 or found.dtype not in (np.int64, np.float64) or (kind is int and found.dtype != np.int64):
        raise TypeError("its numbers are of another kind")
    floats = found.astype(float, copy=False)
    sizes = np.abs(floats)
    if not (sizes.size <= MOST_ITEMS and (sizes <= 2**53).all() and ((sizes == 0) | (sizes >= 1e-100)).all()):
        raise ValueError("one of them is beyond what is measured")
    if kind is int:
        return series.Seen(values, found)
    are_floats = written.count(b".") == len(values)  # a whole number has none
    return series.Seen(values if are_floats else floats.tolist(), floats)


def _on_one_line(written: bytes) -> bytes:
    """A list of numbers as JSON writes it without an indent."""
    return b"[" + written[1:-1].translate(CLOSED_UP, b" ").strip() + b"]"


def load(path: Path) -> Record:
    """One record. Raises ValueError, with what is wrong in one line, where the file is none or was changed."""
    return load_with_text(path)[0]


def load_with_text(path: Path) -> tuple[Record, str]:
    """One record, and the very text that was checked, for who copies it. Raises ValueError as `load` does."""
    text = read_bounded(path, MOST_BYTES)
    record = _quickly(text) or _closely(text)
    if Path(path).stem != record.name:
        raise ValueError(f"it is a copy, or renamed: its name is {record.name}")
    return record, text


def _closely(text: str) -> Record:
    content = _content(text)
    if "schema_version" not in content:
        raise ValueError("it is JSON of another kind")
    _check_bounds(content)
    if content["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"its schema_version is {str(content['schema_version'])[:20]}, this code reads {SCHEMA_VERSION}; "
            "`python scripts/convert_records.py FOLDER` converts older ones"
        )
    return _unchanged(Record, content, text)


def load_failure(path: Path) -> Failure:
    """The note of a failed run. Raises ValueError, in one line, where it is none."""
    _, text = _opened(path)
    try:
        return Failure.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(_first_of(error)) from None


def load_all(folder: Path) -> list[Record]:
    """All records of a folder and of the gpus that `lib.gather` has brought together there, by path.

    A file that is no record is named in a warning and left out.
    """
    return read_each(_files(folder), load)


def _files(folder: Path) -> list[Path]:
    paths = [path for pattern in ("*.json", f"{DEVICE_FOLDER}*/*.json") for path in Path(folder).glob(pattern)]
    return [path for path in sorted(paths) if not path.name.endswith(FAILED)]


def read_each(paths, load_one) -> list:
    """What `load_one` makes of each path. A file that it refuses is named in a warning and left out."""
    found = []
    for path in paths:
        try:
            found.append(load_one(path))
        except REFUSED as error:
            warnings.warn(f"{names.printable(path.name)} is left out: {why(error)}", stacklevel=3)
    return found


REFUSED = (UsageError, ValueError, OSError)


def why(error: Exception) -> str:
    """Why a file was refused, in one line."""
    return names.printable(error if not isinstance(error, OSError) else error.strerror or error)


def failures(folder) -> pd.DataFrame:
    """The runs of a folder that ended without a record: variant, seed's block and why, a row each."""
    columns = ["variant", "block", "why", "it said"]
    rows = [
        (failure.label, failure.study.block, FAILURES[failure.reason], failure.says)
        for failure in read_each(sorted(Path(folder).glob(f"*.{FAILED}")), load_failure)
    ]
    return pd.DataFrame(rows, columns=columns)


def gpu_uuid(environment: dict) -> str | None:
    """Which GPU a record is from; None for a CPU, or where NVML did not say."""
    return (environment.get("gpu") or {}).get("uuid")


def read(folder) -> pd.DataFrame:
    """A tidy table, a row per run: who, where, every metric with its unit in the column's name.

    The columns of series hold lists, or of long ones what is used like a list and read from its file when it is asked
    for (`lib.record.series`). `certificate` holds its checks; `null_reasons` says why a metric is missing. What is the
    same in many runs, such as a certificate, is there once: change none of it in place.
    """
    from lib.record import parallel  # here, because it is a command too, which imports this

    shared: dict[str, object] = {}
    paths = _files(folder)
    return pd.DataFrame(read_each(paths, parallel.rows(paths, lambda row: _once(row, shared))))


def row(path: Path) -> dict:
    """A record as a row of `read`. Raises ValueError and OSError as `load` does."""
    return row_of(path, load(path))


ONCE = ("planned", "certificate", "data", "kernels", "null_reasons", "flags")  # the same in many runs


def _once(row: dict, shared: dict[str, object]) -> dict:
    return row | {name: shared.setdefault(json.dumps(row[name]), row[name]) for name in ONCE}


def _dumped(found: Series) -> dict:
    """As `model_dump`, but the long lists are not copied."""
    return {name: getattr(found, name) for name in NUMBERS} | found.model_dump(exclude=set(NUMBERS))


def row_of(path: Path, record: Record) -> dict:
    """The record that was read from `path`, as a row of `read`."""
    return {
        "name": record.name,
        "label": record.label,
        "title": record.title,
        "attention": record.attention,
        "attention_sha256": record.attention_sha256,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
        "seed": record.parameters["seed"],
        "setting": record.setting,
        "token_sha256": record.data.get("token_sha256"),
        "profile": record.study.profile,
        "session": record.study.session,
        "block": record.study.block,
        "position": record.study.position,
        "planned": record.study.variants,
        "device": record.environment["device"],
        "device_name": record.environment["device_name"],
        "gpu_uuid": gpu_uuid(record.environment),
        "provenance": record.provenance,
        "certified": record.certificate.passed,
        "certificate": record.certificate.model_dump(),
        **record.metrics.model_dump(),
        **{f"series_{name}": values for name, values in series.held(_dumped(record.series), path).items()},
        "parameter_values": record.parameters,
        "data": record.data,
        "kernels": record.kernels,
        "null_reasons": record.null_reasons,
        "flags": record.flags,
    }
