"""Records of what a variant can do: one JSON file per variant, task, rate and seed, written by `lib.study.probes`."""

import warnings
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import Field, model_validator

from lib.errors import UsageError
from lib.record.files import read_checked, write_checked
from lib.record.schema import Strict

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
OUTCOMES = {"measured": "measured", "loss_not_finite": "the loss was not finite", "error": "an error"}


class Mixer(Strict):
    """One mixer of a pattern, with the fingerprint of its file."""

    attention: str
    options: dict
    attention_sha256: str


class Setting(Strict):
    """What all cells of one task have in common, so that they may be compared."""

    task: str
    width: Count
    heads: Count
    layers: Count  # a pattern of fewer mixers is repeated up to here
    convolution: bool  # before the mixers, of width 3
    mlp: bool  # behind each mixer
    positions: bool  # learned
    batch_size: Count
    steps: Count
    warmup_share: Annotated[float, Field(ge=0, le=1)]
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    test_sequences: Count  # of each difficulty


class Point(Strict):
    """Training loss at a step, nats per token asked for."""

    step: Count
    loss: Finite


class Result(Strict):
    """A difficulty that was tested: share of right answers, that share scaled by chance, and what was remembered."""

    difficulty: Count
    context: Count
    accuracy: Annotated[float, Field(ge=0, le=1)]
    scaled_accuracy: Finite
    state_bytes: Count  # of one sequence in fp32, by the mixers' own count


class Probe(Strict):
    """One cell: what became of one pattern on one task, at one rate, from one seed."""

    schema_version: Literal[1] = 1
    kind: Literal["probe"] = "probe"
    name: str
    provenance: Literal["measured", "synthetic"] = "measured"
    started_at: datetime
    finished_at: datetime
    time_s: Positive | None  # of training and testing; None where they did not end
    label: str
    title: str
    pattern: Annotated[list[Mixer], Field(min_length=1)]
    setting: Setting
    learning_rate: Positive
    seed: Annotated[int, Field(ge=0)]
    parameters: Annotated[int, Field(ge=0)]
    environment: dict
    outcome: Literal[tuple(OUTCOMES)]
    says: str = ""
    curve: list[Point]
    results: list[Result]
    content_sha256: str = ""  # of all the rest; filled on writing

    @model_validator(mode="after")
    def results_or_a_reason(self):
        if (self.outcome == "measured") != bool(self.results) or (self.outcome == "measured") == bool(self.says):
            raise ValueError("a cell has results, or says why it has none")
        return self


def write(found: Probe, folder: Path) -> Path:
    """Writes a cell's file, whole or not at all; returns its path. Raises UsageError where it cannot be written."""
    return write_checked(found, Path(folder) / f"{found.name}.json")


def load(path: Path) -> Probe:
    """One cell's file. Raises UsageError, in one line, where it is none or was changed."""
    return read_checked(Probe, path)


def load_all(folder: Path) -> list[Probe]:
    """The cells of a folder, by name. What is no such file is named in a warning and left out; UsageError for none."""
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            found.append(load(path))
        except UsageError as error:
            warnings.warn(f"{path.name} is left out: {error}", stacklevel=2)
    found = [one for one in found if one.provenance == "measured"]
    if not found:
        raise UsageError(f"there is no record in {Path(folder).name}/; `python -m lib.study.probes --write` makes some")
    return found


def frame(found: list[Probe]) -> pd.DataFrame:
    """A row per cell and difficulty: who (`label`, `title`), `task`, `convolution`, `rate`, `seed`, `difficulty`,
    `accuracy`, `scaled`, `state_bytes`, `outcome`, `says`. A cell without results has one row, its numbers NaN."""
    rows = []
    for one in found:
        cell = {
            "label": one.label, "title": one.title, "task": one.setting.task, "convolution": one.setting.convolution,
            "rate": one.learning_rate, "seed": one.seed, "outcome": one.outcome, "says": one.says,
            "setting": one.setting.model_dump_json(),
        }  # fmt: skip
        nothing = {"difficulty": None, "accuracy": None, "scaled": None, "state_bytes": None}
        results = [
            {
                "difficulty": result.difficulty, "accuracy": result.accuracy, "scaled": result.scaled_accuracy,
                "state_bytes": result.state_bytes,
            }
            for result in one.results
        ]  # fmt: skip
        rows += [cell | result for result in results or [nothing]]
    numbers = dict.fromkeys(("difficulty", "accuracy", "scaled", "state_bytes"), float)
    return pd.DataFrame(rows).astype(numbers)
