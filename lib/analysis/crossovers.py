"""Which of two variants is cheaper, from which length on, and which of all: crossovers and the decision map.

A sign is sure at a length where 95 % of the resamples (two-sided) agree on it. Signs are only looked at where both
variants were measured; where a crossover lies between two lengths, a curve through the points says.
"""

from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.analysis.growth import (
    DEGREE,
    DRAWS,
    FEWEST_POINTS,
    FEWEST_PROCESSES,
    Costs,
    costs_of,
    interval,
    labels,
    lack_of_fit,
    powers,
    resamples,
    together,
)
from lib.errors import UsageError

GRID = 33  # lengths at which a curve is looked at between two that have a sure sign
COLUMNS = ["label", "against", "becomes", "context", "low", "high", "between", "first", "until"]
COLUMNS += ["ratio", "ratio_low", "ratio_high", "n"]


def crossovers(points: pd.DataFrame, metric: str, references: list[str], draws: int = DRAWS) -> pd.DataFrame:
    """What may be said of each variant against each reference: the rows of `compared`, with `label` and `against`."""
    rows = []
    for reference in references:
        other = costs_of(points, metric, reference)
        for label in labels(points):
            found = compared(costs_of(points, metric, label), other, DEGREE.get(metric, 2), draws)
            rows += [{"label": label, "against": reference} | row for row in found if label != reference]
    return pd.DataFrame(rows, columns=COLUMNS)


def compared(one: Costs, other: Costs, degree: int = 2, draws: int = DRAWS) -> list[dict]:
    """What may be said of one variant's cost against another's over the lengths that both were measured at.

    A row per crossover: `becomes` "cheaper" or "more expensive" from `context` tokens on. There is one only where the
    signs at two lengths differ in at least 95 % of the resamples, of three processes or more, all lengths taken
    together: curves that are alike seldom cross. Where it lies is read off two curves through the resampled points,
    from which `low` and `high` come too; where the repeats contradict all such curves (`between`: True), `context` is
    on the straight line in logarithms, and low and high are the two measured lengths.
    `until` is the last length up to which the sign stays sure, `first` the shortest that was looked at.

    Without a crossover, one row: `context` is the shortest length from which on the sign is sure at every length up to
    the longest, `ratio` the cost over the reference's there, with its interval. Where not even the longest has a sure
    sign, `becomes` is "inconclusive", `context` missing, and `ratio` that at the longest; for one process "n = 1".
    """
    shared = set(one.contexts.tolist()) & set(other.contexts.tolist())
    if not shared:
        return []
    one, other = one.among(shared), other.among(shared)
    found = _crossings(one, other, degree, draws) or [_sure_from(one, other, draws)]
    return [{"n": min(one.n, other.n)} | row for row in found]


