"""What a variant costs and can do, a row per number: the table that the site filters, sorts and draws.

Each row is a level with its n, and where it was paired with SDPA's the ratio, its 95 % interval and its verdict, as
`lib.analysis` works them out for the notebooks; or the reason why there is none. A folder of records is one study: its
numbers are never joined with those of another.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from lib import attention, record
from lib.analysis import capability, compare, growth
from lib.analysis import steps as compared_steps
from lib.analysis.notes import why
from lib.analysis.style import GIB, MIB, labels, titles
from lib.attention import REFERENCE
from lib.data.tasks import TASKS
from lib.errors import UsageError
from lib.model import gpt2_config
from lib.model.devices import without_weights
from lib.record import FAILURES, REASONS, files, folders, probe, scaling, steps
from lib.record.steps import Steps

GIGA = 1e9
RUNS = {  # of whole training runs: title, unit, scale, better
    "time_s": ("Training time", "s", 1, "lower"),
    "non_padding_tokens_per_s": ("Training speed", "tokens/s", 1, "higher"),
    "energy_j": ("Training energy", "J", 1, "lower"),
    "mean_power_w": ("Mean GPU power", "W", 1, "lower"),
    "peak_memory_bytes": ("Peak GPU memory", "GiB", GIB, "lower"),
    "peak_resident_bytes": ("Peak resident memory", "GiB", GIB, "lower"),
    "cpu_time_s": ("CPU time", "s", 1, "lower"),
    "mfu": ("Model FLOPs utilisation", "share", 1, "higher"),
    "forward_flops_causal": ("FLOPs of a forward pass", "GFLOP", GIGA, "lower"),
    "prefill_latency_s": ("Prefill of the run's model", "ms", 1e-3, "lower"),
    "decode_latency_s_per_token": ("Decoding a token, of the run's model", "ms", 1e-3, "lower"),
    "cache_bytes": ("Cache of the run's model", "MiB", MIB, "lower"),
    "validation_loss": ("Validation loss", "nats", 1, "lower"),
    "parameters": ("Parameters", "million", 1e6, "lower"),
}
STEPS = {
    "time_s_per_step": ("Training step, time", "ms", 1e-3, "lower"),
    "energy_j_per_step": ("Training step, energy", "J", 1, "lower"),
    "peak_memory_bytes": ("Training step, peak GPU memory", "GiB", GIB, "lower"),
}
COMPUTED = {
    "cache": ("Cache, GPT-2 small, bf16", "MiB", MIB, "lower"),
    "core": ("Attention's own FLOPs, GPT-2 small, forward", "GFLOP", GIGA, "lower"),
}
CONTEXTS = (512, 2048, 8192, 32_768)  # that the formulas are worked out for
SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12}
PATTERNS = {  # and who chooses it, with other windows and sizes
    "sliding_window,sdpa": "as in Gemma 2",
    "sliding_window,sliding_window,sliding_window,sliding_window,sliding_window,sdpa": "as in Gemma 3",
    "sinks,sdpa": "as in gpt-oss, which has sinks in both",
    "linear,linear,linear,sdpa": "three to one",
    "retention,retention,retention,sdpa": "three to one",
    "mamba2,mamba2,mamba2,sdpa": "three to one",
    "gated_deltanet,gated_deltanet,gated_deltanet,gated": "as in Qwen3-Next",
    "kda,kda,kda,mla": "as in Kimi Linear",
}
COLUMNS = (
    "label", "variant", "what", "unit", "better", "at", "at_unit", "profile", "setting", "device", "kind", "value",
    "low", "high", "range_of", "n", "ratio", "ratio_low", "ratio_high", "verdict", "certified", "note", "why",
    "records",
)  # fmt: skip # of the table; every row has them all, None where there is nothing to say


class Held(NamedTuple):
    """A record of a folder as it was when it was looked at, and of each variant's file in it whether it passed: (label,
    fingerprint, passed)."""

    path: Path
    sha256: str
    kind: str
    certified: list[tuple[str, str, bool]]


def rows(records: Path, holds: dict[Path, list[Held]] | None = None) -> pd.DataFrame:
    """`COLUMNS` of every study below a folder of records, and of the formulas; `holds` is what is `held` there, where
    that is known. Raises UsageError as `held` does, and for runs that one name stands for though their options differ.
    """
    found = list(computed())
    for folder, kept in (held(records) if holds is None else holds).items():
        found += of_folder(kept, folder.relative_to(records).as_posix())
    table = pd.DataFrame(found, columns=list(COLUMNS)).astype({"at": float, "value": float, "n": "Int64"})
    return table.assign(variant=_told_apart(table))


def _told_apart(table: pd.DataFrame) -> pd.Series:
    """Titles, with the label beside one that could be taken for another's, in each study (`style.titles`)."""
    pairs = table[["profile", "label", "variant"]].drop_duplicates().rename(columns={"variant": "title"})
    pairs["again"] = pairs.groupby(["profile", "label"]).cumcount()  # a label may have two titles, as of two windows
    called = {}
    for (profile, _), own in pairs.groupby(["profile", "again"]):
        shown = titles(own)
        called |= {(profile, row.label, row.title): shown[row.label] for row in own.itertuples()}
    keys = zip(table["profile"], table["label"], table["variant"], strict=True)
    return pd.Series([called[key] for key in keys], index=table.index)


