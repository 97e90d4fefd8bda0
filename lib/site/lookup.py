"""What a variant costs and can do, a row per number: the table that the site filters, sorts and draws.

Each row is a level with its n, and where it was paired with SDPA's the ratio, its 95 % interval and its verdict, as
`lib.analysis` works them out for the notebooks; or the reason why there is none. A folder of records is one study: its
numbers are never joined with those of another.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pandas as pd
import torch

from lib import attention, record
from lib.analysis import capability, compare, growth
from lib.analysis import steps as compared_steps
from lib.analysis.notes import why
from lib.analysis.style import GIB, MIB, labels, titles
from lib.attention import REFERENCE
from lib.data.tasks import TASKS
from lib.errors import UsageError
from lib.model import gpt2_config
from lib.record import REASONS, folders, probe, scaling, steps
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
    "low", "high", "range_of", "n", "ratio", "ratio_low", "ratio_high", "verdict", "certified", "why", "records",
)  # fmt: skip # of the table; every row has them all, None where there is nothing to say


def rows(records: Path) -> pd.DataFrame:
    """`COLUMNS` of every study below a folder of records, and of the formulas. Raises UsageError as `held` does."""
    found = list(computed())
    for folder, files in held(records, lambda path, kind, _: (path, kind)).items():
        found += of_folder(files, folder.relative_to(records).as_posix())
    return pd.DataFrame(found, columns=list(COLUMNS)).astype({"at": float, "value": float, "n": "Int64"})


def held(records: Path, keep: Callable) -> dict[Path, list]:
    """By folder what is to be kept of each record (`folders.look`). Raises UsageError for one that cannot be read: a
    site is not made of half of what lies there."""
    looked = list(folders.look([records], keep))
    wrong = [str(one) for found in looked for one in found.wrong]
    if wrong:
        more = f" ({len(wrong) - 1} more: `python -m lib.record` names all)" if len(wrong) > 1 else ""
        raise UsageError(f"{wrong[0]}{more}")
    return {found.path: found.kept for found in looked if found.kept}


def of_folder(files: list[tuple[Path, str]], profile: str) -> Iterator[dict]:
    """The rows of the records of a folder; benchmarks beside others' code, and failed runs, have none."""
    for kind in dict.fromkeys(kind for _, kind in files):
        makes = {"run": of_runs, "steps": of_steps, "scaling": of_scaling, "probe": of_probes}.get(kind)
        if makes is not None:
            yield from makes([path for path, found in files if found == kind], profile)


def _row(label: str, title: str, shown: tuple, profile: str, **more) -> dict:
    what, unit, scale, better = shown
    row = dict.fromkeys(COLUMNS) | {"label": label, "variant": title, "what": what, "unit": unit, "better": better}
    row |= {"profile": profile, "records": []} | more
    for name in ("value", "low", "high"):
        row[name] = None if row[name] is None or math.isnan(row[name]) else row[name] / scale
    numbers = ("value", "low", "high", "ratio", "ratio_low", "ratio_high", "at", "n")
    return row | {name: None if row[name] is None or pd.isna(row[name]) else float(row[name]) for name in numbers}


def of_runs(paths: list[Path], profile: str) -> Iterator[dict]:
    """Whole training runs: levels and ratios by `compare.ratios`, of each group of runs that may be compared."""
    runs = record.read(paths[0].parent)
    for group in compare.groups(runs):
        own, called = group.runs, titles(group.runs)
        certified = own.groupby("label")["certified"].all()
        for metric, shown in RUNS.items():
            compared = compare.ratios(own, metric) if metric not in compare.LOSSES else pd.DataFrame({"label": []})
            table = compared.set_index("label")
            for label in labels(own):
                mine = own[own["label"] == label]
                where = {
                    "at": mine["parameter_values"].iloc[0]["context"], "at_unit": "tokens", "kind": "training runs",
                    "setting": group.title,
                    "device": mine["device_name"].iloc[0], "certified": bool(certified[label]),
                    "records": [f"{profile}/{name}.json" for name in sorted(mine["name"])],
                }  # fmt: skip
                values = mine[metric].dropna()
                if values.empty:
                    yield _row(label, called[label], shown, profile, why=why(mine, metric), **where)
                    continue
                number = {"value": values.mean(), "n": len(values)}
                if len(values) > 1:
                    number |= {"low": values.min(), "high": values.max(), "range_of": "runs"}
                yield _row(label, called[label], shown, profile, **where, **number, **_ratio(table, label))


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
            yield _row(point.label, point.title, shown, profile, **where, **number)


def of_probes(paths: list[Path], profile: str) -> Iterator[dict]:
    """What variants can do: the median of scaled accuracy over the seeds of the best rate, and the seeds' range."""
    cells = probe.load_all(paths[0].parent)
    files: dict[tuple, list[str]] = {}
    for one in cells:
        files.setdefault((one.label, one.setting.task, one.setting.convolution, one.learning_rate), []).append(one.name)
    device = cells[0].environment["device_name"]
    for row in capability.summary(probe.frame(cells)).itertuples():
        task = TASKS.get(row.task)
        behind = "" if row.convolution else ", without a convolution before it"
        shown = (f"{task.title if task else row.task}, scaled accuracy{behind}", "share", 1, "higher")
        names = files[(row.label, row.task, row.convolution, row.rate)]
        where = {
            "at": row.difficulty, "at_unit": task.unit if task else "difficulty", "kind": "small tasks",
            "setting": f"best rate: {row.rate:g}", "device": device,
            "records": [f"{profile}/{name}.json" for name in sorted(names)],
        }  # fmt: skip
        number = {"value": row.median, "low": row.low, "high": row.high, "range_of": "seeds", "n": row.n}
        yield _row(row.label, row.title, shown, profile, **where, **number)


def computed() -> Iterator[dict]:
    """Every variant that has a file, and the usual patterns, by its own formulas: what needs no run."""
    for name in (*attention.variants(), *PATTERNS):
        for context in CONTEXTS:
            label, title, number = by_formula(name, context)
            for key, shown in COMPUTED.items():
                reference = by_formula(REFERENCE, context)[2][key]
                where = {"at": context, "at_unit": "tokens", "kind": "computed", "device": "any, by formula"}
                where["setting"] = "12 layers of 768, 12 heads, one sequence"
                ratio = {} if name == REFERENCE else {"ratio": number[key] / reference}
                yield _row(label, title, shown, "formulas", value=number[key], **where, **ratio)


def by_formula(name: str, context: int) -> tuple[str, str, dict[str, float]]:
    """Label, title, and of GPT-2 small with one sequence of `context` tokens: bytes of the `cache` in bf16, FLOPs of
    all attention `core`s in a forward pass. Raises UsageError for a variant that GPT-2 small cannot have."""
    return _by_formula(name, context, attention.source_sha256(name))


@lru_cache(None)
def _by_formula(name: str, context: int, _sha256: str) -> tuple[str, str, dict[str, float]]:
    try:
        with torch.device("meta"):
            layers = attention.layers(name, gpt2_config(*SMALL.values(), context, 2))
        number = {
            "cache": sum(layer.cache_bytes(context, 2) for layer in layers),
            "core": sum(layer.core_flops(context) for layer in layers),
        }
    except Exception as error:  # of somebody's file
        said = record.printable(f"{type(error).__name__}: {error}", 200)
        raise UsageError(f"{name} has no count for GPT-2 small at {context} tokens: {said}") from None
    return attention.label(name), attention.title(layers, name), number
