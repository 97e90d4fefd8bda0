"""What may be compared with what, and how sure it is.

Runs are compared only within a group (same setting, same tokens, same device), and with `sdpa` inside a block, so that
whatever drifted from block to block cancels; `lib.analysis.paired` holds the statistics. Costs are compared by their
ratio, losses by their difference in nats.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.analysis.paired import (
    FEWEST_BLOCKS,
    Paired,
    PlaceEffects,
    compared,
    holm,
    paired_t,
    rank_ranges,
    surely_lower,
    verdict,
)  # fmt: skip
from lib.attention import CONTROL, REFERENCE
from lib.errors import UsageError
from lib.record import Metrics

BLOCK = ["session", "block"]
LOSSES = ("validation_loss", "train_loss")  # in nats, so their differences are what ratios are to a cost
COUNTED = (
    "forward_flops_causal", "forward_flops_full", "forward_flops_counted", "attention_core_share", "parameters",
    "cache_bytes", "checkpoint_bytes",
)  # fmt: skip # the same in every run: no noise
KEPT = 64  # tables of whose blocks, pairs and comparisons the results are kept: a page asks for each several times
ORDER_FREE = (*LOSSES, *COUNTED, "tokens")  # the same in whichever place a run stands


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
        f"GPT-2 with {p['layers']} layer{'s' if p['layers'] > 1 else ''} of {p['width']}, T = {p['context']}, "
        f"{p['steps_per_epoch'] * p['epochs']} steps of {p['batch_size'] * p['accumulation']} rows, "
        f"{p['dataset']} data{tokens}, on {run['device_name']}"
    )


def whole_blocks(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of whole blocks: every label once, in one session, on one device (a GPU by its UUID).

    Every label means all that the block was to have, as its runs' records say, but for what has no record in any
    session with `sdpa`: that failed throughout. Where they do not say it, it means all that a session with `sdpa`
    holds, unless another holds these and more: then it was torn. So variants that came later may have blocks of their
    own beside `sdpa`. A block that holds a label twice is left out: which of the two belongs there is not known.
    """
    return runs.take(_whole(Seats(runs)))


SEATS = ("label", *BLOCK, "device_name", "gpu_uuid", "planned", "seed", "position")


class Seats:
    """What blocks, pairs and places of runs follow from: by each of `SEATS` a tuple, None where nothing is known.

    By what it holds, not by whose it is, it is the key by which they are worked out once for all metrics of the same
    runs: a table that was changed has others.
    """

    def __init__(self, runs: pd.DataFrame):
        self.of = {name: _hashable(runs[name]) if name in runs else (None,) * len(runs) for name in SEATS}
        self.hash = hash(tuple(self.of.values()))

    def __hash__(self):
        return self.hash

    def __eq__(self, other):
        return self.hash == other.hash and self.of == other.of


def _hashable(column: pd.Series) -> tuple:
    values = column.astype(object).where(column.notna(), None).tolist()
    if list in set(map(type, values)):
        return tuple(tuple(value) if type(value) is list else value for value in values)
    return tuple(values)


@lru_cache(KEPT)
def _whole(seats: Seats) -> np.ndarray:
    """The places in the table, in its order, of the runs of whole blocks."""
    of = seats.of
    device = [f"{name}{uuid or ''}" for name, uuid in zip(of["device_name"], of["gpu_uuid"], strict=True)]
    blocks: dict[tuple, list[int]] = {}
    for run, seat in enumerate(zip(*(of[name] for name in BLOCK), strict=True)):
        if None not in seat:
            blocks.setdefault(seat, []).append(run)
    labels_of: dict[object, set] = {}
    compared = set()
    for (session, _), part in blocks.items():
        labels = {of["label"][run] for run in part}
        labels_of.setdefault(session, set())
        labels_of[session] |= {of["label"][run] for run in part if of["planned"][run] is None}
        compared |= {session} if REFERENCE in labels else set()
    sessions = {frozenset(labels) for labels in labels_of.values() if labels}
    panels = {labels for labels in sessions if REFERENCE in labels and not any(labels < other for other in sessions)}
    every = frozenset(of["label"][run] for (session, _), part in blocks.items() if session in compared for run in part)
    found = []
    for part in blocks.values():
        labels = frozenset(of["label"][run] for run in part)
        planned = {of["planned"][run] for run in part}
        told = {None if one is None else every.intersection(one) for one in planned}
        is_whole = labels in panels if told == {None} else told == {labels}
        if is_whole and len(labels) == len(part) and len({device[run] for run in part}) == 1:
            found += part
    return np.array(sorted(found), dtype=int)


