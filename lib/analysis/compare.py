"""What may be compared with what, and how sure it is.

Runs are compared only within a group (same setting, same tokens, same device), and by the ratio to `sdpa` inside a
block, so that whatever drifted from block to block cancels. The logarithms of these ratios are taken as normal: paired
t intervals, Holm (1979) over the variants, equivalence by two one-sided tests (Schuirmann 1987).
"""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lib.attention import CONTROL, REFERENCE
from lib.errors import UsageError
from lib.record import REASONS

FEWEST_BLOCKS = 5  # below that, points only
EQUIVALENT_WITHIN = 0.02
BLOCK = ["session", "block"]


@dataclass(frozen=True)
class Group:
    """Runs that one table may hold, and what sets them apart from the others in the folder."""

    runs: pd.DataFrame
    title: str


def groups(runs: pd.DataFrame) -> list[Group]:
    """The runs of `lib.record.read`, split by setting, tokens and device, the largest group first; synthetic ones are
    left out.

    Raises UsageError where none is left.
    """
    if runs.empty or not (runs["provenance"] == "measured").any():
        raise UsageError("there is no record in that folder; `make study` or a run of train.ipynb writes some")
    found = []
    measured = runs[runs["provenance"] == "measured"]
    tokens, gpu = measured["token_sha256"].fillna(""), measured["gpu_uuid"].fillna("")
    several = tokens.groupby(measured["setting"]).nunique() > 1
    for (setting, *_), part in measured.groupby(["setting", tokens, "device_name", gpu], sort=True):
        found.append(Group(part.reset_index(drop=True), _title(part.iloc[0], several[setting])))
    return sorted(found, key=lambda group: -len(group.runs))


def _title(run: pd.Series, tokens_too: bool) -> str:
    """`tokens_too`: runs of this setting saw different tokens, so that their data's name does not tell them apart."""
    p = run["parameter_values"]
    tokens = f" (tokens {(run['token_sha256'] or 'unknown')[:8]})" if tokens_too else ""
    return (
        f"GPT-2 with {p['layers']} layers of {p['width']}, T = {p['context']}, "
        f"{p['steps_per_epoch'] * p['epochs']} steps of {p['batch_size'] * p['accumulation']} rows, "
        f"{p['dataset']} data{tokens}, on {run['device_name']}"
    )


