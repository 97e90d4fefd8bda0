"""What a record holds: one run's measurements, every number with its unit in the name, every null with its reason.

Whatever a reader of records relies on is said here: types, bounds, lengths that agree, and that a run's name, label
and setting follow from its parameters. `lib.record.files` bounds all numbers and texts of a file, unknown ones too.
"""

from datetime import UTC, datetime
from typing import Annotated, Literal, Required

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, WrapValidator, model_validator
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from lib.record import names
from lib.record.series import only_grows

SCHEMA_VERSION = 2
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
POSITION_EMBEDDINGS = ("learned", "none")
ARCHITECTURES = ("gpt2", "llama")
MATCHES = ("none", "parameters", "state")

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
    "context_not_timed": "timed at other lengths alone: add the run's context to inference_contexts",
    "no_repository": "the project's folder is no git repository of its own",
    "git_unavailable": "git is not installed",
    "git_refuses": "git does not answer: no commit yet, or a repository of another user",
    "older_record": "the record is older than this metric",
}
# Of the parameters: what makes no run, or one that nobody can draw. Both ends are allowed.
LIMITS = {
    "seed": (0, 2**53), "layers": (1, 512), "width": (1, 2**17), "heads": (1, 2**14), "positions": (1, 2**27),
    "context": (2, 2**27), "batch_size": (1, 2**20), "accumulation": (1, 2**20), "steps_per_epoch": (1, 10**6),
    "epochs": (1, 10**5), "warmup_steps": (1, 10**6), "lr_warmup_steps": (0, 10**9), "weight_decay": (0, 1e6),
    "clip_norm": (0, 1e9), "validation_sequences": (1, 10**7), "new_tokens": (1, 2**20),
    "inference_repeats": (1, 10**5), "inference_window_s": (0, 1e5), "phase_steps": (0, 10**6), "idle_s": (0, 1e5),
    "convolution": (0, 64),
}  # fmt: skip
MOST_STEPS = 10**6  # of a run, so points of a series
MOST_CONTEXTS = 64  # at which a run times inference: each is a tick of an axis

