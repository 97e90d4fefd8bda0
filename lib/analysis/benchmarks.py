"""Each variant beside its reference implementations: the tables of `lib.record.benchmark`."""

import math
import statistics

import numpy as np
import pandas as pd
from scipy import stats

from lib.record.benchmark import AGAIN, Benchmark


def title(found: Benchmark) -> str:
    """Where the turns were taken, and beside which versions; and what the ratios can say."""
    threads = f"{found.threads} thread{'s' if found.threads > 1 else ''}, fp32"
    where = threads if found.environment["device"] == "cpu" else "bf16"
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    return f"{found.environment['device_name']}, {where}; {versions}\n{caution(found)}"


def caution(found: Benchmark) -> str:
    """How many rounds the ratios rest on, that no verdict follows from them, and what no difference looked like."""
    rounds = sorted({len(taken_ms) for times_ms in found.times_ms.values() for taken_ms in times_ms.values()})
    n = f"n = {rounds[0]}" if len(rounds) == 1 else f"n = {rounds[0]} to {rounds[-1]}" if rounds else "n = 0"
    again = [
        statistics.median(times_ms[f"{name}{AGAIN}"]) / statistics.median(times_ms[name])
        for times_ms in found.times_ms.values()
        for name in found.reference_implementations
        if name in times_ms and f"{name}{AGAIN}" in times_ms
    ]
    noise = "no A/A control: noise unknown"
    if again:
        noise = f"a variant beside itself: {min(again):.3f} to {max(again):.3f}"
    return f"{n} rounds, each ratio by itself: no correction for how many there are, and no verdict; {noise}"


def ratios(times_ms: dict, implementations: dict) -> dict:
    """By variant: its minimum and median; for each the best reference implementation and the ratio of ours to it, or
    None without one."""
    found = {}
    for name in filter(times_ms.__contains__, implementations):
        found[name] = {}
        for key, of in (("minimum", min), ("median", statistics.median)):
            ours_ms = of(times_ms[name])
            ran = [other for other in implementations[name] if other in times_ms]
            best = min(ran, key=lambda other: of(times_ms[other]), default=None)
            found[name][f"{key}_ms"] = ours_ms
            found[name][f"{key}_best_other"] = best
            found[name][f"{key}_ratio"] = None if best is None else ours_ms / of(times_ms[best])
    return found


def exponents(found: Benchmark) -> dict[str, float]:
    """By variant: the slope of log minimum over log T between the two longest lengths, where it ran at both.
    Empty for a single length."""
    if len(found.times_ms) < 2:
        return {}
    (first, firsts_ms), (last, lasts_ms) = sorted(found.times_ms.items())[-2:]
    both = [name for name in found.reference_implementations if name in firsts_ms and name in lasts_ms]
    return {name: math.log(min(lasts_ms[name]) / min(firsts_ms[name]), last / first) for name in both}


def table(found: Benchmark) -> pd.DataFrame:
    """A row per length and variant: what it took, beside the reference implementation of the lowest minimum, and both
    ratios to that one. Above 1 ours is slower."""
    rows = []
    for context, times_ms in sorted(found.times_ms.items()):
        said = ratios(times_ms, found.reference_implementations)
        for name in found.reference_implementations:
            row = {"context": f"{context:,}", "variant": name}
            if name not in said:
                rows.append(row | {"minimum, ms": found.out_of_memory[context][name]})
                continue
            other = said[name]["minimum_best_other"]
            row |= {"minimum, ms": f"{said[name]['minimum_ms']:,.1f}", "median, ms": f"{said[name]['median_ms']:,.1f}"}
            row |= {
                "best reference implementation": other or "none ran",
                "its minimum, ms": f"{min(times_ms[other]):,.1f}" if other else "–",
            }
            for of, heading in ((min, "ratio of minima"), (statistics.median, "of medians")):
                row[heading] = f"{of(times_ms[name]) / of(times_ms[other]):.2f}" if other else "–"
            rows.append(row)
    return pd.DataFrame(rows).fillna("–")


def times(found: Benchmark) -> pd.DataFrame:
    """A row per length and turn, the quickest first, and what a variant's turn takes of it, as the mean over rounds.

    The rounds are the pairs of a paired t interval on the logarithm of the ratio (95 %).
    """
    rows = []
    for context, times_ms in sorted(found.times_ms.items()):
        for name in sorted(times_ms, key=lambda name: min(times_ms[name])):
            row = {"context": f"{context:,}", "turn": name, "rounds": len(times_ms[name])}
            median_ms = statistics.median(times_ms[name])
            row |= {"minimum, ms": f"{min(times_ms[name]):,.1f}", "median, ms": f"{median_ms:,.1f}"}
            for mine in (mine for mine in found.reference_implementations if mine in times_ms):
                took_turns = mine != name and len(times_ms[mine]) == len(times_ms[name])
                row[f"{mine} takes of it"] = paired(times_ms[mine], times_ms[name]) if took_turns else "–"
            rows.append(row)
    return pd.DataFrame(rows).fillna("–")


def paired(ours_ms: list[float], theirs_ms: list[float]) -> str:
    """The ratio of two that took turns, with its interval from two rounds on."""
    logs = np.array([math.log(ours / theirs) for ours, theirs in zip(ours_ms, theirs_ms, strict=True)])
    ratio = math.exp(logs.mean())
    if len(logs) < 2:
        return f"{ratio:.2f}"
    half = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs)
    low, high = ratio * math.exp(-half), ratio * math.exp(half)
    return f"{ratio:.2f} [{low:.2f}, {high:.2f}]"


def missing(found: Benchmark) -> pd.DataFrame:
    """The reference implementations that have no number, and why."""
    rows = [{"implementation": name, "context": "all", "why": why} for name, why in found.absent.items()]
    for context, failed in sorted(found.out_of_memory.items()):
        rows += [
            {"implementation": n, "context": f"{context:,}", "why": why}
            for n, why in failed.items()
            if n.removesuffix(AGAIN) not in found.reference_implementations
        ]
    return pd.DataFrame(rows, columns=["implementation", "context", "why"])
