"""`python -m lib.prediction params/gpu_512.yaml --device "NVIDIA H200" --write FILE`: what runs should cost.

A roofline of time and energy (Choi, Bedard, Fowler, Vuduc 2013, A Roofline Model of Energy, IPDPS): an operator takes
the longer of its FLOPs over the device's rate and its bytes over its memory's; energy is idle power times time, and so
much more a FLOP and a byte. A GPU works while the host launches, so a step takes the longer of the two; and where it
would draw more than its power limit, as long as that limit asks for. What it rests on is in `DEVICES` and in each file.

A prediction is never shown as a measurement: it says what one should be surprised by. `residuals` sets it beside one.
"""

import argparse
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import pandas as pd
from pydantic import Field

from lib import attention, parameters, record, study
from lib.errors import UsageError

FOLDER = record.ROOT / "predictions"
GPT2_VOCABULARY = 50257
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Device(record.Strict):
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


DEVICES = {
    "NVIDIA H200": Device(
        precision="bf16",
        flops_per_s={"bf16": 788e12, "attention": 346e12, "fp32": 53e12},
        bytes_per_s=4.3e12,
        launch_s=7e-6,
        waits=False,
        idle_w=120,
        limit_w=700,
        flops_w={"bf16": 700, "attention": 550, "fp32": 550},
        bytes_w=450,
        seen="on such a card, before this study: torch.mm of 8192 x 8192 bf16, 788 TFLOP/s; a copy on it, 4.3 TB/s",
        assumed="attention: FlashAttention-2 at 35 % of the peak (FlashAttention-3, arXiv 2407.08608, abstract); fp32: "
        "80 % of the data sheet's 66.9 TFLOP/s; 7 us a launch; all watts but the data sheet's limit of 700",
    ),
    "AMD EPYC": Device(
        precision="fp32",
        flops_per_s={"fp32": 1.46e11, "attention": 1.46e11, "bf16": 1.46e11},
        bytes_per_s=2.8e10,
        launch_s=4e-6,
        waits=True,
        seen="2 cores of one, 2 threads: torch.mm of 3072 x 3072 fp32, copy_ of 2^28 floats, a + 1 of two (medians)",
        assumed="attention kernels at the rate of matrix products, bf16 as fast as fp32",
    ),
}


class Cost(NamedTuple):
    """Of one step: seconds, joules (None where the device's power is unknown), launches, and what sets the time."""

    time_s: float
    energy_j: float | None
    launches: int
    bound: str


def cost(operators: list, launches: int, device: Device) -> Cost:
    """What a step of these `lib.operators` takes on a device, by the roofline."""
    compute_s = [operator.flops / device.flops_per_s[operator.unit] for operator in operators]
    memory_s = [operator.bytes / device.bytes_per_s for operator in operators]
    work_s = sum(map(max, compute_s, memory_s))
    launch_s = launches * device.launch_s
    shares = {
        "arithmetic": sum(c for c, m in zip(compute_s, memory_s, strict=True) if c >= m),
        "memory": sum(m for c, m in zip(compute_s, memory_s, strict=True) if c < m),
        "launching": launch_s if device.waits or launch_s > work_s else 0.0,
    }
    time_s = work_s + launch_s if device.waits else max(work_s, launch_s)
    bound = max(shares, key=shares.get)
    if device.idle_w is None:
        return Cost(time_s, None, launches, bound)
    dynamic_j = sum(
        compute * (device.flops_w[operator.unit] - device.idle_w) + memory * (device.bytes_w - device.idle_w)
        for operator, compute, memory in zip(operators, compute_s, memory_s, strict=True)
    )
    throttled_s = dynamic_j / (device.limit_w - device.idle_w)
    if throttled_s > time_s:
        time_s, bound = throttled_s, "the power limit"
    return Cost(time_s, device.idle_w * time_s + dynamic_j, launches, bound)


class Predicted(record.Strict):
    """The measured window of one variant's run."""

    label: str
    attention_sha256: str
    time_s: Positive
    energy_j: Positive | None
    launches: int  # of one step
    flops: dict[str, float]  # of one step, by unit
    bytes: Positive  # of one step
    bound: str  # what most of the time goes into


class Prediction(record.Strict):
    """All variants of a setting on one device, with what the numbers rest on."""

    schema_version: Literal[1] = 1
    kind: Literal["prediction"] = "prediction"
    made_at: datetime
    profile: str
    setting: str  # as a run's record has it
    vocabulary: Annotated[int, Field(gt=1)]
    device_name: str
    device: Device
    variants: list[Predicted]
    content_sha256: str = ""  # of all the rest; filled on writing


