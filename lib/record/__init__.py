"""The records of the study: their schemas, and reading and writing them. `lib.record.read(folder)` is the way in."""

from lib.record.files import (
    DEVICE_FOLDER,
    FAILED,
    INCOMPLETE,
    POSITION_VARIABLE,
    checksum,
    failures,
    load,
    load_all,
    read,
    read_checked,
    study_position,
    write,
    write_checked,
    write_failure,
)  # fmt: skip
from lib.record.schema import (
    FAILURES,
    REASONS,
    SCHEMA_VERSION,
    Certificate,
    Check,
    Failure,
    Metrics,
    Record,
    Series,
    Strict,
    StudyPosition,
    now,
)  # fmt: skip

__all__ = [
    "DEVICE_FOLDER", "FAILED", "FAILURES", "INCOMPLETE", "POSITION_VARIABLE", "REASONS", "SCHEMA_VERSION",
    "Certificate", "Check", "Failure", "Metrics", "Record", "Series", "Strict", "StudyPosition", "checksum", "failures",
    "load", "load_all", "now", "read", "read_checked", "study_position", "write", "write_checked", "write_failure",
]  # fmt: skip
