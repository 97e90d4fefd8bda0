"""The record of a prediction by `lib.study.roofline`, made before anything runs."""

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lib.paths import ROOT
from lib.record.files import read_checked
from lib.record.schema import Strict

FOLDER = ROOT / "predictions"
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Device(Strict):
    """What a device does at best: FLOP/s by unit, bytes/s, seconds to launch an operator; watts doing only that."""

    precision: Literal["bf16", "fp32"]  # of "auto"
    flops_per_s: dict[str, Positive]
    bytes_per_s: Positive
    launch_s: Positive
    waits: bool  # for an operator to end before the next is launched, and goes through heads one by one: a CPU
    idle_w: Positive | None = None  # with the model loaded; None: of its power nothing is known
    limit_w: Positive | None = None
    flops_w: dict[str, Positive] | None = None
    bytes_w: Positive | None = None
    seen: str  # what of this a command printed, and which
    assumed: str  # what nobody has measured


class Predicted(Strict):
    """The measured window of one variant's run."""

    label: str
    attention_sha256: str
    time_s: Positive
    energy_j: Positive | None
    launches: int  # of one step
    flops: dict[str, float]  # of one step, by unit
    bytes: Positive  # of one step
    bound: str  # what most of the time goes into


class Prediction(Strict):
    """All variants of a setting on one device, with what the numbers rest on."""

    schema_version: Literal[2] = 2
    kind: Literal["prediction"] = "prediction"
    made_at: datetime
    profile: str
    setting: str  # as a run's record has it
    vocabulary: Annotated[int, Field(gt=1)]
    device_name: str
    device: Device
    variants: list[Predicted]
    content_sha256: str = ""  # of all the rest; filled on writing


def load_all(folder: Path = FOLDER) -> list[Prediction]:
    """Every prediction of a folder. Raises UsageError where one is damaged."""
    return [read_checked(Prediction, path) for path in sorted(folder.glob("*.json"))]
