"""The figures and tables of the study, drawn from records alone: one function each, one style, one colour per variant.

Every function takes the runs of one group (`lib.compare.groups`) and returns a matplotlib figure. A variant whose
metric was not measured keeps its row, with the reason; one that fails its certificate stands below the line, hatched.
"""

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lib import attention
from lib.analysis import compare
from lib.analysis.style import BESIDE, GIB, MIB, colours, labels, markers, titles, use_style
from lib.analysis.tables import interval
from lib.paths import ROOT
from lib.record import REASONS

MOST_DRAWN = 10_000  # points of a curve: of a longer one every so many-th
PUBLISHED = ROOT / "records" / "published_figures.csv"


def _bars(axes, runs: pd.DataFrame, metric: str, scale: float, unit: str, form: str = "{:,.3g}") -> None:
    """One horizontal bar per variant: the mean, every run as a point, and a 95 % interval from five blocks up."""
    names = labels(runs)
    colour, certified = colours(names), runs.groupby("label")["certified"].all()
    for row, name in enumerate(names):
        own = runs[runs["label"] == name]
        values = own[metric].dropna().astype(float) / scale
        if values.empty:
            reason = own["null_reasons"].iloc[0].get(metric, "")
            text = f"not measured: {REASONS.get(reason, reason)}"
            axes.text(0.01, row, text, va="center", fontsize=9, color="0.35", transform=axes.get_yaxis_transform())
            continue
        hatch = None if certified[name] else "//"
        axes.barh(row, values.mean(), color=colour[name], alpha=0.85, hatch=hatch, height=0.7)
        n = len(values)
        note = f" {form.format(values.mean())}"
        if n >= compare.FEWEST_BLOCKS:
            half = values.sem() * compare.stats.t.ppf(0.975, n - 1)
            axes.errorbar(values.mean(), row, xerr=half, color="0.2", capsize=3)
            note += f" ± {form.format(half)}"
        elif n > 1:
            axes.plot(values, [row] * n, ".", color="0.2", markersize=5)
        end = values.max() if n < compare.FEWEST_BLOCKS else values.mean() + half
        axes.text(end, row, f"{note} (n = {n})", va="center", fontsize=9, color="0.2")
    _name_rows(axes, runs, names, certified)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.35 if runs[metric].notna().any() else 1)
    axes.set_xlabel(unit)
    axes.grid(axis="y", visible=False)
    if runs[metric].isna().all():
        axes.set_xticks([])
    first_uncertified = int(certified.sum())
    if 0 < first_uncertified < len(names):
        axes.axhline(first_uncertified - 0.5, color="0.3", linewidth=1, linestyle=":")


def _name_rows(axes, runs: pd.DataFrame, names: list[str], certified: pd.Series) -> None:
    title = titles(runs)
    called = [title[name] if certified[name] else f"{title[name]}\n(not certified)" for name in names]
    axes.set_yticks(range(len(names)), called)


def _bar_figure(runs: pd.DataFrame, panels: list[tuple[str, str, float, str]], form: str = "{:,.3g}") -> Figure:
    """Panels side by side, each (title, metric, scale, unit)."""
    use_style()
    height = 1.1 + 0.42 * runs["label"].nunique()
    figure, all_axes = plt.subplots(1, len(panels), figsize=(max(6.5, 5.4 * len(panels)), height), squeeze=False)
    for axes, (title, metric, scale, unit) in zip(all_axes[0], panels, strict=True):
        _bars(axes, runs, metric, scale, unit, form)
        axes.set_title(title, loc="left")
    _note(figure, runs)
    figure.tight_layout()
    return figure


def _note(figure: Figure, runs: pd.DataFrame) -> None:
    """The A/A control's difference from itself: what is smaller than this means nothing."""
    table = compare.ratios(runs, "time_s").set_index("label")
    if attention.CONTROL in table.index and not pd.isna(table.loc[attention.CONTROL, "ratio"]):
        difference = table.loc[attention.CONTROL, "ratio"] - 1
        text = (
            f"{titles(runs)[attention.CONTROL]} is the same code run a second time; "
            f"its training time differs by {difference:+.1%}."
        )
        figure.text(0.01, -0.01, text, fontsize=9, color="0.35", va="top")


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
            ("FLOPs, useful", "forward_flops_causal", 1e9, "GFLOPs, forward, one sequence"),
            ("every score computed", "forward_flops_full", 1e9, "GFLOPs"),
            ("as torch counts them", "forward_flops_counted", 1e9, "GFLOPs"),
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


