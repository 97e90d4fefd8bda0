"""What a plan will take, from earlier records on the same device; where there are none it says so and guesses nothing.

A run is expected to take what the same variant took with the same settings. Where it was only measured with others, its
causal FLOP/s and joules per causal FLOP are taken over from the nearest of these, and the lines say so.
"""

import math
import warnings
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from lib import parameters, paths, record
from lib.errors import UsageError

SAME, SCALED = "as measured with these settings", "scaled by FLOPs from other settings"
LARGEST_VOCABULARY = 10**7  # a record that says more is of another model
ALIKE = ("attention", "options", "precision", "compile")  # where these differ, FLOP/s say nothing about each other


class Expected(NamedTuple):
    """The measured window of a run: seconds, joules (None where earlier runs have none), and where that is from."""

    time_s: float
    energy_j: float | None
    source: str


def earlier(folders=None) -> list[record.Record]:
    """The measured records of `folders`, by default of `out_folder()` and all published ones. Raises UsageError."""
    missing = [str(folder) for folder in folders or () if not Path(folder).is_dir()]
    if missing:
        raise UsageError(f"there is no folder {missing[0]} with earlier records")
    folders = folders or [paths.out_folder(), *sorted((paths.ROOT / "records").glob("*/"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # costs by length are no run records; what is damaged is said where it counts
        found = [one for folder in folders for one in record.load_all(folder)]
    return [one for one in found if one.provenance == "measured"]


def lines(runs: list[dict], records: list[record.Record]) -> list[str]:
    """What runs of `lib.study.plan` will take, for each device that there are earlier records from."""
    if not runs:
        return ["nothing is left to run"]
    names = [parameters.display_name(run["values"]) for run in runs]
    variants = {name: run["values"] for name, run in zip(names, runs, strict=True)}
    said = []
    for device in sorted({one.environment["device_name"] for one in records}):
        here = [one for one in records if one.environment["device_name"] == device]
        by_variant = {name: expect(values, here) for name, values in variants.items()}
        if any(by_variant.values()):
            said += [f"to be expected on {device}:", *_sums([by_variant[name] for name in names])]
            unknown = [name for name, found in by_variant.items() if found is None]
            said += [f"  unknown, never run there: {', '.join(unknown)}"] if unknown else []
            beside_s = beside_window(here, parameters.setting(runs[0]["values"]))
            said += [f"  beside its window such a run took {_time(beside_s)} more (median)"] if beside_s else []
    return said or ["to be expected: unknown, there is no earlier record of these variants"]


def _sums(expected: list[Expected | None]) -> list[str]:
    said = []
    for source in (SAME, SCALED):
        found = [one for one in expected if one and one.source == source]
        joules = [one.energy_j for one in found if one.energy_j is not None]
        energy = f"{_energy(sum(joules))} for {len(joules)} of them" if joules else "energy never measured"
        if found:
            said.append(f"  {len(found)} windows {source}: {_time(sum(one.time_s for one in found))}, {energy}")
    return said


def expect(values: dict, records: list[record.Record]) -> Expected | None:
    """A run's window from `records` of one device; None where they do not tell."""
    alike = [one for one in records if all(one.parameters.get(name) == values[name] for name in ALIKE)]
    same = [one.metrics for one in alike if one.setting == parameters.setting(values)]
    if same:
        joules = [found.energy_j for found in same if found.energy_j is not None]
        return Expected(fmean(found.time_s for found in same), fmean(joules) if joules else None, SAME)
    tokenizer = Path(values["tokenizer"]).name  # the vocabulary is not known before the data are read
    usable = [one for one in alike if Path(one.parameters["tokenizer"]).name == tokenizer]
    counted = (lambda one: one.metrics.causal_flops_per_s, lambda one: one.metrics.forward_flops_causal, _vocabulary)
    usable = [one for one in usable if all((count(one) or 0) > 0 for count in counted)]
    if not usable:
        return None
    forward = _forward_flops(values, _vocabulary(usable[-1]))
    nearest = min(usable, key=lambda one: abs(math.log(one.metrics.forward_flops_causal / forward))).metrics
    rows = values["batch_size"] * values["accumulation"] * values["steps_per_epoch"] * values["epochs"]
    time_s = 3 * forward * rows / nearest.causal_flops_per_s  # backward costs two forwards
    energy_j = None if nearest.energy_j is None else nearest.energy_j * time_s / nearest.time_s
    return Expected(time_s, energy_j, SCALED)


def _meta_model(values: dict, vocabulary: int):
    from lib.model import config_of, meta_model

    return meta_model(values["attention"], config_of(values, vocabulary), **values["options"])


def _forward_flops(values: dict, vocabulary: int) -> float:
    from lib.measure import flops

    return flops.analytic(_meta_model(values, vocabulary), values["context"])["forward_flops_causal"]


def _vocabulary(one: record.Record) -> int | None:
    """Told by the parameters that a record's model has; None where they do not fit its variant as it is now."""
    try:
        rest = sum(weight.numel() for weight in _meta_model(one.parameters, 1).parameters())
    except (ValueError, TypeError, RuntimeError):
        return None
    more, left = divmod(one.metrics.parameters - rest, one.parameters["width"])
    return None if left or not 1 <= more < LARGEST_VOCABULARY else more + 1


def beside_window(records: list[record.Record], setting: str) -> float | None:
    """Median seconds of a run outside its window: between two records that follow each other in a block."""
    seated = [one for one in records if one.setting == setting and one.study.session]
    seated.sort(key=lambda one: (one.study.session, one.study.block, one.study.position))
    beside_s = [
        (after.finished_at - before.finished_at).total_seconds() - after.metrics.time_s
        for before, after in pairwise(seated)
        if (after.study.session, after.study.block) == (before.study.session, before.study.block)
        and after.study.position == before.study.position + 1
    ]
    return median(beside_s) if beside_s else None


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def _energy(joules: float) -> str:
    return f"{joules / 3600:.0f} Wh" if joules < 3.6e6 else f"{joules / 3.6e6:.1f} kWh"