def held(records: Path) -> dict[Path, list[Held]]:
    """By folder each record (`folders.look`). Raises UsageError for one that cannot be read, was not measured, or lies
    there twice: a site is not made of half of what lies there."""
    seen: dict[str, Path] = {}
    odd: list[str] = []

    def kept(path: Path, kind: str, found):
        where, sign = path.relative_to(records).as_posix(), getattr(found, "content_sha256", "")
        if getattr(found, "provenance", "measured") != "measured":
            odd.append(f"{where}: it is {found.provenance}, not measured; take it out")
        if sign and sign in seen:
            odd.append(f"{where}: it is the same record as {seen[sign]}; take one out")
        seen.setdefault(sign, where)
        return Held(path, hashlib.sha256(path.read_bytes()).hexdigest(), kind, _certified(kind, found))

    looked = list(folders.look([records], kept))
    odd = [str(one) for found in looked for one in found.wrong] + odd
    if odd:
        more = f" ({len(odd) - 1} more: `python -m lib.analysis.contributed` names all)" if len(odd) > 1 else ""
        raise UsageError(f"{odd[0]}{more}")
    return {found.path: found.kept for found in looked if found.kept}


def _certified(kind: str, of) -> list[tuple[str, str, bool]]:
    if kind == "run":
        return [(of.label, of.attention_sha256, of.certificate.passed)]
    return [(one.label, one.attention_sha256, one.certified) for one in (of.entries if kind == "steps" else ())]


def of_folder(kept: list[Held], profile: str) -> Iterator[dict]:
    """The rows of the records of a folder; benchmarks beside others' code have none."""
    for kind in dict.fromkeys(one.kind for one in kept):
        makes = {"run": of_runs, "steps": of_steps, "scaling": of_scaling, "probe": of_probes, "failure": of_failures}
        if kind in makes:
            yield from makes[kind]([one.path for one in kept if one.kind == kind], profile)


def _row(label: str, title: str, shown: tuple, profile: str, **more) -> dict:
    what, unit, scale, better = shown
    row = dict.fromkeys(COLUMNS) | {"label": label, "variant": title, "what": what, "unit": unit, "better": better}
    row |= {"profile": profile, "records": []} | more
    for name in ("value", "low", "high"):
        row[name] = None if row[name] is None or math.isnan(row[name]) else row[name] / scale
    numbers = ("value", "low", "high", "ratio", "ratio_low", "ratio_high", "at", "n")
    return row | {name: None if row[name] is None or pd.isna(row[name]) else float(row[name]) for name in numbers}


