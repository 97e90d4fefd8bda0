"""What a record holds: one run's measurements, every number with its unit in the name, every null with its reason."""

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 2
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")

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
    "window_too_short": "a window under 2 s, too short for the energy counter",
    "foreign_process": "another process ran on the GPU",
    "counter_power_disagree": "the energy counter and the power trace differ by more than 10 %",
    "not_idle": "the GPU drew as much idle as in the run",
    "rapl_unavailable": "no energy counter of the CPU (RAPL)",
    "permission": "this user may not read the energy counter",
    "peak_unknown": "the device's peak FLOP/s is in no table of ours",
    "peak_not_resettable": "the system keeps no peak of its own for the window",
    "peak_not_above": "the process did not rise above what it had held before",
    "no_sample": "none of its samples fell into the window",
    "empty_profile": "the profiler saw nothing run",
    "not_counted_here": "the system does not count it per process",
    "not_asked_for": "not asked for by the run's parameters",
    "older_record": "the record is older than this metric",
}
Measured = Annotated[float | None, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Metrics(Strict):
    """Every number that figures and tables may show. None has its reason in the record's `null_reasons`.

    One that is added later has the default None; records from before it are read as `older_record`.
    """

    time_s: float = Field(gt=0, allow_inf_nan=False)
    time_per_epoch_s: float = Field(gt=0, allow_inf_nan=False)
    non_padding_tokens_per_s: float = Field(gt=0, allow_inf_nan=False)
    energy_j: Measured
    energy_per_non_padding_token_j: Measured
    mean_power_w: Measured
    idle_power_w: Measured
    net_energy_j: Measured
    gpu_utilization_percent: Measured
    gpu_busy_fraction: Measured
    cpu_energy_j: Measured
    cpu_time_s: Measured
    cpu_cores_used: Measured
    disk_bytes: Measured
    peak_memory_bytes: Measured
    peak_reserved_memory_bytes: Measured
    peak_resident_bytes: Measured
    forward_flops_causal: Measured
    forward_flops_full: Measured
    forward_flops_counted: Measured
    attention_core_share: Measured
    causal_flops_per_s: Measured
    mfu: Measured
    train_loss: Measured
    validation_loss: Measured
    prefill_latency_s: Measured
    decode_latency_s_per_token: Measured
    cache_bytes: Measured
    parameters: int
    checkpoint_bytes: Measured


class Point(Strict):
    """A validation: after how many non-padding tokens, at what loss (nats per token).

    Also the loss of the tokens that end a bigram which their row has held before, and of the rest; None where there is
    no such token, or in a record from before the two were told apart.
    """

    non_padding_tokens: int
    loss: Measured
    repeated_bigram_loss: Measured = None
    other_loss: Measured = None


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
    minimum_time_s_per_step: float
    energy_j_per_step: Measured
    energy_null_reason: Literal[tuple(REASONS)] | None


class Slope(Strict):
    """Cost of forward and backward by the number of layers with attention, and of one attention core (95 %)."""

    layers_with_attention: list[int]
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
    """What drifts from epoch to epoch; None where NVML does not say."""

    sm_clock_mhz: int | None
    temperature_c: int | None
    performance_state: int | None
    power_limit_w: float | None
    throttle_reasons: list[str] | None
    throttled_s: float | None  # since the driver was loaded, by power or heat


class GpuSample(Strict):
    """The GPU at work, at a second of the window; None where NVML does not say."""

    time_s: float
    sm_clock_mhz: int | None
    temperature_c: int | None
    power_limit_w: float | None
    throttle_reasons: list[str] | None
    utilization_percent: Measured


class GpuSummary(Strict):
    """What all samples of a window say together. Shares are of the samples, so none is above 1."""

    samples: int
    sm_clock_mhz_minimum: int | None
    sm_clock_mhz_median: float | None
    sm_clock_mhz_maximum: int | None
    temperature_c_begin: int | None
    temperature_c_end: int | None
    power_limit_w_minimum: float | None
    power_limit_w_maximum: float | None
    throttled_share: Annotated[float, Field(ge=0, le=1)] | None
    throttled_by: dict[str, Annotated[float, Field(ge=0, le=1)]]


class WarmUp(Strict):
    """The steps before the window: how many, for how long, and whether heat and clock had come to rest by then."""

    steps: int
    seconds: float
    steady: bool | None  # None where there is no GPU, or it does not say
    temperature_c: int | None


class Idle(Strict):
    """How `idle_power_w` was read: after the run, once the GPU that had worked had settled, or when it did not."""

    settling_s: float
    settled: bool
    temperature_c: int | None


class Series(Strict):
    train_loss: list[Measured]  # per step, nats per token
    non_padding_tokens: list[int]  # seen up to the end of each step
    validation: list[Point]
    epoch_time_s: list[float]
    epoch_energy_j: list[float]  # empty where the run has no energy
    log: list[LogPoint]
    power_time_s: list[float]  # middles of equal parts of the window; empty without a power trace
    power_w: list[float]  # means over them
    inference: list[Latency]
    phases: list[Phase]  # empty where not asked for
    slope: Slope | None  # None where not asked for
    epoch_edges_j: list[float] = []  # what the idle GPU drew between the counter's steps and an epoch: taken off
    gpu: list[GpuSample] = []  # of the working GPU; empty without one, and in older records


class CertificateMeasure(Strict):
    """One measurement behind a check (`lib.certificate.CLAIMS`); `passed` None: it could not be had, `says` why."""

    check: str
    what: str
    largest: Measured
    allowed: Measured
    passed: bool | None
    says: str


class Certificate(Strict):
    causal: bool
    prefix_equal: bool
    mixes: bool
    receptive_field: int | None  # of `tested`'s context, in one layer; of 150 tokens where nothing was said yet
    cached_equal: bool
    gpt2_projection: bool
    gpt2_initialisation: bool
    reference_difference: Measured
    reference_gradient_difference: Measured
    parameters_vs_baseline: float
    memory_growth: Measured
    flops_growth: Measured
    passed: bool
    measures: list[CertificateMeasure] = []  # empty in records from before the whole model was examined
    tested: dict = {}  # sizes, lengths, precision and devices of the examination; empty there too
    scope: list[str] = []  # the same, and what it cannot say, as sentences


class StudyPosition(Strict):
    """Which study run this was, and where in its order; all None for a run by hand."""

    profile: str | None = None
    session: str | None = None
    block: int | None = None
    position: int | None = None


class Record(Strict):
    schema_version: Literal[2] = SCHEMA_VERSION
    name: str
    provenance: Literal["measured", "synthetic"] = "measured"
    started_at: AwareDatetime | None = None  # before warm-up; None in a record from before that was noted
    finished_at: datetime
    label: str  # the key by which runs are told apart
    title: str  # what figures and tables call it
    attention: str
    attention_sha256: str
    paper: str
    setting: str
    parameters: dict
    study: StudyPosition
    environment: dict
    data: dict
    certificate: Certificate
    kernels: dict[str, list[str] | None]  # forward and backward
    kernels_null_reason: Literal[tuple(REASONS)] | None = None
    metrics: Metrics
    series: Series
    null_reasons: dict[str, Literal[tuple(REASONS)]]
    gpu_states: list[GpuState]  # of the idle GPU, before the window and after each epoch; empty without a GPU
    gpu_summary: GpuSummary | None = None  # of the working one
    warm_up: WarmUp | None = None
    idle: Idle | None = None  # None where no idle power was asked for or could be read
    checks: list[Check]
    flags: list[str]
    content_sha256: str = ""  # of all the rest; filled on writing

    @model_validator(mode="before")
    @classmethod
    def metrics_that_came_later_are_missing(cls, content):
        if isinstance(content, dict) and all(isinstance(content.get(of), dict) for of in ("metrics", "null_reasons")):
            known = cls.model_fields["metrics"].annotation.model_fields
            later = {name for name, metric in known.items() if not metric.is_required()} - set(content["metrics"])
            content = content | {"null_reasons": dict.fromkeys(later, "older_record") | content["null_reasons"]}
        return content

    @model_validator(mode="after")
    def every_null_has_a_reason(self):
        missing = {name for name, value in self.metrics if value is None}
        if missing != set(self.null_reasons):
            odd = ", ".join(sorted(missing ^ set(self.null_reasons)))
            raise ValueError(f"a metric is null exactly where null_reasons says why; not so for {odd}")
        return self

    @model_validator(mode="after")
    def unknown_kernels_have_a_reason(self):
        if (None in self.kernels.values()) != (self.kernels_null_reason is not None):
            raise ValueError("kernels are null exactly where kernels_null_reason says why")
        return self

    @model_validator(mode="after")
    def it_began_before_it_ended(self):
        if self.started_at is not None and not self.started_at <= self.finished_at:
            raise ValueError("a run cannot have ended before it began")
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

    schema_version: Literal[2] = SCHEMA_VERSION
    name: str
    label: str
    setting: str
    study: StudyPosition
    finished_at: datetime
    reason: Literal[tuple(FAILURES)]
    says: str


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
