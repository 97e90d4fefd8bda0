"""Records as files: one JSON file per finished run, written whole or not at all, checked on writing and on reading."""

import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path

import pandas as pd
from pydantic import ValidationError

from lib.errors import UsageError
from lib.paths import out_folder, write_whole
from lib.record.schema import FAILURES, SCHEMA_VERSION, Failure, Record, Strict, StudyPosition

POSITION_VARIABLE = "ATTENTION_STUDY_POSITION"  # JSON, set by `lib.study`: profile, session, block, position
FAILED = "failed.json"  # the end of the name of a failed run's note
INCOMPLETE = "incomplete"  # the folder to which `lib.study.cluster` moves what is of no whole block
DEVICE_FOLDER = "device-"  # how the name of each device's folder begins in what `lib.study.gather` made


def study_position() -> StudyPosition:
    """What `lib.study` said about the run that is going on."""
    return StudyPosition(**json.loads(os.environ.get(POSITION_VARIABLE, "{}")))


def write(record: Record, folder: Path | None = None) -> Path:
    """Writes a record to `folder`, by default `out_folder()`; returns its path. A half-written file never shows.

    Raises UsageError where the folder cannot be written; the record then lies in the system's temporary folder.
    """
    folder = folder or out_folder()
    text, file_name = _signed(record), f"{record.name}.json"
    try:
        path = write_whole(folder / file_name, text)
        (folder / f"{record.name}.{FAILED}").unlink(missing_ok=True)
    except OSError as error:
        way_out = _keep_elsewhere(file_name, text)
        raise UsageError(f"the record cannot be written to {folder.name}/: {error.strerror}; {way_out}") from error
    return path


def _keep_elsewhere(file_name: str, text: str) -> str:
    """Hours of measuring are not lost to a full disk where another has room; what to do then."""
    try:
        kept = write_whole(Path(tempfile.mkdtemp(prefix="attention-study-")) / file_name, text)
    except OSError:
        return "make room there and run the cell again"
    return f"it lies in {kept}; make room and move it there"


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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise UsageError(f"{path.name} is no {kind.__name__} record: {where}: {first['msg']}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path.name} cannot be read: {error}") from None
    if found.content_sha256 != checksum(content):
        raise UsageError(f"{path.name} was changed after it was written: its checksum does not fit")
    return found


def _signed(found: Strict) -> str:
    """A model as JSON, validated once more, with the checksum of its content."""
    content = json.loads(type(found).model_validate(found.model_dump()).model_dump_json())
    return json.dumps(content | {"content_sha256": checksum(content)}, indent=1) + "\n"


def checksum(content: dict) -> str:
    """SHA-256 of a record's content as JSON, its own field left out."""
    rest = {name: value for name, value in content.items() if name != "content_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load(path: Path) -> Record:
    """One record. Raises ValueError, with what is wrong in one line, where the file is none or was changed."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is no whole JSON ({error})") from None
    if not isinstance(content, dict) or "schema_version" not in content:
        raise ValueError("it is JSON of another kind")
    if content["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"its schema_version is {str(content['schema_version'])[:20]}, this code reads {SCHEMA_VERSION}; "
            "`python scripts/convert_records.py FOLDER` converts older ones"
        )
    try:
        record = Record.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}") from None
    if record.content_sha256 != checksum(content):
        raise ValueError("it was changed after it was written: its checksum does not fit")
    if Path(path).stem != record.name:
        raise ValueError(f"it is a copy, or renamed: its name is {record.name}")
    return record


def load_all(folder: Path) -> list[Record]:
    """All records of a folder and of the gpus that `lib.gather` has brought together there, by path.

    A file that is no record is named in a warning and left out.
    """
    records = []
    for path in sorted([*Path(folder).glob("*.json"), *Path(folder).glob(f"{DEVICE_FOLDER}*/*.json")]):
        if path.name.endswith(FAILED):
            continue
        try:
            records.append(load(path))
        except (ValueError, OSError) as error:
            warnings.warn(f"{path.name} is left out: {error}", stacklevel=2)
    return records


def failures(folder) -> pd.DataFrame:
    """The runs of a folder that ended without a record: variant, seed's block and why, a row each."""
    rows = []
    for path in sorted(Path(folder).glob(f"*.{FAILED}")):
        try:
            failure = Failure.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            warnings.warn(f"{path.name} is left out: {str(error).splitlines()[0]}", stacklevel=2)
            continue
        why = FAILURES[failure.reason]
        rows.append({"variant": failure.label, "block": failure.study.block, "why": why, "it said": failure.says})
    return pd.DataFrame(rows, columns=["variant", "block", "why", "it said"])


def read(folder) -> pd.DataFrame:
    """A tidy table, a row per run: who, where, every metric with its unit in the column's name.

    List-valued columns hold the series, `certificate` its checks; `null_reasons` says why a metric is missing.
    """
    rows = []
    for record in load_all(Path(folder)):
        rows.append(
            {
                "name": record.name,
                "label": record.label,
                "title": record.title,
                "attention": record.attention,
                "attention_sha256": record.attention_sha256,
                "started_at": record.started_at,
                "finished_at": record.finished_at,
                "seed": record.parameters["seed"],
                "setting": record.setting,
                "profile": record.study.profile,
                "session": record.study.session,
                "block": record.study.block,
                "position": record.study.position,
                "device": record.environment["device"],
                "device_name": record.environment["device_name"],
                "gpu_uuid": (record.environment["gpu"] or {}).get("uuid"),
                "provenance": record.provenance,
                "certified": record.certificate.passed,
                "certificate": record.certificate.model_dump(),
                **record.metrics.model_dump(),
                **{f"series_{name}": value for name, value in record.series.model_dump().items()},
                "parameter_values": record.parameters,
                "data": record.data,
                "kernels": record.kernels,
                "null_reasons": record.null_reasons,
                "flags": record.flags,
            }
        )
    return pd.DataFrame(rows)
