"""How cost grows with context length, from the points of `lib.record.scaling`: resamples, ratios, exponents, fits.

A process counts with the median of its samples, a point with the geometric mean of its processes. All intervals are
95 %, and all come from one source: the processes are drawn anew with replacement (`resamples`). So one process gives no
interval and no claim, two give signs and ratios, and three or more give crossovers (`lib.analysis.crossovers`) and
intervals of fits as well.
"""

import zlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import optimize, stats

from lib.analysis.style import MIB
from lib.attention import STUDY_ORDER
from lib.record import REASONS

FEWEST_POINTS = 4  # for a curve of three coefficients and an error
FEWEST_PROCESSES = 3  # for the interval of a coefficient, an exponent or a crossover
DRAWS = 2000
SEED = 0
UNIT = 1024  # tokens: coefficients are per 1,024, which keeps their sizes alike
SHOWN = {  # metric: title, scale, unit
    "forward_backward_s": ("Forward and backward of one layer", 1e-3, "ms"),
    "peak_activation_bytes": ("Activation memory of one layer", MIB, "MiB"),
    "prefill_s": ("Prefill of the model", 1e-3, "ms"),
    "decode_s_per_token": ("Decoding a token", 1e-3, "ms"),
    "cache_bytes": ("Cache", MIB, "MiB"),
    "forward_backward_energy_j": ("Forward and backward of one layer", 1, "J"),
    "prefill_energy_j": ("Prefill of the model", 1, "J"),
    "decode_energy_j_per_token": ("Decoding a token", 1, "J"),
}
DEGREE = {"decode_s_per_token": 1, "decode_energy_j_per_token": 1}  # a token looks back once, in any variant


def labels(points: pd.DataFrame) -> list[str]:
    """The variants: the paper's in its order, then others by name."""
    place = {name: index for index, name in enumerate(STUDY_ORDER)}
    return sorted(points["label"].unique(), key=lambda label: (place.get(label, len(place)), label))


def measured(points: pd.DataFrame, metric: str, label: str) -> pd.DataFrame:
    """The rows of a variant that have a number, by length."""
    rows = points[(points["metric"] == metric) & (points["label"] == label)]
    return rows.dropna(subset=["value"]).sort_values("context")


def cost_metrics(points: pd.DataFrame) -> dict[str, str]:
    """Which metrics the fits are of: joules where every measured point has them, else seconds."""
    counted = points[(points["outcome"] == "measured") & points["metric"].str.contains("energy")]
    on_energy = len(counted) > 0 and counted["value"].notna().all()
    if on_energy:
        names = ("forward_backward_energy_j", "prefill_energy_j", "decode_energy_j_per_token", "J")
    else:
        names = ("forward_backward_s", "prefill_s", "decode_s_per_token", "s")
    return dict(zip(("training", "prefill", "decode", "unit"), names, strict=True))


def basis(metric: str, points: pd.DataFrame) -> str:
    """What the costs are counted in, and if not in joules, why."""
    if metric.endswith("_s") or "_s_" in metric:
        reasons = points.loc[points["metric"].str.contains("energy"), "reason"].dropna().unique()
        return f"seconds; joules not measured: {', '.join(REASONS[reason] for reason in reasons)}"
    return "joules"


class Costs(NamedTuple):
    """What one variant's processes say of one metric: natural logarithms, (rounds, lengths), of complete rounds."""

    label: str
    contexts: np.ndarray
    logs: np.ndarray
    sessions: tuple  # of each length, a name per round; empty where they are not known

    @property
    def n(self) -> int:
        return len(self.logs)

    def among(self, contexts) -> "Costs":
        """The same, of these lengths alone."""
        kept = [index for index, context in enumerate(self.contexts) if context in contexts]
        sessions = tuple(self.sessions[index] for index in kept)
        return Costs(self.label, self.contexts[kept], self.logs[:, kept], sessions)


def costs_of(points: pd.DataFrame, metric: str, label: str) -> Costs:
    """`Costs` of the lengths that were measured. A round that is not there at each of them is left out."""
    rows = measured(points, metric, label)
    n = int(rows["n"].min()) if len(rows) else 0
    logs = np.log(np.array([processes[:n] for processes in rows["processes"]], dtype=float).reshape(len(rows), n).T)
    return Costs(label, rows["context"].to_numpy(), logs, tuple(tuple(known[:n]) for known in rows["sessions"]))


