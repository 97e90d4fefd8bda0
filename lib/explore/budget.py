"""The budget with which explore.ipynb opens: of each variant what it needs, and what the records measured, at once.

Weights, caches and FLOPs are computed for the size that is asked, by each variant's own formulas. Times, activation
memory and recall come from the committed records, at the lengths that these measured; where they have none there is a
dash, never a guess between.
"""

from functools import cache
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import pandas as pd

from lib import attention, paths
from lib.analysis import answer, evidence, growth
from lib.analysis.conclusions import Conclusion
from lib.analysis.evidence import TIME, Evidence
from lib.analysis.words import size as in_bytes
from lib.data import corpus
from lib.errors import UsageError
from lib.explore.widgets import Choice, Marked, fitting
from lib.measure import flops
from lib.model import gpt2_config, meta_model
from lib.record import scaling

SIZES = {  # layers, width, heads, vocabulary
    "the quick profile (4 layers of 128)": (4, 128, 8, corpus.BUILTIN_VOCABULARY),
    "GPT-2 small (12 layers of 768)": (12, 768, 12, 50257),
    "GPT-2 XL (48 layers of 1,600)": (48, 1600, 25, 50257),
}
GPT2_SMALL = list(SIZES)[1]
CONTEXTS = tuple(2**power for power in range(8, 18))
BATCHES = tuple(2**power for power in range(8))
GIB_OF_MEMORY = (1, 2, 4, 8, 16, 24, 40, 80, 141)
POINTS = "records/scaling-cpu"
BF16 = 2  # bytes of a number


class Known(NamedTuple):
    """What the committed records say: of training steps and recall, and of cost by length."""

    steps: Evidence
    points: pd.DataFrame
    where: str  # the machine of the points


@cache
def known() -> Known:
    found = scaling.load_all(paths.ROOT / POINTS)
    steps = answer.committed()
    return Known(steps, scaling.frame(found), found[0].environment["device_name"])


def conclusion() -> Conclusion:
    """The study's answer, as README has it."""
    found = known().steps
    said = [answer.plain(one) for one in answer.sentences(found)]
    sure = [answer.plain(one) for one in answer.how_sure(found)]
    shown = [one for one in sure if not one.startswith("Not shown")]
    hidden = [one.removeprefix("Not shown: ") for one in sure if one.startswith("Not shown")]
    rests = [shown[0], *(one for one in shown[1:] if one.startswith("Session "))]
    return Conclusion(said, [], " ".join(rests), hidden[0])


def controls() -> dict:
    def steps(options, value, name, form="{:,}"):
        pairs = [(form.format(option), option) for option in options]
        return widgets.SelectionSlider(options=pairs, value=value, description=name, layout={"width": "46%"})

    sizes = widgets.Dropdown(options=list(SIZES), value=GPT2_SMALL, description="size")
    return {
        "size": sizes,
        "context": steps(CONTEXTS, 8192, "context, tokens"),
        "batch": steps(BATCHES, 64, "sequences at once"),
        "share": widgets.FloatSlider(
            value=0.0, min=0.0, max=1.0, step=0.05, description="share that is decoded", readout_format=".2f",
            layout={"width": "46%"}, continuous_update=False,
        ),
        "memory": steps(GIB_OF_MEMORY, 16, "memory, GiB"),
    }  # fmt: skip


class Need(NamedTuple):
    """What a model with an attention takes at a context length; bytes in bf16."""

    weights_bytes: float
    cache_bytes: float  # of one sequence
    flops_per_token: float  # forward, causal


@cache
def _need(name: str, options: tuple, size: str, context: int) -> Need:
    layers, width, heads, vocabulary = SIZES[size]
    config = gpt2_config(layers, width, heads, context, vocabulary)
    fitting(Choice(name, dict(options)), {"layers": layers, "width": width, "heads": heads, "positions": context})
    model = meta_model(name, config, **dict(options))
    weights = BF16 * sum(weight.numel() for weight in model.parameters())
    held = sum(block.attn.cache_bytes(context, BF16) for block in model.transformer.h)
    return Need(weights, held, flops.analytic(model, context)["forward_flops_causal"] / context)


def need(choice: Choice, size: str, context: int) -> Need:
    """Raises UsageError where the variant refuses this size or its options."""
    return _need(choice.attention, tuple(choice.options.items()), size, context)


@cache
def _by_length(label: str) -> dict[int, list]:
    """Of a variant, then of sdpa, by length: (mean, draws) of the logarithms of prefill's and of decoding's time."""
    points = known().points
    several = [
        growth.costs_of(points, metric, who)
        for who in (label, attention.REFERENCE)
        for metric in ("prefill_s", "decode_s_per_token")
    ]
    shared = set.intersection(*(set(one.contexts.tolist()) for one in several))
    if not shared:
        return {}
    several = [one.among(shared) for one in several]
    drawn = growth.resamples(several)
    return {
        context: [(one.logs.mean(axis=0)[place], draws[:, place]) for one, draws in zip(several, drawn, strict=True)]
        for place, context in enumerate(sorted(shared))
    }


