"""The figures and tables of the study, drawn from records alone: one function each, one style, one colour per variant.

Every function takes the runs of one group (`lib.analysis.compare.groups`) and returns a matplotlib figure, or the
sentence that stands for it where nothing was measured. A variant whose metric was not measured keeps its row, with the
reason; one that fails its certificate stands below the line, hatched. Bars are of one colour, since their names stand
beside them. Beneath each figure stands what the A/A control
differs by in the figure's own metrics.
"""

import math
from collections.abc import Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lib import attention
from lib.analysis import compare
from lib.analysis.loss_figures import cost_to_target, loss_against_cost, loss_by_recall, loss_curves
from lib.analysis.notes import SMALL, absent, note, why
from lib.analysis.style import (
    BESIDE,
    BLUE,
    GIB,
    INK,
    MIB,
    MOST_VARIANTS,
    few,
    folded_away,
    labels,
    looks,
    name_rows,
    tell,
    titles,
    use_style,
)  # fmt: skip
from lib.analysis.tables import interval
from lib.paths import ROOT

PUBLISHED = ROOT / "records" / "published_figures.csv"


def _bars(axes, runs: pd.DataFrame, metric: str, scale: float, unit: str, form: str = "{:,.3g}") -> list[str]:
    """One horizontal bar per variant: its level, every run as a point, and its ratio to sdpa; sdpa's own is the grey
    one. Returns what the bars say, in words.

    From five whole blocks up a bar is sdpa's mean times the paired ratio, with the ratio's 95 % interval: what misses a
    slow block is not drawn shorter for it. The shortest comes first where numbers allow an order: counts, and ratios
    with intervals; below five blocks variants stand in the study's order.
    """
    certified = runs.groupby("label")["certified"].all()
    found = compare.ratios(runs, metric).set_index("label").reindex(labels(runs))
    counted = compare.comparable(runs)
    found["level"] = found["level"].fillna(counted.groupby("label")[metric].agg(lambda own: own.astype(float).mean()))
    if metric in compare.COUNTED or found["low"].notna().any():
        found = found.assign(apart=~certified).sort_values(["apart", "level"], kind="stable")
    found = found.loc[few(list(found.index), found["level"])]
    names, flags, title, said = list(found.index), compare.flagged(runs), titles(runs), []
    for row, name in enumerate(names):
        own, of = runs[runs["label"] == name], found.loc[name]
        own = own[own.index.isin(counted.index)]
        values = own[metric].dropna().astype(float) / scale
        if values.empty:
            axes.text(0.01, row, why(own, metric), va="center", transform=axes.get_yaxis_transform(), **SMALL)
            continue
        level = of["level"] / scale
        colour = INK if name == attention.REFERENCE else BLUE
        hatch = {} if certified[name] else {"hatch": "//", "facecolor": "none"}
        axes.barh(row, level, **{"color": colour, "edgecolor": colour, "height": 0.7} | hatch)
        n, end, note = len(values), max(level, values.max()), f" {form.format(level)}"
        said.append(f"{title[name]}{note}")
        if not pd.isna(of["low"]):
            ends = [[level * (1 - of["low"] / of["ratio"])], [level * (of["high"] / of["ratio"] - 1)]]
            axes.errorbar(level, row, xerr=ends, color=INK, capsize=3)
            end = max(end, level + ends[1][0])  # or the words run through the interval
            ratio = f"{of['ratio']:.3f}" if metric in compare.COUNTED else interval(of)
            note, n = f"{note} (× {ratio}, n = {of['n']:.0f}", int(of["n"])
        elif metric in compare.COUNTED and found["low"].isna().all():
            note = f"{note} (counted"
        else:
            note = f"{note} (n = {n}"
        if n > 1:
            axes.plot(values, [row + 0.25] * len(values), ".", color=INK, markersize=3)
        note += ")" if flags[name].startswith("0 ") else f", flagged in {flags[name]})"
        axes.text(end, row, note, va="center", fontsize=9)
    name_rows(axes, runs, names, certified)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, axes.get_xlim()[1] * (1.35 if found["low"].isna().all() else 1.9))
    axes.set_xlabel(unit if found["low"].isna().all() else f"{unit} (×: ratio to SDPA's, 95 %)")
    axes.grid(axis="y", visible=False)
    first_uncertified = int(certified[names].sum())
    if 0 < first_uncertified < len(names):
        axes.axhline(first_uncertified - 0.5, color=INK, linewidth=1, linestyle=":")
    return said


