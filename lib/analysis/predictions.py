"""What was predicted, beside what was measured."""

import pandas as pd

from lib.record.prediction import Prediction

UNKNOWN = "it is unknown when these runs began, so no prediction of them counts"


def residuals(runs: pd.DataFrame, predictions: list[Prediction]) -> pd.DataFrame:
    """A row per variant that was predicted before any run began: both, and how far the measured one is above it.

    `runs` are those of one group of `lib.analysis.compare`, so of one setting and device; their mean is taken. Of a
    variant the newest prediction counts; one whose file has changed since has no row. Without `started_at` in every
    record nothing counts: the end and the window do not say when a run began, and what was seen of one variant may
    have been used to predict another.
    """
    columns = ["variant", *(f"{unit}, {what}" for unit in "sJ" for what in ("predicted", "measured", "above"))]
    begun = pd.NaT if runs["started_at"].isna().any() else runs["started_at"].min()
    usable = [one for one in _of_these(runs, predictions) if one.made_at < begun]  # none where it is NaT
    newest = {said.label: said for one in sorted(usable, key=lambda one: one.made_at) for said in one.variants}
    rows = []
    for said in newest.values():
        mine = runs[(runs["label"] == said.label) & (runs["attention_sha256"] == said.attention_sha256)]
        row = [said.label]
        for predicted, measured in ((said.time_s, mine["time_s"]), (said.energy_j, mine["energy_j"])):
            seen = measured.mean() if measured.notna().all() else None  # never the mean of a part
            row += [predicted, seen, seen / predicted - 1 if predicted and seen else None]
        if len(mine):
            rows.append([*row, said.bound])
    return pd.DataFrame(rows, columns=[*columns, "most of it predicted to go into"])


def why_none(runs: pd.DataFrame, predictions: list[Prediction]) -> str:
    """Why `residuals` has no row, in one sentence."""
    if not _of_these(runs, predictions):
        return "nothing was predicted of these runs"
    if runs["started_at"].isna().any():
        return UNKNOWN
    return "nothing was predicted before the first of these runs began"


def _of_these(runs: pd.DataFrame, predictions: list[Prediction]) -> list[Prediction]:
    """The predictions of this setting on this device."""
    here = runs["setting"].iloc[0], runs["device_name"].iloc[0]
    return [one for one in predictions if (one.setting, one.device_name) == here]


def in_words(found: pd.DataFrame) -> str:
    """What the rows of `residuals` say of the prediction, which is a floor: that some are below it, or that none is."""
    above = pd.concat([found["s, above"], found["J, above"]]).dropna().astype(float)
    if above.empty:
        return "nothing that was predicted was measured"
    if (above >= 0).all():
        return f"Measured above the prediction by {above.min():.0%} to {above.max():.0%}, as above a floor."
    return (
        f"{(above < 0).sum()} of {len(above)} times and joules were measured below the prediction, by up to "
        f"{-above.min():.0%}: it is no floor, so the peaks that it assumes are too low for this device, or its counts "
        "too high."
    )


def table(found: pd.DataFrame) -> pd.DataFrame:
    """`residuals` as text: rounded, a dash where nothing was predicted or measured."""
    formats = {"predicted": "{:,.4g}", "measured": "{:,.4g}", "above": "{:+.0%}"}
    shown = found.astype(object)
    for column in shown.columns:
        form = formats.get(column.rpartition(", ")[2], "{}")
        shown[column] = ["–" if pd.isna(value) else form.format(value) for value in shown[column]]
    return shown
