"""The picture of the README's answer: a row per variant; recall, time, joules, memory, cache."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_hex

from lib.analysis import style
from lib.analysis.evidence import CACHE_CONTEXT, ENERGY, LITTLE, PAIRS, TIME, Evidence, Pick
from lib.analysis.style import BLUE
from lib.analysis.words import cost, counted, factor, joined
from lib.record import REASONS

PALE, QUIET = style.QUIET_BLUE, style.INK
WORTH_A_WORD = 1.015  # a ratio further from 1 than this is written beside its point
RATIOS, COUNTS, RECALL, EMPTY = 1.8, 1.25, 0.9, 1.15  # widths of the columns
ABOVE, BELOW = 0.95, 0.5  # inches over and under the rows, for the columns' titles, the legend and the axes


def picture(evidence: Evidence):
    """A row per variant: recall, training time and joules over SDPA's with intervals, memory, cache."""
    style.use_style()
    e, labels = evidence, evidence.labels
    memory = e.memory_at(e.long)
    widths = [
        RECALL if e.recall else EMPTY, RATIOS, RATIOS if e.turns[ENERGY].notna().any() else EMPTY,
        COUNTS if memory else EMPTY, COUNTS,
    ]  # fmt: skip
    rows = (0.1 + 0.18 * len(e.lengths)) * len(labels)  # inches
    height = rows + ABOVE + BELOW
    figure, axes = plt.subplots(
        1, 5, figsize=(1.6 * sum(widths), height), sharey=True,
        gridspec_kw={
            "width_ratios": widths, "wspace": 0.12, "top": 1 - ABOVE / height, "bottom": BELOW / height,
        },
    )  # fmt: skip
    places = {label: len(labels) - 1 - index for index, label in enumerate(labels)}
    axes[0].set_yticks(list(places.values()), [e.title[label] for label in places])
    for axis in axes:
        axis.grid(visible=False)
        across = axis.get_yaxis_transform()  # lines between rows, so that none runs through a number
        axis.hlines([y + 0.5 for y in range(len(labels) - 1)], 0, 1, transform=across, color=QUIET, linewidth=0.3)
        axis.spines["left"].set_visible(False)
        axis.set_ylim(-0.7, len(labels) - 0.3)
    _recall_panel(axes[0], e, places)
    _ratio_panel(axes[1], e, places, TIME, "Training time ÷ SDPA's")
    _ratio_panel(axes[2], e, places, ENERGY, "Joules ÷ SDPA's")
    _bar_panel(axes[3], places, memory, style.GIB, f"Training memory,\n{e.long:,} tokens", "GiB")
    _bar_panel(axes[4], places, e.cache, style.MIB, f"KV cache,\n{CACHE_CONTEXT:,} tokens", "MiB")
    _around(figure, e)
    return style.tell(figure, " ".join(headline(e)))


def _around(figure, e: Evidence):
    """The title, which is the conclusion, and what the numbers are of."""
    size, setting = figure.get_size_inches(), e.found.setting
    trained = e.trained or "not tried"
    others = [one.title for label, one in e.recall.items() if label in e.title and one.title != e.title[label]]
    tried = f"; tried as {'; '.join(others)}" if others else ""
    figure.suptitle(
        "\n".join(headline(e)), x=0.0, y=1 + 0.05 / size[1], ha="left", va="bottom", fontweight="bold", fontsize=13
    )
    figure.text(
        0.0, -0.35 / size[1],
        f"Time, joules, memory: training steps of GPT-2 ({counted(setting.layers, 'layer')} of {setting.width}, "
        f"{setting.precision}) on {e.machine}, {e.rounds} in turns.\n"
        "95 % intervals where they are wider than the marks. Italic numbers: not told apart from SDPA, or too few "
        f"rounds with joules. A mark alone: within {WORTH_A_WORD - 1:.1%}. Blank: not run.\n"
        f"Cache: by each variant's definition, bf16. Recall: {PAIRS} pairs in 128 tokens, a point a seed, the tick "
        f"their median;\n{trained}{tried}.",
        fontsize=9, color=QUIET, va="top", parse_math=False,
    )  # fmt: skip


def headline(evidence: Evidence) -> list[str]:
    """A line for each length."""
    e, others = evidence, evidence.others
    lines = []
    for context in e.lengths:
        pick, kept = e.cheapest(context, TIME, others), e.cheapest(context, TIME, [x for x in others if e.recalls(x)])
        why = e.untold(context, TIME)
        if why is not None:
            lines.append(f"{context:,} tokens: not told; {why}.")
            continue
        if not pick.labels:
            lines.append(f"{context:,} tokens: keep SDPA; nothing trains in significantly less time.")
        elif set(pick.labels) & set(kept.labels):  # of those that share the place, who recalls
            lines.append(f"{context:,} tokens: {_less(e, kept, context)}.")
        elif not e.recall:
            lines.append(f"{context:,} tokens: {_less(e, pick, context)}.")
        else:
            first = _less(e, kept, context) if kept.labels else "keep SDPA"
            then = _less(e, pick, context, ", ")
            lines.append(f"{context:,} tokens: {first}; if recall is not needed {then}.")
    return lines


