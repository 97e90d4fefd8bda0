"""The figures of what is learned: losses beside the n-gram tables, what can be recalled, and losses beside costs.

As in `lib.analysis.figures`, each is drawn from the runs of one group, or is the sentence that stands for it.
"""

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd

from lib import attention
from lib.analysis import compare, ngrams, target
from lib.analysis.notes import SMALL, about_noise, absent, beneath, note, why
from lib.analysis.style import (
    BESIDE,
    BLUE,
    INK,
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
from lib.record import REASONS
from lib.record.series import every

FAINT = {"linewidth": 0.9, "alpha": 0.5}


def loss_curves(runs):
    """Training loss (mean over runs, faint) and validation loss (points), against non-padding tokens; the n-gram tables
    of the same training tokens as lines."""
    use_style()
    figure, axes = plt.subplots(figsize=(7, 4.2))
    every_name, shown = labels(runs), compare.comparable(runs)
    names = _by_loss(runs)
    look, title = looks(every_name), titles(runs)
    for name in names:
        own = shown[shown["label"] == name]
        step = every(max(map(len, own["series_train_loss"])))
        training = _mean([losses[::step] for losses in own["series_train_loss"]])
        axes.plot(_longest(own["series_non_padding_tokens"])[::step], training, **FAINT, color=look[name]["color"])
        points, tokens = _validation(own, "loss")
        certified = "" if own["certified"].all() else ", not certified"
        style = look[name] | {"markersize": 5, "linewidth": 1.6}
        axes.plot(tokens, points, label=f"{title[name]} (n = {len(own)}{certified})", **style)
    draw_tables(axes, shown)
    axes.set_title("Loss: training (faint) and validation (marked)", loc="left")
    axes.set_xlabel("non-padding tokens seen")
    axes.set_ylabel("nats per token")
    axes.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep=""))
    axes.legend(**BESIDE)
    ends = shown.groupby("label")["validation_loss"].mean()
    tell(figure, f"Validation loss at the end, nats: {_said(ends, names, title)}.")
    validations = min(len(points) - 1 for points in shown["series_validation"])
    too_few = () if validations > 1 else ("One validation after training began is no curve: raise epochs.",)
    away = folded_away(every_name, names, LOSS)
    note(figure, runs, {"validation loss": "validation_loss"}, [ngrams.sentence(shown), *too_few, *away])
    return figure


LOSS = "validation loss"


def _by_loss(runs) -> list[str]:
    return few(labels(runs), runs.groupby("label")["validation_loss"].mean())


def _said(values: pd.Series, names: list[str], title: dict, form: str = "{:.3f}") -> str:
    return ", ".join(f"{title[name]} {form.format(values[name])}" for name in names if not pd.isna(values.get(name)))


def _longest(series) -> list:
    """Records of one setting may be from other versions or hands, and end sooner."""
    return max(series, key=len)


def _mean(series: list[list]) -> pd.Series:
    """The mean at each place, over those that reach it."""
    return pd.DataFrame(series, dtype=float).mean()


def _validation(own: pd.DataFrame, kind: str) -> tuple[pd.Series, list[int]]:
    """Mean validation losses of some runs, and the tokens at which they were taken."""
    step = every(max(map(len, own["series_validation"])))
    points = [found[::step] for found in own["series_validation"]]
    losses = _mean([[point[kind] for point in found] for found in points])
    return losses, [point["non_padding_tokens"] for point in _longest(points)]


def draw_tables(axes, runs: pd.DataFrame, kind: str = "loss") -> None:
    """The losses of the n-gram tables as lines, where they are known."""
    for name, loss in ngrams.tables(runs, kind).items():
        label = f"{name} table, {loss:.2f}"
        axes.axhline(loss, color=INK, linewidth=1.1, linestyle=DASHES[name], label=label, zorder=1)


DASHES = {"bigram": "--", "unigram": ":"}
SPLIT = {
    "repeated_bigram_loss": "Tokens that end a bigram seen earlier in the sequence",
    "other_loss": "All other tokens",
}


def loss_by_recall(runs):
    """Validation loss of the tokens that a model can recall from its context, and of the rest, by tokens seen."""
    use_style()
    shown = compare.comparable(runs)
    known = shown["series_validation"].map(
        lambda points: all(point[kind] is not None for point in points for kind in SPLIT)
    )
    if not known.any():
        return (
            "Loss of repeated bigrams and of the rest: not measured; these records are older than that split, "
            "or their sequences repeat no bigram."
        )
    shown, every_name, names = shown[known], labels(shown[known]), _by_loss(shown[known])
    figure, all_axes = plt.subplots(1, 2, figsize=(11, 4.2))
    look, title = looks(every_name), titles(runs)
    for axes, (kind, heading) in zip(all_axes, SPLIT.items(), strict=True):
        for name in names:
            own = shown[shown["label"] == name]
            losses, tokens = _validation(own, kind)
            style = look[name] | {"markersize": 4, "linewidth": 1.4}
            axes.plot(tokens, losses, label=f"{title[name]} (n = {len(own)})", **style)
        draw_tables(axes, shown, kind)
        axes.set_title(heading, loc="left")
        axes.set_xlabel("non-padding tokens seen")
        axes.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep=""))
        axes.legend(fontsize=8, frameon=False, loc="upper right")
    all_axes[0].set_ylabel("validation loss, nats per token")
    figure.tight_layout()
    also = [ngrams.sentence(shown), *folded_away(every_name, names, LOSS)]
    note(figure, runs, {"validation loss": "validation_loss"}, also)
    return figure


