"""Where a training step's time and energy go: by phase, and by attention core.

Both are loops of their own, outside the measured window, on the weights as they are; nothing of them stays behind.
What is compared is measured in rounds of alternating order, so that drift of clocks and temperature cancels.
"""

import statistics

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lib import attention
from lib.errors import one_sentence_when_out_of_memory
from lib.measure.meter import Stopwatch

FEW_COUNTS = 5  # of blocks that keep their attention, where there are more layers than that


@one_sentence_when_out_of_memory()
def measured(trainer, steps: int) -> dict:
    """`phases` and `slope` with rounds of so many steps, as a record holds them; nothing where `steps` is 0."""
    if not steps:
        return {"phases": [], "slope": None}
    return {"phases": phases(trainer, steps), "slope": slope(trainer, steps)}


def table(found: dict) -> pd.DataFrame:
    """What `measured` found, as a reader sees it, in milliseconds and, where counted, joules."""
    rows = [
        {
            "part": f"{row['phase'].replace('_', ' and ')}{' (derived)' if row['derived'] else ''}",
            "ms": f"{row['time_s_per_step'] * 1e3:.2f}",
            "minimum, ms": f"{row['minimum_time_s_per_step'] * 1e3:.2f}",
            "J": "–" if row["energy_j_per_step"] is None else f"{row['energy_j_per_step']:.3f}",
        }
        for row in found["phases"]
    ]
    slope = found["slope"]
    if slope:
        low, high = slope["time_s_per_core_low"] * 1e3, slope["time_s_per_core_high"] * 1e3
        cost = f"{slope['time_s_per_core'] * 1e3:.3f} [{low:.3f}, {high:.3f}]"
        joules = "–" if slope["energy_j_per_core"] is None else f"{slope['energy_j_per_core']:.4f}"
        rows.append({"part": "one attention core, by slope", "ms": cost, "minimum, ms": "", "J": joules})
    return pd.DataFrame(rows or [{"part": "not asked for: phase_steps is 0"}])


def phases(trainer, steps: int, rounds: int = 3, warmup: int = 2) -> list[dict]:
    """Forward, forward and backward, and the full step of a `lib.training.Trainer`, each in a loop of its own.

    A row per phase: `time_s_per_step`, the median over `rounds` of `steps` steps, each from an idle device to an idle
    device; `minimum_time_s_per_step`; `energy_j_per_step` over all rounds, None with its `energy_null_reason` (a round
    under 2 s has none). Forward keeps what backward will need, as in training. The rows "backward" and "optimizer"
    are differences of these, `derived`, and as uncertain as both together: noise can make them negative.
    """
    work = {
        "forward": lambda step: trainer.forward_backward(step, backward=False),
        "forward_backward": lambda step: _forward_backward(trainer, step),
        "step": lambda step: trainer.take_step(step),
    }
    with trainer.snapshot_and_restore():
        trainer.model.train()
        watches = _rounds(trainer, work, steps, rounds, warmup)
    rows = {name: {"phase": name, "derived": False} | _per_step(watch, steps) for name, watch in watches.items()}
    rows["backward"] = _difference("backward", rows["forward_backward"], rows["forward"])
    rows["optimizer"] = _difference("optimizer", rows["step"], rows["forward_backward"])
    return list(rows.values())


def slope(trainer, steps: int, rounds: int = 4, warmup: int = 2) -> dict:
    """Attention's own share: seconds and joules of forward and backward against the number of blocks that keep it.

    In the other layers `Bypassed` stands in: GPT-2's projections and nothing between them. So for `sdpa` the slope is
    the price of one attention core with what brings heads apart and together, forward and backward; a variant with
    projections of its own (mla's latents, gqa's narrow keys) is charged with what they cost beyond GPT-2's, or credited
    with what they save. The bypass is not quite nothing: backward it fills the gradient of queries and keys with zeros,
    where a core writes what it found. The optimizer is left out: a core has no weights, and so none change.

    Least squares with an intercept for each round: `time_s_per_core` with its 95 % interval (`_low`, `_high`), and
    `time_r_squared`, how much of the variation inside rounds a straight line explains; the same for `energy_j`, None
    with `energy_null_reason` where some round was under 2 s or had no counter. `layers_with_attention` are the numbers
    of layers that keep it. Of a pattern they are whole repetitions, where there is room, and a core is the mean one.
    """
    blocks = trainer.model.transformer.h
    own = [block.attn for block in blocks]
    weight = own[0].c_proj.weight

    def with_attention(kept):
        def work(step):
            for layer, block in enumerate(blocks):
                block.attn = own[layer] if layer < kept else stand_ins[layer]
            _forward_backward(trainer, step)

        return work

    counts = counts_of(len(own), len(attention.parts(trainer.model.config.attention)))
    with trainer.snapshot_and_restore():
        trainer.model.train()
        stand_ins = [Bypassed(trainer.model.config).to(weight.device, weight.dtype) for _ in blocks]
        try:
            watches = _rounds(trainer, {kept: with_attention(kept) for kept in counts}, steps, rounds, warmup)
        finally:
            for block, layer in zip(blocks, own, strict=True):
                block.attn = layer
    energies = {kept: watch.reading() for kept, watch in watches.items()}
    reason = next((reading.reason for reading in energies.values() if reading.reason), None)
    times = {kept: np.divide(watch.seconds, steps) for kept, watch in watches.items()}
    found = {"layers_with_attention": counts, "time_s_per_step": [float(np.median(times[kept])) for kept in counts]}
    found |= _line("time_s_per_core", "time_r_squared", times)
    found |= {"energy_j_per_step": None, "energy_null_reason": reason}
    if reason is None:
        joules = {kept: np.divide(watch.counter.windows_j, steps) for kept, watch in watches.items()}
        found["energy_j_per_step"] = [float(np.median(joules[kept])) for kept in counts]
        return found | _line("energy_j_per_core", "energy_r_squared", joules)
    return found | dict.fromkeys(
        ("energy_j_per_core", "energy_j_per_core_low", "energy_j_per_core_high", "energy_r_squared")
    )