def _less(e: Evidence, pick: Pick, context: int, between: str = ", training time ") -> str:
    how = joined([cost(e.ratio(label, context, TIME)).split(" [")[0] for label in pick.labels])
    little = all(e.ratio(label, context, TIME).ratio > LITTLE for label in pick.labels)
    return f"{'SDPA or ' * little}{joined([e.title[label] for label in pick.labels])}{between}{how}"


def _nothing(axis, words: str):
    axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", va="center", color=QUIET, style="italic")
    axis.grid(visible=False)
    axis.set_xticks([])


def _recall_panel(axis, e: Evidence, places: dict):
    axis.set_title("Recall", loc="left")
    if not e.recall:
        _nothing(axis, "not known")
        return
    axis.set_xlim(-5, 105)
    axis.set_xlabel("% of facts")
    for label, y in places.items():
        own = e.points[e.points["label"] == label]["scaled"] * 100
        if label not in e.recall:
            axis.text(0, y, "not known", va="center", color=QUIET, style="italic", fontsize=9)
            continue
        axis.plot(own.clip(lower=0), [y] * len(own), "o", color=PALE, markersize=5, clip_on=False)
        axis.plot([max(0.0, e.recall[label].median) * 100], [y], "|", color=BLUE, markersize=15, markeredgewidth=3)


def _ratio_panel(axis, e: Evidence, places: dict, metric: str, title: str):
    axis.set_title(title, loc="left")
    if e.turns[metric].isna().all():
        reasons = sorted(set(e.turns["energy_null_reason"].dropna()))
        _nothing(axis, "\n".join(["not measured:", *(REASONS[reason] for reason in reasons)]))
        return
    axis.axvline(1, color=QUIET, linewidth=1)
    axis.set_xscale("log", base=2)
    for context, up, face in zip(e.lengths, *_marks(len(e.lengths)), strict=True):
        for label, y in places.items():
            row = e.ratio(label, context, metric)
            if row is None:
                why = e.failed.get(label, {}).get(context)
                if why:
                    why = why if len(why) < 40 else f"{why[:38]}…"
                    axis.annotate(
                        f"{context:,}: {why}".replace("$", r"\$"), (1.05, y + up), va="center", fontsize=8, color=QUIET
                    )
                continue
            _ratio(axis, row, y + up, face)
        axis.plot([], [], "o", color=BLUE, markerfacecolor=face, label=f"{context:,} tokens")
    low, high = axis.get_xlim()
    axis.set_xlim(min(low / 3, 0.6), max(high * 1.8, 1.7))
    axis.xaxis.set_major_formatter(plt.FuncFormatter(_factor))
    axis.xaxis.set_minor_locator(plt.NullLocator())
    axis.set_xlabel("less  ←  1  →  more")
    if metric == TIME:
        inch = 1 / (axis.get_position().height * axis.figure.get_size_inches()[1])
        axis.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1 + 0.45 * inch), ncols=len(e.lengths), frameon=False, fontsize=9,
            borderpad=0,
        )  # fmt: skip


def _marks(count: int) -> tuple[list[float], list[str]]:
    """How far above its row the mark of each length stands, and its face: the longer, the darker."""
    if count <= 2:
        return [0.18, -0.18][:count], [PALE, BLUE][:count]
    shades = LinearSegmentedColormap.from_list("length", ["white", PALE, BLUE])(np.linspace(0, 1, count))
    return list(np.linspace(0.3, -0.3, count)), [to_hex(shade) for shade in shades]


def _ratio(axis, row, y: float, face: str):
    if not np.isnan(row.low):
        axis.plot([row.low, row.high], [y, y], color=PALE, linewidth=5, solid_capstyle="butt", zorder=1)
    axis.plot([row.ratio], [y], "o", color=BLUE, markerfacecolor=face, markersize=7, zorder=2)
    color = BLUE if row.verdict == "significantly different" else QUIET
    if abs(np.log(row.ratio)) > np.log(WORTH_A_WORD):
        more = row.ratio > 1
        end = np.nanmax([row.ratio, row.high]) if more else np.nanmin([row.ratio, row.low])
        axis.annotate(
            factor(row), (end, y), xytext=(7 if more else -7, 0), fontsize=9, color=color,
            style="normal" if color == BLUE else "italic", textcoords="offset points",
            ha="left" if more else "right", va="center",
        )  # fmt: skip


def _factor(x: float, _) -> str:
    return "1" if x == 1 else f"×{x:g}" if x > 1 else f"÷{1 / x:g}"


def _bar_panel(axis, places: dict, bytes_of: dict, unit: int, title: str, name: str):
    axis.set_title(title, loc="left")
    known = {label: bytes_of[label] / unit for label in places if not np.isnan(bytes_of.get(label, np.nan))}
    if not known:
        _nothing(axis, "not measured")
        return
    axis.barh([places[label] for label in known], list(known.values()), height=0.5, color=BLUE)
    for label, value in known.items():
        words = f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"
        axis.annotate(
            words, (value, places[label]), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    axis.set_xlim(0, max(known.values()) * 1.35)
    axis.set_xlabel(name)
