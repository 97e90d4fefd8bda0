"""Figures of cost by context length: ratios to the reference with their intervals, growth, and the decision map."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import ndimage

from lib import attention
from lib.analysis import crossovers
from lib.analysis.growth import SHOWN, basis, cost_metrics, exponents, labels, measured, ratios
from lib.analysis.style import BLUE, INK, looks, tell, titles, use_style
from lib.record.scaling import OUTCOMES

GAP = 0.055  # of a panel's height between two names at lines' ends
LEAST_NAMED, MOST_NAMED = 0.03, 3  # of the map; variants of a region. The table has the smaller regions too
SHADES = mpl.colors.LinearSegmentedColormap.from_list("cost", ["#cfd8dc", "#7cb4da", "#0f7ac0", "#0a3a66"])


def ratio_figure(points: pd.DataFrame, metrics: list[str], reference: str = attention.REFERENCE):
    """Each variant's cost over the reference's by context length, a panel per metric; names at the lines' ends."""
    use_style()
    figure, all_axes = plt.subplots(1, len(metrics), figsize=(5.6 * len(metrics), 4.6), squeeze=False)
    said = [_ratios(axes, points, metric, reference) for axes, metric in zip(all_axes[0], metrics, strict=True)]
    figure.tight_layout()
    return tell(figure, " ".join(said))


def growth_figure(points: pd.DataFrame, metric: str, start: int):
    """A metric by context length as measured, with guide lines of exponents 1 and 2, and each variant's exponent."""
    use_style()
    figure, (curves, slopes) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(5, 4))
    _curves(curves, points, metric)
    said = _exponents(slopes, points, metric, start)
    figure.tight_layout()
    return tell(figure, f"{SHOWN[metric][0]} by context length, and the exponent p of T^p: {said}.")


def cache_and_decode_figure(points: pd.DataFrame, reference: str = attention.REFERENCE):
    """Prefill and decoding of a small model over the reference's, and its cache, by context length."""
    use_style()
    figure, all_axes = plt.subplots(1, 3, figsize=(16, 4.8))
    said = [
        _ratios(axes, points, metric, reference)
        for axes, metric in zip(all_axes, ("prefill_s", "decode_s_per_token"), strict=False)
    ]
    _curves(all_axes[2], points, "cache_bytes")
    figure.tight_layout()
    return tell(figure, f"{' '.join(said)} And the cache in MiB.")


def _ratios(axes, points: pd.DataFrame, metric: str, reference: str) -> str:
    """Each variant's cost over the reference's with a 95 % band, where there are two processes or more; in words the
    ratios at each line's end."""
    names, called = labels(points), titles(points)
    look = looks(names)
    title = SHOWN[metric][0]
    if reference not in names:
        axes.set_axis_off()
        axes.text(0, 0.5, f"{title}: no ratios,\n{reference} is not among the variants", fontsize=10)
        return f"{title}: no ratios."
    found = ratios(points, metric, reference)
    ends = {reference: (_lengths(points)[-1], 1.0)}
    axes.axhline(1, **look[reference] | {"marker": ""}, linewidth=1.6)
    said = []
    for name, own in found.groupby("label"):
        axes.plot(own["context"], own["ratio"], **look[name], markersize=5, linewidth=1.6)
        axes.fill_between(own["context"], own["low"], own["high"], color=look[name]["color"], alpha=0.18, linewidth=0)
        ends[name] = own["context"].iloc[-1], own["ratio"].iloc[-1]
        said.append(f"{called[name]} {own['ratio'].iloc[-1]:.2f} at {own['context'].iloc[-1]:,}")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    _plain_numbers(axes)
    _log_contexts(axes, points)
    _name_ends(axes, ends, look, called)
    n = int(found["n"].min()) if len(found) else 0
    band = f"band: 95 %, n = {n} processes" if n > 1 else f"n = {n}: no interval"
    axes.set_title(f"{title},\nover {called[reference]}'s ({band})", loc="left")
    _mark_lost(axes, points, metric, look)
    return f"{title}, over {called[reference]}'s: {', '.join(said)} tokens."


