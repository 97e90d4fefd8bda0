"""The run record: one JSON file per finished run, written whole or not at all, checked on writing and on reading."""

import hashlib
import json
import os
import tempfile
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lib.errors import UsageError

SCHEMA_VERSION = 1
ROOT = Path(__file__).resolve().parent.parent
OUT_VARIABLE = "ATTENTION_STUDY_OUT"  # the folder that runs write to, instead of notebooks/out
SITTING_VARIABLE = "ATTENTION_STUDY_SITTING"  # JSON, set by `lib.study`: profile, sitting, block, position

FAILED = "failed.json"  # the end of the name of a failed run's note
TORN = "torn"  # the name of the folder in which `lib.cluster` puts aside what is of no whole block
CARD = "card-"  # the begin of the name of a folder with one card's records, in one that `lib.gather` made

REASONS = {
    "no_gpu": "the run used no GPU",
    "gpu_run": "not the memory that a GPU run is about",
    "nvml_unavailable": "NVIDIA's management library does not answer",
    "nvidia_smi_unavailable": "nvidia-smi does not answer",
    "gpu_lost": "the GPU stopped answering NVIDIA's management library during the run",
    "mig": "the GPU is split (MIG) and its counter counts all parts",
    "counter_unsupported": "this GPU has no energy counter",
    "counter_zero": "the energy counter did not move",
    "counter_reset": "the energy counter went backwards",
    "window_too_short": "under 10 s, too short for the energy counter",
    "foreign_process": "another process ran on the GPU",
    "counter_power_disagree": "the energy counter and the power trace differ by more than 10 %",
    "not_idle": "the GPU drew as much before the run as in it",
    "rapl_unavailable": "no energy counter of the CPU (RAPL)",
    "permission": "this user may not read the energy counter",
    "peak_unknown": "the device's peak FLOP/s is in no table of ours",
    "peak_not_resettable": "the system keeps no peak of its own for the window",
    "not_counted_here": "the system does not count it per process",
    "not_asked_for": "not asked for by the run's parameters",
}

