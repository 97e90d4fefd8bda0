"""Comparisons inside blocks: the place in the order taken out, paired t, families, ranks. Numbers in, numbers out.

A block holds every variant once, one after the other, so what drifts inside it (a machine that warms up, a neighbour,
a first run that is slow) falls on places, not on variants. With y the logarithm of a cost,

    y[block, variant] = block + variant + place + noise,

by ordinary least squares over all runs, any shape of the place's effect allowed. The effects of the places are taken
out of the differences between two variants, and these are tested by t over the blocks, with their own spread: variants
need not be equally noisy. Because places are estimated from the same runs, the spread is scaled to what the design
makes of it, and its degrees of freedom are Satterthwaite's (1946). tests/test_compare_simulated.py holds the coverage.
"""

import math
from collections.abc import Iterable
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy import stats

FEWEST_BLOCKS = 5  # below that, points only
EQUIVALENT_WITHIN = 0.02
MARGIN = math.log1p(EQUIVALENT_WITHIN)  # on the logarithm of a cost, and in nats of a loss: 2 % of its perplexity
ROUNDING = 1e-9  # of effects that the design cannot tell apart


class Paired(NamedTuple):
    """Comparisons with a reference: the mean difference, its 95 % interval, and two raw p.

    Differences are of logarithms for a cost, of nats for a loss. `p` is of no difference; `equivalence_p` of a
    difference as large as the margin (the larger of two one-sided tests, Schuirmann 1987).
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    equivalence_p: np.ndarray


def paired_t(differences, inflation: float = 1.0, freedom: float | None = None) -> Paired:
    """Two-sided paired t over the last axis of `differences` (..., n), one per block.

    The margin of equivalence is symmetric, so that it makes no difference which of the two is the denominator.
    `inflation` of the squared error of the mean and its degrees of `freedom` are those of `PlaceEffects.between`.
    """
    d = np.asarray(differences, dtype=float)
    n, mean = d.shape[-1], d.mean(-1)
    freedom = n - 1 if freedom is None else freedom
    error = stats.sem(d, axis=-1) * math.sqrt(inflation)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stats.t.sf(np.abs(mean) / error, freedom)
        equivalence_p = stats.t.sf((MARGIN - np.abs(mean)) / error, freedom)
    exact = error == 0  # a count, the same in every block
    p = np.where(exact, np.where(mean == 0, 1.0, 0.0), p)
    equivalence_p = np.where(exact, np.where(np.abs(mean) < MARGIN, 0.0, 1.0), equivalence_p)
    half = error * stats.t.ppf(0.975, freedom)
    return Paired(mean, mean - half, mean + half, p, equivalence_p)


class Contrast:
    """How the difference between two variants, free of the places' effects, is made of all the runs.

    The matrix that makes it is the plain difference in each common block, less `used` (common blocks, places) times
    `estimate` (places, runs): what the effects of its two places are estimated to be.
    """

    def __init__(self, common, one: int, other: int, variants: int, used, estimate):
        self.ones, self.others, self.used, self.estimate = (
            common * variants + one,
            common * variants + other,
            used,
            estimate,
        )
        n = len(common)
        of_pairs = estimate[:, self.ones] - estimate[:, self.others]  # (places, n)
        cross = used @ of_pairs
        gram = 2 * np.eye(n) - cross - cross.T + used @ (estimate @ estimate.T) @ used.T
        centred = gram - gram.mean(0)
        centred -= centred.mean(1, keepdims=True)
        self.trace = np.trace(centred)  # of what independent noise of the runs makes of the differences
        if self.trace < ROUNDING:
            return
        self.inflation = float(n * (n - 1) * gram.mean() / self.trace)  # of the squared error of the mean
        self.freedom = float(self.trace**2 / np.square(centred).sum())

    def differences(self, values) -> np.ndarray:
        """By common block, of `values` (blocks, variants) without NaN."""
        flat = values.ravel()
        return flat[self.ones] - flat[self.others] - self.used @ (self.estimate @ flat)

    @property
    def matrix(self) -> np.ndarray:
        """(common blocks, blocks x variants)."""
        found = -self.used @ self.estimate
        found[range(len(self.ones)), self.ones] += 1
        found[range(len(self.ones)), self.others] -= 1
        return found


class PlaceEffects:
    """The design of a study: which variant ran in which place of which block, (blocks, variants) each."""

    def __init__(self, places, observed=None):
        self.places = np.asarray(places)
        self.observed = np.ones(self.places.shape, bool) if observed is None else np.asarray(observed, dtype=bool)
        self.contrasts: dict[tuple[int, int], Contrast | None] = {}  # of the metrics that share this design

    @cached_property
    def _estimated(self) -> tuple[np.ndarray, np.ndarray]:
        """(runs, places) of zeros and ones, and the matrix (places, runs) that makes the effects out of the runs."""
        blocks, variants = self.places.shape
        here = self.observed.ravel()
        levels, level = np.unique(self.places.ravel(), return_inverse=True)
        places = np.eye(len(levels))[level.ravel()] * here[:, None]
        names = np.tile(np.eye(variants), (blocks, 1)) * here[:, None]
        # Frisch, Waugh and Lovell: what blocks explain goes by their means, and what variants explain of the rest.
        names, rest = self._without_blocks(names), self._without_blocks(places)
        rest = rest - names @ (np.linalg.pinv(names, rcond=ROUNDING) @ rest)
        return places, np.linalg.pinv(rest, rcond=ROUNDING)

    def _without_blocks(self, columns) -> np.ndarray:
        """(runs, columns) less the means over the runs of their block that there are."""
        blocks, variants = self.places.shape
        counts = np.maximum(self.observed.sum(1), 1)[:, None]
        means = columns.reshape(blocks, variants, -1).sum(1) / counts
        return columns - np.repeat(means, variants, axis=0) * self.observed.ravel()[:, None]

    def between(self, one: int, other: int) -> Contrast | None:
        """The contrast of two variants (columns) over the blocks that hold both.

        None where there are fewer than two such blocks, or place and variant cannot be told apart in this order.
        """
        if (one, other) not in self.contrasts:
            self.contrasts[one, other] = self._between(one, other)
        return self.contrasts[one, other]

    def _between(self, one: int, other: int) -> Contrast | None:
        common = np.flatnonzero(self.observed[:, one] & self.observed[:, other])
        variants = self.places.shape[1]
        if len(common) < 2:
            return None
        places, estimate = self._estimated
        used = places[common * variants + one] - places[common * variants + other]  # (n, places)
        left = used.mean(0)
        if np.abs(left - (left @ estimate) @ places).max() > ROUNDING:
            return None
        found = Contrast(common, one, other, variants, used, estimate)
        return None if found.trace < ROUNDING else found  # every difference is used up by the effects


def compared(values, effects: PlaceEffects | None, one: int, other: int) -> Paired | None:
    """Variant `one` minus `other` of `values` (blocks, variants), NaN where there is none; see `PlaceEffects.between`.

    Without `effects` the order is taken to make no difference: of a loss, of a count.
    """
    values = np.asarray(values, dtype=float)
    raw = values[:, one] - values[:, other]
    raw = raw[~np.isnan(raw)]
    if len(raw) < 2:
        return None
    if effects is None or np.ptp(raw) == 0:  # the same in every block: nothing drifts, and rounding is no spread
        return paired_t(raw)
    contrast = effects.between(one, other)
    if contrast is None:
        return None
    return paired_t(contrast.differences(np.nan_to_num(values)), contrast.inflation, contrast.freedom)


def holm(p) -> np.ndarray:
    """Raw p of the comparisons of one family -> adjusted by Holm's step-down (1979)."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def verdict(p: float, equivalence_p: float, within: str = "2 %") -> str:
    """What may be said, of p that are both adjusted; a sure difference is called so even where it is a small one."""
    if p < 0.05:
        return "significantly different"
    return f"equivalent within {within}" if equivalence_p < 0.05 else "inconclusive"