def of_runs(paths: list[Path], profile: str) -> Iterator[dict]:
    """Whole training runs: of those that are compared the mean, and the ratio by `compare.ratios`, of each group of
    runs that may be compared."""
    runs = pd.DataFrame([files.row(path) | {"path": f"{profile}/{path.name}"} for path in paths])
    for group in compare.groups(runs):
        own, called = group.runs, titles(group.runs)
        certified = own.groupby("label")["certified"].all()
        compared = compare.comparable(own)
        for label in labels(own):
            _check_one_definition(own[own["label"] == label], label, profile)
        for metric, shown in RUNS.items():
            ratios = compare.ratios(own, metric) if metric not in compare.LOSSES else pd.DataFrame({"label": []})
            table = ratios.set_index("label")
            for label in labels(own):
                mine = compared[compared["label"] == label]
                where = {
                    "at": mine["parameter_values"].iloc[0]["context"], "at_unit": "tokens", "kind": "training runs",
                    "setting": group.title,
                    "device": mine["device_name"].iloc[0], "certified": bool(certified[label]),
                    "records": sorted(mine["path"]), "note": _flagged(mine),
                }  # fmt: skip
                values = mine[metric].dropna()
                if values.empty:
                    yield _row(label, called[label], shown, profile, why=why(mine, metric), **where)
                    continue
                number = {"value": values.mean(), "n": len(values)}
                if len(values) > 1:
                    number |= {"low": values.min(), "high": values.max(), "range_of": "runs"}
                yield _row(label, called[label], shown, profile, **where, **number, **_ratio(table, label))


def _check_one_definition(mine: pd.DataFrame, label: str, profile: str) -> None:
    """Raises UsageError where runs of one label and setting are of different options."""
    options = sorted({json.dumps(values["options"], sort_keys=True) for values in mine["parameter_values"]})
    if len(options) > 1:
        said = " and ".join(map(record.printable, options[:2]))
        raise UsageError(
            f"{profile}: runs called {label!a} have different options, {said}: give each a label of its own"
        )


def _flagged(mine: pd.DataFrame) -> str | None:
    flags = sorted({flag for flags in mine["flags"] for flag in flags})
    return f"{int(mine['flags'].map(bool).sum())} of {len(mine)} runs flagged: {', '.join(flags)}" if flags else None


def of_failures(paths: list[Path], profile: str) -> Iterator[dict]:
    """Runs that ended without a record, a row per label and reason."""
    failed = pd.DataFrame([files.load_failure(path).model_dump() | {"path": path} for path in paths])
    for (label, reason), own in failed.groupby(["label", "reason"]):
        said = f"not measured: {len(own)} run{'s' * (len(own) > 1)} ended without a record: {FAILURES[reason]}"
        where = {"kind": "training runs", "records": sorted(f"{profile}/{path.name}" for path in own["path"])}
        yield _row(label, label, RUNS["time_s"], profile, why=said, **where)


def _ratio(table: pd.DataFrame, label: str) -> dict:
    if label not in table.index or label == REFERENCE or table.loc[label].isna()["ratio"]:
        return {}
    row = table.loc[label]
    return {"ratio": row["ratio"], "ratio_low": row["low"], "ratio_high": row["high"], "verdict": row["verdict"]}


def of_steps(paths: list[Path], profile: str) -> Iterator[dict]:
    """Training steps that took turns: the median of the turns, and the paired ratio."""
    for path in paths:
        found = steps.load(path)
        turns = steps.frame(found)
        ratios = compared_steps.ratios(found) if len(turns) else pd.DataFrame(columns=["metric", "context", "label"])
        for entry in found.entries:
            for size in found.setting.sizes:
                where = {
                    "at": size.context, "at_unit": "tokens", "kind": "training steps",
                    "setting": _of_steps(found, size), "certified": entry.certified,
                    "device": found.environment["device_name"], "records": [f"{profile}/{path.name}"],
                }  # fmt: skip
                mine = (
                    turns[(turns["label"] == entry.label) & (turns["context"] == size.context)] if len(turns) else turns
                )
                for metric, shown in STEPS.items():
                    values = mine[metric].dropna() if len(mine) else pd.Series(dtype=float)
                    if values.empty:
                        reason = found.failed.get(entry.label, {}).get(size.context) or _why_no_turn(mine, metric)
                        yield _row(entry.label, entry.title, shown, profile, why=f"not measured: {reason}", **where)
                        continue
                    level = values.max() if metric == "peak_memory_bytes" else values.median()
                    number = {"value": level, "n": len(values), "low": values.min(), "high": values.max()}
                    table = ratios[(ratios["metric"] == metric) & (ratios["context"] == size.context)]
                    beside = _ratio(table.set_index("label"), entry.label)
                    if metric == "peak_memory_bytes" and entry.label != REFERENCE and len(turns):
                        whole = turns[(turns["label"] == REFERENCE) & (turns["context"] == size.context)][metric].max()
                        beside = {"ratio": level / whole}  # NaN where SDPA has none
                    lost = mine.loc[mine[metric].isna(), "energy_null_reason"].dropna()
                    if len(lost) and metric == "energy_j_per_step":
                        reasons = "; ".join(sorted({REASONS[code] for code in lost}))
                        number["note"] = f"{len(lost)} of {len(mine)} rounds without joules: {reasons}"
                    yield _row(entry.label, entry.title, shown, profile, range_of="rounds", **where, **number, **beside)