def _curves(axes, points: pd.DataFrame, metric: str) -> None:
    """The metric as measured, a tick for every sample, and how slopes 1 and 2 would look."""
    title, scale, unit = SHOWN[metric]
    names = labels(points)
    look = looks(names)
    ends = {}
    for name in names:
        own = measured(points, metric, name)
        axes.plot(own["context"], own["value"] / scale, **look[name], markersize=5, linewidth=1.4)
        samples = [(row.context, value / scale) for row in own.itertuples() for value in row.samples]
        axes.plot(*np.array(samples).reshape(-1, 2).T, "_", color=look[name]["color"], markersize=5, alpha=0.5)
        if len(own):
            ends[name] = own["context"].iloc[-1], own["value"].iloc[-1] / scale
    axes.set_yscale("log")
    _guides(axes, points)
    _plain_numbers(axes)
    _log_contexts(axes, points)
    _name_ends(axes, ends, look, titles(points))
    axes.set_title(f"{title}, {unit}\n(grey: as T and as T²)", loc="left")
    _mark_lost(axes, points, metric, look)


def _guides(axes, points: pd.DataFrame) -> None:
    """Grey lines of exponents 1 and 2 from the lower left corner, named, which leave the limits as they are."""
    low, high = axes.get_ylim()
    lengths = np.array(_lengths(points), dtype=float)
    for power, name in ((1, "T"), (2, "T²")):
        line = low * (lengths / lengths[0]) ** power
        axes.plot(lengths, line, color=INK, linewidth=1, linestyle=":", zorder=0)
        inside = np.flatnonzero(line < high)
        if len(inside):
            at = inside[-1]
            axes.annotate(name, (lengths[at], line[at]), xytext=(2, -9), textcoords="offset points", fontsize=9)
    axes.set_ylim(low, high)


def _exponents(axes, points: pd.DataFrame, metric: str, start: int) -> str:
    """Exponents with their intervals, a row each; in words the exponents."""
    names, called = labels(points), titles(points)
    look = looks(names)
    for rule in (1, 2):
        axes.axvline(rule, color=INK, linewidth=1, linestyle="--")
    found = exponents(points, metric, start)
    for row, one in enumerate(found.itertuples()):
        if np.isnan(one.exponent):
            axes.text(1, row, f" only {one.n} lengths measured", va="center", fontsize=9)
            continue
        axes.plot(one.exponent, row, color=BLUE, marker=look[one.label]["marker"])
        if not np.isnan(one.low):
            axes.plot([one.low, one.high], [row, row], color=BLUE, linewidth=2)
    axes.set_yticks(range(len(names)), [called[name] for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    by = " and ".join(sorted(set(found["by"].dropna())))
    axes.set_title(
        f"Exponent p of T^p from {start:,} tokens on\n({f'95 %, over {by}' if by else 'no intervals'})", loc="left"
    )
    axes.set_xlabel("1: linear, 2: quadratic")
    known = found.dropna(subset=["exponent"])
    return ", ".join(f"{called[one.label]} {one.exponent:.2f}" for one in known.itertuples())


def _name_ends(axes, ends: dict[str, tuple[float, float]], look: dict, called: dict) -> None:
    """The variants' names at their lines' ends, in their colours, moved apart where they would overlap."""
    low, high = np.log(axes.get_ylim())
    heights = {name: (np.log(y) - low) / (high - low) for name, (_, y) in ends.items()}
    order = sorted(heights, key=lambda name: (heights[name], name))
    placed = []
    for name in order:
        placed.append(max(heights[name], placed[-1] + GAP if placed else 0.0))
    over = max(0.0, placed[-1] - 1) if placed else 0.0
    for index in range(len(placed) - 1, -1, -1):  # what was pushed above the panel comes down again
        above = placed[index + 1] - GAP if index + 1 < len(placed) else placed[index] - over
        placed[index] = min(placed[index], above)
    beside = mpl.transforms.blended_transform_factory(axes.transAxes, axes.transAxes)
    for name, height in zip(order, placed, strict=True):
        (x, y), colour = ends[name], look[name]["color"]
        words = {"xytext": (1.05, height), "textcoords": beside, "va": "center", "fontsize": 9, "color": colour}
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(called[name], (x, y), arrowprops=line, annotation_clip=False, **words)


def _mark_lost(axes, points: pd.DataFrame, metric: str, look: dict) -> None:
    """A cross at the top for each variant that has no number at a length, and why in the legend."""
    lost = points[(points["metric"] == metric) & (points["outcome"] != "measured")]
    top = mpl.transforms.blended_transform_factory(axes.transData, axes.transAxes)
    for context, rows in lost.groupby("context"):
        for place, row in enumerate(rows.itertuples()):
            axes.plot(
                context, 0.98 - 0.05 * place, "x", color=look[row.label]["color"], markeredgewidth=2, transform=top
            )
    if len(lost):
        says = " or ".join(OUTCOMES[outcome] for outcome in sorted(lost["outcome"].unique()))
        axes.plot([], [], "x", color=INK, markeredgewidth=2, label=says)
        axes.legend(loc="upper left", frameon=False)


def _lengths(points: pd.DataFrame) -> list[int]:
    return sorted(points["context"].unique())


def _plain_numbers(axes) -> None:
    axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())


def _log_contexts(axes, points: pd.DataFrame) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.set_xticks(_lengths(points))
    axes.tick_params(axis="x", labelrotation=30)
    axes.set_xlabel("context, tokens")


def decision_map_figure(points: pd.DataFrame, reference: str = attention.REFERENCE):
    """The reference's cost over the best variant's, by context length and share of tokens that are decoded.

    Regions are outlined and named by the best; where it ties with others, by all of them. Without the reference: the
    outlines alone.
    """
    use_style()
    metrics = cost_metrics(points)
    found = crossovers.decision_map(points, metrics["prefill"], metrics["decode"])
    figure, axes = plt.subplots(figsize=(9, 5))
    called = titles(points)
    over = found.over[found.labels.index(reference)] if reference in found.labels else np.ones_like(found.over[0])
    top = max(float(over[np.isfinite(over)].max(initial=1.0)), 1.1)
    shades = {"norm": mpl.colors.LogNorm(1, top), "cmap": SHADES, "shading": "nearest", "rasterized": True}
    drawn = axes.pcolormesh(found.contexts, found.shares, np.where(np.isfinite(over), over, np.nan), **shades)
    named = _name_regions(axes, found, called)
    _log_contexts(axes, points)
    axes.set_xlim(found.contexts[0], found.contexts[-1])
    axes.grid(visible=False)
    axes.set_ylabel("share of tokens that are decoded")
    if reference in found.labels:
        title = f"{called[reference]}'s cost over the best"
        ticks = [tick for tick in (1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100) if tick <= top]
        bar = figure.colorbar(drawn, ax=axes, ticks=ticks, format=mpl.ticker.FuncFormatter(lambda x, _: f"× {x:g}"))
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)
    else:
        title = "The best variant"
    ties = "; or: not told apart" if found.open.any() else ""
    axes.set_title(f"{title}, which is named{ties}\n({basis(metrics['prefill'], points)}; n = {found.n})", loc="left")
    said = f", up to × {top:.1f}" if reference in found.labels else ""
    return tell(figure, f"{title} by context length and share of decoded tokens{said}. Best: {', '.join(named)}.")