def time_ratio(label: str, context: int, share: float) -> tuple[float, float, float] | None:
    """A token's time over sdpa's with a 95 % interval (NaN for one process), where `share` of the tokens are written
    one by one and the others read at once; None where one of both was not measured at that length."""
    found = _by_length(label).get(context)
    if found is None:
        return None
    mean, draws = (
        [(1 - share) * np.exp(one[which][part]) / context + share * np.exp(one[which + 1][part]) for which in (0, 2)]
        for part, one in ((0, found), (1, found))
    )
    low, high = growth.interval(draws[0] / draws[1])
    return float(mean[0] / mean[1]), float(low), float(high)


@cache
def _kept() -> dict[tuple[str, int], float]:
    """Peak activation memory of one layer over sdpa's, by variant and length."""
    found = growth.ratios(known().points, "peak_activation_bytes", attention.REFERENCE)
    there = {(attention.REFERENCE, context): 1.0 for context in found["context"]}
    return there | dict(zip(zip(found["label"], found["context"], strict=True), found["ratio"], strict=True))


def table(choice: Choice, size: str, context: int, batch: int, share: float, memory: int) -> list:
    """A row per variant, and one of the choice where its options are its own: what fits first, by what it needs."""
    rows = []
    every = dict.fromkeys((*map(Choice, attention.variants()), choice))
    for one in every:
        try:
            needs = need(one, size, context)
        except UsageError:
            if one == choice:
                raise
            continue
        needed = needs.weights_bytes + batch * needs.cache_bytes
        row = {"variant": one.label, "cache": in_bytes(needed - needs.weights_bytes)}
        row |= {"weights and cache": in_bytes(needed), "fits": "yes" if needed <= memory * 2**30 else "no"}
        row |= {"GFLOPs a token": f"{needs.flops_per_token / 1e9:,.3g}"}
        rows.append((needed, row | _measured(one, context, share)))
    rows = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    grey = [place for place, row in enumerate(rows) if row["fits"] == "no"]
    own = [place for place, row in enumerate(rows) if row["variant"] == choice.label]
    return [Marked(pd.DataFrame(rows), grey, own), *_about(size, batch, memory, share)]


def _measured(one: Choice, context: int, share: float) -> dict:
    """What the records have of a variant with the study's own options."""
    label, steps, is_ours = one.name, known().steps, not one.options and attention.is_ours(one.attention)
    step = steps.ratio(label, context, TIME) if is_ours else None
    recall = steps.recall.get(label) if is_ours else None
    return {
        f"training step ÷ SDPA's, {steps.machine}": _ratio(
            label, None if step is None else (step.ratio, step.low, step.high)
        ),
        f"time ÷ SDPA's, {known().where}": _ratio(label, time_ratio(label, context, share) if is_ours else None),
        "activations ÷ SDPA's": f"{_kept()[label, context]:.2f}" if is_ours and (label, context) in _kept() else "–",
        "recalls": "–" if recall is None else _recalled(recall, one.label),
    }


def _recalled(recall: evidence.Recall, title: str) -> str:
    other = "" if recall.title == title else f" (as {recall.title})"
    return f"{evidence.share_of(recall)}{other}"


def _ratio(label: str, found: tuple[float, float, float] | None) -> str:
    if found is None:
        return "–"
    ratio, low, high = found
    return (
        "1" if label == attention.REFERENCE else f"{ratio:.2f}" + ("" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]")
    )


def _about(size: str, batch: int, memory: int, share: float) -> list[str]:
    found = known()
    setting = found.steps.found.setting
    lengths, measured = " and ".join(f"{at:,}" for at in found.steps.lengths), sorted(found.points["context"].unique())
    return [
        f"Weights and cache: {size}, bf16, {batch} sequence{'' if batch == 1 else 's'}, beside {memory} GiB; grey rows "
        "do not fit. Training keeps gradients, optimizer and activations on top. GFLOPs: forward, causal, whole model.",
        f"Training step: of GPT-2 with {setting.layers} layers of {setting.width} whatever the size above, measured on "
        f"{found.steps.machine} at {lengths} tokens. Time: reading {1 - share:.0%} of the "
        f"tokens at once and writing {share:.0%} one by one, a small model on {found.where}; activations: one layer "
        f"there; both at {measured[0]:,} to {measured[-1]:,} tokens. In brackets: 95 %. Recalls: 32 pairs in 128 "
        "tokens, the median seed's and where they differ the lowest and the highest. A dash: not measured at this "
        "length, or with these options.",
    ]
