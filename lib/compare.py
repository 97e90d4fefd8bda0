"""What may be compared with what, and how sure it is.

Runs are compared only within a group (same setting, same device), and by the ratio to `sdpa` inside a block, so that
whatever drifted from block to block cancels.
"""

import math
from dataclasses import dataclass

import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lib.errors import UsageError

REFERENCE = "sdpa"
NULL = "sdpa_again"  # the reference a second time: its difference from itself
FEWEST_BLOCKS = 5  # below that, points only
EQUIVALENT_WITHIN = 0.02


@dataclass(frozen=True)
class Group:
    """Runs that one table may hold, and what sets them apart from the others in the folder."""

    runs: pd.DataFrame
    title: str


def groups(runs: pd.DataFrame) -> list[Group]:
    """The runs of `lib.record.read`, split by setting and device, the largest group first; synthetic ones are left out.

    Raises UsageError where none is left.
    """
    if runs.empty or not (runs["provenance"] == "measured").any():
        raise UsageError("there is no record in that folder; `make study` or a run of train.ipynb writes some")
    found = []
    measured = runs[runs["provenance"] == "measured"]
    for _, part in measured.groupby(["setting", "device_name", measured["gpu_uuid"].fillna("")], sort=True):
        found.append(Group(part.reset_index(drop=True), _title(part.iloc[0])))
    return sorted(found, key=lambda group: -len(group.runs))


def _title(run: pd.Series) -> str:
    p = run["parameter_values"]
    return (
        f"GPT-2 with {p['layers']} layers of {p['width']}, T = {p['context']}, "
        f"{p['steps_per_epoch'] * p['epochs']} steps of {p['batch_size'] * p['accumulation']} rows, "
        f"{p['dataset']} data, on {run['device_name']}"
    )


def whole_blocks(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of blocks in which every variant of the group ran, in one sitting on one device."""
    labels = set(runs["label"])
    keys = ["sitting", "block"]
    whole = [part for _, part in runs.dropna(subset=keys).groupby(keys) if set(part["label"]) == labels]
    return pd.concat(whole) if whole else runs.iloc[:0]


def ratios(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Each variant's `metric` over `sdpa`'s in the same block, a row per label.

    `ratio` is the geometric mean over `n` blocks. From five blocks up: `low` and `high`, the 95 % paired-t interval on
    the logarithm; `p`, Holm-adjusted over the variants; and `verdict`: *different* (p < 0.05), *equivalent* (90 %
    interval within 2 %), or *undecided*. With fewer these are missing and `verdict` says how many. Where no block
    is whole, runs are paired by seed and only the points are given.
    """
    blocks = whole_blocks(runs)
    complete = not blocks.empty
    wide = (blocks if complete else runs).pivot_table(
        index=["sitting", "block"] if complete else "seed", columns="label", values=metric
    )
    if REFERENCE not in wide:
        return pd.DataFrame(columns=["label", "ratio", "n", "low", "high", "p", "verdict"])
    rows = []
    for label in wide.columns:
        logs = (wide[label] / wide[REFERENCE]).map(math.log).dropna()
        row = {"label": label, "ratio": math.exp(logs.mean()) if len(logs) else None, "n": len(logs)}
        if complete and len(logs) >= FEWEST_BLOCKS and label != REFERENCE:
            test = stats.ttest_1samp(logs, 0.0)
            row["low"], row["high"] = (math.exp(bound) for bound in test.confidence_interval(0.95))
            row["p"] = float(test.pvalue)
            row["narrow"] = [abs(bound) for bound in test.confidence_interval(0.90)]
        rows.append(row)
    return _verdicts(pd.DataFrame(rows, columns=["label", "ratio", "n", "low", "high", "p", "narrow"]))


def _verdicts(table: pd.DataFrame) -> pd.DataFrame:
    tested = table["p"].notna()
    if tested.any():
        table.loc[tested, "p"] = multipletests(table.loc[tested, "p"].astype(float), method="holm")[1]

    def verdict(row):
        if row["label"] == REFERENCE:
            return "the reference"
        if pd.isna(row["p"]):
            return f"n = {row['n']}"
        if row["p"] < 0.05:
            return "different"
        return "equivalent" if max(row["narrow"]) < math.log1p(EQUIVALENT_WITHIN) else "undecided"

    table["verdict"] = table.apply(verdict, axis=1)
    return table.drop(columns="narrow")