def _name_regions(axes, found: crossovers.Map, called: dict[str, str]) -> list[str]:
    """An outline around the cells with the same best variants, and their names in the middle; returns these names."""
    named = []
    sets = found.tied.copy()  # (labels, shares, lengths)
    np.put_along_axis(sets, found.cheapest[None], True, axis=0)
    sets[:, sets.sum(axis=0) > MOST_NAMED] = True  # one region: who is in it changes from cell to cell
    kinds, index = np.unique(sets.reshape(len(sets), -1), axis=1, return_inverse=True)
    index = index.reshape(found.cheapest.shape)
    for kind in range(kinds.shape[1]):
        mine = index == kind
        if not mine.all():
            axes.contour(found.contexts, found.shares, mine.astype(float), levels=[0.5], colors="black", linewidths=0.8)
        if mine.mean() < LEAST_NAMED:
            continue
        # The cell of this region that is furthest from any other region and from the map's edge.
        depth = ndimage.distance_transform_cdt(np.pad(mine, 1))[1:-1, 1:-1]
        row, column = np.unravel_index(depth.argmax(), depth.shape)
        box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2}
        where = found.contexts[column], found.shares[row]
        best = [called[found.labels[place]] for place in np.flatnonzero(kinds[:, kind])]
        words = " or\n".join(best) if len(best) <= MOST_NAMED else f"more than {MOST_NAMED}\nare not told apart"
        named.append(words.replace("\n", " "))
        axes.text(*where, words, ha="center", va="center", fontsize=9, color="black", bbox=box)
    return named
