"""Figures of cost by context length: ratios to the reference with their intervals, growth, and the decision map."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patches import Patch
from scipy import ndimage

from lib import attention
from lib.analysis import crossovers
from lib.analysis.growth import SHOWN, basis, cost_metrics, exponents, labels, measured, ratios
from lib.analysis.style import colours, markers, titles, use_style
from lib.record.scaling import OUTCOMES

GAP = 0.055  # of a panel's height between two names at lines' ends
LEAST_NAMED = 0.03  # of the map; the table has the smaller regions too


def growth_figure(points: pd.DataFrame, metric: str, start: int, reference: str = attention.REFERENCE):
    """A metric by context length: over the reference's, with intervals; as measured; and the exponents."""
    use_style()
    figure, (relative, curves, slopes) = plt.subplots(1, 3, figsize=(16, 4.8), width_ratios=(5, 5, 4))
    _ratios(relative, points, metric, reference)
    _curves(curves, points, metric)
    _exponents(slopes, points, metric, start)
    figure.tight_layout()
    return figure


def cache_and_decode_figure(points: pd.DataFrame, reference: str = attention.REFERENCE):
    """Prefill and decoding of a small model over the reference's, and its cache, by context length."""
    use_style()
    figure, all_axes = plt.subplots(1, 3, figsize=(16, 4.8))
    for axes, metric in zip(all_axes, ("prefill_s", "decode_s_per_token"), strict=False):
        _ratios(axes, points, metric, reference)
    _curves(all_axes[2], points, "cache_bytes")
    figure.tight_layout()
    return figure


def _ratios(axes, points: pd.DataFrame, metric: str, reference: str) -> None:
    """Each variant's cost over the reference's with a 95 % band, where there are two processes or more."""
    names, called = labels(points), titles(points)
    colour, marker = colours(names), markers(names)
    title = SHOWN[metric][0]
    if reference not in names:
        axes.set_axis_off()
        axes.text(0, 0.5, f"{title}: no ratios,\n{reference} is not among the variants", fontsize=10, color="0.35")
        return
    found = ratios(points, metric, reference)
    ends = {reference: (_lengths(points)[-1], 1.0)}
    axes.axhline(1, color=colour[reference], linewidth=1.4)
    for name, own in found.groupby("label"):
        axes.plot(own["context"], own["ratio"], color=colour[name], marker=marker[name], markersize=5, linewidth=1.4)
        axes.fill_between(own["context"], own["low"], own["high"], color=colour[name], alpha=0.18, linewidth=0)
        ends[name] = own["context"].iloc[-1], own["ratio"].iloc[-1]
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    _plain_numbers(axes)
    _log_contexts(axes, points)
    _name_ends(axes, ends, colour, called)
    n = int(found["n"].min()) if len(found) else 0
    band = f"band: 95 %, n = {n} processes" if n > 1 else f"n = {n}: no interval"
    axes.set_title(f"{title},\nover {called[reference]}'s ({band})", loc="left")
    _mark_lost(axes, points, metric, colour)


def _curves(axes, points: pd.DataFrame, metric: str) -> None:
    """The metric as measured, a tick for every sample, and how slopes 1 and 2 would look."""
    title, scale, unit = SHOWN[metric]
    names = labels(points)
    colour, marker = colours(names), markers(names)
    ends = {}
    for name in names:
        own = measured(points, metric, name)
        style = {"color": colour[name], "marker": marker[name], "markersize": 5, "linewidth": 1.4}
        axes.plot(own["context"], own["value"] / scale, **style)
        samples = [(row.context, value / scale) for row in own.itertuples() for value in row.samples]
        axes.plot(*np.array(samples).reshape(-1, 2).T, "_", color=colour[name], markersize=5, alpha=0.5)
        if len(own):
            ends[name] = own["context"].iloc[-1], own["value"].iloc[-1] / scale
    axes.set_yscale("log")
    _slopes(axes, points)
    _plain_numbers(axes)
    _log_contexts(axes, points)
    _name_ends(axes, ends, colour, titles(points))
    axes.set_title(f"{title}, {unit}\n(grey: as T and as T²)", loc="left")
    _mark_lost(axes, points, metric, colour)


def _slopes(axes, points: pd.DataFrame) -> None:
    """Grey lines of exponents 1 and 2 from the lower left corner, which leave the limits as they are."""
    low, high = axes.get_ylim()
    lengths = np.array(_lengths(points), dtype=float)
    for power in (1, 2):
        axes.plot(lengths, low * (lengths / lengths[0]) ** power, color="0.6", linewidth=1, linestyle=":", zorder=0)
    axes.set_ylim(low, high)