def together(several: list[Costs]) -> list[str]:
    """For each of several `Costs`, a key: alike for those whose rounds were measured in turns, in the same sessions.

    Only their rounds may be paired: what slowed the machine in one slowed all of them.
    """
    shared = set.intersection(*(set(costs.contexts.tolist()) for costs in several))
    keys = []
    for costs in several:
        sessions = costs.among(shared).sessions
        known = sessions and all(sessions)
        keys.append(f"{costs.n} {sessions}" if known else f"{costs.n} {costs.label}")
    return keys


def resamples(several: list[Costs], draws: int = DRAWS, level: float = 0.95) -> list[np.ndarray]:
    """Mean logarithms of drawn rounds, (draws, lengths) of each of `several`: bootstrap by process.

    A draw takes as many rounds as there are, with replacement, the same ones at all lengths; and the same ones for
    variants whose rounds were measured in turns (`together`), so that what they have in common cancels. Two rounds are
    too few for that: their deviations are drawn from all lengths together, as if each scattered alike. One round says
    nothing of its scatter: all of it is NaN.
    """
    found = []
    for costs, key in zip(several, together(several), strict=True):
        random = np.random.default_rng([SEED, zlib.crc32(key.encode())])
        mean, (n, lengths) = costs.logs.mean(axis=0), costs.logs.shape
        deviations = costs.logs - mean
        if n < 2:
            found.append(np.full((draws, lengths), np.nan))
        elif n < FEWEST_PROCESSES:
            moved = deviations.ravel()[random.integers(n * lengths, size=(draws, n, lengths))].mean(axis=1)
            found.append(mean + _widening(n, (n - 1) * lengths, level) * moved)
        else:
            moved = deviations[random.integers(n, size=(draws, n))].mean(axis=1)
            found.append(mean + _widening(n, n - 1, level) * moved)
    return found


@lru_cache
def _widening(n: int, freedom: int, level: float) -> float:
    """By how much the mean of `n` drawn deviations has to be moved further, for its interval to be Student's.

    Bootstraps of few values are too narrow: their spread is short by √((n - 1) / n), and they know no t (Hesterberg
    2015, The American Statistician 69, section 4.1).
    """
    quantile = (1 + level) / 2
    # No draw from n values is further out than √(n (n - 1)) of its standard deviations: from two, √2.
    reach = min(stats.norm.ppf(quantile), np.sqrt(n * freedom))
    return stats.t.ppf(quantile, freedom) / reach * np.sqrt(n / (n - 1))