def loss_curves(runs):
    """Training loss (mean over runs, faint) and validation loss (points), against non-padding tokens."""
    use_style()
    figure, axes = plt.subplots(figsize=(7, 4.2))
    names = labels(runs)
    colour, marker, title = colours(names), markers(names), titles(runs)
    for name in names:
        own = runs[runs["label"] == name]
        step = 1 + max(map(len, own["series_train_loss"])) // MOST_DRAWN
        training = pd.DataFrame([losses[::step] for losses in own["series_train_loss"]], dtype=float).mean()
        tokens = max(own["series_non_padding_tokens"], key=len)[::step]
        axes.plot(tokens, training, color=colour[name], linewidth=0.9, alpha=0.5)
        losses = [[p["loss"] for p in validation] for validation in own["series_validation"]]
        points = pd.DataFrame(losses, dtype=float).mean()
        tokens = [p["non_padding_tokens"] for p in max(own["series_validation"], key=len)]
        certified = "" if own["certified"].all() else ", not certified"
        style = {"color": colour[name], "marker": marker[name], "markersize": 5, "linewidth": 1.6}
        axes.plot(tokens, points, label=f"{title[name]} (n = {len(own)}{certified})", **style)
    axes.set_title("Loss: training (faint) and validation (marked)", loc="left")
    axes.set_xlabel("non-padding tokens seen")
    axes.set_ylabel("nats per token")
    axes.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep=""))
    axes.legend(**BESIDE)
    _note(figure, runs)
    return figure


def _by_context(axes, runs, field: str, scale: float) -> None:
    names = labels(runs)
    colour, marker, title = colours(names), markers(names), titles(runs)
    for name in names:
        own = pd.DataFrame([row for rows in runs[runs["label"] == name]["series_inference"] for row in rows])
        if not own.empty:
            line = own.groupby("context")[field].median() / scale
            axes.plot(line.index, line, color=colour[name], marker=marker[name], linewidth=1.4, label=title[name])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    contexts = sorted({row["context"] for rows in runs["series_inference"] for row in rows})
    axes.set_xticks(contexts)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context, tokens")


def inference_latency(runs):
    """Prefill, decode and cache of one sequence, by context length."""
    use_style()
    figure, (prefill, decode, cache) = plt.subplots(1, 3, figsize=(12, 3.8))
    panels = (
        (prefill, "Prefill latency", "prefill_latency_s", 1e-3, "ms"),
        (decode, "Decode latency", "decode_latency_s_per_token", 1e-3, "ms per token"),
        (cache, "Cache", "cache_bytes", MIB, "MiB"),
    )
    for axes, title, field, scale, unit in panels:
        _by_context(axes, runs, field, scale)
        axes.set_title(title, loc="left")
        axes.set_ylabel(unit)
    cache.legend(**BESIDE)
    figure.tight_layout()
    _note(figure, runs)
    return figure


def loss_against_cost(runs):
    """Validation loss at the end against what it cost: energy where it was measured, else time; and the Pareto front.

    The front is drawn through the means of the certified variants; the A/A control is not a competitor.
    """
    use_style()
    on_energy = runs["energy_j"].notna().any()
    metric, scale, unit = ("energy_j", 1e3, "GPU energy, kJ") if on_energy else ("time_s", 1, "training time, s")
    figure, axes = plt.subplots(figsize=(7, 4.2))
    names = labels(runs)
    colour, marker, title = colours(names), markers(names), titles(runs)
    for name in names:
        own = runs[runs["label"] == name].dropna(subset=[metric])
        hollow = {} if own["certified"].all() else {"facecolors": "none"}
        style = {
            "color": colour[name],
            "marker": marker[name],
            "s": 60,
            "label": f"{title[name]} (n = {len(own)})",
        } | hollow
        axes.scatter(own[metric] / scale, own["validation_loss"], **style)
    low, high = axes.get_ylim()
    room = max(0.0, 0.1 - (high - low)) / 2  # differences of a thousandth are not drawn as if they were large
    axes.set_ylim(low - room, high + room)
    _front(axes, runs, metric, scale)
    axes.set_title("Validation loss against cost: lower left is better", loc="left")
    axes.set_xlabel(unit if on_energy else f"{unit} (energy not measured)")
    axes.set_ylabel("nats per token")
    axes.legend(**BESIDE)
    _note(figure, runs)
    return figure