def _exponents(axes, points: pd.DataFrame, metric: str, start: int) -> None:
    names, called = labels(points), titles(points)
    colour, marker = colours(names), markers(names)
    for rule in (1, 2):
        axes.axvline(rule, color="0.35", linewidth=1, linestyle="--")
    found = exponents(points, metric, start)
    for row, one in enumerate(found.itertuples()):
        if np.isnan(one.exponent):
            axes.text(1, row, f" only {one.n} lengths measured", va="center", fontsize=9, color="0.35")
            continue
        axes.plot(one.exponent, row, color=colour[one.label], marker=marker[one.label])
        if not np.isnan(one.low):
            axes.plot([one.low, one.high], [row, row], color=colour[one.label], linewidth=2)
    axes.set_yticks(range(len(names)), [called[name] for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    by = " and ".join(sorted(set(found["by"].dropna())))
    axes.set_title(
        f"Exponent p of T^p from {start:,} tokens on\n({f'95 %, over {by}' if by else 'no intervals'})", loc="left"
    )
    axes.set_xlabel("1: linear, 2: quadratic")


def _name_ends(axes, ends: dict[str, tuple[float, float]], colour: dict, called: dict) -> None:
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
        x, y = ends[name]
        words = {"xytext": (1.05, height), "textcoords": beside, "va": "center", "fontsize": 9, "color": colour[name]}
        line = {"arrowstyle": "-", "color": colour[name], "linewidth": 0.6, "alpha": 0.6, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(called[name], (x, y), arrowprops=line, annotation_clip=False, **words)


def _mark_lost(axes, points: pd.DataFrame, metric: str, colour: dict) -> None:
    """A cross at the top for each variant that has no number at a length, and why in the legend."""
    lost = points[(points["metric"] == metric) & (points["outcome"] != "measured")]
    top = mpl.transforms.blended_transform_factory(axes.transData, axes.transAxes)
    for context, rows in lost.groupby("context"):
        for place, row in enumerate(rows.itertuples()):
            axes.plot(context, 0.98 - 0.05 * place, "x", color=colour[row.label], markeredgewidth=2, transform=top)
    if len(lost):
        says = " or ".join(OUTCOMES[outcome] for outcome in sorted(lost["outcome"].unique()))
        axes.plot([], [], "x", color="0.3", markeredgewidth=2, label=says)
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
    """The reference's cost over the best variant's, by context length and share of decoded tokens.

    Regions are outlined and named by the best; hatched where it ties with another. Without the reference: the
    outlines alone.
    """
    use_style()
    metrics = cost_metrics(points)
    found = crossovers.decision_map(points, metrics["prefill"], metrics["decode"])
    figure, axes = plt.subplots(figsize=(9, 5))
    called = titles(points)
    over = found.over[found.labels.index(reference)] if reference in found.labels else np.ones_like(found.over[0])
    top = max(float(over[np.isfinite(over)].max(initial=1.0)), 1.1)
    shades = {"norm": mpl.colors.LogNorm(1, top), "cmap": "YlGnBu", "shading": "nearest", "rasterized": True}
    drawn = axes.pcolormesh(found.contexts, found.shares, np.where(np.isfinite(over), over, np.nan), **shades)
    if found.open.any():
        with mpl.rc_context({"hatch.linewidth": 0.5, "hatch.color": "0.45"}):
            levels = {"levels": [0.5, 1.5], "colors": "none", "hatches": ["///"]}
            axes.contourf(found.contexts, found.shares, found.open.astype(float), **levels)
    _name_regions(axes, found, called)
    _log_contexts(axes, points)
    axes.set_xlim(found.contexts[0], found.contexts[-1])
    axes.grid(visible=False)
    axes.set_ylabel("share of tokens that are decoded")
    if reference in found.labels:
        title = f"{called[reference]}'s cost over the best variant's, which is named"
        ticks = [tick for tick in (1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100) if tick <= top]
        bar = figure.colorbar(drawn, ax=axes, ticks=ticks, format=mpl.ticker.FuncFormatter(lambda x, _: f"x {x:g}"))
        bar.ax.minorticks_off()
    else:
        title = "The best variant"
    axes.set_title(f"{title}\n({basis(metrics['prefill'], points)}; n = {found.n})", loc="left")
    if found.open.any():
        hatched = Patch(facecolor="white", edgecolor="0.45", hatch="///", label="the best and another tie")
        axes.legend(handles=[hatched], loc="upper left", bbox_to_anchor=(0, -0.2), frameon=False)
    return figure


def _name_regions(axes, found: crossovers.Map, called: dict[str, str]) -> None:
    """An outline around the cells where each variant is the best, and its name in the middle of them."""
    for place in np.unique(found.cheapest):
        mine = found.cheapest == place
        if not mine.all():
            axes.contour(found.contexts, found.shares, mine.astype(float), levels=[0.5], colors="black", linewidths=1)
        if mine.mean() < LEAST_NAMED:
            continue
        # The cell of this region that is furthest from any other region and from the map's edge.
        depth = ndimage.distance_transform_cdt(np.pad(mine, 1))[1:-1, 1:-1]
        row, column = np.unravel_index(depth.argmax(), depth.shape)
        box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2}
        where = found.contexts[column], found.shares[row]
        axes.text(*where, called[found.labels[place]], ha="center", va="center", fontsize=10, bbox=box)