def surely_lower(values, effects: PlaceEffects | None, names: list, among: Iterable) -> list[tuple]:
    """The pairs (lower, higher) of `among` that surely differ, Holm over all of them. `values` has the columns `names`.

    Pairs with fewer than five blocks in common are not compared.
    """
    values, found = np.asarray(values, dtype=float), []
    for one, other in combinations([names.index(name) for name in among], 2):
        if (~np.isnan(values[:, one] - values[:, other])).sum() >= FEWEST_BLOCKS:
            test = compared(values, effects, one, other)
            found += [] if test is None else [(test, names[one], names[other])]
    sure = holm([float(test.p) for test, _, _ in found]) < 0.05
    return [
        (one, other) if test.mean < 0 else (other, one)
        for (test, one, other), is_sure in zip(found, sure, strict=True)
        if is_sure
    ]


def rank_ranges(names: Iterable, lower: Iterable[tuple]) -> dict:
    """The first and the last rank that each of `names` can have, by which is surely lower than which.

    What follows from two sure differences is sure as well, so two that are not told apart share at least one rank.
    """
    below = {name: set() for name in names}  # what is surely lower
    for low, high in lower:
        below[high].add(low)
    for middle in below:
        for name in below:
            if middle in below[name]:
                below[name] |= below[middle]
    sure = {name: {other for other in found if name not in below[other]} for name, found in below.items()}
    above = {name: sum(name in found for found in sure.values()) for name in sure}
    return {name: (1 + len(found), len(sure) - above[name]) for name, found in sure.items()}