def _bar_figure(runs: pd.DataFrame, panels: list[tuple[str, str, float, str]], form="{:,.3g}") -> Figure | str:
    """Panels side by side, each (title, metric, scale, unit); one without a single value is a sentence instead."""
    use_style()
    drawn = [panel for panel in panels if runs[panel[1]].notna().any()]
    missing = absent({title: why(runs, metric) for title, metric, *_ in panels if runs[metric].isna().all()})
    if not drawn:
        return " ".join(missing)
    every = labels(runs)
    height, width = 1.1 + 0.42 * min(len(every), MOST_VARIANTS), 5.4
    if compare.ratios(runs, drawn[0][1])["low"].notna().any():
        width = 7.2  # intervals need room
    figure, all_axes = plt.subplots(1, len(drawn), figsize=(max(6.5, width * len(drawn)), height), squeeze=False)
    said = []
    for axes, (title, metric, scale, unit) in zip(all_axes[0], drawn, strict=True):
        said.append(f"{title}, {unit}: {', '.join(_bars(axes, runs, metric, scale, unit, form))}.")
        axes.set_title(title, loc="left")
    tell(figure, " ".join(said))
    figure.tight_layout()
    away = folded_away(every, every[:MOST_VARIANTS], "what a panel shows")
    note(figure, runs, {title: metric for title, metric, *_ in drawn}, [*missing, *away])
    return figure


def training_time(runs):
    return _bar_figure(runs, [("Training time", "time_per_epoch_s", 1, "seconds per epoch")])


def gpu_energy(runs):
    return _bar_figure(
        runs,
        [
            ("GPU energy of the run", "energy_j", 1e3, "kJ"),
            ("GPU energy per non-padding token", "energy_per_non_padding_token_j", 1e-3, "mJ per token"),
        ],
    )


def peak_memory(runs):
    panels = [("Peak GPU memory", "peak_memory_bytes", GIB, "GiB allocated")]
    if runs["peak_resident_bytes"].notna().any():
        panels.append(("Peak memory of the process", "peak_resident_bytes", GIB, "GiB resident"))
    return _bar_figure(runs, panels)


def flops(runs):
    return _bar_figure(
        runs,
        [
            ("Causal FLOPs", "forward_flops_causal", 1e9, "GFLOPs, forward, one sequence"),
            ("Full T x T FLOPs", "forward_flops_full", 1e9, "GFLOPs"),
            ("FLOPs counted by PyTorch", "forward_flops_counted", 1e9, "GFLOPs"),
        ],
        form="{:,.4g}",
    )


def gpu_power(runs):
    return _bar_figure(runs, [("Mean GPU power", "mean_power_w", 1, "W")])


def gpu_utilization(runs):
    return _bar_figure(runs, [("GPU utilization", "gpu_utilization_percent", 1, "% of the time with a kernel running")])


def cpu_use(runs):
    return _bar_figure(
        runs,
        [
            ("CPU use", "cpu_cores_used", 1, "cores busy, mean over the window"),
            ("CPU energy", "cpu_energy_j", 1e3, "kJ"),
        ],
    )


def model_size(runs):
    return _bar_figure(
        runs,
        [("Parameters", "parameters", 1e6, "millions"), ("Size on disk", "checkpoint_bytes", MIB, "MiB")],
        form="{:,.4g}",
    )


def _by_context(axes, runs, field: str, scale: float) -> None:
    names = labels(runs)
    look, title = looks(names), titles(runs)
    for name in _by_latency(runs):
        own = pd.DataFrame([row for rows in runs[runs["label"] == name]["series_inference"] for row in rows])
        if not own.empty:
            line = own.groupby("context")[field].median() / scale
            axes.plot(line.index, line, **look[name], linewidth=1.4, label=title[name])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    contexts = sorted({row["context"] for rows in runs["series_inference"] for row in rows})
    axes.set_xticks(contexts)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context, tokens")


def _by_latency(runs) -> list[str]:
    return few(labels(runs), runs.groupby("label")["decode_latency_s_per_token"].mean())


def inference_latency(runs):
    """Prefill, decode and cache of one sequence, by context length."""
    use_style()
    shown = compare.comparable(runs)
    if not shown["series_inference"].map(bool).any():
        return "Inference: not measured: not asked for by the runs' parameters."
    figure, (prefill, decode, cache) = plt.subplots(1, 3, figsize=(12, 3.8))
    panels = (
        (prefill, "Prefill latency", "prefill_latency_s", 1e-3, "ms"),
        (decode, "Decode latency", "decode_latency_s_per_token", 1e-3, "ms per token"),
        (cache, "Cache", "cache_bytes", MIB, "MiB"),
    )
    for axes, title, field, scale, unit in panels:
        _by_context(axes, shown, field, scale)
        axes.set_title(title, loc="left")
        axes.set_ylabel(unit)
    cache.legend(**BESIDE)
    figure.tight_layout()
    at = f"at {runs['parameter_values'].iloc[0]['context']:,} tokens"
    metrics = {f"{title} {at}" if field != "cache_bytes" else title: field for _, title, field, *_ in panels}
    note(figure, runs, metrics, folded_away(labels(shown), _by_latency(shown), "decode latency"))
    return figure


