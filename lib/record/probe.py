"""Records of what a variant can do: one JSON file per variant, task, rate and seed, written by `lib.study.probes`."""

import json
import statistics
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import AfterValidator, Field, model_validator

from lib.errors import UsageError
from lib.record import names
from lib.record.files import read_checked, read_each, write_checked
from lib.record.schema import Environment, Moment, Options, Sha256, Strict, Text, Title

Count = Annotated[int, Field(ge=1, le=2**53)]
Label = Annotated[str, AfterValidator(lambda text: names.check_name(text, "label"))]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
OUTCOMES = {"measured": "measured", "loss_not_finite": "the loss was not finite", "error": "an error"}


def check_pattern(label: str, title: str, mixers: list[str]) -> None:
    """Raises ValueError, in one line, for a label or a title that cannot be shown, or passes for another variant's."""
    names.check_label(label, ",".join(dict.fromkeys(mixers)))
    names.check_name(title, "title")


class Mixer(Strict):
    """One mixer of a pattern, with the fingerprint of its file."""

    attention: Text
    options: Options
    attention_sha256: Sha256


class Setting(Strict):
    """What all cells of one task have in common, so that they may be compared."""

    task: Text
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
    started_at: Moment
    finished_at: Moment
    time_s: Positive | None  # of training and testing; None where they did not end
    label: Label
    title: Title
    pattern: Annotated[list[Mixer], Field(min_length=1, max_length=512)]
    setting: Setting
    learning_rate: Positive
    seed: Annotated[int, Field(ge=0)]
    parameters: Annotated[int, Field(ge=0)]
    environment: Environment
    outcome: Literal[tuple(OUTCOMES)]
    says: Text = ""
    curve: list[Point]
    results: list[Result]
    content_sha256: str = ""  # of all the rest; filled on writing

    @model_validator(mode="after")
    def its_label_is_its_own(self):
        check_pattern(self.label, self.title, [mixer.attention for mixer in self.pattern])
        return self

    @model_validator(mode="after")
    def results_or_a_reason(self):
        if (self.outcome == "measured") != bool(self.results) or (self.outcome == "measured") == bool(self.says):
            raise ValueError("a cell has results, or says why it has none")
        return self


APART = 0.1  # of scaled accuracy: rates that are less apart, as those which only guess, would be chosen by luck


def best_rate(scaled: dict[float, dict[float, dict[int, float]]]) -> float:
    """The best rate, of scaled accuracies by difficulty, rate and seed: that of the highest median over the seeds that
    every rate has (or all, where they share none), at the hardest difficulty at which rates are `APART`, or at the
    hardest, where they never are. Of equals the middle one: the borders of what works are further away."""
    medians = {difficulty: _medians(by_rate) for difficulty, by_rate in scaled.items()}
    told = [difficulty for difficulty, own in medians.items() if max(own.values()) - min(own.values()) > APART]
    by_rate = medians[max(told or medians)]
    equal = sorted(rate for rate, median in by_rate.items() if median == max(by_rate.values()))
    return equal[(len(equal) - 1) // 2]


def _medians(by_rate: dict[float, dict[int, float]]) -> dict[float, float]:
    shared = set.intersection(*map(set, by_rate.values()))
    return {rate: statistics.median(value for seed, value in own.items() if seed in shared or not shared)
            for rate, own in by_rate.items()}  # fmt: skip


def write(found: Probe, folder: Path) -> Path:
    """Writes a cell's file, whole or not at all; returns its path. Raises UsageError where it cannot be written."""
    return write_checked(found, Path(folder) / f"{found.name}.json")


def load(path: Path) -> Probe:
    """One cell's file. Raises UsageError, in one line, where it is none, was changed, or is a copy."""
    found = read_checked(Probe, path)
    if Path(path).stem != found.name:
        raise UsageError(f"{names.printable(Path(path).name)} is a copy, or renamed: its name is {found.name[:200]!r}")
    return found


def load_all(folder: Path) -> list[Probe]:
    """The cells of a folder, by name. What is no such file is named in a warning and left out; UsageError for none."""
    found = [one for one in read_each(sorted(Path(folder).glob("*.json")), load) if one.provenance == "measured"]
    if not found:
        raise UsageError(f"there is no record in {Path(folder).name}/; `python -m lib.study.probes --write` makes some")
    return found


def frame(found: list[Probe]) -> pd.DataFrame:
    """A row per cell and difficulty: who (`label`, `title`, `made_of`), `task`, `convolution`, `rate`, `seed`,
    `difficulty`, `accuracy`, `scaled`, `state_bytes`, `outcome`, `says`. A cell without results has one row, its
    numbers NaN. `made_of` says what a label of the reader's own stands for, and is empty for a variant's own title."""
    rows = []
    for one in found:
        cell = {
            "label": one.label, "title": one.title, "made_of": _made_of(one), "task": one.setting.task,
            "convolution": one.setting.convolution,
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


def _made_of(found: Probe) -> str:
    if found.title != found.label:
        return ""
    said = []
    for mixer in found.pattern:
        options = ", ".join(f"{name}: {json.dumps(value)}" for name, value in mixer.options.items())
        name = Path(mixer.attention).stem
        said.append(f"{name} ({options})" if options else name)
    made_of = " + ".join(dict.fromkeys(said))
    return "" if made_of == found.label else made_of
