"""Each variant beside what a user would pick otherwise: the record of scripts/benchmark_attention.py, and its table."""

import math
import statistics
from datetime import datetime
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator
from scipy import stats

from lib import record

Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Benchmark(record.Strict):
    """Turns that were taken in one process: `times_ms` and `out_of_memory` by length, then by who took the turn."""

    schema_version: Literal[1] = 1
    kind: Literal["peers"] = "peers"
    finished_at: datetime
    what: Literal["layer", "step"]
    batch: int
    compiled: bool
    vocabulary: int
    threads: int
    environment: dict
    versions: dict[str, str]  # of the peers' packages
    peers: dict[str, list[str]]  # by variant, whether they ran or not
    times_ms: dict[int, dict[str, list[Milliseconds]]]
    out_of_memory: dict[int, dict[str, str]]
    absent: dict[str, str]  # peers that are not installed, with the reason
    content_sha256: str = ""  # of all the rest; filled on writing

    @model_validator(mode="after")
    def _numbers_or_reasons(self):
        for context, times_ms in self.times_ms.items():
            silent = set(self.peers) - set(times_ms) - set(self.out_of_memory.get(context, {}))
            if silent:
                raise ValueError(f"no time and no reason for {', '.join(sorted(silent))} at {context}")
        return self


def title(found: Benchmark) -> str:
    """Where the turns were taken, and beside which versions, in one line."""
    threads = f"{found.threads} thread{'s' if found.threads > 1 else ''}, fp32"
    where = threads if found.environment["device"] == "cpu" else "bf16"
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    return f"{found.environment['device_name']}, {where}; {versions}"


def ratios(times_ms: dict, peers: dict) -> dict:
    """By variant: its minimum and median, and for each of the two the best peer and ours over its; None without one."""
    found = {}
    for name in filter(times_ms.__contains__, peers):
        found[name] = {}
        for key, of in (("minimum", min), ("median", statistics.median)):
            ours_ms = of(times_ms[name])
            ran = [peer for peer in peers[name] if peer in times_ms]
            best = min(ran, key=lambda peer: of(times_ms[peer]), default=None)
            found[name][f"{key}_ms"] = ours_ms
            found[name][f"{key}_best_peer"] = best
            found[name][f"{key}_ratio"] = None if best is None else ours_ms / of(times_ms[best])
    return found


def exponents(found: Benchmark) -> dict[str, float]:
    """By variant: the slope of log minimum over log T between the two longest lengths, where it ran at both."""
    (first, firsts_ms), (last, lasts_ms) = sorted(found.times_ms.items())[-2:]
    both = [name for name in found.peers if name in firsts_ms and name in lasts_ms]
    return {name: math.log(min(lasts_ms[name]) / min(firsts_ms[name]), last / first) for name in both}


def table(found: Benchmark) -> pd.DataFrame:
    """A row per length and variant: what it took, beside the best of its peers. Above 1 ours is slower."""
    rows = []
    for context, times_ms in sorted(found.times_ms.items()):
        said = ratios(times_ms, found.peers)
        for name in found.peers:
            row = {"context": f"{context:,}", "variant": name}
            if name not in said:
                rows.append(row | {"least ms": found.out_of_memory[context][name]})
                continue
            peer = said[name]["minimum_best_peer"]
            row |= {"least ms": f"{said[name]['minimum_ms']:,.1f}", "median ms": f"{said[name]['median_ms']:,.1f}"}
            row |= {"best peer": peer or "none ran", "its least ms": f"{min(times_ms[peer]):,.1f}" if peer else "–"}
            for key, heading in (("minimum", "ratio of leasts"), ("median", "of medians")):
                row[heading] = f"{said[name][f'{key}_ratio']:.2f}" if peer else "–"
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
            row |= {"least ms": f"{min(times_ms[name]):,.1f}", "median ms": f"{statistics.median(times_ms[name]):,.1f}"}
            for mine in (mine for mine in found.peers if mine in times_ms):
                row[f"{mine} takes of it"] = "–" if mine == name else paired(times_ms[mine], times_ms[name])
            rows.append(row)
    return pd.DataFrame(rows).fillna("–")


def paired(ours_ms: list[float], theirs_ms: list[float]) -> str:
    """The ratio of two that took turns, with its interval from two rounds on."""
    logs = np.array([math.log(ours / theirs) for ours, theirs in zip(ours_ms, theirs_ms, strict=True)])
    ratio = math.exp(logs.mean())
    if len(logs) < 2:
        return f"{ratio:.2f}"
    low, high = (math.exp(end) for end in stats.t.interval(0.95, len(logs) - 1, logs.mean(), stats.sem(logs)))
    return f"{ratio:.2f} [{low:.2f}, {high:.2f}]"


def missing(found: Benchmark) -> pd.DataFrame:
    """The peers that have no number, and why."""
    rows = [{"peer": name, "context": "all", "why": why} for name, why in found.absent.items()]
    for context, failed in sorted(found.out_of_memory.items()):
        rows += [
            {"peer": n, "context": f"{context:,}", "why": why} for n, why in failed.items() if n not in found.peers
        ]
    return pd.DataFrame(rows, columns=["peer", "context", "why"])
