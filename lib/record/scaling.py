"""Records of cost by context length: one JSON file per variant, written by `lib.study.scaling`.

A point is what some processes say of one part at one length. **One rule for what counts**: a process counts with the
median of its samples, which a short disturbance does not move; a point with the geometric mean of its processes, so
that the ratio of two points is the mean ratio. Exponents, fits, ratios and crossovers all start from these.
"""

import hashlib
import math
import statistics
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import Field, model_validator

from lib.errors import UsageError
from lib.record import names
from lib.record.files import gpu_uuid, read_checked, read_each, write_checked
from lib.record.schema import (
    DEVICES,
    LIMITS,
    PRECISIONS,
    REASONS,
    Environment,
    Moment,
    PatternOptions,
    Sha256,
    Strict,
    Text,
    Title,
    now,
)

METRICS = {
    "layer": ("forward_backward_s", "peak_activation_bytes", "forward_backward_energy_j"),
    "model": ("prefill_s", "decode_s_per_token", "cache_bytes", "prefill_energy_j", "decode_energy_j_per_token"),
}
ENERGY = {part: tuple(name for name in metrics if "energy" in name) for part, metrics in METRICS.items()}
PART = {metric: part for part, metrics in METRICS.items() for metric in metrics}
OUTCOMES = {"measured": "measured", "out_of_memory": "out of memory", "over_time": "over the time limit"}

MOST_POINTS, MOST_SAMPLES = 1000, 10**5

Count = Annotated[int, Field(ge=1, le=10**7)]
Sample = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class Setting(Strict):
    """What all points of a folder have in common."""

    layers: Annotated[int, Field(ge=1, le=LIMITS["layers"][1])]  # of the model; the layer is one of them
    width: Count
    heads: Count
    vocabulary: Annotated[int, Field(ge=2, le=10**7)]
    new_tokens: Count
    repeats: Count  # timed in each process, after a warm-up
    energy_window_s: Seconds
    device: Literal[DEVICES]
    precision: Literal[PRECISIONS]