def panels(whole: pd.DataFrame) -> list[pd.DataFrame]:
    """Whole blocks by the labels that they hold: variants that came later have blocks of their own."""
    return [whole.take(part) for part in _panels(Seats(whole))]


@lru_cache(KEPT)
def _panels(seats: Seats) -> list[list[int]]:
    of = seats.of
    blocks: dict[tuple, list[int]] = {}
    for run, seat in enumerate(zip(*(of[name] for name in BLOCK), strict=True)):
        blocks.setdefault(seat, []).append(run)
    found: dict[frozenset, list[int]] = {}
    for _, part in sorted(blocks.items()):
        found.setdefault(frozenset(of["label"][run] for run in part), []).extend(part)
    return sorted((sorted(part) for part in found.values()), key=lambda part: min(of["block"][run] for run in part))


def comparable(runs: pd.DataFrame) -> pd.DataFrame:
    """Of what is in whole blocks the runs of those alone, so that means are of the same seeds; of others all runs."""
    whole = whole_blocks(runs)
    return pd.concat([whole, runs[~runs["label"].isin(whole["label"])]]) if len(whole) else runs


def balanced(runs: pd.DataFrame) -> bool:
    """Whether over the whole blocks every label stood in every place, and right behind every other, equally often.

    A Williams square does that in as many blocks as there are labels, or in twice as many where their number is odd.
    The A/A control is no part of it: only the order of the others among themselves counts.
    """
    parts = panels(whole_blocks(runs))
    return bool(parts) and all(map(_is_balanced, parts))


def _is_balanced(whole: pd.DataFrame) -> bool:
    orders = [part.sort_values("position") for _, part in whole.groupby(BLOCK)]
    if any(list(order["position"]) != list(range(len(order))) for order in orders):
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
    """For beside a table: how many blocks are whole, what may be said of them, and whether their order is balanced."""
    whole = whole_blocks(runs)
    blocks = len(whole.groupby(BLOCK))
    if not blocks:
        return (
            "No block is whole (every variant in one session on one device): runs are paired by seed, points only: no "
            "interval, no verdict, no rank."
        )
    counted = f"{blocks} whole block{'s' if blocks > 1 else ''}{_by_panel(whole)}{_torn(runs, whole)}"
    if blocks < FEWEST_BLOCKS:
        return f"{counted}, fewer than {FEWEST_BLOCKS}: points only, no interval, no verdict, no rank."
    if balanced(runs):
        return f"{counted}, the order of runs over them balanced; the place of each run is in the model."
    if _places(Seats(whole)) is None:
        return f"{counted}, but not in which order their runs were: points only, no interval, no verdict, no rank."
    return f"{counted}, the order of runs over them not balanced: the place of each run is in the model."


def _by_panel(whole: pd.DataFrame) -> str:
    parts = panels(whole)
    if len(parts) == 1:
        return ""
    counted = (f"{len(part.groupby(BLOCK))} of {', '.join(sorted(set(part['label'])))}" for part in parts)
    return f" ({'; '.join(counted)})"


def _torn(runs: pd.DataFrame, whole: pd.DataFrame) -> str:
    """The runs of labels in whole blocks that are in none: their numbers count nowhere."""
    left = runs[runs["label"].isin(whole["label"]) & ~runs.index.isin(whole.index)]
    if left.empty:
        return ""
    several = f"{len(left)} runs of incomplete blocks count" if len(left) > 1 else "1 run of an incomplete block counts"
    return f" ({several} nowhere; the same command runs such blocks again)"


def pairs(runs: pd.DataFrame) -> pd.DataFrame:
    """Each run beside the one of `sdpa` that it may be compared with.

    Columns: `label`, `session`, `block`, `run` and `reference` (indices of `runs`), and `whole`. Runs of whole blocks
    are paired inside the block. A label that is in no whole block (runs by hand, incomplete blocks) is paired by seed
    and has `whole` False; two runs of one label and seed are two things under one name, and paired with nothing.
    """
    found = _pairs(Seats(runs))
    return found.assign(run=runs.index[found["run"]], reference=runs.index[found["reference"]])