def _front(axes, runs, metric: str, scale: float) -> None:
    """The border of what some variant beats in both cost and loss, to the edges of the plot."""
    competing = runs[runs["certified"] & (runs["label"] != attention.CONTROL)]
    means = competing.groupby("label")[[metric, "validation_loss"]].mean().sort_values(metric)
    means = means[compare.pareto_front(means[metric], means["validation_loss"])]
    if means.empty:
        return
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    costs, losses = means[metric] / scale, means["validation_loss"]
    x, y = [costs.iloc[0], *costs, right], [top, *losses, losses.iloc[-1]]
    axes.step(x, y, where="post", color="0.4", linewidth=1, linestyle="--", zorder=0, label="Pareto front (of means)")
    axes.set_xlim(right=right)
    axes.set_ylim(top=top)


def cost_to_target(runs):
    """Energy and time to the validation loss at which `sdpa` ends in the same block, from `compare.to_target`.

    Behind each number is its ratio to `sdpa`'s. A censored bar is pale and ends in an arrow: it costs more (not
    reached, ">", and the most by which a block fell short) or less ("<") than is drawn.
    """
    use_style()
    target = compare.to_target(runs)
    figure, all_axes = plt.subplots(1, 2, figsize=(13.5, 1.1 + 0.42 * runs["label"].nunique()))
    panels = (("Energy to sdpa's loss", "energy_j", 1e3, "kJ"), ("Time to sdpa's loss", "time_s", 1, "s"))
    for axes, (title, cost, scale, unit) in zip(all_axes, panels, strict=True):
        _target_bars(axes, runs, target, cost, scale)
        axes.set_title(title, loc="left")
        axes.set_xlabel(f"{unit} (×: ratio to sdpa's)")
    _note(figure, runs)
    figure.tight_layout()
    return figure


def _target_bars(axes, runs, target: pd.DataFrame, cost: str, scale: float) -> None:
    names = labels(runs)
    colour, certified = colours(names), runs.groupby("label")["certified"].all()
    summary = compare.target_summary(target).set_index("label").reindex(names)
    longest = summary[cost].max() / scale
    for row, (name, found) in enumerate(summary.iterrows()):
        if pd.isna(found[cost]):
            reason = "no run of sdpa to compare with" if pd.isna(found["reason"]) else found["reason"]
            text = f"not measured: {reason}" if reason in REASONS.values() else reason
            axes.text(0.01, row, text, va="center", fontsize=9, color="0.35", transform=axes.get_yaxis_transform())
            continue
        value, sign = found[cost] / scale, found["censored"]
        axes.barh(row, value, color=colour[name], alpha=0.85 if pd.isna(sign) else 0.35, height=0.7)
        note, end = f" {value:,.3g}", value
        if not pd.isna(sign):
            end = value + (0.06 if sign == ">" else -0.06) * longest
            axes.annotate("", (end, row), (value, row), arrowprops={"arrowstyle": "->", "color": "0.2"})
            short = target.loc[target["label"] == name, "gap_nats"].max()
            missing = f", {short:.2g} nats above the target" if sign == ">" else ""
            note = f" {sign} {value:,.3g} (reached in {found['reached']:.0f} of {found['n']:.0f}{missing})"
        else:
            note += f" (× {interval(found, cost)}, n = {found['n']:.0f})"
        axes.text(max(end, value), row, note, va="center", fontsize=9, color="0.2")
    _name_rows(axes, runs, names, certified)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1 if pd.isna(longest) else 2.6 * longest)
    if pd.isna(longest):
        axes.set_xticks([])