def counts_of(layers: int, period: int) -> list[int]:
    """How many of so many layers keep their attention, in a slope's points: whole repetitions of a pattern."""
    counts = [*range(0, layers, period), layers]
    if len(counts) <= FEW_COUNTS + 1:
        return counts
    return [counts[place] for place in np.linspace(0, len(counts) - 1, FEW_COUNTS).round().astype(int)]


class Bypassed(nn.Module):
    """An attention whose core is left out: GPT-2's projections, the output of each token made from its own values."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.residual_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states, **_):
        values = self.c_attn(hidden_states).split(hidden_states.shape[2], dim=2)[2]  # (B, T, C)
        # What c_proj does, which itself would want the values in one piece: a copy that no attention makes.
        out = torch.addmm(self.c_proj.bias, values.flatten(0, 1), self.c_proj.weight)  # (B T, C)
        return self.residual_dropout(out.view_as(values)), None


def _forward_backward(trainer, step: int) -> None:
    trainer.forward_backward(step)
    trainer.model.zero_grad(set_to_none=True)


def _rounds(trainer, work: dict, steps: int, rounds: int, warmup: int) -> dict[object, Stopwatch]:
    """Runs each kind of work for `steps` steps a round, in alternating order, `warmup` steps untimed before each."""
    watches = {name: Stopwatch(trainer.device) for name in work}
    for name in work:
        _loop(trainer, work[name], warmup)  # compilation and first allocations, before any clock runs
    for turn in range(rounds):
        for name in list(work)[:: 1 if turn % 2 == 0 else -1]:
            _loop(trainer, work[name], warmup)
            with watches[name]:
                _loop(trainer, work[name], steps)
    return watches


def _loop(trainer, work, steps: int) -> None:
    for step in range(steps):
        work(step % len(trainer.rows))


def _per_step(watch: Stopwatch, steps: int) -> dict:
    reading = watch.reading()
    return {
        "time_s_per_step": statistics.median(watch.seconds) / steps,
        "minimum_time_s_per_step": min(watch.seconds) / steps,
        "energy_j_per_step": None if reading.joules is None else reading.joules / (steps * len(watch.seconds)),
        "energy_null_reason": reading.reason,
    }


def _difference(name: str, whole: dict, part: dict) -> dict:
    row = {"phase": name, "derived": True}
    for quantity in ("time_s_per_step", "minimum_time_s_per_step", "energy_j_per_step"):
        missing = whole[quantity] is None or part[quantity] is None
        row[quantity] = None if missing else whole[quantity] - part[quantity]
    return row | {"energy_null_reason": whole["energy_null_reason"] or part["energy_null_reason"]}


def _line(name: str, fit_name: str, costs: dict[int, np.ndarray]) -> dict:
    """Least squares of the costs, an entry per round for each number of kept blocks, with an intercept per round."""
    from statsmodels.regression.linear_model import OLS  # here: half a second that a run without phases would pay

    y = np.stack(list(costs.values()), axis=1)  # (rounds, counts)
    rounds, counts = y.shape
    kept = np.tile(list(costs), rounds)
    intercepts = np.repeat(np.eye(rounds), counts, axis=0)  # (rounds counts, rounds)
    fit = OLS(y.ravel(), np.column_stack([kept, intercepts])).fit()
    low, high = fit.conf_int(0.05)[0]
    inside = ((y - y.mean(axis=1, keepdims=True)) ** 2).sum()
    return {
        name: float(fit.params[0]),
        f"{name}_low": float(low),
        f"{name}_high": float(high),
        fit_name: float(1 - fit.ssr / inside),
    }
