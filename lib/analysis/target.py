"""What it cost to reach a loss: tokens, seconds and joules until a validation loss first falls to a target.

The target of a block is the loss that `sdpa` has after two thirds of its tokens there, or, where the block holds the
A/A control, the mean of the two. So `sdpa` passes it well before its end, and it and its control are treated alike,
which centres their ratio on 1. A target counts as reached within a tolerance, what the losses of the two typically
differ by, and by the curve's isotonic fit, which no lucky validation can pull below the target.
"""

import math
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression

from lib.analysis import compare
from lib.attention import CONTROL, REFERENCE
from lib.record import REASONS
from lib.record.series import as_array

COSTS = ("tokens", "time_s", "energy_j")
FEWEST_VALIDATIONS = 8  # after the one at token 0: fewer do not say where between two of them a loss was reached
PASSED_AT = 2 / 3  # of `sdpa`'s tokens
RULE = (
    "The target is the validation loss of SDPA (and of its A/A control) after two thirds of its tokens in the same "
    "block; it is reached within {tolerance:.3f} nats, by which {whose}."
)


def to_target(runs: pd.DataFrame) -> pd.DataFrame:
    """What each run had spent when its validation loss first reached its block's target.

    A row per run: `target` (nats), `tokens` (non-padding ones), `time_s`, `energy_j`, each also over `sdpa`'s own
    (`tokens_ratio`...), `censored`, `gap_nats`, `reason`. Between two validations the loss is taken as linear in the
    logarithm of the tokens; tokens become seconds and joules by the run's own epochs, whose steps are taken as equally
    long. `censored` is the sign to write before the numbers: ">" where the whole budget did not do (`gap_nats`: what
    its curve lacked), "<" where already the first validation after token 0, which has no logarithm, is there. A number
    that is missing has its `reason`.
    """
    found, pairs, allowed = {}, compare.pairs(runs), tolerance(runs)
    twins = pairs[pairs["label"] == CONTROL].set_index("reference")["run"].to_dict()
    of = _by_run(runs)
    for pair in pairs.itertuples():
        yardsticks = [of[pair.reference], *([of[twins[pair.reference]]] if pair.reference in twins else [])]
        found[pair.run] = _to_target(of[pair.run], yardsticks, allowed)
    rows = []
    for pair in pairs.itertuples():
        mine, theirs = dict(found[pair.run]), found.get(pair.reference, {})
        for cost in COSTS:
            if mine.get(cost) and theirs.get(cost):
                mine[f"{cost}_ratio"] = mine[cost] / theirs[cost]
        rows.append({"run": pair.run, "label": pair.label, "session": pair.session, "block": pair.block} | mine)
    numbers = ["target", *(f"{cost}{end}" for cost in COSTS for end in ("", "_ratio")), "gap_nats"]
    table = pd.DataFrame(rows, columns=["run", "label", *compare.BLOCK, *numbers, "censored", "reason"])
    return table.astype(dict.fromkeys(numbers, float) | dict.fromkeys(("censored", "reason"), object))


def tolerance(runs: pd.DataFrame) -> float:
    """By how many nats the A/A control's validation losses differ from `sdpa`'s at the same tokens, root mean square.

    0.0 where there is no control.
    """
    pairs, of = compare.pairs(runs), runs["series_validation"]
    gaps = [
        mine - theirs
        for pair in pairs[pairs["label"] == CONTROL].itertuples()
        for (_, mine), (_, theirs) in zip(_curve(of[pair.run]), _curve(of[pair.reference]), strict=False)
    ]
    return float(np.sqrt(np.mean(np.square(gaps)))) if gaps else 0.0


def rule(runs: pd.DataFrame) -> str:
    """The rule of the target in one sentence, for beside its numbers."""
    has_control = (runs["label"] == CONTROL).any()
    whose = "the losses of these two differ" if has_control else "nothing is known to differ: there is no A/A control"
    return RULE.format(tolerance=tolerance(runs), whose=whose)


def _curve(validations: list[dict]) -> list[tuple[int, float]]:
    """(tokens, loss) of the validations after token 0 whose loss is finite."""
    points = ((point["non_padding_tokens"], point["loss"]) for point in validations)
    return [(tokens, loss) for tokens, loss in points if tokens > 0 and loss is not None]


class _Run:
    """One run, whose curve and fit are made once: in its block it is compared, and perhaps compared with."""

    def __init__(self, values: dict):
        self.values = values
        self.curve = _curve(values["series_validation"])

    def __getitem__(self, name: str):
        return self.values[name]

    @cached_property
    def fit(self) -> tuple[np.ndarray, np.ndarray]:
        """The logarithm of the tokens of its validations, and the losses that never rise which fit it best."""
        tokens, losses = zip(*self.curve, strict=True)
        return np.log(tokens), isotonic_regression(losses, increasing=False).x


USED = ("certified", "energy_j", "null_reasons", "series_validation", "series_epoch_time_s", "series_epoch_energy_j",
        "series_non_padding_tokens")  # fmt: skip


def _by_run(runs: pd.DataFrame) -> dict[int, _Run]:
    """By index, what is asked of a run: a row of the whole table costs as much as all that is done with it."""
    return dict(zip(runs.index, map(_Run, runs[list(USED)].to_dict("records")), strict=True))


