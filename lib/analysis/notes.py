"""What stands beneath a figure: the A/A control of its own metrics, and what was not measured, with the reason."""

import textwrap

import pandas as pd
from matplotlib.figure import Figure

from lib import attention
from lib.analysis import compare
from lib.analysis.style import INK, titles
from lib.record import REASONS

SMALL = {"fontsize": 9, "color": INK}
NO_CONTROL = "There is no A/A control among these runs: their noise is unknown."
CHARACTERS_PER_INCH = 13  # of that size


def why(own: pd.DataFrame, metric: str) -> str:
    """Why some runs have no number for a metric, in the words of their records."""
    reasons = {why[metric] for why in own["null_reasons"] if metric in why}
    return f"not measured: {'; '.join(sorted(REASONS.get(reason, reason) for reason in reasons)) or 'no reason given'}"


def absent(reasons: dict[str, str]) -> list[str]:
    """A sentence per reason, of the panels (by title) that are not drawn."""
    titles_of: dict[str, list[str]] = {}
    for title, reason in reasons.items():
        titles_of.setdefault(reason, []).append(title)
    return [f"{', '.join(them)}: {reason}." for reason, them in titles_of.items()]


def beneath(figure: Figure, lines: list[str]) -> None:
    """Writes sentences under a figure, no wider than it is."""
    width = int(CHARACTERS_PER_INCH * figure.get_figwidth())
    text = "\n".join(part for line in lines for part in textwrap.wrap(line, width))
    figure.text(0.01, -0.01, text, va="top", **SMALL)


def note(figure: Figure, runs: pd.DataFrame, metrics: dict[str, str], also=()) -> None:
    """Beneath a figure: what the A/A control differs from the reference by in each of its own metrics; and more."""
    found = {title: (compare.noise(runs, metric), metric) for title, metric in metrics.items()}
    beneath(figure, [*about_noise(runs, found), *also])


def about_noise(runs: pd.DataFrame, found: dict[str, tuple[compare.Noise | None, str]]) -> list[str]:
    """Sentences on the A/A control, by what was measured: (its noise, the metric). It estimates noise, no threshold."""
    if attention.CONTROL not in set(runs["label"]):
        return [NO_CONTROL]
    counted = [title for title, (_, metric) in found.items() if metric in compare.COUNTED]
    said = [f"{title} {noise_in_words(one, metric)}" for title, (one, metric) in found.items() if title not in counted]
    lines = (
        [f"A/A control, {titles(runs).get(attention.REFERENCE, attention.REFERENCE)} run twice: {'; '.join(said)}."]
        if said
        else []
    )
    return lines + ([f"{', '.join(counted)}: counted, the same in every run."] if counted else [])


def noise_in_words(found: compare.Noise | None, metric: str) -> str:
    """A/A ratio, or difference in nats, with its interval; at n = 1 that the noise is unknown."""
    if found is None:
        return "not measured"
    is_loss = metric in compare.LOSSES
    estimate = f"{found.estimate:+.3f} nats" if is_loss else f"× {found.estimate:.3f}"
    if found.low is None:
        return f"{estimate}, n = 1: noise unknown"
    form = "+.3f" if is_loss else ".3f"
    return f"{estimate} [{found.low:{form}}, {found.high:{form}}], n = {found.n}"
