"""The record of `lib.study.steps`: training steps of several variants that took turns in one process."""

import math
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import AfterValidator, Field, model_validator

from lib.record import names
from lib.record.files import read_checked, write_checked
from lib.record.schema import (
    LIMITS,
    REASONS,
    Environment,
    GpuSummary,
    Measured,
    Moment,
    Number,
    Options,
    PatternOptions,
    Seconds,
    Sha256,
    Strict,
    Text,
    Title,
)  # fmt: skip

Count = Annotated[int, Field(ge=1, le=2**53)]
Context = Annotated[int, Field(ge=2, le=LIMITS["context"][1])]
Label = Annotated[str, AfterValidator(lambda text: names.check_name(text, "label"))]
MOST = 10**4  # rounds, or turns of a round


class Size(Strict):
    """Rows of so many tokens, so many of them in a step."""

    context: Context
    batch_size: Count


class Setting(Strict):
    """What all turns have in common."""

    layers: Count
    width: Count
    heads: Count
    vocabulary: Annotated[int, Field(ge=2)]
    sizes: Annotated[list[Size], Field(min_length=1, max_length=64)]
    window_s: Seconds  # that each turn is to fill
    compile: bool
    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16"]


class Entry(Strict):
    """What takes turns."""

    label: str
    title: Title
    attention: Text
    attention_sha256: Sha256
    options: PatternOptions
    certified: bool
    parameters: Count

    @model_validator(mode="after")
    def its_label_is_its_own(self):
        names.check_label(self.label, self.attention)
        return self


class Turn(Strict):
    """One measurement window: `steps` whole training steps (forward, backward, clipping, AdamW) of one variant.

    `peak_memory_bytes` is what a process with this model alone would need: its weights and moments, and the most that
    its steps took on top of all that lay there. `alone`: the other models were moved to the host for it, since beside
    them it had run out of memory.
    """

    label: Label
    context: Context
    position: Annotated[int, Field(ge=0, le=MOST)]  # in the round's order at this length
    steps: Count
    time_s: Seconds
    energy_j: Measured
    energy_null_reason: Literal[tuple(REASONS)] | None
    edges_j: Measured  # taken off the counter's joules: what the idle GPU drew between its steps and the window
    after_w: list[Number]  # of the idle GPU after the window, over two steps of the counter: alike, or it was late
    peak_memory_bytes: Measured
    gpu: GpuSummary | None
    other_processes: int | None  # on the GPU, right after the window; None where there is none or it is unknown
    alone: bool = False


class Round(Strict):
    """Every variant once at every length; only whole rounds are kept, so every two turns of one are a pair."""

    session: Text  # of the process that measured it
    begun_at: Moment
    warm: bool | None  # whether the GPU had come to its heat before the first; None without one, or where it is silent
    turns: Annotated[list[Turn], Field(max_length=MOST)]


class Steps(Strict):
    schema_version: Literal[2] = 2
    kind: Literal["steps"] = "steps"
    provenance: Literal["measured", "synthetic"]
    finished_at: Moment
    setting: Setting
    environment: Environment
    entries: Annotated[list[Entry], Field(max_length=100)]
    examined: Options = Field(default_factory=dict)  # sizes and lengths of what `certified` speaks of
    rounds: list[Round] = Field(default_factory=list, max_length=MOST)
    failed: dict[Label, dict[Context, Text]] = Field(default_factory=dict)  # label: length: why it has no turn there
    # label: length: share of a step in which the GPU computes
    busy: dict[Label, dict[Context, Measured]] = Field(default_factory=dict)
    content_sha256: str = ""  # of all the rest; filled on writing

    @model_validator(mode="after")
    def every_round_is_whole(self):
        labels = [entry.label for entry in self.entries]
        cells = {(size.context, label) for size in self.setting.sizes for label in labels}
        cells -= {(context, label) for label, lengths in self.failed.items() for context in lengths}
        for number, one in enumerate(self.rounds):
            found = [(turn.context, turn.label) for turn in one.turns]
            if len(found) != len(set(found)) or set(found) != cells:
                raise ValueError(f"round {number} lacks a turn, or has one twice")
        return self


def write(found: Steps, path: Path) -> Path:
    """Writes the record, whole or not at all; returns its path. Raises UsageError where it cannot be written."""
    return write_checked(found, path)


def load(path: Path) -> Steps:
    """Reads one. Raises UsageError, in one line, where it is none or was changed."""
    return read_checked(Steps, path)


def frame(found: Steps) -> pd.DataFrame:
    """A row per turn: label, title, certified, context, batch_size, round, position, and of one step `time_s_per_step`,
    `energy_j_per_step`, `peak_memory_bytes`, `mean_power_w`; NaN where not measured."""
    entries = {entry.label: entry for entry in found.entries}
    batch = {size.context: size.batch_size for size in found.setting.sizes}

    def number(value):
        return math.nan if value is None else value

    rows = [
        {
            "label": turn.label,
            "title": entries[turn.label].title,
            "certified": entries[turn.label].certified,
            "context": turn.context,
            "batch_size": batch[turn.context],
            "round": number_of,
            "session": one.session,
            "position": turn.position,
            "time_s_per_step": turn.time_s / turn.steps,
            "energy_j_per_step": number(turn.energy_j) / turn.steps,
            "mean_power_w": number(turn.energy_j) / turn.time_s,
            "peak_memory_bytes": number(turn.peak_memory_bytes),
            "energy_null_reason": turn.energy_null_reason,
            "throttled_share": number(turn.gpu.throttled_share if turn.gpu else None),
            "other_processes": number(turn.other_processes),
        }
        for number_of, one in enumerate(found.rounds)
        for turn in one.turns
    ]
    return pd.DataFrame(rows)