def whole_blocks(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of whole blocks: every label once, in one session, on one device (a GPU by its UUID).

    Every label means all that the sessions with `sdpa` hold: a variant added later, in a session without it, is in no
    block and tears none. A block that holds a label twice is left out: which of the two belongs there is not known.
    """
    seated = runs.dropna(subset=BLOCK)
    compared = seated["session"].isin(seated.loc[seated["label"] == REFERENCE, "session"])
    every = sorted(set(seated.loc[compared, "label"]))

    def is_whole(part):
        return sorted(part["label"]) == every and len(part[["device_name", "gpu_uuid"]].drop_duplicates()) == 1

    whole = [part for _, part in seated.groupby(BLOCK) if is_whole(part)]
    return pd.concat(whole) if whole else runs.iloc[:0]


def balanced(runs: pd.DataFrame) -> bool:
    """Whether over the whole blocks every label stood in every place, and right behind every other, equally often.

    A Williams square does that in as many blocks as there are labels, or in twice as many where their number is odd.
    The A/A control is no part of it: only the order of the others among themselves counts.
    """
    orders = [part.sort_values("position") for _, part in whole_blocks(runs).groupby(BLOCK)]
    if not orders or any(list(order["position"]) != list(range(len(order))) for order in orders):
        return False
    names = [[label for label in order["label"] if label != CONTROL] for order in orders]
    places = Counter(place for order in names for place in enumerate(order))
    neighbours = Counter(two for order in names for two in pairwise(order))
    labels = len(names[0])
    return (
        len(places) == labels**2
        and len(neighbours) == labels * (labels - 1)
        and len(set(places.values())) == 1
        and len(set(neighbours.values())) <= 1
    )


def about_blocks(runs: pd.DataFrame) -> str:
    """One sentence for beside a table: how many blocks are whole, and whether their order is balanced."""
    blocks = len(whole_blocks(runs).groupby(BLOCK))
    if not blocks:
        return "No block is whole (every variant in one session on one device): runs are paired by seed, points only."
    order = "balanced" if balanced(runs) else "not balanced"
    return f"{blocks} whole block{'s' if blocks > 1 else ''}, the order of runs over them {order}."


def pairs(runs: pd.DataFrame) -> pd.DataFrame:
    """Each run beside the one of `sdpa` that it may be compared with.

    Columns: `label`, `session`, `block`, `run` and `reference` (indices of `runs`), and `whole`. Runs of whole blocks
    are paired inside the block. A label that is in no whole block (runs by hand, incomplete blocks) is paired by seed
    and has `whole` False; two runs of one label and seed are two things under one name, and paired with nothing.
    """
    blocks = whole_blocks(runs)
    others = runs[~runs["label"].isin(blocks["label"])]
    found = []
    for part, partners, keys in ((blocks, blocks, BLOCK), (others, runs, ["seed"])):
        references = partners[partners["label"] == REFERENCE].drop_duplicates(keys, keep=False)
        references = references.reset_index(names="reference")[[*keys, "reference"]]
        part = part.drop_duplicates([*keys, "label"], keep=False).reset_index(names="run")
        found.append(part.merge(references, on=keys).assign(whole=keys is BLOCK))
    return pd.concat(found, ignore_index=True)[["label", *BLOCK, "run", "reference", "whole"]]


class Paired(NamedTuple):
    """Comparisons with the reference: geometric mean ratio, its 95 % interval, raw p, and equivalence."""

    ratio: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    within: np.ndarray


def paired_t(logs) -> Paired:
    """Two-sided paired t over the last axis of `logs` (..., n), the logarithms of ratios inside n blocks.

    `within`: the 90 % interval lies inside 1/1.02 to 1.02, that is, both one-sided tests reject at 5 %. The margin is
    symmetric on the logarithm, so that it makes no difference which of the two is the denominator.
    """
    logs = np.asarray(logs, dtype=float)
    n, mean, error = logs.shape[-1], logs.mean(-1), stats.sem(logs, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stats.t.sf(np.abs(mean) / error, n - 1)
    p = np.where(error == 0, np.where(mean == 0, 1.0, 0.0), p)  # a count, the same in every block
    wide, narrow = (error * stats.t.ppf(quantile, n - 1) for quantile in (0.975, 0.95))
    within = np.abs(mean) + narrow < math.log1p(EQUIVALENT_WITHIN)
    return Paired(np.exp(mean), np.exp(mean - wide), np.exp(mean + wide), p, within)


def holm(p) -> np.ndarray:
    """Raw p of the comparisons of one family -> adjusted by Holm's step-down."""
    return multipletests(p, method="holm")[1]


def verdict(adjusted_p: float, within: bool) -> str:
    """What may be said; a difference that is sure is called so even where it is small enough to be equivalent."""
    return "significantly different" if adjusted_p < 0.05 else "equivalent within 2 %" if within else "inconclusive"


def ratios(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Each variant's `metric` over `sdpa`'s in the same block, a row per label.

    `ratio` is the geometric mean over the `n` blocks in which both were measured and are above 0. From five blocks up:
    `low` and `high`, the 95 % paired-t interval on the logarithm; `p`, Holm-adjusted; and `verdict`: *significantly
    different* (p < 0.05), *equivalent within 2 %* (90 % interval inside it), or *inconclusive*. With fewer, or where a
    label has no whole block and its runs are paired by seed, these are missing and `verdict` says so.

    Holm's family are the certified variants of this one table. The A/A control is a control, not a question: counted
    in, it would cost the variants power, and Holm would make it slower to sound the alarm; its `p` is the raw one, so
    it is called different by chance in one table of twenty. What fails its certificate has an interval, but no p.
    """
    if REFERENCE not in set(runs["label"]):
        return pd.DataFrame(columns=["label", "ratio", "n", "low", "high", "p", "verdict"])
    paired, rows, family = pairs(runs), [], []
    for label, own in runs.groupby("label"):
        mine = paired[paired["label"] == label]
        values, references = (runs.loc[mine[end], metric].to_numpy(dtype=float) for end in ("run", "reference"))
        usable = (values > 0) & (references > 0)
        logs = np.log(values[usable] / references[usable])
        row = dict.fromkeys(("ratio", "low", "high", "p")) | {"label": label, "n": len(logs)}
        row["ratio"] = math.exp(logs.mean()) if len(logs) else None
        if label == REFERENCE:
            row["verdict"] = "the reference"
        elif not mine["whole"].all():
            row["verdict"] = f"n = {len(logs)}, not in one session"
        elif len(logs) < FEWEST_BLOCKS:
            row["verdict"] = f"n = {len(logs)}"
        else:
            found = paired_t(logs)
            row |= {"low": float(found.low), "high": float(found.high), "within": bool(found.within)}
            if not own["certified"].all():
                row["verdict"] = "fails its certificate"
            else:
                row["p"] = float(found.p)
                family += [row] if label != CONTROL else []
        rows.append(row)
    for row, p in zip(family, holm([row["p"] for row in family]) if family else [], strict=True):
        row["p"] = float(p)
    for row in rows:
        row.setdefault("verdict", None if row["p"] is None else verdict(row["p"], row["within"]))
    table = pd.DataFrame(rows, columns=["label", "ratio", "n", "low", "high", "p", "verdict"])
    return table.astype(dict.fromkeys(("ratio", "low", "high", "p"), float))


COSTS = ("tokens", "time_s", "energy_j")


def to_target(runs: pd.DataFrame) -> pd.DataFrame:
    """What each run had spent when its validation loss first reached the one at which `sdpa` ended in the same block.

    A row per run: `tokens` (useful ones), `time_s`, `energy_j`, each also over `sdpa`'s own (`tokens_ratio`...),
    `censored`, `gap_nats`, `reason`. Between two validations the loss is taken as linear in the logarithm of the
    tokens; tokens become seconds and joules by the run's own epochs, whose steps are taken as equally long. `censored`
    is the sign to write before the numbers: ">" where the whole budget did not do (`gap_nats`: what its best
    validation lacked), "<" where already the first validation after token 0, which has no logarithm, is better. A
    number that is missing has its `reason`.
    """
    rows = []
    for pair in pairs(runs).itertuples():
        reference = runs.loc[pair.reference]
        found, theirs = (_to_target(run, reference) for run in (runs.loc[pair.run], reference))
        for cost in COSTS:
            if found.get(cost) and theirs.get(cost):
                found[f"{cost}_ratio"] = found[cost] / theirs[cost]
        rows.append({"label": pair.label, "session": pair.session, "block": pair.block, "whole": pair.whole} | found)
    numbers = [f"{cost}{end}" for cost in COSTS for end in ("", "_ratio")] + ["gap_nats"]
    table = pd.DataFrame(rows, columns=["label", *BLOCK, "whole", *numbers, "censored", "reason"])
    return table.astype(dict.fromkeys(numbers, float) | dict.fromkeys(("censored", "reason"), object))


def _to_target(run: pd.Series, reference: pd.Series) -> dict:
    if not run["certified"]:
        return {"reason": "fails its certificate"}
    curve = [
        (point["non_padding_tokens"], point["loss"]) for point in run["series_validation"] if point["loss"] is not None
    ]
    target = reference["series_validation"][-1]["loss"] if reference["series_validation"] else None
    if target is None or not curve:
        return {"reason": "no validation loss"}
    reached = next((index for index, (_, loss) in enumerate(curve) if loss <= target), None)
    if reached == 0:
        return {"reason": "the target is reached without training"}
    if reached is None:
        tokens = curve[-1][0]
        found = {"censored": ">", "gap_nats": min(loss for _, loss in curve) - target}
    else:
        (before, above), (tokens, below) = curve[reached - 1 : reached + 1]
        found = {"censored": "<" if before == 0 and below < target else None}
        if before > 0:
            tokens = before * (tokens / before) ** ((above - target) / (above - below))
    found |= {"tokens": tokens, "time_s": _spent(run, tokens, run["series_epoch_time_s"])}
    if pd.isna(run["energy_j"]) or not run["series_epoch_energy_j"]:
        reason = run["null_reasons"].get("energy_j")
        return found | {"reason": REASONS.get(reason, "no energy by epoch")}
    return found | {"energy_j": _spent(run, tokens, run["series_epoch_energy_j"])}


def _spent(run: pd.Series, tokens: float, per_epoch: list[float]) -> float:
    """The part of a per-epoch series that a run had spent after so many non-padding tokens, by its count of steps."""
    seen = [0, *run["series_non_padding_tokens"]]
    step = np.interp(tokens, seen, range(len(seen)))
    return float(np.interp(step, np.linspace(0, len(seen) - 1, len(per_epoch) + 1), np.cumsum([0, *per_epoch])))


def target_summary(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `to_target` in one per label: geometric means over its `n` blocks, `reached` in so many of them.

    `censored` is the sign of the means where some block has one: means over bounds are bounds, and get no interval.
    Where some blocks have upper and others lower bounds there is no mean; nor where a cost was not measured in each.
    """
    rows = []
    for label, own in table.groupby("label"):
        counted, reasons = own[own["tokens"].notna()], own["reason"].dropna()
        signs = list(counted["censored"].dropna().unique())
        row = {"label": label, "n": len(counted), "reached": int((counted["censored"] != ">").sum())}
        row |= {"censored": signs[0] if len(signs) == 1 else None, "reason": next(iter(reasons), None)}
        if len(signs) == 2:
            row["reason"] = "not reached in some blocks, by the first validation in others"
        else:
            exact = not signs and label != REFERENCE and own["whole"].all()
            for cost in COSTS:
                row |= _summary_of(cost, counted, exact)
        rows.append(row)
    numbers = [f"{cost}{end}" for cost in COSTS for end in ("", "_ratio", "_low", "_high")]
    summary = pd.DataFrame(rows, columns=["label", "n", "reached", "censored", *numbers, "reason"])
    return summary.astype(dict.fromkeys(numbers, float) | dict.fromkeys(("censored", "reason"), object))


def _summary_of(cost: str, own: pd.DataFrame, exact: bool) -> dict:
    if own.empty or own[[cost, f"{cost}_ratio"]].isna().any(axis=None):
        return {}
    logs = np.log(own[f"{cost}_ratio"].to_numpy())
    found = {cost: math.exp(np.log(own[cost]).mean()), f"{cost}_ratio": math.exp(logs.mean())}
    if exact and len(logs) >= FEWEST_BLOCKS:
        interval = paired_t(logs)
        found |= {f"{cost}_low": float(interval.low), f"{cost}_high": float(interval.high)}
    return found


def pareto_front(costs, losses) -> np.ndarray:
    """Which of the points no other beats: at least as good in both, and better in one. Both are better when lower.

    A point that lacks one of the two is not on the front.
    """
    points = np.stack([np.asarray(costs, dtype=float), np.asarray(losses, dtype=float)])  # (2, n)
    mine, others = points[:, :, None], points[:, None]
    beaten = (mine >= others).all(0) & (mine > others).any(0)  # (n, n)
    return ~beaten.any(axis=1) & ~np.isnan(points).any(axis=0)