Measured = Annotated[float | None, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Metrics(Strict):
    """Every number that figures and tables may show. None has its reason in the record's `null_reasons`."""

    time_s: float = Field(gt=0, allow_inf_nan=False)
    time_per_epoch_s: float = Field(gt=0, allow_inf_nan=False)
    useful_tokens_per_s: float = Field(gt=0, allow_inf_nan=False)
    energy_j: Measured
    energy_per_useful_token_j: Measured
    mean_power_w: Measured
    idle_power_w: Measured
    net_energy_j: Measured
    gpu_utilization_percent: Measured
    gpu_busy_share: Measured
    cpu_energy_j: Measured
    cpu_time_s: Measured
    cpu_cores_used: Measured
    disk_bytes: Measured
    peak_memory_bytes: Measured
    peak_reserved_memory_bytes: Measured
    peak_resident_bytes: Measured
    forward_flops_useful: Measured
    forward_flops_dense: Measured
    forward_flops_counted: Measured
    attention_core_share: Measured
    useful_flops_per_s: Measured
    mfu: Measured
    train_loss: Measured
    validation_loss: Measured
    prefill_latency_s: Measured
    decode_latency_s_per_token: Measured
    cache_bytes: Measured
    parameters: int
    checkpoint_bytes: Measured


class Point(Strict):
    """A validation: after how many useful tokens, at what loss (nats per token)."""

    useful_tokens: int
    loss: Measured


class Latency(Strict):
    """Inference on one sequence at one context length."""

    context: int
    prefill_latency_s: float
    decode_latency_s_per_token: float
    cache_bytes: int
    cache_bytes_analytic: int
    prefill_energy_j: Measured
    decode_energy_j_per_token: Measured
    energy_null_reason: Literal[tuple(REASONS)] | None


class Phase(Strict):
    """A part of a training step, in a loop of its own; `derived` ones are differences of others."""

    phase: str
    derived: bool
    time_s_per_step: float
    least_time_s_per_step: float
    energy_j_per_step: Measured
    energy_null_reason: Literal[tuple(REASONS)] | None


class Slope(Strict):
    """Cost of forward and backward by the number of blocks that keep their attention, and of one of them (95 %)."""

    kept: list[int]
    time_s_per_step: list[float]
    time_s_per_core: float
    time_s_per_core_low: float
    time_s_per_core_high: float
    time_r_squared: float
    energy_j_per_step: list[float] | None
    energy_j_per_core: Measured
    energy_j_per_core_low: Measured
    energy_j_per_core_high: Measured
    energy_r_squared: Measured
    energy_null_reason: Literal[tuple(REASONS)] | None


class LogPoint(Strict):
    """How far the window was, on the device's clock, when a step was done; joules where counter and trace agree."""

    step: int
    time_s: float
    energy_j: Measured


class Check(Strict):
    """One thing that a reviewer would ask of a run. What is flagged is one of the record's flags."""

    check: str
    value: Measured
    limit: Measured
    verdict: Literal["green", "flagged", "null"]
    says: str


class GpuState(Strict):
    """What drifts while a GPU works; None where NVML does not say."""

    sm_clock_mhz: int | None
    temperature_c: int | None
    performance_state: int | None
    power_limit_w: float | None
    throttle_reasons: list[str] | None
    held_down_s: float | None  # since the driver was loaded, by power or heat


class Series(Strict):
    train_loss: list[Measured]  # per step, nats per token
    useful_tokens: list[int]  # seen up to the end of each step
    validation: list[Point]
    epoch_time_s: list[float]
    epoch_energy_j: list[float]  # empty where the run has no energy
    log: list[LogPoint]
    power_time_s: list[float]  # middles of equal parts of the window; empty without a power trace
    power_w: list[float]  # means over them
    inference: list[Latency]
    phases: list[Phase]  # empty where not asked for
    slope: Slope | None  # None where not asked for


class Certificate(Strict):
    causal: bool
    prefix_equal: bool
    mixes: bool
    receptive_field: int
    cached_equal: bool
    gpt2_projection: bool
    gpt2_initialisation: bool
    reference_difference: Measured
    reference_gradient_difference: Measured
    parameters_vs_baseline: float
    memory_growth: float
    flops_growth: float
    passed: bool


class Sitting(Strict):
    """Which study run this was, and where in its order; all None for a run by hand."""

    profile: str | None = None
    sitting: str | None = None
    block: int | None = None
    position: int | None = None


class Record(Strict):
    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    provenance: Literal["measured", "synthetic"] = "measured"
    finished_at: datetime
    label: str
    attention: str
    attention_sha256: str
    paper: str
    setting: str
    parameters: dict
    sitting: Sitting
    environment: dict
    data: dict
    certificate: Certificate
    kernels: dict[str, list[str]]
    metrics: Metrics
    series: Series
    null_reasons: dict[str, Literal[tuple(REASONS)]]
    gpu_states: list[GpuState]  # at the begin of the window and after each epoch; empty without a GPU
    checks: list[Check]
    flags: list[str]
    content_sha256: str = ""  # of all the rest; filled on writing

    @model_validator(mode="after")
    def every_null_has_a_reason(self):
        missing = {name for name, value in self.metrics if value is None}
        if missing != set(self.null_reasons):
            odd = ", ".join(sorted(missing ^ set(self.null_reasons)))
            raise ValueError(f"a metric is null exactly where null_reasons says why; not so for {odd}")
        return self

    @model_validator(mode="after")
    def every_flag_is_a_flagged_check(self):
        if self.flags != [check.check for check in self.checks if check.verdict == "flagged"]:
            raise ValueError("flags are the checks that are flagged")
        return self


FAILURES = {
    "out_of_memory": "out of memory",
    "loss_not_finite": "the loss was not finite",
    "killed": "its process was killed",
    "wrong_input": "a parameter or its data must be put right",
    "error": "an error",
}


class Failure(Strict):
    """A run of a study that ended without a record. Never a record: no number of such a run counts."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    label: str
    setting: str
    sitting: Sitting
    finished_at: datetime
    reason: Literal[tuple(FAILURES)]
    says: str


def out_folder() -> Path:
    """Where runs leave records and executed notebooks: notebooks/out, or what the environment variable names."""
    return Path(os.environ.get(OUT_VARIABLE) or ROOT / "notebooks" / "out")


def from_root(path: str) -> Path:
    """A path that a notebook or profile names: from the repository's root, wherever it is run."""
    return ROOT / path


def figures_folder(path: str) -> Path:
    """Where figures go: the folder that a notebook names, or beside the records that the environment variable sends
    elsewhere, so that a test never draws over the committed ones."""
    return out_folder() / "figures" if os.environ.get(OUT_VARIABLE) else from_root(path)


def sitting() -> Sitting:
    """What `lib.study` said about the run that is going on."""
    return Sitting(**json.loads(os.environ.get(SITTING_VARIABLE, "{}")))


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


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


def write_whole(path: Path, text: str) -> Path:
    """Writes a file that is either there whole or not at all; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".tmp", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return path


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
            "use the code that wrote it"
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
    """All records of a folder and of the cards that `lib.gather` has brought together there, by path.

    A file that is no record is named in a warning and left out.
    """
    records = []
    for path in sorted([*Path(folder).glob("*.json"), *Path(folder).glob(f"{CARD}*/*.json")]):
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
        rows.append({"variant": failure.label, "block": failure.sitting.block, "why": why, "it said": failure.says})
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
                "attention": record.attention,
                "attention_sha256": record.attention_sha256,
                "finished_at": record.finished_at,
                "seed": record.parameters["seed"],
                "setting": record.setting,
                "profile": record.sitting.profile,
                "sitting": record.sitting.sitting,
                "block": record.sitting.block,
                "position": record.sitting.position,
                "device": record.environment["device"],
                "device_name": record.environment["device_name"],
                "gpu_uuid": (record.environment["gpu"] or {}).get("uuid"),
                "provenance": record.provenance,
                "certified": record.certificate.passed,
                "certificate": record.certificate.model_dump(),
                **record.metrics.model_dump(),
                **{f"series_{name}": value for name, value in record.series.model_dump().items()},
                "parameter_values": record.parameters,
                "kernels": record.kernels,
                "null_reasons": record.null_reasons,
                "flags": record.flags,
            }
        )
    return pd.DataFrame(rows)