def _to_target(run: _Run, yardsticks: list[_Run], allowed: float) -> dict:
    if not run["certified"]:
        return {"reason": "fails its certificate"}
    fewest = min(len(each.curve) for each in (run, *yardsticks))
    if fewest < FEWEST_VALIDATIONS:
        return {"reason": f"not enough validations: raise epochs ({fewest}, at least {FEWEST_VALIDATIONS} are needed)"}
    ends = [(*each.fit, each.curve[-1][0]) for each in yardsticks]
    target = float(np.mean([np.interp(math.log(PASSED_AT * end), logs, fit) for logs, fit, end in ends]))
    (logs, fit), found = run.fit, {"target": target}
    reached = np.flatnonzero(fit <= target + allowed)
    if not len(reached):
        tokens = math.exp(logs[-1])
        found |= {"censored": ">", "gap_nats": fit[-1] - target}
    elif reached[0] == 0:
        tokens = math.exp(logs[0])
        found |= {"censored": "<"}
    else:
        around = slice(reached[0] - 1, reached[0] + 1)
        tokens = math.exp(np.interp(-target - allowed, -fit[around], logs[around]))
    found |= {"tokens": tokens, "time_s": _spent(run, tokens, run["series_epoch_time_s"])}
    if pd.isna(run["energy_j"]) or not run["series_epoch_energy_j"]:
        reason = run["null_reasons"].get("energy_j")
        return found | {"reason": REASONS.get(reason, "no energy by epoch")}
    return found | {"energy_j": _spent(run, tokens, run["series_epoch_energy_j"])}


def _spent(run: _Run, tokens: float, per_epoch: list[float]) -> float:
    """The part of a per-epoch series that a run had spent after so many non-padding tokens, by its count of steps."""
    seen = np.concatenate([[0], as_array(run["series_non_padding_tokens"])])
    step = np.interp(tokens, seen, np.arange(len(seen)))
    return float(np.interp(step, np.linspace(0, len(seen) - 1, len(per_epoch) + 1), np.cumsum([0, *per_epoch])))


def summary(runs: pd.DataFrame, table: pd.DataFrame | None = None) -> pd.DataFrame:
    """`to_target` (`table`, where it is there already) in one row per label.

    Geometric means over its `n` blocks; the target was `reached` in so many of them.

    Of each cost its mean, and `..._ratio`, `..._low`, `..._high` and `..._verdict` as `compare.ratios` has them.
    `censored` is the sign of the means where some block has one: means over bounds are bounds, and get no interval.
    Where some blocks have upper and others lower bounds there is no mean; nor where a cost was not measured in each.
    """
    table, exact = to_target(runs) if table is None else table, runs.copy(deep=False)
    by_run = table.set_index("run")
    signed = by_run.groupby("label")["censored"].transform(lambda signs: signs.notna().any())
    for cost in COSTS:
        exact[cost] = by_run[cost].mask(signed).reindex(runs.index)
    ratios = {cost: compare.ratios(exact, cost).set_index("label") for cost in COSTS}
    rows = []
    for label, own in table.groupby("label"):
        counted, reasons = own[own["tokens"].notna()], own["reason"].dropna()
        signs = list(counted["censored"].dropna().unique())
        row = {"label": label, "n": len(counted), "reached": int((counted["censored"] != ">").sum())}
        row |= {"censored": signs[0] if len(signs) == 1 else None, "reason": next(iter(reasons), None)}
        if len(signs) == 2:
            row["reason"] = "not reached in some blocks, by the first validation in others"
        else:
            for cost in COSTS:
                row |= _summary_of(cost, counted, ratios[cost].loc[label], bool(signs))
        rows.append(row)
    numbers = [f"{cost}{end}" for cost in COSTS for end in ("", "_ratio", "_low", "_high")]
    verdicts = [f"{cost}_verdict" for cost in COSTS]
    found = pd.DataFrame(rows, columns=["label", "n", "reached", "censored", *numbers, *verdicts, "reason"])
    return found.astype(dict.fromkeys(numbers, float) | dict.fromkeys(("censored", "reason", *verdicts), object))


def _summary_of(cost: str, own: pd.DataFrame, ratio: pd.Series, is_bound: bool) -> dict:
    if own.empty or own[[cost, f"{cost}_ratio"]].isna().any(axis=None):
        return {}
    found = {cost: math.exp(np.log(own[cost]).mean())}
    if is_bound:
        return found | {f"{cost}_ratio": math.exp(np.log(own[f"{cost}_ratio"]).mean())}
    return found | {f"{cost}_{end}": ratio[end] for end in ("ratio", "low", "high", "verdict")}


def noise(runs: pd.DataFrame, cost: str, table: pd.DataFrame | None = None) -> compare.Noise | None:
    """The A/A control's cost to the target (of `table`, as in `summary`) beside `sdpa`'s; None where one has none."""
    spent = (to_target(runs) if table is None else table).set_index("run")[cost].reindex(runs.index)
    return compare.noise(runs.assign(**{cost: spent}), cost) if REFERENCE in set(runs["label"]) else None
