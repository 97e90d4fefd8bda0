"""`python -m lib.study.roofline params/gpu_512.yaml --device "NVIDIA H200" --write FILE`: what runs should cost.

A roofline of time and energy (Choi, Bedard, Fowler, Vuduc 2013, A Roofline Model of Energy, IPDPS): an operator takes
the longer of its FLOPs over the device's rate and its bytes over its memory's; energy is idle power times time, and so
much more a FLOP and a byte. A GPU works while the host launches, so a step takes the longer of the two; and where it
would draw more than its power limit, as long as that limit asks for. What it rests on is in `DEVICES` and in each file.

A prediction is never shown as a measurement: it says what one should be surprised by. `residuals` sets it beside one.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from lib import attention, parameters, record
from lib.errors import UsageError
from lib.record.prediction import Device, Predicted, Prediction
from lib.study import plan

GPT2_VOCABULARY = 50257
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
        seen="on such a GPU, before this study: torch.mm of 8192 x 8192 bf16, 788 TFLOP/s; a copy on it, 4.3 TB/s",
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


def predict(profile: str | None, device_name: str, vocabulary: int, variants: list | None = None) -> Prediction:
    """Counts and predicts the runs of a profile (None: the notebook's defaults). Raises UsageError."""
    if device_name not in DEVICES:
        raise UsageError(
            f"nothing is known of a device {device_name!r}; known: {', '.join(DEVICES)}. "
            "Add yours to DEVICES in lib/study/roofline.py"
        )
    if vocabulary < 2:
        raise UsageError(f"vocabulary must be at least 2, not {vocabulary}")
    runs, name = plan.chosen(profile, variants or attention.STUDY_ORDER, 1)
    if runs[0]["values"]["compile"]:
        raise UsageError("which kernels a compiled model has is not known before; predict it with compile: false")
    return Prediction(
        made_at=record.now(), profile=name, setting=parameters.setting(runs[0]["values"]), vocabulary=vocabulary,
        device_name=device_name, device=DEVICES[device_name],
        variants=[predicted(run["values"], vocabulary, DEVICES[device_name]) for run in runs],
    )  # fmt: skip


def predicted(values: dict, vocabulary: int, device: Device) -> Predicted:
    """One run, from the parameters of train.ipynb."""
    from lib.measure import operators  # torch, which reading predictions does without

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


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.study.roofline", description=__doc__.split("\n\n")[1])
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
        print(f"python -m lib.study.roofline: {error}", file=sys.stderr)
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