def loss_against_cost(runs):
    """Validation loss at the end against what it cost: energy where it was measured, else time.

    From five whole blocks up both as paired with sdpa, with 95 % intervals, and the Pareto front of the certified
    variants whose loss is below the bigram table's; the A/A control is no competitor. Below, a point per run.
    """
    use_style()
    on_energy = runs["energy_j"].notna().any()
    metric, scale, unit = ("energy_j", 1e3, "GPU energy, kJ") if on_energy else ("time_s", 1, "training time, s")
    figure, axes = plt.subplots(figsize=(7, 4.2))
    cost, loss = compare.ratios(runs, metric).set_index("label"), compare.differences(runs).set_index("label")
    plain = unit
    if len(cost) and (cost["low"].notna() & loss["low"].notna()).any():
        _paired_points(axes, runs, cost, loss)
        unit = f"{unit.split(',')[0]}, ratio to SDPA's"
    else:
        _points(axes, runs, metric, scale)
    axes.set_xlabel(unit if on_energy else f"{unit} (energy not measured)")
    axes.legend(**BESIDE)
    means, names = runs.groupby("label")[[metric, "validation_loss"]].mean(), labels(runs)
    tell(
        figure,
        f"Validation loss at the end, nats: {_said(means['validation_loss'], names, titles(runs))}; "
        f"{plain}: {_said(means[metric] / scale, names, titles(runs), '{:.3g}')}.",
    )
    also = [ngrams.sentence(runs), *folded_away(names, _by_loss(runs), LOSS)]
    note(figure, runs, {unit.split(",")[0]: metric, "validation loss": "validation_loss"}, also)
    return figure


def _points(axes, runs, metric: str, scale: float) -> None:
    """A point per run: which is better is not said."""
    names = labels(runs)
    look, title = looks(names), titles(runs)
    counted = compare.comparable(runs)
    for name in _by_loss(runs):
        own = counted[counted["label"] == name].dropna(subset=[metric])
        hollow = {} if own["certified"].all() else {"facecolors": "none"}
        shown = {
            "color": look[name]["color"],
            "marker": look[name]["marker"],
            "s": 60,
            "label": f"{title[name]} (n = {len(own)})",
        }
        axes.scatter(own[metric] / scale, own["validation_loss"], **shown | hollow)
    draw_tables(axes, runs)
    low, high = axes.get_ylim()
    room = max(0.0, 0.1 - (high - low)) / 2  # differences of a thousandth are not drawn as if they were large
    axes.set_ylim(low - room, high + room)
    axes.set_title("Validation loss against cost", loc="left")
    axes.set_ylabel("nats per token")


def _paired_points(axes, runs, cost: pd.DataFrame, loss: pd.DataFrame) -> None:
    """What a variant costs and loses beside sdpa, each with its interval; the front through what none of them beats."""
    names = [name for name in labels(runs) if not pd.isna(cost.loc[name, "ratio"])]
    look, title = looks(names), titles(runs)
    certified = runs.groupby("label")["certified"].all()
    drawn = set(_by_loss(runs))
    for name in (name for name in names if name in drawn):
        x, y, (of, by) = cost.loc[name, "ratio"], loss.loc[name, "difference"], (cost.loc[name], loss.loc[name])
        ends = {"xerr": [[x - of["low"]], [of["high"] - x]], "yerr": [[y - by["low"]], [by["high"] - y]]}
        hollow = {} if certified[name] else {"markerfacecolor": "none"}
        shown = look[name] | {"markersize": 7, "capsize": 2, "linestyle": "none"}
        axes.errorbar(x, y, **ends, **shown | hollow, label=f"{title[name]} (n = {of['n']:.0f})")
    low, high = axes.get_ylim()
    room = max(0.0, 0.1 - (high - low)) / 2
    low, high = low - room, high + room
    axes.set_ylim(low, high)
    for table, lost in ngrams.tables(runs).items():
        lost -= loss.loc[attention.REFERENCE, "level"]
        seen = "" if low < lost < high else ", outside this picture"
        axes.axhline(lost, color=INK, linewidth=1.1, linestyle=DASHES[table], label=f"{table} table, {lost:+.2f}{seen}")
    axes.set_ylim(low, high)
    above = ngrams.above_bigram(runs)
    competing = [n for n in names if certified[n] and n != attention.CONTROL and not above[n] > 0]
    _front(axes, cost.loc[competing, "ratio"], loss.loc[competing, "difference"])
    better = ": lower left is better" if len(competing) > 1 else ""
    axes.set_title(f"Validation loss against cost, beside SDPA{better}", loc="left")
    axes.set_ylabel("nats above SDPA's")


