"""Tables and sentences about cost by context length: the points, exponents, fits, crossovers and the decision map."""

import numpy as np
import pandas as pd

from lib.analysis import crossovers as claims
from lib.analysis.growth import DEGREE, FEWEST_PROCESSES, SHOWN, exponents, fits, labels, ratios
from lib.analysis.style import titles
from lib.analysis.words import counted
from lib.errors import UsageError
from lib.record import REASONS, scaling
from lib.record.scaling import OUTCOMES, PART, Scaling

METRICS = ("forward_backward_s", "peak_activation_bytes", "prefill_s", "decode_s_per_token", "cache_bytes")
LEAST_REGION = 0.01  # of the map; smaller ones are one row
ALLOWED = {  # what so many processes of each point allow to be said
    0: "No point was measured",
    1: "One process for each point: the numbers have no interval, and nothing is claimed. Measure more rounds",
    2: "Two processes for each point allow signs and ratios, with their scatter taken as alike at all lengths, but no "
    "crossover and no interval of a fit. Measure three rounds or more for these, five for intervals worth reading",
}
ENOUGH = "{n} processes for each point allow signs, ratios, crossovers and intervals of fits, drawn anew by process"


def processes(points: pd.DataFrame) -> int:
    """How many processes each measured point has, at the least; 0 where none was measured."""
    return int(points.loc[points["n"] > 0, "n"].min()) if points["n"].any() else 0


def allowed(points: pd.DataFrame) -> str:
    """What the number of processes lets this page say, in a sentence."""
    n = processes(points)
    left = points.loc[points["n"] > n]
    more = f" (rounds that are not there for every point count in the points alone: {len(left)})" if len(left) else ""
    return ALLOWED.get(n, ENOUGH.format(n=n)) + more + "."


def conclusion(points: pd.DataFrame, metrics: list[str], reference: str) -> list[str]:
    """The page's answer: by each metric, what costs less and more than `reference` at the longest length, a sentence
    each; last, what the number of processes allows."""
    _known(points, [reference])
    in_turns = all(ratios(points, metric, reference)["paired"].all() for metric in metrics)
    pairing = (
        "Rounds went through the variants in turns, so the ratios are of rounds."
        if in_turns
        else "That the rounds went through the variants in turns is not recorded: they count as independent."
    )
    return [_standing(points, metric, reference) for metric in metrics] + [f"{allowed(points)} {pairing}"]


def _standing(points: pd.DataFrame, metric: str, reference: str) -> str:
    called, found = titles(points), ratios(points, metric, reference)
    begin = f"{SHOWN[metric][0]}, over {called[reference]}'s"
    if found.empty:
        return f"{begin}: nothing to compare."
    last = found[found["context"] == found["context"].max()].sort_values("ratio", kind="stable")
    sides = {
        "costs less": last[last["high"] < 1],
        "costs more": last[last["low"] > 1],
        "inconclusive": last[~((last["high"] < 1) | (last["low"] > 1))],
    }
    says = [
        f"{side}: " + ", ".join(f"{called[r.label]} {_interval(r.ratio, r.low, r.high)}" for r in rows.itertuples())
        for side, rows in sides.items()
        if len(rows)
    ]
    return f"{begin} at {last['context'].iloc[0]:,} tokens (n = {last['n'].min()}): {'; '.join(says)}."


def _known(points: pd.DataFrame, references: list[str]) -> None:
    missing = set(references) - set(points["label"])
    if missing:
        there = ", ".join(labels(points))
        raise UsageError(f"references: there are no points of {', '.join(sorted(missing))}; name some of {there}")


def exponents_table(points: pd.DataFrame, start: int) -> pd.DataFrame:
    """Exponents of all that is measured, with intervals, and what these come from."""
    columns, by = {}, {}
    for metric in METRICS:
        found = exponents(points, metric, start).set_index("label")
        columns[SHOWN[metric][0]] = found.apply(lambda row: _interval(row["exponent"], row["low"], row["high"]), axis=1)
        by[metric] = found["by"]
    table = pd.DataFrame(columns)
    table["intervals from"] = pd.DataFrame(by).apply(lambda row: " and ".join(sorted(set(row.dropna()))) or "–", axis=1)
    return table.rename(titles(points)).rename_axis("variant").reset_index()