Measured = Annotated[float | None, Field(allow_inf_nan=False)]
Amount = Annotated[float | None, Field(ge=0, allow_inf_nan=False)]  # a bar that begins at 0
Number = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=1e-9, le=1e15, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Text = Annotated[str, Field(max_length=names.LONGEST_TEXT)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Title = Annotated[str, AfterValidator(lambda text: names.check_name(text, "title"))]
Option = bool | int | float | str | list[bool | int | float | str | None] | None
Options = dict[str, Option]
PatternOptions = dict[str, Option | Options]  # those of one variant stand under its name


def _in_this_age(moment: datetime) -> datetime:
    """In UTC. Before and beyond, adding a run's seconds leaves what a datetime can hold."""
    if not 2020 <= moment.year < 2100:
        raise ValueError("its year must be from 2020 to 2099")
    return moment.astimezone(UTC)


Moment = Annotated[AwareDatetime, AfterValidator(_in_this_age)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# Dictionaries, and what is in them is no attribute: records of other versions know other parameters and facts.
KNOWN_AND_OTHERS = ConfigDict(extra="allow")


class Gpu(TypedDict, total=False):
    __pydantic_config__ = KNOWN_AND_OTHERS
    uuid: Annotated[str, Field(max_length=100)] | None
    memory_bytes: Count | None
    capability: Text | None
    cuda: Text | None
    driver: Text | None
    max_sm_clock_mhz: Count | None
    memory_clock_mhz: Count | None
    persistence_mode: Count | None


class Environment(TypedDict, total=False):
    """Where it ran, by `lib.measure.environment`."""

    __pydantic_config__ = KNOWN_AND_OTHERS
    device: Required[Literal["cpu", "cuda"]]
    device_name: Required[Annotated[str, Field(max_length=120)]]
    gpu: Gpu | None  # None: a CPU
    python: Text
    platform: Text
    packages: dict[str, Text | None]
    cpu: Text
    cpu_cores: Count | None
    torch_threads: Count
    commit: Text | None
    commit_modified: bool | None


class Data(TypedDict, total=False):
    """What was trained on, by `lib.data.corpus`."""

    __pydantic_config__ = KNOWN_AND_OTHERS
    dataset_commit: Text
    conversations: Count
    empty_turns: Count
    empty_conversations: Count
    cut_conversations: Count
    train_sequences: Count
    validation_sequences: Count
    train_tokens: Count
    padding_share: Annotated[float, Field(ge=0, le=1)]
    token_sha256: Sha256


def _limited(name: str, kind: type = int):
    least, most = LIMITS[name]
    return Annotated[kind, Field(ge=least, le=most)]


class Parameters(TypedDict, total=False):
    """The parameters of train.ipynb; those are required that some reader of records asks for."""

    __pydantic_config__ = KNOWN_AND_OTHERS
    attention: Required[Text]
    options: Required[PatternOptions]
    label: Required[str]
    seed: Required[_limited("seed")]
    layers: Required[_limited("layers")]
    width: Required[_limited("width")]
    heads: Required[_limited("heads")]
    positions: Required[_limited("positions")]
    context: Required[_limited("context")]
    batch_size: Required[_limited("batch_size")]
    accumulation: Required[_limited("accumulation")]
    steps_per_epoch: Required[_limited("steps_per_epoch")]
    epochs: Required[_limited("epochs")]
    dataset: Required[Text]
    tokenizer: Required[Text]
    precision: Required[Literal[PRECISIONS]]
    compile: Required[bool]
    device: Literal[DEVICES]
    dataset_revision: Text
    turns: Text
    schedule: Text
    packing: bool | Literal["documents"]
    train_on_padding: bool
    dropout: Annotated[float, Field(ge=0, lt=1)]
    validation_share: Annotated[float, Field(ge=0, lt=1)]
    learning_rate: Annotated[float, Field(gt=0, le=1e39)]
    validation_sequences: _limited("validation_sequences")
    warmup_steps: _limited("warmup_steps")
    lr_warmup_steps: _limited("lr_warmup_steps")
    weight_decay: _limited("weight_decay", float)
    clip_norm: _limited("clip_norm", float)
    idle_s: _limited("idle_s", float)
    new_tokens: _limited("new_tokens")
    inference_repeats: _limited("inference_repeats")
    inference_window_s: _limited("inference_window_s", float)
    phase_steps: _limited("phase_steps")
    position_embedding: Literal[POSITION_EMBEDDINGS]
    architecture: Literal[ARCHITECTURES]
    convolution: _limited("convolution")
    match: Literal[MATCHES]
    save_model: Text
    inference_contexts: Annotated[list[Annotated[int, Field(ge=1, le=2**27)]], Field(max_length=MOST_CONTEXTS)]


class Metrics(Strict):
    """Every number that figures and tables may show. None has its reason in the record's `null_reasons`.

    One that is added later has the default None; records from before it are read as `older_record`.
    """

    time_s: Seconds
    time_per_epoch_s: Seconds
    non_padding_tokens_per_s: Rate
    energy_j: Amount
    energy_per_non_padding_token_j: Amount
    mean_power_w: Amount
    idle_power_w: Amount
    net_energy_j: Measured
    gpu_utilization_percent: Amount
    gpu_busy_fraction: Amount
    cpu_energy_j: Amount
    cpu_time_s: Amount
    cpu_cores_used: Amount
    disk_bytes: Amount
    peak_memory_bytes: Amount
    peak_reserved_memory_bytes: Amount
    peak_resident_bytes: Amount
    forward_flops_causal: Amount
    forward_flops_full: Amount
    forward_flops_counted: Amount
    attention_core_share: Amount
    causal_flops_per_s: Amount
    mfu: Amount
    train_loss: Amount
    validation_loss: Amount
    prefill_latency_s: Amount
    decode_latency_s_per_token: Amount
    cache_bytes: Amount
    parameters: Count
    checkpoint_bytes: Amount


class Point(Strict):
    """A validation: after how many non-padding tokens, at what loss (nats per token).

    Also the loss of the tokens that end a bigram which their row has held before, and of the rest; None where there is
    no such token, or in a record from before the two were told apart.
    """

    non_padding_tokens: Count
    loss: Measured
    repeated_bigram_loss: Measured = None
    other_loss: Measured = None


class Latency(Strict):
    """Inference on one sequence at one context length."""

    context: Annotated[int, Field(ge=1, le=2**27)]
    prefill_latency_s: Seconds
    decode_latency_s_per_token: Seconds
    cache_bytes: Count
    cache_bytes_analytic: Count
    prefill_energy_j: Measured
    decode_energy_j_per_token: Measured
    energy_null_reason: Literal[tuple(REASONS)] | None


class Phase(Strict):
    """A part of a training step, in a loop of its own; `derived` ones are differences of others."""

    phase: Text
    derived: bool
    time_s_per_step: Number
    minimum_time_s_per_step: Number
    energy_j_per_step: Measured
    energy_null_reason: Literal[tuple(REASONS)] | None


class Slope(Strict):
    """Cost of forward and backward by the number of layers with attention, and of one attention core (95 %)."""

    layers_with_attention: list[Count]
    time_s_per_step: list[Number]
    time_s_per_core: Number
    time_s_per_core_low: Number
    time_s_per_core_high: Number
    time_r_squared: Number
    energy_j_per_step: list[Number] | None
    energy_j_per_core: Measured
    energy_j_per_core_low: Measured
    energy_j_per_core_high: Measured
    energy_r_squared: Measured
    energy_null_reason: Literal[tuple(REASONS)] | None


class LogPoint(Strict):
    """How far the window was, on the device's clock, when a step was done; joules where counter and trace agree."""

    step: Count
    time_s: Number
    energy_j: Measured


class Check(Strict):
    """One thing that a reviewer would ask of a run. What is flagged is one of the record's flags."""

    check: Text
    value: Measured
    limit: Measured
    verdict: Literal["green", "flagged", "null"]
    says: Text


class GpuState(Strict):
    """What drifts from epoch to epoch; None where NVML does not say."""

    sm_clock_mhz: int | None
    temperature_c: int | None
    performance_state: int | None
    power_limit_w: Measured
    throttle_reasons: list[Text] | None
    throttled_s: Measured  # since the driver was loaded, by power or heat


class GpuSample(Strict):
    """The GPU at work, at a second of the window; None where NVML does not say."""

    time_s: Number
    sm_clock_mhz: int | None
    temperature_c: int | None
    power_limit_w: Measured
    throttle_reasons: list[Text] | None
    utilization_percent: Measured


class GpuSummary(Strict):
    """What all samples of a window say together. Shares are of the samples, so none is above 1."""

    samples: Count
    sm_clock_mhz_minimum: int | None
    sm_clock_mhz_median: Measured
    sm_clock_mhz_maximum: int | None
    temperature_c_begin: int | None
    temperature_c_end: int | None
    power_limit_w_minimum: Measured
    power_limit_w_maximum: Measured
    throttled_share: Annotated[float, Field(ge=0, le=1)] | None
    throttled_by: dict[str, Annotated[float, Field(ge=0, le=1)]]


class WarmUp(Strict):
    """The steps before the window: how many, for how long, and whether heat and clock had come to rest by then."""

    steps: Count
    seconds: Number
    steady: bool | None  # None where there is no GPU, or it does not say
    temperature_c: int | None


class Idle(Strict):
    """How `idle_power_w` was read: after the run, once the GPU that had worked had settled, or when it did not."""

    settling_s: Number
    settled: bool
    temperature_c: int | None


def _seen_already(value, validate, info):
    return info.context[value] if info.context and type(value) is str and value in info.context else validate(value)


# With a context a string may stand for numbers that were seen together before (`lib.record.files`).
SeenTogether = WrapValidator(_seen_already)
NUMBERS = {"train_loss": float, "non_padding_tokens": int}  # the series of a number a step


class Series(Strict):
    train_loss: Annotated[list[Number], SeenTogether]  # per step, nats per token
    non_padding_tokens: Annotated[list[Count], SeenTogether]  # seen up to the end of each step
    validation: list[Point]
    epoch_time_s: list[Seconds]
    epoch_energy_j: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]  # empty where the run has no energy
    log: list[LogPoint]
    power_time_s: list[Number]  # middles of equal parts of the window; empty without a power trace
    power_w: list[Number]  # means over them
    inference: Annotated[list[Latency], Field(max_length=MOST_CONTEXTS)]
    phases: list[Phase]  # empty where not asked for
    slope: Slope | None  # None where not asked for
    epoch_edges_j: list[Number] = []  # what the idle GPU drew between the counter's steps and an epoch: taken off
    gpu: list[GpuSample] = []  # of the working GPU; empty without one, and in older records

    @model_validator(mode="after")
    def lengths_agree_and_tokens_only_grow(self):
        for one, other in (("train_loss", "non_padding_tokens"), ("power_time_s", "power_w")):
            if len(getattr(self, one)) != len(getattr(self, other)):
                raise ValueError(f"{one} and {other} have as many values as each other")
        for seen in (self.non_padding_tokens, [point.non_padding_tokens for point in self.validation]):
            if not only_grows(seen):
                raise ValueError("tokens seen so far become fewer")
        if self.slope and len(self.slope.layers_with_attention) != len(self.slope.time_s_per_step):
            raise ValueError("slope has a time for each number of layers")
        return self


class CertificateMeasure(Strict):
    """One measurement behind a check (`lib.certificate.CLAIMS`); `passed` None: it could not be had, `says` why."""

    check: Text
    what: Text
    largest: Measured
    allowed: Measured
    passed: bool | None
    says: Text


class Certificate(Strict):
    causal: bool
    prefix_equal: bool
    mixes: bool
    receptive_field: Count | None  # of `tested`'s context, in one layer; of 150 tokens where nothing was said yet
    cached_equal: bool
    gpt2_projection: bool
    gpt2_initialisation: bool
    reference_difference: Measured
    reference_gradient_difference: Measured
    parameters_vs_baseline: Number
    memory_growth: Measured
    flops_growth: Measured
    passed: bool
    # Empty in records from before the whole model was examined.
    measures: Annotated[list[CertificateMeasure], Field(max_length=1000)] = []
    tested: Options = {}  # sizes, lengths, precision and devices of the examination
    scope: Annotated[list[Text], Field(max_length=100)] = []  # the same, and what it cannot say, as sentences


class StudyPosition(Strict):
    """Which study run this was, and where in its order; all None for a run by hand.

    `variants`: the labels of all runs that its block was to have; None in a record from before that was noted.
    """

    profile: Text | None = None
    session: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    block: Annotated[int, Field(ge=0, le=10**6)] | None = None
    position: Annotated[int, Field(ge=0, le=10**6)] | None = None
    variants: Annotated[list[Text], Field(max_length=1000)] | None = None

    @model_validator(mode="after")
    def a_session_has_places(self):
        if self.session is not None and None in (self.block, self.position):
            raise ValueError("a run of a session has its block and its position there")
        return self


class Record(Strict):
    schema_version: Literal[2] = SCHEMA_VERSION
    name: str
    provenance: Literal["measured", "synthetic"] = "measured"
    started_at: Moment | None = None  # before warm-up; None in a record from before that was noted
    finished_at: Moment
    label: str  # the key by which runs are told apart
    title: Title  # what figures and tables call it
    attention: str
    attention_sha256: Sha256
    paper: Text
    setting: str
    parameters: Parameters
    study: StudyPosition
    environment: Environment
    data: Data
    certificate: Certificate
    kernels: dict[str, list[Text] | None]  # forward and backward
    kernels_null_reason: Literal[tuple(REASONS)] | None = None
    metrics: Metrics
    series: Series
    null_reasons: dict[str, Literal[tuple(REASONS)]]
    gpu_states: list[GpuState]  # of the idle GPU, before the window and after each epoch; empty without a GPU
    gpu_summary: GpuSummary | None = None  # of the working one
    warm_up: WarmUp | None = None
    idle: Idle | None = None  # None where no idle power was asked for or could be read
    checks: Annotated[list[Check], Field(max_length=100)]
    flags: list[Text]
    content_sha256: str = ""  # of all the rest; filled on writing

    @model_validator(mode="after")
    def metrics_that_came_later_are_missing(self):
        later = set(type(self.metrics).model_fields) - self.metrics.model_fields_set
        self.null_reasons.update(dict.fromkeys(later, "older_record") | self.null_reasons)
        return self

    @model_validator(mode="after")
    def it_is_called_what_its_parameters_say(self):
        names.check_label(self.label, self.attention)
        said = {"attention": self.attention, "label": self.label, "name": self.name, "setting": self.setting}
        values = self.parameters
        true = {"attention": values["attention"], "label": names.display_name(values)}
        true |= {"name": names.run_name(values), "setting": names.setting(values)}
        for what in true:
            if said[what] != true[what]:
                raise ValueError(f"its {what} is {said[what][:100]!r}, by its parameters {true[what][:100]!r}")
        return self

    @model_validator(mode="after")
    def its_series_are_as_long_as_it_ran(self):
        steps, epochs = self.parameters["steps_per_epoch"] * self.parameters["epochs"], self.parameters["epochs"]
        if steps > MOST_STEPS:
            raise ValueError(f"a run has at most {MOST_STEPS:,} steps")
        joules = self.series.epoch_energy_j
        found = len(self.series.train_loss), len(self.series.epoch_time_s), len(joules) or epochs
        if found != (steps, epochs, epochs):
            raise ValueError(f"the series must be of {steps} steps and {epochs} epochs")
        return self

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
    name: Text
    label: Annotated[str, AfterValidator(lambda text: names.check_name(text, "label"))]
    setting: Text
    study: StudyPosition
    finished_at: Moment
    reason: Literal[tuple(FAILURES)]
    says: Text


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