class Point(Strict):
    """Samples of one part at one length, from `rounds` processes; or why there are none."""

    part: Literal[tuple(METRICS)]
    context: Annotated[int, Field(ge=2, le=LIMITS["context"][1])]
    outcome: Literal[tuple(OUTCOMES)]
    says: Text = ""
    rounds: Annotated[int, Field(ge=0, le=MOST_SAMPLES)] = 0
    sessions: list[Text] = Field(
        default_factory=list, max_length=MOST_SAMPLES
    )  # in which call each round ran; empty: unknown
    samples: dict[str, Annotated[list[Sample], Field(min_length=1, max_length=MOST_SAMPLES)]] = Field(
        default_factory=dict
    )
    null_reasons: dict[str, Literal[tuple(REASONS)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def all_or_nothing(self):
        named = sorted([*self.samples, *self.null_reasons])
        if self.outcome == "measured":
            if named != sorted(METRICS[self.part]) or not self.rounds:
                raise ValueError(f"each metric of a {self.part} has samples or a reason, and no other has")
            if any(len(samples) % self.rounds for samples in self.samples.values()):
                raise ValueError("each of a point's processes takes equally many samples")
            if len(self.sessions) not in (0, self.rounds):
                raise ValueError("each of a point's processes has one session")
        elif named or self.rounds or self.sessions or not self.says:
            raise ValueError("a point that was not measured says why, and holds nothing else")
        return self

    def lacks(self, turn: int) -> bool:
        """Whether the round `turn`, from 0, is still to be measured; what ran out is not tried again."""
        return self.outcome == "measured" and self.rounds <= turn

    def joined(self, other: "Point") -> "Point":
        """Both points' samples; a metric that either lacks, both lack. What ran out once is a point that ran out.

        Where one does not know its sessions, the two together do not.
        """
        if other.outcome != "measured":
            return other
        reasons = self.null_reasons | other.null_reasons
        shared = [metric for metric in METRICS[self.part] if metric not in reasons]
        both = {metric: self.samples[metric] + other.samples[metric] for metric in shared}
        sessions = self.sessions + other.sessions if self.sessions and other.sessions else []
        changes = {"rounds": self.rounds + other.rounds, "sessions": sessions}
        return self.model_copy(update=changes | {"samples": both, "null_reasons": reasons})

    def processes(self, metric: str) -> list[float]:
        """The median of each process's samples, in the order of the rounds; empty where the metric has none."""
        samples = self.samples.get(metric, [])
        each = len(samples) // max(self.rounds, 1)
        return [statistics.median(samples[begin : begin + each]) for begin in range(0, len(samples), each or 1)]


class Scaling(Strict):
    """One variant's points: the content of a file."""

    schema_version: Literal[2] = 2
    kind: Literal["scaling"] = "scaling"
    provenance: Literal["measured", "synthetic"]
    finished_at: Moment
    label: str
    title: Title  # what figures and tables call it
    attention: Text
    attention_sha256: Sha256
    options: PatternOptions
    setting: Setting
    environment: Environment
    points: Annotated[list[Point], Field(max_length=MOST_POINTS)]
    content_sha256: str = ""  # of all the rest; filled on writing

    @model_validator(mode="after")
    def its_label_is_its_own(self):
        names.check_label(self.label, self.attention)
        return self

    @model_validator(mode="after")
    def each_point_once_and_in_order(self):
        places = [(point.part, point.context) for point in self.points]
        if sorted(set(places)) != places:
            raise ValueError("points stand by part and context, each once")
        return self

    def point(self, part: str, context: int) -> Point | None:
        return next((point for point in self.points if (point.part, point.context) == (part, context)), None)

    def with_point(self, point: Point) -> "Scaling":
        before = self.point(point.part, point.context)
        others = [other for other in self.points if other is not before]
        points = sorted([*others, before.joined(point) if before else point], key=lambda p: (p.part, p.context))
        return self.model_copy(update={"points": points, "finished_at": now()})


def file_name(label: str) -> str:
    """The name of a variant's file. Whatever its label holds, it lies in the folder that it is written to."""
    stem = names.file_stem(label)
    told_apart = "" if stem == label else f"-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    return f"{stem}{told_apart}.json"


def write(found: Scaling, folder: Path) -> Path:
    """Writes a variant's file, whole or not at all; returns its path. Raises UsageError where it cannot be written."""
    return write_checked(found, folder / file_name(found.label))


def load(path: Path) -> Scaling:
    """One variant's file. Raises UsageError, in one line, where it is none, was changed, or is a copy."""
    found = read_checked(Scaling, path)
    if Path(path).name != file_name(found.label):
        raise UsageError(f"{names.printable(Path(path).name)} is a copy, or renamed: it was {file_name(found.label)}")
    return found


def load_all(folder: Path) -> list[Scaling]:
    """The variants of a folder; what is no such record is named in a warning and left out.

    Raises UsageError where there is none, or they are not of one setting and machine.
    """
    found = [one for one in read_each(sorted(Path(folder).glob("*.json")), load) if one.provenance == "measured"]
    if not found:
        raise UsageError(f"there is no record in {Path(folder).name}/; `python -m lib.study.scaling --write` makes")
    if not any(one.points for one in found):
        raise UsageError(f"the records in {Path(folder).name}/ hold no point yet; run `python -m lib.study.scaling` on")
    if any(machine(one) != machine(found[0]) for one in found):
        raise UsageError(f"the records in {Path(folder).name}/ differ in setting or machine; keep them in two folders")
    return found


def machine(found: Scaling) -> tuple:
    facts = found.environment
    return found.setting, facts["device_name"], facts.get("torch_threads"), gpu_uuid(facts)


def title(found: list[Scaling]) -> str:
    """Of what and where the points are, in one line."""
    setting, facts = found[0].setting, found[0].environment
    layers, threads = setting.layers, facts.get("torch_threads", "unknown")
    size = f"{layers} layer{'s' * (layers != 1)} x {setting.width}, {setting.heads} heads, {setting.precision}, batch 1"
    on_cpu = f"{threads} thread{'s' * (threads != 1)}"
    where = on_cpu if facts["device"] == "cpu" else f"torch {facts.get('packages', {}).get('torch', 'unknown')}"
    return f"{size}, on {facts['device_name']} ({where})"


def frame(found: list[Scaling]) -> pd.DataFrame:
    """A row per variant, metric and length: all `samples`; the median of each of the `n` `processes`, by round, and
    their `sessions`; `value`, the geometric mean of the processes. Empty and NaN where the point was not measured
    (`outcome`, `says`) or the metric was not (`reason`)."""
    rows = [
        {
            "label": one.label,
            "title": one.title,
            "metric": metric,
            "context": point.context,
            "outcome": point.outcome,
            "says": point.says,
            "reason": point.null_reasons.get(metric),
            "samples": point.samples.get(metric, []),
            "processes": processes,
            "sessions": point.sessions,
            "value": statistics.geometric_mean(processes) if processes else math.nan,
            "n": len(processes),
        }
        for one in found
        for point in one.points
        for metric in METRICS[point.part]
        for processes in [point.processes(metric)]
    ]
    return pd.DataFrame(rows)