@lru_cache(KEPT)
def _pairs(seats: Seats) -> pd.DataFrame:
    """`pairs`, by places in the table."""
    runs = pd.DataFrame(seats.of)
    runs["label"] = runs["label"].astype("str")
    blocks = runs.take(_whole(seats))
    others = runs[~runs["label"].isin(blocks["label"])]
    found = []
    for part, partners, keys in ((blocks, blocks, BLOCK), (others, runs, ["seed"])):
        references = partners[partners["label"] == REFERENCE].drop_duplicates(keys, keep=False)
        references = references.reset_index(names="reference")[[*keys, "reference"]]
        part = part.drop_duplicates([*keys, "label"], keep=False).reset_index(names="run")
        found.append(part.merge(references, on=keys).assign(whole=keys is BLOCK))
    return pd.concat(found, ignore_index=True)[["label", *BLOCK, "run", "reference", "whole"]]


class Layout(NamedTuple):
    """A metric in the whole blocks: a row per block, a column per label, NaN where it was not measured."""

    values: pd.DataFrame  # logarithms of a cost, nats of a loss
    effects: PlaceEffects | None  # of the places; None where the order makes no difference


def laid_out(runs: pd.DataFrame, metric: str, as_ratio: bool) -> Layout | None:
    """The whole blocks of `runs`. None where there is none, or nobody knows in which order their runs were."""
    return _laid_out(Seats(runs), scaled(runs[metric], as_ratio).to_numpy(), metric in ORDER_FREE)


def _laid_out(seats: Seats, values: np.ndarray, is_order_free: bool) -> Layout | None:
    whole = _whole(seats)
    if not len(whole):
        return None
    rows, columns, names, index = _grid(seats)
    found = np.full((len(index), len(names)), np.nan)
    found[rows, columns] = values[whole]
    found = pd.DataFrame(found, index, names)
    if is_order_free:
        return Layout(found, None)
    places = _places(seats)
    return None if places is None else Layout(found, _effects(places, found.notna().to_numpy()))


@lru_cache(KEPT)
def _grid(seats: Seats) -> tuple[np.ndarray, np.ndarray, pd.Index, pd.MultiIndex]:
    """Where each run of a whole block stands in a table of blocks and labels: its row and column; labels and blocks."""
    of, whole = seats.of, _whole(seats)
    blocks = sorted({(of["session"][run], of["block"][run]) for run in whole})
    names = sorted({of["label"][run] for run in whole})
    row, column = ({key: place for place, key in enumerate(keys)} for keys in (blocks, names))
    rows = np.array([row[of["session"][run], of["block"][run]] for run in whole])
    columns = np.array([column[of["label"][run]] for run in whole])
    return rows, columns, pd.Index(names, name="label"), pd.MultiIndex.from_tuples(blocks, names=BLOCK)


def _effects(places: np.ndarray, observed: np.ndarray) -> PlaceEffects:
    return _effects_of(places.shape, places.tobytes(), observed.tobytes())


@lru_cache(KEPT)
def _effects_of(shape: tuple, places: bytes, observed: bytes) -> PlaceEffects:
    return PlaceEffects(np.frombuffer(places).reshape(shape), np.frombuffer(observed, dtype=bool).reshape(shape))


@lru_cache(KEPT)
def _places(seats: Seats) -> np.ndarray | None:
    """Which place each label has in each whole block, (blocks, labels); None where nobody knows. Blocks of other labels
    have places of their own, whose effects are others; a label that a block does not hold has place -1."""
    of, whole = seats.of, _whole(seats)
    rows, columns, names, index = _grid(seats)
    place = [of["position"][run] for run in whole]
    if None in place:
        return None
    where, found = np.array(place, dtype=float), np.full((len(index), len(names)), -1.0)
    for number, part in enumerate(_panels(Seats(pd.DataFrame(of).take(whole)))):
        where[part] += number * MOST_PLACES
    if len(set(zip(rows.tolist(), where.tolist(), strict=True))) < len(where):
        return None
    found[rows, columns] = where
    return found


MOST_PLACES = 10**7  # no block has so many


def scaled(values: pd.Series, as_ratio: bool) -> pd.Series:
    """Numbers as they are compared: the logarithm where it is above 0, for a ratio; as they are, for a difference."""
    values = values.astype(float)
    return np.log(values.where(values > 0)) if as_ratio else values


NUMBERS = ("estimate", "low", "high", "p", "level")
COLUMNS = ["label", "n", *NUMBERS, "verdict"]


