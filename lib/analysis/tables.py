"""The tables of the study, from records alone."""

import pandas as pd

from lib.analysis import compare
from lib.analysis.style import GIB, MIB, labels, titles
from lib.errors import UsageError
from lib.markup import table
from lib.record import REASONS

__all__ = ["certificates", "interval", "ranking", "table", "unmeasured"]

RANKED = {
    "time_per_epoch_s": ("s per epoch", 1, "{:,.2f}"),
    "energy_per_non_padding_token_j": ("mJ per token", 1e-3, "{:,.3f}"),
    "peak_memory_bytes": ("peak GPU GiB", GIB, "{:,.2f}"),
    "validation_loss": ("validation loss", 1, "{:.3f}"),
    "decode_latency_s_per_token": ("decode ms per token", 1e-3, "{:,.2f}"),
    "cache_bytes": ("cache MiB", MIB, "{:,.2f}"),
    "parameters": ("parameters, M", 1e6, "{:,.2f}"),
}


def ranking(runs: pd.DataFrame, by: str = "time_per_epoch_s") -> pd.DataFrame:
    """The variants from the cheapest up by `by`, with the ratio to sdpa; the uncertified below, without a rank.

    A number that was not measured is a dash; `unmeasured` says why.
    """
    if by not in RANKED:
        raise UsageError(f"rank by one of {', '.join(RANKED)}, not {by!r}")
    means = runs.groupby("label")[list(RANKED)].mean(numeric_only=True).reindex(columns=list(RANKED))
    means["certified"] = runs.groupby("label")["certified"].all()
    means = means.sort_values(["certified", by], ascending=[False, True])
    ratio = compare.ratios(runs, by).set_index("label")
    rows, rank, title = [], 0, titles(runs)
    for label, values in means.iterrows():
        measured = not pd.isna(values[by])
        rank += bool(values["certified"] and measured)
        row = {"rank": rank if values["certified"] and measured else "–", "variant": title[label]}
        for metric, (unit, scale, form) in RANKED.items():
            row[unit] = "–" if pd.isna(values[metric]) else form.format(values[metric] / scale)
        found = ratio.loc[label] if label in ratio.index else None
        row["ratio to sdpa"] = "–" if found is None or pd.isna(found["ratio"]) else interval(found)
        verdict = "" if found is None else found["verdict"]
        row["verdict"] = verdict if values["certified"] else "fails its certificate"
        rows.append(row)
    return pd.DataFrame(rows)


def interval(found: pd.Series, of: str = "") -> str:
    ratio, low, high = (found[f"{of}_{end}" if of else end] for end in ("ratio", "low", "high"))
    return f"{ratio:.3f}" if pd.isna(low) else f"{ratio:.3f} [{low:.3f}, {high:.3f}]"


def certificates(runs: pd.DataFrame) -> pd.DataFrame:
    """What each variant was proven to be, a row each; where runs differ, the worst of them."""
    yes = {
        "causal": "causal", "prefix_equal": "prefix-equal", "mixes": "mixes tokens",
        "cached_equal": "cached = uncached", "gpt2_projection": "GPT-2's projection",
        "gpt2_initialisation": "GPT-2's initial weights",
    }  # fmt: skip
    rows, title = [], titles(runs)
    for label in labels(runs):
        said = pd.DataFrame(runs.loc[runs["label"] == label, "certificate"].tolist())
        row = {"variant": title[label], "passed": "yes" if said["passed"].all() else "NO"}
        row |= {heading: "yes" if said[field].all() else "NO" for field, heading in yes.items()}
        row["last token sees"] = f"{said['receptive_field'].min()}"
        row["from its reference"] = f"{said['reference_difference'].max():.0e}"
        row["its gradients"] = f"{said['reference_gradient_difference'].max():.0e}"
        row["weights / GPT-2's"] = f"{said['parameters_vs_baseline'].max():.3f}"
        row["memory grows as"] = f"T^{said['memory_growth'].max():.1f}"
        row["FLOPs grow as"] = f"T^{said['flops_growth'].max():.1f}"
        rows.append(row)
    return pd.DataFrame(rows)


def unmeasured(runs: pd.DataFrame) -> pd.DataFrame:
    """Every metric that some run lacks, why, and in how many runs."""
    missing = [
        {"metric": metric, "not measured, because": REASONS[reason], "variant": run["label"]}
        for _, run in runs.iterrows()
        for metric, reason in run["null_reasons"].items()
    ]
    if not missing:
        return pd.DataFrame(columns=["metric", "not measured, because", "runs"])
    table = pd.DataFrame(missing).groupby(["not measured, because", "metric"], as_index=False).size()
    return table.rename(columns={"size": "runs"})[["metric", "not measured, because", "runs"]]
