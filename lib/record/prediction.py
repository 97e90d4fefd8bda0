"""The record of a prediction by `lib.study.roofline`, made before anything runs."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lib.paths import ROOT
from lib.record import names
from lib.record.files import read_checked, read_each
from lib.record.schema import Count, Moment, Sha256, Strict, Text

FOLDER = ROOT / "predictions"
Positive = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]


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
    seen: Text  # what of this a command printed, and which
    assumed: Text  # what nobody has measured


class Predicted(Strict):
    """The measured window of one variant's run."""

    label: Annotated[str, AfterValidator(lambda text: names.check_name(text, "label"))]
    attention_sha256: Sha256
    time_s: Positive
    energy_j: Positive | None
    launches: Count  # of one step
    flops: dict[str, float]  # of one step, by unit
    bytes: Positive  # of one step
    bound: Text  # what most of the time goes into


class Prediction(Strict):
    """All variants of a setting on one device, with what the numbers rest on."""

    schema_version: Literal[2] = 2
    kind: Literal["prediction"] = "prediction"
    made_at: Moment
    profile: Text
    setting: Text  # as a run's record has it
    vocabulary: Annotated[int, Field(gt=1, le=10**7)]
    device_name: Text
    device: Device
    variants: list[Predicted]
    content_sha256: str = ""  # of all the rest; filled on writing


def load_all(folder: Path = FOLDER) -> list[Prediction]:
    """Every prediction of a folder; what is none is named in a warning and left out."""
    return read_each(sorted(folder.glob("*.json")), lambda path: read_checked(Prediction, path))