def ratios(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Each variant's `metric` over `sdpa`'s in the same block, a row per label.

    `ratio` is the geometric mean over the `n` blocks in which both were measured and are above 0; from five blocks up
    without the effects of the places in their order (`lib.analysis.paired`), and with `low` and `high`, the 95 %
    interval; `p`, Holm-adjusted; and `verdict`: *significantly different* (p < 0.05), *equivalent within 2 %* (two
    one-sided tests, Holm-adjusted too), or *inconclusive*. With fewer blocks, where a label is in no whole block and
    its runs are paired by seed, or where the order does not let place and variant be told apart, these are missing and
    `verdict` says why. `level` is `sdpa`'s mean times the ratio: what misses a slow block is not lower for it.

    Holm's families are the certified variants of this one table. The A/A control is a control, not a question: counted
    in, it would cost the variants power, and Holm would make it slower to sound the alarm; its `p` is the raw one, so
    it is called different by chance in one table of twenty. What fails its certificate has an interval, but no p.
    """
    found = _against_reference(runs, metric, as_ratio=True)
    found[["estimate", "low", "high", "level"]] = np.exp(found[["estimate", "low", "high", "level"]])
    return found.rename(columns={"estimate": "ratio"})


def differences(runs: pd.DataFrame, metric: str = "validation_loss") -> pd.DataFrame:
    """As `ratios`, of a loss: `difference` in nats from `sdpa`'s in the same block, so with the same seed and rows.

    0.02 nats are 2 % of the perplexity: the margin within which two are equivalent. The order of runs makes no
    difference to a loss, so their places are not in the model.
    """
    return _against_reference(runs, metric, as_ratio=False).rename(columns={"estimate": "difference"})


def _against_reference(runs: pd.DataFrame, metric: str, as_ratio: bool) -> pd.DataFrame:
    """`ratios` and `differences`, on the scale on which they are compared."""
    if REFERENCE not in set(runs["label"]):
        return pd.DataFrame(columns=COLUMNS).astype(dict.fromkeys(NUMBERS, float))
    values, certified = scaled(runs[metric], as_ratio), runs["certified"].astype(bool)
    asked = values.to_numpy().tobytes(), certified.to_numpy().tobytes(), metric in ORDER_FREE, as_ratio
    return _compared(Seats(runs), *asked).copy()


@lru_cache(KEPT)
def _compared(seats: Seats, values: bytes, certified: bytes, is_order_free: bool, as_ratio: bool) -> pd.DataFrame:
    """`_against_reference` of runs in these seats, which have these numbers and certificates."""
    values, certified = np.frombuffer(values), np.frombuffer(certified, dtype=bool)
    layout, labels = _laid_out(seats, values, is_order_free), np.array(seats.of["label"], dtype=object)
    whole, paired = _whole(seats), dict(list(_pairs(seats).groupby("label")))
    reference = pd.Series(values[whole[labels[whole] == REFERENCE]]).mean()
    rows, family = [], []
    for label in sorted(set(labels)):
        own = labels == label
        mine = paired.get(label, _pairs(seats).iloc[:0])
        logs = values[mine["run"].to_numpy(int)] - values[mine["reference"].to_numpy(int)]
        logs = logs[~np.isnan(logs)]
        row = dict.fromkeys(COLUMNS) | {"label": label, "n": len(logs), "level": pd.Series(values[own]).mean()}
        row["estimate"] = logs.mean() if len(logs) else None
        row["verdict"], tested = _verdict_or_test(label, mine, logs, layout)
        if tested is not None:
            row |= {"estimate": float(tested.mean), "low": float(tested.low), "high": float(tested.high)}
            row |= {"p": float(tested.p), "equivalence_p": float(tested.equivalence_p)}
            if not certified[own].all():
                row |= {"p": None, "verdict": "fails its certificate"}
            family += [row] if row["verdict"] is None and label != CONTROL else []
        if len(logs) and mine["whole"].all():
            row["level"] = reference + row["estimate"]
        rows.append(row)
    for of in ("p", "equivalence_p"):
        for row, p in zip(family, holm([row[of] for row in family]), strict=True):
            row[of] = float(p)
    for row in rows:
        row["verdict"] = row["verdict"] or verdict(row["p"], row["equivalence_p"], "2 %" if as_ratio else "0.02 nats")
    return pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(NUMBERS, float))


def _verdict_or_test(label, mine: pd.DataFrame, logs, layout: Layout | None) -> tuple[str | None, Paired | None]:
    """Of one label: what is said without a test, or the test."""
    if label == REFERENCE:
        return "the reference", None
    if not mine["whole"].all():
        return f"n = {len(logs)}, not in one session", None
    if len(logs) < FEWEST_BLOCKS:
        return f"n = {len(logs)}", None
    if layout is None:
        return f"n = {len(logs)}, order unknown", None
    columns = list(layout.values)
    tested = compared(layout.values, layout.effects, columns.index(label), columns.index(REFERENCE))
    return (f"n = {len(logs)}, place and variant confounded", None) if tested is None else (None, tested)


def ranks(runs: pd.DataFrame, metric: str, better: str = "lower") -> dict[str, tuple[int, int]]:
    """The first and last rank that each certified variant can have, from the best `metric` on, which is the lowest, or
    the highest where that is `better`; the control has none.

    From the paired comparisons of all variants with each other over the blocks that both are in, Holm-adjusted over
    all pairs: where two are not significantly different they share a rank. A variant with fewer than five whole blocks
    in common with `sdpa` has none.
    """
    layout = laid_out(runs, metric, metric not in LOSSES)
    if layout is None or REFERENCE not in layout.values:
        return {}
    certified = runs.groupby("label")["certified"].all()
    values = layout.values if better == "lower" else -layout.values
    common = values.sub(values[REFERENCE], axis=0).notna().sum()
    names = list(values)
    ranked = [name for name in names if certified[name] and name != CONTROL and common[name] >= FEWEST_BLOCKS]
    lower = surely_lower(values, layout.effects, names, ranked)
    return rank_ranges(ranked, lower)


class Noise(NamedTuple):
    """The A/A control beside the reference: two runs of the same code. `low` and `high` are None at n = 1."""

    estimate: float  # ratio, or nats of a loss
    low: float | None
    high: float | None
    n: int


def noise(runs: pd.DataFrame, metric: str) -> Noise | None:
    """What the A/A control differs from `sdpa` by in `metric`, with its 95 % interval from two blocks up.

    It estimates the noise of that metric and is no threshold: without any difference a variant exceeds it half the
    time. None where there is no control, or it was not measured.
    """
    as_ratio = metric not in LOSSES
    found = _against_reference(runs, metric, as_ratio).set_index("label")
    if CONTROL not in found.index or not found.loc[CONTROL, "n"]:
        return None
    of, shown = found.loc[CONTROL], lambda value: float(np.exp(value) if as_ratio else value)
    low, high, n = of["low"], of["high"], int(of["n"])
    if n == 1:
        return Noise(shown(of["estimate"]), None, None, n)
    if pd.isna(low):  # fewer blocks than a verdict needs, or no known order: noise, and what drifts
        mine, values = pairs(runs), scaled(runs[metric], as_ratio)
        mine = mine[mine["label"] == CONTROL]
        logs = values[mine["run"]].to_numpy() - values[mine["reference"]].to_numpy()
        _, low, high, *_ = paired_t(logs[~np.isnan(logs)])
    return Noise(shown(of["estimate"]), shown(low), shown(high), n)


def unflagged(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs without a number from those that are flagged: their blocks stay, and lack them."""
    is_flagged = runs["flags"].map(bool)
    numbers = [name for name in Metrics.model_fields if name in runs]
    return runs.assign(**{name: runs[name].astype(float).mask(is_flagged) for name in numbers})


def flagged(runs: pd.DataFrame) -> pd.Series:
    """By label, in how many of its runs some check is flagged: "1 of 8"."""
    counted = runs["flags"].map(bool).groupby(runs["label"]).agg(["sum", "size"])
    return counted.apply(lambda row: f"{row['sum']} of {row['size']}", axis=1)


def pareto_front(costs, losses) -> np.ndarray:
    """Which of the points no other beats: at least as good in both, and better in one. Both are better when lower.

    A point that lacks one of the two is not on the front.
    """
    points = np.stack([np.asarray(costs, dtype=float), np.asarray(losses, dtype=float)])  # (2, n)
    mine, others = points[:, :, None], points[:, None]
    beaten = (mine >= others).all(0) & (mine > others).any(0)  # (n, n)
    return ~beaten.any(axis=1) & ~np.isnan(points).any(axis=0)