def growth_table(points: pd.DataFrame, reference: str, start: int) -> pd.DataFrame:
    """A row per variant: training, memory and decoding over `reference`'s at the longest length, from `start` on the
    exponents of the first two, with 95 % intervals. Raises UsageError without a point of the reference."""
    _known(points, [reference])
    last, columns = int(points["context"].max()), {}
    for metric in ("forward_backward_s", "peak_activation_bytes", "decode_s_per_token"):
        found = ratios(points, metric, reference).query("context == @last").set_index("label")
        said = found.apply(lambda row: _interval(row["ratio"], row["low"], row["high"]), axis=1) if len(found) else {}
        columns[f"{SHOWN[metric][0]}, ÷ {titles(points)[reference]} at {last:,}"] = {**said, reference: "1"}
    begin = min(points["context"][points["context"] >= start], default=start)
    for metric in ("forward_backward_s", "peak_activation_bytes"):
        found = exponents(points, metric, start).set_index("label")
        said = found.apply(lambda row: _interval(row["exponent"], row["low"], row["high"]), axis=1)
        columns[f"{SHOWN[metric][0]}, exponent from {begin:,}"] = said
    table = pd.DataFrame(columns, index=labels(points)).fillna("–")
    return table.rename(titles(points)).rename_axis("variant").reset_index()


def threads_table(first: list[Scaling], second: list[Scaling], metric: str) -> pd.DataFrame | str:
    """A row per variant of two folders of records that differ in threads alone: milliseconds of both at the longest
    length that both have, and the first over the second. What cannot stand side by side is said instead."""
    setting, device, threads, gpu = scaling.machine(first[0])
    other = scaling.machine(second[0])
    if (setting, device, gpu) != (other[0], other[1], other[3]) or threads == other[2]:
        return "the times of the two folders are of other settings or machines, or of as many threads: not side by side"
    columns, frames = {}, [scaling.frame(found) for found in (first, second)]
    shared = set.intersection(*(set(points["context"]) for points in frames))
    if not shared:
        return "the two folders have no length in common"
    for count, points in zip((threads, other[2]), frames, strict=True):
        found = points[(points["metric"] == metric) & (points["context"] == max(shared))].set_index("label")["value"]
        columns[f"{counted(count, 'thread')}, ms"] = found.dropna() * 1e3
    both = pd.DataFrame(columns).dropna()
    both = both.reindex([label for label in labels(frames[0]) if label in both.index])
    table = both.map("{:,.0f}".format).assign(**{"÷": (both.iloc[:, 0] / both.iloc[:, 1]).map("{:.2f}".format)})
    return table.rename(titles(frames[0])).rename_axis(f"variant, at {max(shared):,} tokens").reset_index()


def _interval(value: float, low: float, high: float, form: str = "{:.2f}") -> str:
    if np.isnan(value):
        return "–"
    return form.format(value) if np.isnan(low) else f"{form} [{form}, {form}]".format(value, low, high)


def fits_table(points: pd.DataFrame, metric: str) -> pd.DataFrame:
    """a, b and c of each variant's fit, in milliseconds or joules, K being 1,024 tokens; and what the repeats say."""
    _, scale, unit = SHOWN[metric]
    called = titles(points)
    found = fits(points, metric)
    names = (f"a, {unit}", f"b, {unit} per K", f"c, {unit} per K²")[: DEGREE.get(metric, 2) + 1]
    rows = []
    for label in labels(points):
        cells, says = ["too few lengths measured"] * len(names), "–"
        if label in found:
            fit = found[label]
            ends = fit.intervals if fit.intervals is not None else np.full((len(names), 2), np.nan)
            values = zip(fit.coefficients / scale, ends / scale, strict=True)
            cells, says = [_interval(value, *interval, form="{:.3g}") for value, interval in values], _repeats_say(fit)
        rows.append({"variant": called[label]} | dict(zip(names, cells, strict=True)) | {"the repeats": says})
    return pd.DataFrame(rows)


def _repeats_say(fit) -> str:
    if fit.p is None:
        return f"n = {fit.n}: the curve was not tested"
    p = "p < 0.001" if fit.p < 0.001 else f"p = {fit.p:.2g}"
    if fit.contradicted:
        return f"contradict this curve ({p}): no intervals"
    return f"allow this curve ({p})" + (f"; n = {fit.n}: no intervals" if fit.n < FEWEST_PROCESSES else "")