def power_over_time(runs):
    """The power trace of every run over its window, a row per variant; dashed: the mean by the energy counter."""
    use_style()
    names = labels(runs)
    colour, certified = colours(names), runs.groupby("label")["certified"].all()
    title = titles(runs)
    traces_of = {name: _power_traces(runs[runs["label"] == name]) for name in names}
    height = 1.2 + (0.8 if any(traces_of.values()) else 0.42) * len(names)
    figure, all_axes = plt.subplots(len(names), 1, figsize=(8, height), sharex=True, sharey=True, squeeze=False)
    for axes, (name, traces) in zip(all_axes[:, 0], traces_of.items(), strict=True):
        own = runs[runs["label"] == name]
        for times, watts in traces:
            axes.plot(times, watts, color=colour[name], linewidth=1, alpha=0.85)
        if not traces:
            reason = REASONS.get(own["null_reasons"].iloc[0].get("energy_j"), "no power trace in the record")
            text = f"not measured: {reason}"
            axes.text(0.01, 0.5, text, va="center", fontsize=9, color="0.35", transform=axes.transAxes)
        elif own["mean_power_w"].notna().any():
            axes.axhline(own["mean_power_w"].mean(), color="0.2", linewidth=1, linestyle="--")
        lines = [
            title[name],
            *([] if certified[name] else ["(not certified)"]),
            *([f"(n = {len(traces)})"] if traces else []),
        ]
        axes.set_ylabel("\n".join(lines), rotation=0, ha="right", va="center", labelpad=12)
    if not any(traces_of.values()):
        axes.set_xticks([])
        axes.set_yticks([])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds of the measured window")
    all_axes[0, 0].set_title("GPU power, W (dashed: mean by the energy counter)", loc="left")
    figure.tight_layout()
    _note(figure, runs)
    return figure


def _power_traces(runs: pd.DataFrame) -> list[tuple[list, list]]:
    """(seconds, watts) of each run that has a trace; a record from before there were any has no such column."""
    both = (runs.get(f"series_power_{name}", pd.Series([None] * len(runs))) for name in ("time_s", "w"))
    return [(times, watts) for times, watts in zip(*both, strict=True) if isinstance(times, list) and times]


PUBLISHED_BESIDE_OURS = {
    "training_time_s_per_epoch": ("Training time", "time_per_epoch_s"),
    "gpu_energy_mj": ("GPU energy", "energy_j"),
    "gpu_memory_gb": ("GPU memory", "peak_memory_bytes"),
    "flops_e12": ("FLOPs", "forward_flops_counted"),
    "gpu_power_w": ("GPU power", "mean_power_w"),
    "model_size_mb": ("Model size", "checkpoint_bytes"),
}


def published_beside_ours(runs):
    """The paper's numbers and ours, each as a ratio to its own `sdpa`: the machines differ, ratios may be read."""
    use_style()
    published, called = pd.read_csv(PUBLISHED).set_index("variant"), titles(runs)
    figure, all_axes = plt.subplots(2, 3, figsize=(12, 7.4), sharey=True)
    for axes, (column, (title, metric)) in zip(all_axes.flat, PUBLISHED_BESIDE_OURS.items(), strict=True):
        theirs = published[column] / published.loc["sdpa", column]
        axes.plot(theirs, range(len(theirs)), "o", markerfacecolor="none", color="0.35", label="published (RTX 4090)")
        ours = compare.ratios(runs, metric).set_index("label")["ratio"].reindex(theirs.index).astype(float)
        axes.plot(ours, range(len(ours)), "D", color="C0", label="ours")
        axes.axvline(1, color="0.6", linewidth=1)
        axes.set_yticks(range(len(theirs)), [called.get(name, name) for name in theirs.index])
        axes.set_ylim(len(theirs) - 0.5, -0.5)
        axes.set_title(title + ("" if ours.notna().any() else " (ours: not measured here)"), loc="left")
        axes.set_xlabel("ratio to sdpa")
    all_axes[0, 0].legend(frameon=True, fontsize=9, loc="lower right")
    figure.tight_layout()
    _note(figure, runs)
    return figure


FIGURES = (
    training_time, gpu_energy, peak_memory, loss_curves, flops, gpu_power, gpu_utilization, inference_latency, cpu_use,
    model_size, loss_against_cost, cost_to_target, power_over_time, published_beside_ours,
)  # fmt: skip