def _of_steps(found: Steps, size: steps.Size) -> str:
    of = found.setting
    return f"{of.layers} layers of {of.width}, {size.batch_size} x {size.context:,} tokens, {of.precision}"


def _why_no_turn(mine: pd.DataFrame, metric: str) -> str:
    if len(mine) and metric == "energy_j_per_step":
        return "; ".join(sorted(REASONS[code] for code in set(mine["energy_null_reason"].dropna())))
    return "no round was run yet" if mine.empty else REASONS["no_gpu"]


def of_scaling(paths: list[Path], profile: str) -> Iterator[dict]:
    """Cost by context length: the geometric mean of the processes, and the ratio by `growth.ratios`."""
    found = scaling.load_all(paths[0].parent)
    points = scaling.frame(found)
    names = {one.label: f"{profile}/{scaling.file_name(one.label)}" for one in found}
    title = scaling.title(found)
    for metric, (what, scale, unit) in growth.SHOWN.items():
        shown = (what + {"ms": ", time", "J": ", energy"}.get(unit, ""), unit, scale, "lower")
        ratios = growth.ratios(points, metric, REFERENCE).set_index(["label", "context"])
        for point in points[points["metric"] == metric].itertuples():
            where = {
                "at": point.context, "at_unit": "tokens", "kind": "cost by length",
                "setting": title, "device": found[0].environment["device_name"], "records": [names[point.label]],
            }  # fmt: skip
            if math.isnan(point.value):
                reason = point.says or REASONS.get(point.reason, "no reason given")
                yield _row(point.label, point.title, shown, profile, why=f"not measured: {reason}", **where)
                continue
            number = {"value": point.value, "n": point.n}
            if point.n > 1:
                number |= {"low": min(point.processes), "high": max(point.processes), "range_of": "processes"}
            if (point.label, point.context) in ratios.index:
                row = ratios.loc[(point.label, point.context)]
                number |= {"ratio": row["ratio"], "ratio_low": row["low"], "ratio_high": row["high"]}
                if row["n"] != point.n:
                    number["note"] = f"the ratio is of {row['n']:.0f} processes"
            yield _row(point.label, point.title, shown, profile, **where, **number)


def of_probes(paths: list[Path], profile: str) -> Iterator[dict]:
    """What variants can do: the median of scaled accuracy over the seeds of the best rate, and the seeds' range.

    Cells of different devices, or of one task in different numbers of layers, are never joined. What has no median has
    the reason.
    """
    apart: dict[tuple, dict[int, list]] = {}
    for path in paths:
        cell = probe.load(path)
        asked = cell.environment["device_name"], cell.label, cell.setting.task, cell.setting.convolution
        apart.setdefault(asked, {}).setdefault(cell.setting.layers, []).append(cell)
    by_device: dict[tuple, list] = {}  # those of a label's fewest layers stand with the others, as in the notebook
    for (device, label, _, _), by_layers in apart.items():
        for layers, cells in by_layers.items():
            fewest = min(by_layers) == layers
            by_device.setdefault((device, None if fewest else (label, layers)), []).extend(cells)
    for (device, _), cells in by_device.items():
        yield from _of_cells(cells, device, profile)