def crossovers_table(points: pd.DataFrame, metrics: list[str], references: list[str]) -> pd.DataFrame:
    """The crossovers of several metrics, as a reader sees them, a row per variant and reference."""
    _known(points, references)
    columns = {}
    for metric in metrics:
        found = claims.crossovers(points, metric, references)
        says = found.apply(_crossover_in_words, axis=1) if len(found) else pd.Series(dtype=str)
        columns[SHOWN[metric][0]] = says.groupby([found["label"], found["against"]]).agg("; ".join)
    table = pd.DataFrame(columns).rename_axis(["variant", "against"]).reset_index().fillna("–")
    order = {label: place for place, label in enumerate(labels(points))}
    places = table["against"].map(references.index) * len(order) + table["variant"].map(order)
    table[["variant", "against"]] = table[["variant", "against"]].replace(titles(points))
    return table.iloc[places.argsort(kind="stable")].reset_index(drop=True)


def _crossover_in_words(row: pd.Series) -> str:
    becomes, ratio = row["becomes"], _interval(row["ratio"], row["ratio_low"], row["ratio_high"])
    if np.isnan(row["context"]):
        return "n = 1: no claim" if becomes == "n = 1" else f"{becomes}: {ratio} at {row['until']:,.0f}"
    if np.isnan(row["ratio"]):
        ends = f"between the measured {row['low']:,.0f} and {row['high']:,.0f}" if row["between"] else ""
        ends = ends or f"[{row['low']:,.0f}, {row['high']:,.0f}]"
        return f"{becomes} from {row['context']:,.0f} {ends} up to {row['until']:,.0f}"
    if row["context"] == row["first"]:
        return f"{becomes} at every length: {ratio} at {row['first']:,.0f}"
    return f"{becomes} from {row['context']:,.0f} at the latest: {ratio} there"


def map_table(points: pd.DataFrame, found: claims.Map) -> pd.DataFrame:
    """Which variants are the cheapest over how much of the decision map, and how far behind the rest are there."""
    called, table = titles(points), claims.regions(found)
    large = table["share"] >= LEAST_REGION
    rows = [
        {
            "cheapest": " or ".join(called[label] for label in row.labels) + (" (tied)" if len(row.labels) > 1 else ""),
            "of the map": f"{row.share:.0%}",
            "next": "–" if pd.isna(row.next) else called[row.next],
            "behind the cheapest": "–"
            if pd.isna(row.next)
            else f"x {row.middle:.2f} [{row.low:.2f} to {row.high:.2f}]",
        }
        for row in table[large].itertuples()
    ]
    if not large.all():
        rest = table[~large]
        rows.append({"cheapest": f"{len(rest)} other ties, each on less than {LEAST_REGION:.0%}"})
        rows[-1] |= {"of the map": f"{rest['share'].sum():.0%}", "next": "–", "behind the cheapest": "–"}
    return pd.DataFrame(rows)


def points_table(points: pd.DataFrame) -> pd.DataFrame:
    """Every variant and length: the value with its lowest and highest process, and what ran out."""
    rows = []
    called = titles(points)
    for label in labels(points):
        for context in sorted(points["context"].unique()):
            row = {"variant": called[label], "context": f"{context:,}"}
            for metric in METRICS:
                title, scale, unit = SHOWN[metric]
                own = points.query("label == @label and context == @context and metric == @metric")
                row[f"{title}, {unit}"] = _cell(own.iloc[0], scale) if len(own) else "–"
            rows.append(row)
    return pd.DataFrame(rows)


def _cell(point: pd.Series, scale: float) -> str:
    if point["outcome"] != "measured":
        return OUTCOMES[point["outcome"]]
    if pd.notna(point["reason"]):
        return REASONS[point["reason"]]
    value, low, high = (_number(of / scale) for of in (point["value"], *np.quantile(point["processes"], [0, 1])))
    return value if low == high else f"{value} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def unmeasured(points: pd.DataFrame) -> pd.DataFrame:
    """Points and metrics without a number, and why."""
    ran_out, called = points[points["outcome"] != "measured"], titles(points)
    ran_out = ran_out.assign(part=ran_out["metric"].map(PART))
    rows = [
        {"what": row.part, "variant": called[row.label], "context": f"{row.context:,}"}
        | {"why": f"{OUTCOMES[row.outcome]}: {row.says}"}
        for row in ran_out.drop_duplicates(["label", "context", "part"]).itertuples()
    ]
    for (metric, reason), own in points.dropna(subset=["reason"]).groupby(["metric", "reason"]):
        names, contexts = labels(own), sorted(own["context"].unique())
        rows.append(
            {"what": metric, "variant": "all" if names == labels(points) else ", ".join(called[name] for name in names)}
        )
        rows[-1] |= {"context": f"{contexts[0]:,} to {contexts[-1]:,}", "why": REASONS[reason]}
    return pd.DataFrame(rows, columns=["what", "variant", "context", "why"])