def interval(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The middle 95 % of draws (along the first axis)."""
    return tuple(np.quantile(draws, [0.025, 0.975], axis=0))


def ratios(points: pd.DataFrame, metric: str, reference: str) -> pd.DataFrame:
    """Each variant's cost over `reference`'s, a row per length that both were measured at.

    `ratio` below 1 is cheaper. `low` and `high` are NaN for one process; `paired` where the rounds were in turns.
    """
    other, rows = costs_of(points, metric, reference), []
    for label in labels(points):
        shared = set(other.contexts.tolist()) & set(measured(points, metric, label)["context"].tolist())
        if label == reference or not shared:
            continue
        pair = [costs.among(shared) for costs in (costs_of(points, metric, label), other)]
        mine, theirs = resamples(pair)
        low, high = np.exp(interval(mine - theirs))
        ratio = np.exp(pair[0].logs.mean(axis=0) - pair[1].logs.mean(axis=0))
        columns = {"label": label, "context": pair[0].contexts, "ratio": ratio, "low": low, "high": high}
        rows.append(pd.DataFrame(columns | {"n": min(pair[0].n, pair[1].n), "paired": len(set(together(pair))) == 1}))
    empty = pd.DataFrame(columns=["label", "context", "ratio", "low", "high", "n", "paired"])
    return pd.concat(rows, ignore_index=True) if rows else empty


def exponents(points: pd.DataFrame, metric: str, start: int) -> pd.DataFrame:
    """Per variant the p of cost ~ T^p over lengths from `start` tokens on, least squares in logarithms.

    The interval comes from the `processes` where there are three: how well this slope is known. Else it is Student's
    over the `points`: how far they lie off a line. For two lengths it is then NaN, and for one there is no slope.
    """
    rows = []
    for label in labels(points):
        own = measured(points, metric, label).query("context >= @start")
        row = {"label": label, "exponent": np.nan, "low": np.nan, "high": np.nan, "n": len(own), "by": None}
        if len(own) > 1:
            costs = costs_of(own, metric, label)
            x = np.log(costs.contexts)
            fit = sm.OLS(costs.logs.mean(axis=0), sm.add_constant(x)).fit()
            row["exponent"] = fit.params[1]
            if costs.n >= FEWEST_PROCESSES:
                slopes = resamples([costs])[0] @ (x - x.mean()) / ((x - x.mean()) ** 2).sum()
                row["low"], row["high"] = interval(slopes)
                row["by"] = "processes"
            elif fit.df_resid:
                row["low"], row["high"] = fit.conf_int(0.05)[1]
                row["by"] = "points"
        rows.append(row)
    return pd.DataFrame(rows)


class Fit(NamedTuple):
    """cost = a + bK + cK², K in units of 1,024 tokens, none of them negative.

    `intervals`, (coefficients, 2), are None where there are fewer than three processes or where these contradict the
    curve; `p` is that of the test for it, None for one process.
    """

    coefficients: np.ndarray
    intervals: np.ndarray | None
    p: float | None
    n: int

    @property
    def contradicted(self) -> bool:
        return self.p is not None and self.p < 0.05

    def at(self, contexts) -> np.ndarray:
        """The cost at these lengths."""
        return powers(contexts, len(self.coefficients) - 1) @ self.coefficients


def powers(contexts, degree: int) -> np.ndarray:
    """(lengths, degree + 1): 1, K, K²... of each length."""
    return np.vander(np.asarray(contexts) / UNIT, degree + 1, increasing=True)


def fits(points: pd.DataFrame, metric: str, draws: int = DRAWS) -> dict[str, Fit]:
    """A `Fit` for each variant with at least four measured lengths; decoding is fitted by a straight line.

    Least squares over relative errors, since lengths and costs span orders of magnitude, without negative coefficients
    (Lawson and Hanson 1974): no part of a cost is below nothing.
    """
    found = {}
    for label in labels(points):
        costs = costs_of(points, metric, label)
        if len(costs.contexts) < FEWEST_POINTS:
            continue
        mean = costs.logs.mean(axis=0)
        terms = powers(costs.contexts, DEGREE.get(metric, 2)) / np.exp(mean)[:, None]
        coefficients = optimize.nnls(terms, np.ones(len(mean)))[0]
        p = lack_of_fit(costs.logs, mean + np.log(terms @ coefficients), np.count_nonzero(coefficients))
        fit = Fit(coefficients, None, p, costs.n)
        if costs.n >= FEWEST_PROCESSES and not fit.contradicted:
            drawn = [optimize.nnls(terms, relative)[0] for relative in np.exp(resamples([costs], draws)[0] - mean)]
            fit = fit._replace(intervals=np.stack(interval(np.array(drawn)), axis=1))
        found[label] = fit
    return found


def lack_of_fit(logs: np.ndarray, fitted: np.ndarray, parameters: int) -> float | None:
    """p of the F test that a curve's distance from the means (lengths,) of `logs` (rounds, lengths) is what the
    rounds scatter (Fisher 1922); None for one round, and where the curve has as many parameters as lengths.

    A round that is slower at all lengths alike moves the whole curve, and is no scatter about it.
    """
    n, lengths = logs.shape
    if n < 2 or lengths <= parameters:
        return None
    mean = logs.mean(axis=0)
    scattered = logs - mean - logs.mean(axis=1, keepdims=True) + logs.mean()
    freedom = lengths - parameters, (lengths - 1) * (n - 1)
    scatter = max((scattered**2).sum() / freedom[1], 1e-18)  # rounds that agree to the last digit
    return float(stats.f.sf(n * ((fitted - mean) ** 2).sum() / freedom[0] / scatter, *freedom))