def _of_cells(cells: list[probe.Probe], device: str, profile: str) -> Iterator[dict]:
    frame, shown = probe.frame(cells), capability.summary
    by_cell: dict[tuple, list[probe.Probe]] = {}
    for one in cells:
        by_cell.setdefault((one.label, one.title, one.setting.task, one.setting.convolution), []).append(one)
    found = (
        shown(frame)
        if frame["accuracy"].notna().any()
        else pd.DataFrame(columns=["label", "title", "task", "convolution"])
    )
    asked = capability.in_one_setting(frame)
    trained_of = capability.trained_for(asked).groupby([asked["task"], asked["convolution"]]).first().to_dict()
    unsolved = {name: capability.why_not_shown(frame, name) for name in set(found["task"]) & set(TASKS)}
    for (label, title, name, convolution), own in by_cell.items():
        task = TASKS.get(name)
        behind = "" if convolution else ", without a convolution before it"
        trained = trained_of.get((name, convolution))
        own = [one for one in own if one.setting.steps == trained] or own  # as `summary` has them
        behind += f", after {trained:,} steps" if task and trained not in (None, task.net.steps) else ""
        what = (f"{task.title if task else name}, scaled accuracy{behind}", "share", 1, "higher")
        unit = task.unit if task else "difficulty"
        rows = found[(found["label"] == label) & (found["task"] == name) & (found["convolution"] == convolution)]
        rows = rows[rows["title"] == title]
        net = own[0].setting
        setting = f"{net.layers} layer{'s' * (net.layers > 1)} of {net.width}, {net.steps} steps, the best of its rates"
        where = {"at_unit": unit, "kind": "small tasks", "setting": setting, "device": device}
        if rows.empty:
            outcomes = sorted({probe.OUTCOMES[one.outcome] for one in own if one.outcome != "measured"})
            said = "; ".join(outcomes) or "in another setting than most cells of this task"
            links = sorted(f"{profile}/{one.name}.json" for one in own)
            yield _row(label, title, what, profile, why=f"not measured: {said}", records=links, **where)
        for row in rows.itertuples():
            at_rate = [one for one in own if one.learning_rate == row.rate]
            lost = sum(one.outcome != "measured" for one in at_rate)
            notes = [f"{lost} of {len(at_rate)} seeds ended without a result"] if lost else []
            notes += [unsolved[name]] if unsolved.get(name) and convolution == task.net.convolution else []
            number = {"value": row.median, "low": row.low, "high": row.high, "n": row.n, "at": row.difficulty}
            links = sorted(f"{profile}/{one.name}.json" for one in at_rate)
            number |= {"range_of": f"seeds at rate {row.rate:g}", "note": "; ".join(notes) or None}
            yield _row(label, row.title, what, profile, records=links, **where, **number)


def computed() -> Iterator[dict]:
    """Every variant that has a file, and the usual patterns, by its own formulas: what needs no run."""
    for name in (*attention.variants(), *PATTERNS):
        for context in CONTEXTS:
            where = {"at": context, "at_unit": "tokens", "kind": "computed", "device": "any, by formula"}
            where["setting"] = "12 layers of 768, 12 heads, one sequence"
            try:
                label, title, number = by_formula(name, context)
            except UsageError as error:  # of one variant, so the others' pages stand
                for shown in COMPUTED.values():
                    yield _row(attention.label(name), attention.label(name), shown, "formulas", why=str(error), **where)
                continue
            for key, shown in COMPUTED.items():
                reference = by_formula(REFERENCE, context)[2][key]
                ratio = {} if name == REFERENCE else {"ratio": number[key] / reference}
                yield _row(label, title, shown, "formulas", value=number[key], **where, **ratio)


def by_formula(name: str, context: int) -> tuple[str, str, dict[str, float]]:
    """Label, title, and of GPT-2 small with one sequence of `context` tokens: bytes of the `cache` in bf16, FLOPs of
    all attention `core`s in a forward pass. Raises UsageError for a variant that GPT-2 small cannot have."""
    return _by_formula(name, context, attention.source_sha256(name))


@lru_cache(None)
def _by_formula(name: str, context: int, _sha256: str) -> tuple[str, str, dict[str, float]]:
    try:
        with without_weights():
            layers = attention.layers(name, gpt2_config(*SMALL.values(), context, 2))
        number = {
            "cache": sum(layer.cache_bytes(context, 2) for layer in layers),
            "core": sum(layer.core_flops(context) for layer in layers),
        }
    except Exception as error:  # of somebody's file
        said = record.printable(f"{type(error).__name__}: {error}", 200)
        raise UsageError(f"{name} has no count for GPT-2 small at {context} tokens: {said}") from None
    return attention.label(name), attention.title(layers, name), number
