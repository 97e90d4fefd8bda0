"""The tables of the study, from records alone."""

import pandas as pd

from lib import attention
from lib.analysis import compare, ngrams
from lib.analysis.notes import NO_CONTROL, noise_in_words, why
from lib.analysis.style import GIB, MIB, labels, titles
from lib.errors import UsageError
from lib.markup import folded, lines, table
from lib.record import REASONS, own_metrics

__all__ = ["certificates", "folded", "interval", "lines", "main", "own", "ranking", "table", "unmeasured"]

RANKED = {
    "time_per_epoch_s": ("s per epoch", 1, "{:,.2f}"),
    "energy_per_non_padding_token_j": ("mJ per token", 1e-3, "{:,.3f}"),
    "peak_memory_bytes": ("peak GPU GiB", GIB, "{:,.2f}"),
    "cpu_time_s": ("CPU s per run", 1, "{:,.2f}"),
    "peak_resident_bytes": ("peak resident GiB", GIB, "{:,.2f}"),
    "validation_loss": ("validation loss", 1, "{:.3f}"),
    "decode_latency_s_per_token": ("decode ms per token", 1e-3, "{:,.2f}"),
    "cache_bytes": ("cache MiB", MIB, "{:,.2f}"),
    "parameters": ("parameters, M", 1e6, "{:,.2f}"),
}


ON_GPU = ("energy_per_non_padding_token_j", "peak_memory_bytes")
ON_CPU = ("cpu_time_s", "peak_resident_bytes")


def ranking(runs: pd.DataFrame, by: str = "time_per_epoch_s") -> pd.DataFrame:
    """The variants with what they cost and what they learn, beside sdpa; ranked by `by` from five whole blocks up.

    Ranks are those of `compare.ranks`: "2–3" is shared by variants that are not told apart. Below five blocks no number
    says which is cheaper: there is no rank, and the order is the study's. The uncertified stand below, without a rank.
    A number that was not measured is a dash; `unmeasured` says why.
    """
    if by not in RANKED:
        raise UsageError(f"rank by one of {', '.join(RANKED)}, not {by!r}")
    ranked = of_device(runs)
    found = {metric: _beside_reference(runs, metric) for metric in dict.fromkeys((*ranked, by, "validation_loss"))}
    cost, loss, above = found[by], found["validation_loss"], ngrams.above_bigram(runs)
    ranks, title, flags = compare.ranks(runs, by), titles(runs), compare.flagged(runs)
    certified = runs.groupby("label")["certified"].all()
    rows = []
    for label in sorted(labels(runs), key=lambda label: (not certified[label], *_place(label, ranks, cost))):
        row = {"rank": _rank(ranks.get(label)), "variant": title[label]}
        for metric, (unit, scale, form) in ranked.items():
            level = found[metric].loc[label, "level"]
            row[unit] = "–" if pd.isna(level) else form.format(level / scale)
        if by != "validation_loss":
            row |= {"ratio to SDPA": shown(cost.loc[label]), "n": _count(cost.loc[label, "n"])}
            row["verdict"] = _verdict(cost.loc[label], certified[label])
        row["loss − SDPA's, nats"] = shown(loss.loc[label])
        row["verdict on the loss"] = _verdict_on_loss(loss.loc[label], certified[label], above[label], above)
        row["loss − bigram table's"] = "–" if pd.isna(above[label]) else f"{above[label]:+.2f}"
        rows.append(row | {"flagged": flags[label]})
    return pd.DataFrame(rows)


def main(runs: pd.DataFrame, by: str = "time_per_epoch_s") -> pd.DataFrame:
    """`ranking` without what it leaves empty: columns of dashes alone; `flagged` where nothing is; and below five
    blocks, where each verdict says no more than n, verdicts and n."""
    table = ranking(runs, by)
    idle = {"rank", "n", "verdict", "verdict on the loss"} if (table["rank"] == "–").all() else set()
    if not runs["flags"].map(bool).any():
        idle.add("flagged")
    empty = {name for name in table if (table[name] == "–").all()}
    return table.drop(columns=[name for name in table if name in idle | empty])


