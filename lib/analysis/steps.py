"""Training steps that took turns in one process: the ratios and the table of `lib.record.steps`.

`python -m lib.analysis.steps FILE` prints them. A round is a block: ratios, intervals and verdicts are those of
`lib.analysis.compare`, over rounds instead of blocks of whole runs.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from lib.analysis import compare
from lib.attention import CONTROL, REFERENCE
from lib.errors import UsageError
from lib.record import REASONS, steps
from lib.record.steps import Steps

METRICS = ("time_s_per_step", "energy_j_per_step")


def runs(found: Steps, context: int) -> pd.DataFrame:
    """The turns at one length as the runs that `lib.analysis.compare` compares, a round as a block."""
    gpu, turns = found.environment.get("gpu") or {}, steps.frame(found)
    where = {"device_name": found.environment["device_name"], "gpu_uuid": gpu.get("uuid")}
    turns = turns[turns["context"] == context].reset_index(drop=True)
    return turns.assign(block=turns["round"], seed=turns["round"], **where)


def ratios(found: Steps) -> pd.DataFrame:
    """`compare.ratios` of each length and metric, with `context`, `metric`, `title` and the `median` of one step."""
    titles, parts = {entry.label: entry.title for entry in found.entries}, []
    for context in (size.context for size in found.setting.sizes):
        turns = runs(found, context)
        for metric in METRICS:
            medians = turns.groupby("label")[metric].median()
            table = compare.ratios(turns, metric)
            table = table.assign(context=context, metric=metric, title=table["label"].map(titles))
            parts.append(table.assign(median=table["label"].map(medians)))
    return pd.concat(parts, ignore_index=True)


def about(found: Steps) -> str:
    """One sentence for beside the table: how many rounds, whether their order is balanced, and what was in the way."""
    turns = steps.frame(found)
    if turns.empty:
        return "No round is there yet."
    first = runs(found, found.setting.sizes[0].context)
    order = "balanced" if compare.balanced(first) else "not balanced"
    rounds = f"{len(found.rounds)} round{'s' if len(found.rounds) > 1 else ''} on {found.environment['device_name']}"
    said = [f"{rounds}, their order {order}."]
    reasons = sorted(set(turns["energy_null_reason"].dropna()))
    said += [f"No joules in {(turns['energy_null_reason'] == r).sum()} windows: {REASONS[r]}." for r in reasons]
    throttled = int((turns["throttled_share"] > 0).sum())
    said += [f"The clock was throttled in {throttled} of {len(turns)} windows."] if throttled else []
    return " ".join(said)


def table(found: Steps) -> pd.DataFrame:
    """A row per length and variant, the reference first and its A/A control behind it, then the cheapest in time."""
    compared = {(row.context, row.metric, row.label): row for row in ratios(found).itertuples()}
    frame, rows = steps.frame(found), []
    for size in found.setting.sizes:
        turns = frame[frame["context"] == size.context].groupby("label")
        medians, peaks = turns[list(METRICS)].median(), turns["peak_memory_bytes"].max()

        def place(entry, times=medians[METRICS[0]]):
            return {REFERENCE: 0, CONTROL: 1}.get(entry.label, 2), times.get(entry.label, np.inf)

        for entry in sorted(found.entries, key=place):
            row = {"context": f"{size.context:,}", "variant": entry.title}
            why = found.failed.get(entry.label, {}).get(size.context)
            if why is not None:
                rows.append(row | {"ms a step": why})
                continue
            time_s, energy_j = medians.loc[entry.label]
            by_time, by_energy = (compared.get((size.context, metric, entry.label)) for metric in METRICS)
            row |= {"ms a step": f"{time_s * 1e3:,.1f}", "÷ SDPA": _ratio(by_time), "time": _verdict(by_time)}
            row |= {"J a step": _number(energy_j), "J ÷ SDPA": _ratio(by_energy), "energy": _verdict(by_energy)}
            rows.append(row | {"peak memory, GiB": _number(peaks[entry.label] / 2**30)})
    return pd.DataFrame(rows).fillna("–")


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:,.2f}"


def _verdict(compared) -> str:
    return "–" if compared is None or np.isnan(compared.ratio) else compared.verdict


def _ratio(compared) -> str:
    if compared is None or np.isnan(compared.ratio):
        return "–"
    interval = "" if np.isnan(compared.low) else f" [{compared.low:.3f}, {compared.high:.3f}]"
    return f"{compared.ratio:.3f}{interval}"


def main(words: list[str] | None = None) -> int:
    paths = sys.argv[1:] if words is None else words
    try:
        if len(paths) != 1:
            raise UsageError("name one file that `python -m lib.study.steps --write FILE` wrote")
        found = steps.load(Path(paths[0]))
        if steps.frame(found).empty:
            raise UsageError(about(found))
        print(about(found), table(found).to_string(index=False), sep="\n")
    except UsageError as error:
        print(f"python -m lib.analysis.steps: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
