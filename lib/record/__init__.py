"""The records of the study: their schemas, and reading and writing them. `lib.record.read(folder)` is the way in."""

from lib.record.files import (
    DEVICE_FOLDER,
    FAILED,
    INCOMPLETE,
    POSITION_VARIABLE,
    checksum,
    failures,
    gpu_uuid,
    load,
    load_all,
    load_failure,
    load_with_text,
    read,
    read_checked,
    read_each,
    study_position,
    write,
    write_checked,
    write_failure,
)  # fmt: skip
from lib.record.names import cleaned, printable
from lib.record.own import OwnMetric, own_metrics
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
    "Certificate", "Check", "Failure", "Metrics", "OwnMetric", "Record", "Series", "Strict", "StudyPosition",
    "checksum", "cleaned", "failures", "gpu_uuid", "load", "load_all", "load_failure", "load_with_text", "now",
    "own_metrics", "printable", "read", "read_checked", "read_each", "study_position", "write", "write_checked",
    "write_failure",
]  # fmt: skip