def predict(profile: str | None, device_name: str, vocabulary: int, variants: list | None = None) -> Prediction:
    """Counts and predicts the runs of a profile (None: the notebook's defaults). Raises UsageError."""
    if device_name not in DEVICES:
        raise UsageError(
            f"nothing is known of a device {device_name!r}; known: {', '.join(DEVICES)}. "
            "Add yours to DEVICES in lib/prediction.py"
        )
    if vocabulary < 2:
        raise UsageError(f"vocabulary must be at least 2, not {vocabulary}")
    runs, name = study.chosen(profile, variants or attention.variants(), 1)
    if runs[0]["values"]["compile"]:
        raise UsageError("which kernels a compiled model has is not known before; predict it with compile: false")
    return Prediction(
        made_at=record.now(), profile=name, setting=parameters.setting(runs[0]["values"]), vocabulary=vocabulary,
        device_name=device_name, device=DEVICES[device_name],
        variants=[predicted(run["values"], vocabulary, DEVICES[device_name]) for run in runs],
    )  # fmt: skip


def predicted(values: dict, vocabulary: int, device: Device) -> Predicted:
    """One run, from the parameters of train.ipynb."""
    from lib import operators  # torch, which reading predictions does without

    precision = device.precision if values["precision"] == "auto" else values["precision"]
    step = operators.step(values, vocabulary, precision)
    launches, heads = len(step), values["heads"]
    if not device.waits:
        # A CPU's path may go through the heads one by one, a GPU's takes all at once: without what more heads add.
        twice = values | {"heads": 2 * heads, "width": 2 * values["width"]}
        launches -= (len(operators.step(twice, vocabulary, precision)) - launches) // heads * (heads - 1)
    took, steps = cost(step, launches, device), values["steps_per_epoch"] * values["epochs"]
    return Predicted(
        label=parameters.display_name(values),
        attention_sha256=attention.source_sha256(values["attention"]),
        time_s=steps * took.time_s,
        energy_j=None if took.energy_j is None else steps * took.energy_j,
        launches=took.launches,
        flops={unit: sum(o.flops for o in step if o.unit == unit) for unit in sorted({o.unit for o in step})},
        bytes=sum(operator.bytes for operator in step),
        bound=took.bound,
    )


def load_all(folder: Path = FOLDER) -> list[Prediction]:
    """Every prediction of a folder. Raises UsageError where one is damaged."""
    return [record.read_checked(Prediction, path) for path in sorted(folder.glob("*.json"))]


def residuals(runs: pd.DataFrame, predictions: list[Prediction]) -> pd.DataFrame:
    """A row per variant that was predicted before any run was measured: both, and how far the measured one is above it.

    `runs` are those of one group of `lib.compare`, so of one setting and device; their mean is taken. Of a variant the
    newest prediction counts; one whose file has changed since has no row.
    """
    columns = ["variant", *(f"{unit}, {what}" for unit in "sJ" for what in ("predicted", "measured", "above"))]
    here = runs["setting"].iloc[0], runs["device_name"].iloc[0]
    begun = (runs["finished_at"] - pd.to_timedelta(runs["time_s"], unit="s")).min()
    usable = [one for one in predictions if (one.setting, one.device_name) == here and one.made_at < begun]
    newest = {said.label: said for one in sorted(usable, key=lambda one: one.made_at) for said in one.variants}
    rows = []
    for said in newest.values():
        mine = runs[(runs["label"] == said.label) & (runs["attention_sha256"] == said.attention_sha256)]
        row = [said.label]
        for predicted, measured in ((said.time_s, mine["time_s"]), (said.energy_j, mine["energy_j"])):
            seen = measured.mean() if measured.notna().all() else None  # never the mean of a part
            row += [predicted, seen, seen / predicted - 1 if predicted and seen else None]
        if len(mine):
            rows.append([*row, said.bound])
    return pd.DataFrame(rows, columns=[*columns, "most of it predicted to go into"])


def table(found: pd.DataFrame) -> pd.DataFrame:
    """`residuals` as text: rounded, a dash where nothing was predicted or measured."""
    formats = {"predicted": "{:,.4g}", "measured": "{:,.4g}", "above": "{:+.0%}"}
    shown = found.astype(object)
    for column in shown.columns:
        form = formats.get(column.rpartition(", ")[2], "{}")
        shown[column] = ["–" if pd.isna(value) else form.format(value) for value in shown[column]]
    return shown


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.prediction", description=__doc__.split("\n\n")[1])
    parser.add_argument("profile", nargs="?", help="a YAML file of overrides; without one the notebook's defaults")
    parser.add_argument("--device", required=True, help=f"one of {', '.join(DEVICES)}")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="names or .py files; without them all")
    parser.add_argument(
        "--vocabulary", type=int, default=GPT2_VOCABULARY, metavar="N", help="words (GPT-2's: %(default)s)"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="where to keep it, as JSON")
    options = parser.parse_args(words)
    try:
        found = predict(options.profile, options.device, options.vocabulary, options.variants)
        _show(found)
        if options.write:
            record.write_checked(found, options.write)
    except UsageError as error:
        print(f"python -m lib.prediction: {error}", file=sys.stderr)
        return 2
    return 0


def _show(found: Prediction) -> None:
    for one in found.variants:
        energy = "" if one.energy_j is None else f"  {one.energy_j:>9,.0f} J  {one.energy_j / one.time_s:>4,.0f} W"
        print(
            f"{one.label:<16} {one.time_s:>8,.2f} s{energy}  {one.launches:>6,} launches a step, most of it {one.bound}"
        )


if __name__ == "__main__":
    sys.exit(main())