def of_device(runs: pd.DataFrame) -> dict:
    """`RANKED` without what is about other devices: of a CPU's runs the GPU's numbers, and the other way round."""
    left_out = ON_GPU if (runs["device"] == "cpu").all() else ON_CPU
    return {metric: how for metric, how in RANKED.items() if metric not in left_out}


def processor(runs: pd.DataFrame) -> pd.DataFrame:
    """Wall clock beside processor time, each as a ratio to SDPA's: on a CPU that others use too, the second holds."""
    title, found = titles(runs), {metric: _beside_reference(runs, metric) for metric in ("time_s", "cpu_time_s")}
    certified, flags = runs.groupby("label")["certified"].all(), compare.flagged(runs)
    rows = []
    for label in labels(runs):
        row = {"variant": title[label]}
        for metric, called in (("time_s", "wall clock"), ("cpu_time_s", "CPU seconds")):
            of = found[metric].loc[label]
            row[f"{called}, ratio to SDPA"], row[f"verdict on {called}"] = shown(of), _verdict(of, certified[label])
        rows.append(row | {"flagged": flags[label]})
    return pd.DataFrame(rows)


def own(runs: pd.DataFrame, wanted: dict) -> pd.DataFrame | str:
    """Numbers of one's own (`lib.record.own`), each variant's beside sdpa's and ranked in the direction that is better.

    As in `ranking`, ranks and verdicts need five whole blocks; what fails its certificate has no rank. A sentence where
    none is wanted, or none was measured. Raises UsageError for what is no such metric.
    """
    asked = own_metrics(wanted)
    if not asked:
        return "None was asked for."
    runs, title = runs.assign(**{one.column: one.of(runs) for one in asked}), titles(runs)
    certified = runs.groupby("label")["certified"].all()
    rows, missing = [], []
    for one in asked:
        if runs[one.column].isna().all():
            missing.append(f"{one.name}: {_why_no_own(runs, one)}.")
            continue
        found, ranks = _beside_reference(runs, one.column), compare.ranks(runs, one.column, one.better)
        for label in sorted(
            labels(runs), key=lambda label: (not certified[label], *_by_rank(label, ranks, found, one))
        ):
            of = found.loc[label]
            row = {"metric": f"{one.name} ({one.better} is better)", "rank": _rank(ranks.get(label))}
            row |= {"variant": title[label], "value": _shown(of["level"], "{:,.4g}"), "ratio to SDPA": shown(of)}
            rows.append(row | {"n": _count(of["n"]), "verdict": _verdict(of, certified[label])})
    return pd.DataFrame(rows) if rows else " ".join(missing)


def _by_rank(label: str, ranks: dict, found: pd.DataFrame, one) -> tuple:
    first, last, level = _place(label, ranks, found)
    return first, last, level if one.better == "lower" else -level


def _why_no_own(runs: pd.DataFrame, one) -> str:
    lacking = [name for name in one.needs if runs[name].isna().all()]
    return why(runs, lacking[0]) if lacking else f"{one.formula} is no finite number"


