"""How cost grows with context length, from the points of `lib.scaling`: exponents, fits, crossovers, the decision map.

A point counts with the minimum of its samples: what disturbs a run only ever adds to it. Fits weigh relative errors,
since lengths and costs span orders of magnitude. All intervals are 95 %.
"""

from typing import NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import statsmodels.api as sm
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from scipy import stats

from lib.analysis.style import BESIDE, MIB, colours, markers, titles, use_style
from lib.attention import STUDY_ORDER
from lib.errors import UsageError
from lib.record import REASONS
from lib.record.scaling import OUTCOMES, PART

FEWEST_POINTS = 4  # for a curve of three coefficients and an error
DRAWS = 4000  # of coefficients, for the interval of a crossover
SEED = 0
UNIT = 1024  # tokens: coefficients are per 1,024, which keeps their sizes alike
SHOWN = {  # metric: title, scale, unit
    "forward_backward_s": ("Forward and backward of one layer", 1e-3, "ms"),
    "peak_activation_bytes": ("Memory on top of weights and input", MIB, "MiB"),
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
    return rows.dropna(subset=["minimum"]).sort_values("context")


def cost_metrics(points: pd.DataFrame) -> dict[str, str]:
    """Which metrics the fits are of: joules where every measured point has them, else seconds."""
    counted = points[(points["outcome"] == "measured") & points["metric"].str.contains("energy")]
    on_energy = len(counted) > 0 and counted["minimum"].notna().all()
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


def exponents(points: pd.DataFrame, metric: str, start: int) -> pd.DataFrame:
    """Per variant the p of cost ~ T^p over lengths from `start` tokens on, least squares in logarithms, t interval.

    `low` and `high` are NaN for two points, all of it for fewer.
    """
    rows = []
    for label in labels(points):
        own = measured(points, metric, label).query("context >= @start")
        row = {"label": label, "exponent": np.nan, "low": np.nan, "high": np.nan, "n": len(own)}
        if len(own) > 1:
            fit = sm.OLS(np.log(own["minimum"].to_numpy()), sm.add_constant(np.log(own["context"].to_numpy()))).fit()
            row["exponent"] = fit.params[1]
            if fit.df_resid:
                row["low"], row["high"] = fit.conf_int(0.05)[1]
        rows.append(row)
    return pd.DataFrame(rows)


class Fit(NamedTuple):
    """cost = a + bK + cK², K in units of 1,024 tokens, for lengths from `first` to `last`."""

    coefficients: np.ndarray
    covariance: np.ndarray
    df: int
    first: int
    last: int

    def terms(self, contexts) -> np.ndarray:
        """(lengths, coefficients): the powers of each length."""
        return np.vander(np.asarray(contexts) / UNIT, len(self.coefficients), increasing=True)

    def at(self, contexts) -> tuple[np.ndarray, np.ndarray]:
        """The mean cost, and half the width of its interval."""
        terms = self.terms(contexts)
        variance = np.einsum("ti,ij,tj->t", terms, self.covariance, terms)
        return terms @ self.coefficients, stats.t.ppf(0.975, self.df) * np.sqrt(variance)

    def intervals(self) -> np.ndarray:
        """(coefficients, 2): low and high of each."""
        half = stats.t.ppf(0.975, self.df) * np.sqrt(np.diag(self.covariance))
        return np.stack([self.coefficients - half, self.coefficients + half], axis=1)


def fits(points: pd.DataFrame, metric: str) -> dict[str, Fit]:
    """A `Fit` for each variant with at least four measured lengths; decoding is fitted by a straight line."""
    found = {}
    for label in labels(points):
        own = measured(points, metric, label)
        if len(own) < FEWEST_POINTS:
            continue
        contexts, costs = own["context"].to_numpy(), own["minimum"].to_numpy()
        terms = np.vander(contexts / UNIT, DEGREE.get(metric, 2) + 1, increasing=True)
        fit = sm.WLS(costs, terms, weights=costs**-2.0).fit()
        found[label] = Fit(fit.params, fit.cov_params(), int(fit.df_resid), int(contexts[0]), int(contexts[-1]))
    return found


def crossovers(found: dict[str, Fit], references: list[str]) -> pd.DataFrame:
    """Where each variant's fitted cost crosses a reference's, within the lengths that both were measured at.

    A row per crossing: `becomes` cheaper or more expensive from `context` tokens on. Its interval comes from 4,000
    seeded draws of both fits' coefficients (multivariate t); an end outside the measured lengths is infinite. Without
    a crossing, `becomes` says what holds throughout in at least 95 % of the draws, or "inconclusive".
    """
    pairs = [(label, reference) for reference in references if reference in found for label in found]
    rows = [
        {"label": label, "against": reference} | row
        for label, reference in pairs
        if label != reference
        for row in _crossings(found[label], found[reference])
    ]
    return pd.DataFrame(rows, columns=["label", "against", "becomes", "context", "low", "high"])


def _crossings(one: Fit, other: Fit) -> list[dict]:
    grid = np.geomspace(max(one.first, other.first), min(one.last, other.last), 512)
    difference = one.at(grid)[0] - other.at(grid)[0]
    generator = np.random.default_rng(SEED)
    draws = _draws(one, generator) @ one.terms(grid).T - _draws(other, generator) @ other.terms(grid).T
    at = np.flatnonzero(np.diff(np.sign(difference)))
    rows = [_crossing(grid, difference[i], grid[i], draws) for i in at]
    rows = [row for row in rows if np.isfinite([row["low"], row["high"]]).any()]
    if rows:
        return rows
    shares = {
        "cheaper throughout": (draws < 0).all(axis=1).mean(),
        "more expensive throughout": (draws > 0).all(axis=1).mean(),
    }
    holds = [says for says, share in shares.items() if share >= 0.95]
    return [{"becomes": holds[0] if holds else "inconclusive", "context": np.nan, "low": np.nan, "high": np.nan}]


def _draws(fit: Fit, generator) -> np.ndarray:
    shape = stats.multivariate_t(fit.coefficients, fit.covariance, df=fit.df, allow_singular=True)
    return shape.rvs(DRAWS, random_state=generator)


def _crossing(grid, before, context, draws) -> dict:
    """The crossing after `context` from `before`'s sign to the other, and where the draws put it."""
    up = 1 if before < 0 else -1  # the sign of the difference after it
    turns = (np.sign(draws[:, :-1]) == -up) & (np.sign(draws[:, 1:]) == up)  # (draws, grid - 1)
    distance = np.where(turns, np.abs(np.log(grid[:-1] / context)), np.inf)
    nearest = grid[distance.argmin(axis=1)]
    # A draw that never turns so has its crossing before the first length, or after the last.
    never = ~turns.any(axis=1)
    nearest[never] = np.where(np.sign(draws[never, -1]) == up, -np.inf, np.inf)
    low, high = np.quantile(nearest, [0.025, 0.975], method="nearest")
    return {"becomes": "more expensive" if up > 0 else "cheaper", "context": context, "low": low, "high": high}


class Map(NamedTuple):
    """Which of `labels` is cheapest, (shares, contexts); and whether its interval overlaps the second's."""

    labels: list[str]
    contexts: np.ndarray
    shares: np.ndarray
    cheapest: np.ndarray
    overlaps: np.ndarray


def decision_map(prefill: dict[str, Fit], decode: dict[str, Fit], lengths: int = 241, shares: int = 101) -> Map:
    """The cheapest variant over context length T and share s of tokens that are decoded, the others being prefilled.

    The cost of a token is (1 - s) x prefill(T) / T + s x decode(T); half its interval's width is the root of the sum of
    both parts' squares (Zou and Donner 2008). A variant takes part at the lengths that it was measured at.
    """
    names = [label for label in prefill if label in decode]
    if not names:
        raise UsageError("a decision map needs variants with at least four measured lengths")
    ends = {n: (max(prefill[n].first, decode[n].first), min(prefill[n].last, decode[n].last)) for n in names}
    contexts = np.geomspace(min(e[0] for e in ends.values()), max(e[1] for e in ends.values()), lengths)
    share = np.linspace(0, 1, shares)[:, None]
    costs, halves = np.full((2, len(names), shares, lengths), np.inf)
    for index, name in enumerate(names):
        (read, read_half), (written, written_half) = prefill[name].at(contexts), decode[name].at(contexts)
        # Ends of a range of powers are met but for rounding.
        inside = (contexts > ends[name][0] * 0.999) & (contexts < ends[name][1] * 1.001)
        costs[index] = np.where(inside, (1 - share) * read / contexts + share * written, np.inf)
        halves[index] = np.hypot((1 - share) * read_half / contexts, share * written_half)
    order = costs.argsort(axis=0)
    best, second = order[0], order[min(1, len(names) - 1)]

    def taken(values, which):
        return np.take_along_axis(values, which[None], axis=0)[0]

    reach = taken(costs, best) + taken(halves, best)
    overlaps = (reach >= taken(costs, second) - taken(halves, second)) & (best != second)
    return Map(names, contexts, share[:, 0], best, overlaps)


def growth_figure(points: pd.DataFrame, metric: str, start: int):
    """A metric by context length, every sample as a tick; beside it the exponents with their intervals."""
    use_style()
    figure, (curves, slopes) = plt.subplots(1, 2, figsize=(11.5, 4.4), width_ratios=(3, 2))
    _curves(curves, points, metric)
    names = labels(points)
    colour, marker = colours(names), markers(names)
    for row, found in enumerate(exponents(points, metric, start).itertuples()):
        if np.isnan(found.exponent):
            slopes.text(0, row, f"only {found.n} lengths measured", va="center", fontsize=9, color="0.35")
            continue
        slopes.plot(found.exponent, row, color=colour[found.label], marker=marker[found.label])
        if not np.isnan(found.low):
            slopes.plot([found.low, found.high], [row, row], color=colour[found.label], linewidth=2)
    called = titles(points)
    slopes.set_yticks(range(len(names)), [called[name] for name in names])
    slopes.set_ylim(len(names) - 0.5, -0.5)
    slopes.set_title(f"Exponent p of T^p from {start:,} tokens on (95 %)", loc="left")
    slopes.set_xlabel("1: linear, 2: quadratic")
    figure.tight_layout()
    return figure


def cache_and_decode_figure(points: pd.DataFrame):
    """Prefill, decoding and cache of a small model by context length."""
    use_style()
    figure, all_axes = plt.subplots(1, 3, figsize=(14, 4.2))
    for axes, metric in zip(all_axes, ("prefill_s", "decode_s_per_token", "cache_bytes"), strict=True):
        _curves(axes, points, metric, legend=metric == "cache_bytes")
    figure.tight_layout()
    return figure


def _curves(axes, points: pd.DataFrame, metric: str, legend: bool = True) -> None:
    title, scale, unit = SHOWN[metric]
    names, called = labels(points), titles(points)
    colour, marker = colours(names), markers(names)
    for name in names:
        own = measured(points, metric, name)
        style = {"color": colour[name], "marker": marker[name], "markersize": 5, "linewidth": 1.4}
        axes.plot(own["context"], own["minimum"] / scale, label=called[name], **style)
        samples = [(row.context, value / scale) for row in own.itertuples() for value in row.samples]
        axes.plot(*np.array(samples).reshape(-1, 2).T, "_", color=colour[name], markersize=5, alpha=0.5)
    _log_contexts(axes, points)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_title(title, loc="left")
    axes.set_ylabel(unit)
    lost = points[(points["metric"] == metric) & (points["outcome"] != "measured")]
    top = mpl.transforms.blended_transform_factory(axes.transData, axes.transAxes)
    for context, rows in lost.groupby("context"):
        for place, row in enumerate(rows.itertuples()):
            axes.plot(context, 0.98 - 0.05 * place, "x", color=colour[row.label], markeredgewidth=2, transform=top)
    if len(lost):
        says = " or ".join(OUTCOMES[outcome] for outcome in sorted(lost["outcome"].unique()))
        axes.plot([], [], "x", color="0.3", markeredgewidth=2, label=says)
    if legend:
        axes.legend(**BESIDE)


def _log_contexts(axes, points: pd.DataFrame) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.set_xticks(sorted(points["context"].unique()))
    axes.tick_params(axis="x", labelrotation=30)
    axes.set_xlabel("context, tokens")


def decision_map_figure(points: pd.DataFrame):
    """`decision_map` of the points, hatched where the cheapest two overlap."""
    use_style()
    metrics = cost_metrics(points)
    found = decision_map(fits(points, metrics["prefill"]), fits(points, metrics["decode"]))
    figure, axes = plt.subplots(figsize=(8, 4.6))
    colour, called = colours(found.labels), titles(points)
    shades = ListedColormap([colour[name] for name in found.labels])
    extent = {"cmap": shades, "vmin": -0.5, "vmax": len(found.labels) - 0.5, "shading": "nearest", "alpha": 0.8}
    axes.pcolormesh(found.contexts, found.shares, found.cheapest, rasterized=True, **extent)
    if found.overlaps.any():
        with mpl.rc_context({"hatch.linewidth": 0.6}):
            levels = {"levels": [0.5, 1.5], "colors": "none", "hatches": ["///"]}
            axes.contourf(found.contexts, found.shares, found.overlaps.astype(float), **levels)
    _log_contexts(axes, points)
    axes.set_xlim(found.contexts[0], found.contexts[-1])
    axes.grid(visible=False)
    axes.set_ylabel("share of tokens that are decoded")
    axes.set_title(f"The cheapest variant, by the fits\n({basis(metrics['prefill'], points)})", loc="left")
    won = [Patch(facecolor=(*colour[name], 0.8), label=called[name]) for name in _present(found)]
    hatched = Patch(facecolor="white", edgecolor="0.3", hatch="///", label="overlaps the second")
    axes.legend(handles=[*won, *([hatched] if found.overlaps.any() else [])], **BESIDE)
    return figure


def _present(found: Map) -> list[str]:
    return [found.labels[index] for index in np.unique(found.cheapest)]


def exponents_table(points: pd.DataFrame, start: int) -> pd.DataFrame:
    """Exponents of all that is measured, with intervals."""
    columns = {}
    for metric in ("forward_backward_s", "peak_activation_bytes", "prefill_s", "decode_s_per_token", "cache_bytes"):
        found = exponents(points, metric, start).set_index("label")
        columns[SHOWN[metric][0]] = found.apply(lambda row: _interval(row["exponent"], row["low"], row["high"]), axis=1)
    return pd.DataFrame(columns).rename(titles(points)).rename_axis("variant").reset_index()


def _interval(value: float, low: float, high: float, form: str = "{:.2f}") -> str:
    if np.isnan(value):
        return "–"
    return form.format(value) if np.isnan(low) else f"{form} [{form}, {form}]".format(value, low, high)


def fits_table(points: pd.DataFrame, metric: str) -> pd.DataFrame:
    """a, b and c of each variant's fit with their intervals, in milliseconds or joules; K is 1,024 tokens."""
    _, scale, unit = SHOWN[metric]
    called = titles(points)
    found = fits(points, metric)
    names = (f"a, {unit}", f"b, {unit} per K", f"c, {unit} per K²")[: DEGREE.get(metric, 2) + 1]
    rows = []
    for label in labels(points):
        cells = ["too few lengths measured"] * len(names)
        if label in found:
            ends = zip(found[label].coefficients / scale, found[label].intervals() / scale, strict=True)
            cells = [_interval(value, *interval, form="{:.3g}") for value, interval in ends]
        rows.append({"variant": called[label]} | dict(zip(names, cells, strict=True)))
    return pd.DataFrame(rows)


def crossovers_table(points: pd.DataFrame, metrics: list[str], references: list[str]) -> pd.DataFrame:
    """The crossovers of several metrics, as a reader sees them, a row per variant and reference."""
    missing = set(references) - set(points["label"])
    if missing:
        raise UsageError(f"references: there are no points of {', '.join(sorted(missing))}")
    columns = {}
    for metric in metrics:
        found = crossovers(fits(points, metric), references)
        says = found.apply(_crossover_in_words, axis=1) if len(found) else pd.Series(dtype=str)
        columns[SHOWN[metric][0]] = says.groupby([found["label"], found["against"]]).agg("; ".join)
    table = pd.DataFrame(columns).rename_axis(["variant", "against"]).reset_index().fillna("–")
    order = {label: place for place, label in enumerate(labels(points))}
    places = table["against"].map(references.index) * len(order) + table["variant"].map(order)
    table[["variant", "against"]] = table[["variant", "against"]].replace(titles(points))
    return table.iloc[places.argsort(kind="stable")].reset_index(drop=True)


def _crossover_in_words(row: pd.Series) -> str:
    if np.isnan(row["context"]):
        return row["becomes"]
    low = "below the first" if np.isinf(row["low"]) else f"{row['low']:,.0f}"
    high = "beyond the last" if np.isinf(row["high"]) else f"{row['high']:,.0f}"
    return f"{row['becomes']} from {row['context']:,.0f} on [{low}, {high}]"


def points_table(points: pd.DataFrame) -> pd.DataFrame:
    """Least and median of every variant and length, and what ran out."""
    rows = []
    called = titles(points)
    for label in labels(points):
        for context in sorted(points["context"].unique()):
            row = {"variant": called[label], "context": f"{context:,}"}
            for metric in (
                "forward_backward_s",
                "peak_activation_bytes",
                "prefill_s",
                "decode_s_per_token",
                "cache_bytes",
            ):
                title, scale, unit = SHOWN[metric]
                own = points.query("label == @label and context == @context and metric == @metric")
                row[f"{title}, {unit}"] = _cell(own.iloc[0], scale, metric) if len(own) else "–"
            rows.append(row)
    return pd.DataFrame(rows)


def _cell(point: pd.Series, scale: float, metric: str) -> str:
    if point["outcome"] != "measured":
        return OUTCOMES[point["outcome"]]
    if pd.notna(point["reason"]):
        return REASONS[point["reason"]]
    minimum, median = (_number(point[of] / scale) for of in ("minimum", "median"))
    return minimum if metric == "cache_bytes" or point["n"] == 1 else f"{minimum} (median {median})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def unmeasured(points: pd.DataFrame) -> pd.DataFrame:
    """Points and metrics without a number, and why."""
    ran_out, called = points[points["outcome"] != "measured"], titles(points)
    ran_out = ran_out.assign(part=ran_out["metric"].map(PART))
    rows = [
        {"what": row.part, "variant": called[row.label], "context": f"{row.context:,}"}
        | {"why": f"{OUTCOMES[row.outcome]}: {row.says}"}
        for row in ran_out.drop_duplicates(["label", "context", "part"]).itertuples()
    ]
    for (metric, reason), own in points.dropna(subset=["reason"]).groupby(["metric", "reason"]):
        names, contexts = labels(own), sorted(own["context"].unique())
        rows.append(
            {"what": metric, "variant": "all" if names == labels(points) else ", ".join(called[name] for name in names)}
        )
        rows[-1] |= {"context": f"{contexts[0]:,} to {contexts[-1]:,}", "why": REASONS[reason]}
    return pd.DataFrame(rows, columns=["what", "variant", "context", "why"])