def difference(one: Costs, other: Costs, draws: int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Logarithm of the ratio at each length, and its resamples (draws, lengths)."""
    mine, theirs = resamples([one, other], draws, level)
    return one.logs.mean(axis=0) - other.logs.mean(axis=0), mine - theirs


def sure_signs(one: Costs, other: Costs, draws: int, level: float = 0.95) -> np.ndarray:
    """The sign of the difference at each length: -1, 1, or 0 where too few draws agree, two-sided at this level."""
    mean, drawn = difference(one, other, draws, level)
    signs = np.sign(mean)
    return np.where((np.sign(drawn) == signs).mean(axis=0) >= (1 + level) / 2, signs, 0).astype(int)


def _sure_from(one: Costs, other: Costs, draws: int) -> dict:
    mean, drawn = difference(one, other, draws)
    signs = sure_signs(one, other, draws)
    first = len(signs)
    while first and signs[first - 1] and signs[first - 1] == signs[-1]:
        first -= 1
    place = min(first, len(signs) - 1)
    low, high = interval(drawn[:, place])
    row = {"ratio": np.exp(mean[place]), "ratio_low": np.exp(low), "ratio_high": np.exp(high), "between": False}
    row |= {"first": one.contexts[0], "until": one.contexts[-1]}
    if first < len(signs):
        return row | {"becomes": _word(signs[-1]), "context": one.contexts[first]}
    return row | {"becomes": "n = 1" if np.isnan(low) else "inconclusive"}


def _word(sign: int) -> str:
    return "cheaper" if sign < 0 else "more expensive"


def _crossings(one: Costs, other: Costs, degree: int, draws: int) -> list[dict]:
    if min(one.n, other.n) < FEWEST_PROCESSES:
        return []
    # A crossover needs two signs, looked for at all lengths: each has its part of the 5 % (Bonferroni).
    signs = sure_signs(one, other, draws, level=1 - 0.05 / len(one.contexts))
    sure = np.flatnonzero(signs)
    turns = [(i, j) for i, j in pairwise(sure) if signs[i] != signs[j]]
    ends = [j + np.argmin([*(signs[j:] == signs[j]), False]) - 1 for _, j in turns]
    return [
        _crossing(one, other, i, j, signs[j], degree, draws) | {"first": one.contexts[0], "until": one.contexts[end]}
        for (i, j), end in zip(turns, ends, strict=True)
    ]


def _crossing(one: Costs, other: Costs, i: int, j: int, sign: int, degree: int, draws: int) -> dict:
    """The crossover between the lengths `i` and `j`, after which the difference has this sign."""
    row = {"becomes": _word(sign), "between": False}
    x = np.log(one.contexts[i : j + 1])
    grid = np.unique(np.concatenate([x, np.linspace(x[0], x[-1], GRID)]))
    curves = _curves(one, other, degree, draws)
    if curves:
        mine, theirs = (curve(np.exp(grid)) for curve in curves)
        at, *places = _turns(grid, np.log(mine / theirs), sign)
        if x[0] < at < x[-1]:
            return row | dict(zip(("context", "low", "high"), np.exp([at, *interval(np.array(places))]), strict=True))
    mean = one.logs.mean(axis=0) - other.logs.mean(axis=0)
    (at,) = _turns(x, mean[None, i : j + 1], sign)
    return row | {"context": np.exp(at), "low": one.contexts[i], "high": one.contexts[j], "between": True}


def _turns(x: np.ndarray, values: np.ndarray, sign: int) -> np.ndarray:
    """Where each row of `values` (rows, lengths) turns to this sign, on the line between two lengths.

    Of several places the middle of the first and the last; the end of `x` on the side where it must lie, for none.
    """
    changes = np.sign(values[:, 1:]) != np.sign(values[:, :-1])
    before, after = np.abs(values[:, :-1]), np.abs(values[:, 1:])
    places = x[:-1] + np.diff(x) * before / np.maximum(before + after, 1e-300)
    first = np.where(changes, places, x[-1]).min(axis=1)
    last = np.where(changes, places, x[0]).max(axis=1)
    without = np.where(np.sign(values[:, 0]) == sign, x[0], x[-1])
    return np.where(changes.any(axis=1), (first + last) / 2, without)


def _curves(one: Costs, other: Costs, degree: int, draws: int):
    """A curve through each variant's points and one through each of its draws: two functions of lengths that give
    (1 + draws, lengths) costs; None where there are none.

    Each is a + bK + cK² or, for what has a floor below some length, max(f, bK + cK²): the first pair that the repeats
    contradict neither in a variant's costs nor, where rounds are paired, in their ratio, which may scatter less. They
    are only looked at inside the measured lengths, so no coefficient has to be positive.
    """
    if len(one.contexts) < FEWEST_POINTS:
        return None
    pair, paired = (one, other), len(set(together([one, other]))) == 1
    choices = [_shapes(costs, degree) for costs in pair]
    for (shape, mine), (other_shape, theirs) in product(*choices):
        if not paired or _allowed(one.logs - other.logs, mine - theirs, degree):
            found = []
            for costs, through, moved in zip(pair, (shape, other_shape), resamples(list(pair), draws), strict=True):
                mean = costs.logs.mean(axis=0)
                relative = np.exp(np.vstack([np.zeros_like(mean), moved - mean]))
                found.append(through(costs.contexts, np.exp(mean), relative, degree))
            return found
    return None


def _shapes(costs: Costs, degree: int) -> list[tuple]:
    """The curves that the repeats do not contradict, each with its logarithms at the measured lengths."""
    found, means = [], np.exp(costs.logs.mean(axis=0))
    for shape in (_polynomial, _floored):
        (fitted,) = np.log(shape(costs.contexts, means, np.ones((1, len(means))), degree)(costs.contexts))
        found += [(shape, fitted)] if _allowed(costs.logs, fitted, degree) else []
    return found


def _allowed(logs, fitted, degree: int) -> bool:
    p = lack_of_fit(logs, fitted, degree + 1)
    return p is not None and p >= 0.05


def _polynomial(contexts, means, relative, degree: int, first: int = 0):
    """a + bK + cK² by least squares of relative errors through each row of `relative` (rows, lengths), costs over
    their `means` (lengths,). With `first` 1 without a."""
    coefficients = relative @ np.linalg.pinv(powers(contexts, degree)[:, first:] / means[:, None]).T  # (rows, powers)
    least = means.min() / 1e3  # the curve of a draw may dip below nothing
    return lambda where: np.maximum(coefficients @ powers(where, degree)[:, first:].T, least)


def _floored(contexts, means, relative, degree: int):
    """max(f, bK + cK²) in the same way; of all lengths at which the floor may end, the one that fits each row best."""
    ends = range(1, len(contexts) - 1)  # two lengths at least rise
    floors = [(relative[:, :end] / means[:end]).sum(axis=1) / (means[:end] ** -2.0).sum() for end in ends]
    rising = [_polynomial(contexts[end:], means[end:], relative[:, end:], degree, first=1) for end in ends]

    def all_at(where):  # (ends, rows, lengths)
        return np.stack([np.maximum(f[:, None], curve(where)) for f, curve in zip(floors, rising, strict=True)])

    best = ((all_at(contexts) / means - relative) ** 2).sum(axis=2).argmin(axis=0)
    return lambda where: all_at(where)[best, np.arange(len(relative))]


class Map(NamedTuple):
    """The cheapest of `labels` over lengths T (contexts,) and shares of decoded tokens (shares,), on a grid (S, T).

    `cheapest` (S, T) are places in `labels`; `tied` (labels, S, T), which others are not surely more expensive than the
    cheapest; `over` (labels, S, T), each one's cost over the cheapest's, infinite where it was not measured; `n`, the
    processes of the variant that has fewest.
    """

    labels: list[str]
    contexts: np.ndarray
    shares: np.ndarray
    cheapest: np.ndarray
    tied: np.ndarray
    over: np.ndarray
    n: int

    @property
    def open(self) -> np.ndarray:
        """(S, T): where the cheapest and another tie."""
        return self.tied.any(axis=0)


def decision_map(
    points: pd.DataFrame, prefill: str, decode: str, lengths: int = 97, shares: int = 41, draws: int = 500
) -> Map:
    """The cheapest variant over context length T and share s of tokens that are decoded, the others being prefilled.

    The cost of a token is (1 - s) x prefill(T) / T + s x decode(T), with straight lines in logarithms between measured
    lengths. The cheapest is compared with **all** others: one that is not more expensive in at least 97.5 % of the
    resamples ties with it. A variant takes part at the lengths that it was measured at, two or more.
    """
    every = {name: [costs_of(points, metric, name) for metric in (prefill, decode)] for name in labels(points)}
    parts = {name: pair for name, pair in every.items() if min(len(costs.contexts) for costs in pair) > 1}
    if not parts:
        raise UsageError(
            "a decision map needs a variant that prefills and decodes at two lengths; measure more lengths"
        )
    names, reads, writes = list(parts), *map(list, zip(*parts.values(), strict=True))
    measured = np.concatenate([costs.contexts for costs in reads])
    contexts, share = np.geomspace(measured.min(), measured.max(), lengths), np.linspace(0, 1, shares)[:, None]
    read, written = (_between(several, contexts, draws) for several in (reads, writes))  # (labels, 1 + draws, T)
    with np.errstate(invalid="ignore"):  # no share of something that was not measured
        costs = (1 - share) * read[:, :, None] / contexts + share * written[:, :, None]
    costs = np.where(np.isinf(read + written)[:, :, None], np.inf, costs).astype(np.float32)
    cheapest = costs[:, 0].argmin(axis=0)
    best = np.take_along_axis(costs, cheapest[None, None], axis=0)  # (1, 1 + draws, S, T)
    # Where all draws of one process are NaN nothing is more expensive, so that everything ties.
    tied = np.stack([(own[1:] > best[0, 1:]).mean(axis=0) < 0.975 for own in costs])
    tied[cheapest, *np.indices(cheapest.shape)] = False
    tied &= np.isfinite(costs[:, 0])
    n = min(costs.n for costs in (*reads, *writes))
    return Map(names, contexts, share[:, 0], cheapest, tied, costs[:, 0] / best[0, 0], n)


def _between(several: list[Costs], contexts: np.ndarray, draws: int) -> np.ndarray:
    """(variants, 1 + draws, lengths): costs at these lengths by the points and by each draw, on straight lines in
    logarithms; infinite beyond what was measured."""
    found = []
    for costs, drawn in zip(several, resamples(several, draws), strict=True):
        at, x = np.log(contexts), np.log(costs.contexts)
        weights = np.array([np.interp(at, x, one) for one in np.eye(len(x))])  # (measured, lengths)
        values = np.exp(np.vstack([costs.logs.mean(axis=0), drawn]) @ weights)
        # Ends of a range of powers are met but for rounding.
        inside = (contexts > costs.contexts[0] * 0.999) & (contexts < costs.contexts[-1] * 1.001)
        found.append(np.where(inside, values, np.inf))
    return np.array(found)


def regions(found: Map) -> pd.DataFrame:
    """What the map says, a row per set of variants that tie as the cheapest, the largest region first.

    `labels`, `share` of the map; of the rest, which is `next` most often, and its cost over the cheapest's: `low`,
    `middle` and `high` over the region; None and NaN where there is no rest.
    """
    ties = found.tied.copy()
    ties[found.cheapest, *np.indices(found.cheapest.shape)] = True
    sets, which = np.unique(ties.reshape(len(found.labels), -1), axis=1, return_inverse=True)
    rest = np.where(ties, np.inf, found.over).reshape(len(found.labels), -1)
    rows = []
    for number, tie_here in enumerate(sets.T):
        cells = rest[:, which.ravel() == number]
        behind = cells.min(axis=0)
        behind, nearest = behind[np.isfinite(behind)], cells.argmin(axis=0)[np.isfinite(behind)]
        row = {"labels": [label for label, tie in zip(found.labels, tie_here, strict=True) if tie]}
        row |= {"share": cells.shape[1] / which.size, "next": None, "low": np.nan, "middle": np.nan, "high": np.nan}
        if len(behind):
            row["next"] = found.labels[np.bincount(nearest).argmax()]
            row |= dict(zip(("low", "middle", "high"), np.quantile(behind, [0, 0.5, 1]), strict=True))
        rows.append(row)
    return pd.DataFrame(rows).sort_values("share", ascending=False, kind="stable", ignore_index=True)