def _beside_reference(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """`compare.ratios` or `compare.differences` by label; without sdpa the levels alone."""
    found = (compare.differences if metric in compare.LOSSES else compare.ratios)(runs, metric).set_index("label")
    means = runs[metric].astype(float).groupby(runs["label"]).mean()
    found = found.reindex(means.index)
    return found.assign(level=found["level"].fillna(means), verdict=found["verdict"].fillna(""))


def _place(label: str, ranks: dict, cost: pd.DataFrame) -> tuple:
    """Where a variant stands: by rank, then by its number, then the unranked; all alike where nothing is ranked."""
    return (*ranks[label], cost.loc[label, "level"]) if label in ranks else (len(ranks) + 1, 0, 0)


def _count(n) -> str:
    return "–" if pd.isna(n) else f"{n:.0f}"


def _rank(found: tuple[int, int] | None) -> str:
    if found is None:
        return "–"
    first, last = found
    return f"{first}" if first == last else f"{first}–{last}"


def _verdict(found: pd.Series, certified: bool) -> str:
    if not certified:
        return "fails its certificate"
    return found["verdict"] if pd.isna(found["p"]) else f"{found['verdict']} (p = {found['p']:.2g})"


def _verdict_on_loss(found: pd.Series, certified: bool, above: float, of_all: pd.Series) -> str:
    """The verdict of the paired difference; also where a loss says nothing about attention (`lib.analysis.ngrams`)."""
    if certified and not pd.isna(found["p"]) and max(above, of_all.get(attention.REFERENCE, above)) > 0:
        return f"{_verdict(found, certified)}, but worse than a bigram table"
    return _verdict(found, certified)


def without_flagged(runs: pd.DataFrame, by: str = "time_per_epoch_s") -> pd.DataFrame | str:
    """The same table without the numbers of flagged runs; a sentence where that makes no difference."""
    if not runs["flags"].map(bool).any():
        return "No run is flagged: without flagged runs the table is the same."
    found = ranking(compare.unflagged(runs), by)
    if found.equals(ranking(runs, by)):
        return "Without the flagged runs the table is the same."
    return found


def noise(runs: pd.DataFrame) -> pd.DataFrame | str:
    """What the A/A control differs from sdpa by, a row per metric of `ranking`: noise, and no threshold."""
    if attention.CONTROL not in set(runs["label"]):
        return NO_CONTROL
    rows = []
    for metric, (unit, _, _) in of_device(runs).items():
        found = compare.noise(runs, metric)
        said = "counted, the same in every run" if metric in compare.COUNTED else noise_in_words(found, metric)
        rows.append({"metric": unit, "A/A control beside SDPA": said})
    return pd.DataFrame(rows)


def interval(found: pd.Series, of: str = "") -> str:
    ratio, low, high = (found[f"{of}_{end}" if of else end] for end in ("ratio", "low", "high"))
    return f"{ratio:.3f}" if pd.isna(low) else f"{ratio:.3f} [{low:.3f}, {high:.3f}]"


def shown(found: pd.Series) -> str:
    """A row of `compare.ratios` or `compare.differences` with its interval, where it has one."""
    if "ratio" in found:
        return "–" if pd.isna(found["ratio"]) else interval(found)
    if pd.isna(found["difference"]):
        return "–"
    ends = "" if pd.isna(found["low"]) else f" [{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"{found['difference']:+.3f}{ends}"


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
        row["failed"] = ", ".join(_failed_checks(said["measures"])) or "–"
        row |= {heading: "yes" if said[field].all() else "NO" for field, heading in yes.items()}
        row["last token sees"] = _shown(pd.to_numeric(said["receptive_field"]).min(), "{:.0f}")
        row["from its reference"] = _shown(pd.to_numeric(said["reference_difference"]).max(), "{:.0e}")
        row["its gradients"] = _shown(pd.to_numeric(said["reference_gradient_difference"]).max(), "{:.0e}")
        row["weights / GPT-2's"] = f"{said['parameters_vs_baseline'].max():.3f}"
        row["memory grows as"] = _shown(pd.to_numeric(said["memory_growth"]).max(), "T^{:.1f}")
        row["FLOPs grow as"] = _shown(pd.to_numeric(said["flops_growth"]).max(), "T^{:.1f}")
        rows.append(row)
    return pd.DataFrame(rows)


def _failed_checks(measures) -> list[str]:
    """Checks that failed in any of several certificates; older ones hold no measurements."""
    return list(dict.fromkeys(one["check"] for several in measures for one in several if one["passed"] is False))


def _shown(value, how: str) -> str:
    return "–" if pd.isna(value) else how.format(value)


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