def power_over_time(runs):
    """The power trace of every run over its window, a row per variant; dashed: the mean by the energy counter."""
    use_style()
    title = titles(runs)
    traces_of = {name: _power_traces(runs[runs["label"] == name]) for name in labels(runs)}
    traced = [name for name, traces in traces_of.items() if traces]
    names = few(traced, runs.groupby("label")["mean_power_w"].mean())
    missing = {title[name]: _why_no_trace(runs[runs["label"] == name]) for name in traces_of if name not in traced}
    if not names:
        return f"GPU power over time: {_why_no_trace(runs)}."
    certified = runs.groupby("label")["certified"].all()
    height = 1.2 + 0.8 * len(names)
    figure, all_axes = plt.subplots(len(names), 1, figsize=(8, height), sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(all_axes[:, 0], names, strict=True):
        own = runs[runs["label"] == name]
        for times, watts in _in_few_lines(traces_of[name]):
            axes.plot(times, watts, color=BLUE, linewidth=1)
        if own["mean_power_w"].notna().any():
            axes.axhline(own["mean_power_w"].mean(), color=INK, linewidth=1, linestyle="--")
        lines = [title[name], *([] if certified[name] else ["(not certified)"]), f"(n = {len(traces_of[name])})"]
        axes.set_ylabel("\n".join(lines), rotation=0, ha="right", va="center", labelpad=12)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds of the measured window")
    all_axes[0, 0].set_title("GPU power, W (dashed: mean by the energy counter)", loc="left")
    figure.tight_layout()
    away = folded_away(traced, names, "mean power")
    note(figure, runs, {"mean GPU power": "mean_power_w"}, [*absent(missing), *away])
    return figure


def _why_no_trace(own: pd.DataFrame) -> str:
    return why(own, "energy_j") if own["energy_j"].isna().any() else "not measured: no power trace in the record"


def _in_few_lines(traces: list[tuple[list, list]]) -> list[tuple[list, list]]:
    """Thousands of lines take seconds: more than can be told apart are drawn as one that is broken between them."""
    if len(traces) <= 100:
        return traces
    times, watts = ([value for values in axis for value in [*values, math.nan]] for axis in zip(*traces, strict=True))
    return [(times, watts)]


def _power_traces(runs: pd.DataFrame) -> list[tuple[list, list]]:
    """(seconds, watts) of each run that has a trace; a record from before there were any has no such column."""
    both = (runs.get(f"series_power_{name}", pd.Series([None] * len(runs))) for name in ("time_s", "w"))
    return [
        (list(times), list(watts))
        for times, watts in zip(*both, strict=True)
        if isinstance(times, Sequence) and len(times)
    ]


PUBLISHED_BESIDE_OURS = {
    "training_time_s_per_epoch": ("Training time", "time_per_epoch_s"),
    "gpu_energy_mj": ("GPU energy", "energy_j"),
    "gpu_memory_gb": ("GPU memory", "peak_memory_bytes"),
    "flops_e12": ("FLOPs", "forward_flops_counted"),
    "gpu_power_w": ("GPU power", "mean_power_w"),
    "model_size_mb": ("Model size", "checkpoint_bytes"),
}


def published_beside_ours(runs):
    """The paper's numbers and ours, each as a ratio to its own `sdpa`: the machines differ, ratios may be read.

    Of the variants that are the paper's; a sentence where none but sdpa is, or nothing published is at hand.
    """
    if not PUBLISHED.is_file():
        return f"The published numbers are in records/{PUBLISHED.name} of the project's clone, which is not here."
    published, called = pd.read_csv(PUBLISHED).set_index("variant"), titles(runs)
    ours = set(runs.loc[runs["attention"] == runs["label"], "label"])  # under its own name, so with its own options
    published = published[[name in ours for name in published.index]]
    if attention.REFERENCE not in ours or len(published) < 2:
        return "None of these variants but SDPA is of the published study, so none of its numbers stands beside them."
    use_style()
    figure, all_axes = plt.subplots(2, 3, figsize=(12, 7.4), sharey=True)
    measured = {}
    for axes, (column, (title, metric)) in zip(all_axes.flat, PUBLISHED_BESIDE_OURS.items(), strict=True):
        theirs = published[column] / published.loc["sdpa", column]
        axes.plot(theirs, range(len(theirs)), "o", markerfacecolor="none", color=INK, label="published (RTX 4090)")
        ours = compare.ratios(runs, metric).set_index("label").reindex(theirs.index)
        ratio = ours["ratio"].astype(float)
        measured |= {title: metric} if ratio.notna().any() else {}
        ends = [ratio - ours["low"].fillna(ratio), ours["high"].fillna(ratio) - ratio]
        axes.errorbar(ratio, range(len(ratio)), xerr=ends, fmt="D", color=BLUE, capsize=2, label="ours")
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_yticks(range(len(theirs)), [called[name] for name in theirs.index])
        axes.set_ylim(len(theirs) - 0.5, -0.5)
        axes.set_title(title + ("" if ratio.notna().any() else " (ours: not measured here)"), loc="left")
        axes.set_xlabel(f"ratio to {called[attention.REFERENCE]}'s")
    all_axes[0, 0].legend(frameon=True, fontsize=9, loc="lower right")
    figure.tight_layout()
    note(figure, runs, measured)
    return figure


FIGURES = (
    training_time, gpu_energy, peak_memory, loss_curves, loss_by_recall, flops, gpu_power, gpu_utilization,
    inference_latency, cpu_use, model_size, loss_against_cost, cost_to_target, power_over_time, published_beside_ours,
)  # fmt: skip