def _front(axes, costs: pd.Series, losses: pd.Series) -> None:
    """The border of what some variant beats in both cost and loss, to the edges of the plot."""
    on_it = compare.pareto_front(costs, losses)
    points = pd.DataFrame({"cost": costs[on_it], "loss": losses[on_it]}).sort_values("cost")
    if len(costs) < 2:
        return
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    x, y = [points["cost"].iloc[0], *points["cost"], right], [top, *points["loss"], points["loss"].iloc[-1]]
    label = "Pareto front (of paired means)"
    axes.step(x, y, where="post", color=INK, linewidth=1, linestyle="--", zorder=0, label=label)
    axes.set_xlim(right=right)
    axes.set_ylim(top=top)


TARGET_PANELS = (("Energy to the target", "energy_j", 1e3, "kJ"), ("Time to the target", "time_s", 1, "s"))


def cost_to_target(runs):
    """Energy and time until the validation loss first falls to a target that sdpa passes, from `lib.analysis.target`.

    Behind each number is its ratio to sdpa's. A censored bar is pale and ends in an arrow: it costs more (not reached,
    ">", and the most by which a block fell short) or less ("<") than is drawn.
    """
    use_style()
    found = target.to_target(runs)
    summary = target.summary(runs, found).set_index("label")
    reasons = {title: _why_no_target(runs, summary, cost) for title, cost, *_ in TARGET_PANELS}
    missing = absent({title: reasons[title] for title, cost, *_ in TARGET_PANELS if summary[cost].isna().all()})
    drawn = [panel for panel in TARGET_PANELS if summary[panel[1]].notna().any()]
    if not drawn:
        return " ".join(missing)
    height = 1.1 + 0.42 * min(runs["label"].nunique(), MOST_VARIANTS)
    figure, all_axes = plt.subplots(1, len(drawn), figsize=(7 * len(drawn), height), squeeze=False)
    for axes, (title, cost, scale, unit) in zip(all_axes[0], drawn, strict=True):
        _target_bars(axes, runs, found, summary, cost, scale)
        axes.set_title(title, loc="left")
        axes.set_xlabel(f"{unit} (×: ratio to SDPA's)")
    figure.tight_layout()
    told = [
        f"{title}, {unit}: {_said(summary[cost] / scale, labels(runs), titles(runs), '{:.3g}')}."
        for title, cost, scale, unit in drawn
    ]
    tell(figure, " ".join(told))
    lines = about_noise(runs, {title: (target.noise(runs, cost, found), cost) for title, cost, *_ in drawn})
    every_name = labels(runs)
    away = folded_away(every_name, every_name[:MOST_VARIANTS], "what a panel shows")
    lines += [target.rule(runs), ngrams.sentence(runs), *missing, *away]
    beneath(figure, lines)
    return figure


def _why_no_target(runs: pd.DataFrame, summary: pd.DataFrame, cost: str) -> str:
    if summary.empty:
        return "no run of SDPA to compare with"
    reasons = [str(reason) for reason in dict.fromkeys(summary["reason"].dropna())]
    if cost == "energy_j" and runs[cost].isna().all() and summary["time_s"].notna().any():
        return why(runs, cost)
    return "; ".join(reasons)


def _target_bars(axes, runs, target: pd.DataFrame, summary: pd.DataFrame, cost: str, scale: float) -> None:
    names = few(labels(runs), summary[cost])
    certified = runs.groupby("label")["certified"].all()
    summary = summary.reindex(names)
    longest = summary[cost].max() / scale
    for row, (name, found) in enumerate(summary.iterrows()):
        if pd.isna(found[cost]):
            reason = "no run of SDPA to compare with" if pd.isna(found["reason"]) else found["reason"]
            text = f"not measured: {reason}" if reason in REASONS.values() else reason
            axes.text(0.01, row, text, va="center", transform=axes.get_yaxis_transform(), **SMALL)
            continue
        value, sign = found[cost] / scale, found["censored"]
        colour = INK if name == attention.REFERENCE else BLUE
        axes.barh(row, value, color=colour, alpha=1 if pd.isna(sign) else 0.35, height=0.7)
        note, end = f" {value:,.3g}", value
        if not pd.isna(sign):
            end = value + (0.06 if sign == ">" else -0.06) * longest
            axes.annotate("", (end, row), (value, row), arrowprops={"arrowstyle": "->", "color": INK})
            short = target.loc[target["label"] == name, "gap_nats"].max()
            missing = f", {short:.2g} nats above the target" if sign == ">" else ""
            note = f" {sign} {value:,.3g} (reached in {found['reached']:.0f} of {found['n']:.0f}{missing})"
        else:
            note += f" (× {interval(found, cost)}, n = {found['n']:.0f})"
        axes.text(max(end, value), row, note, va="center", fontsize=9)
    name_rows(axes, runs, names, certified)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 2.6 * longest)
