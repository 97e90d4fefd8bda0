"""Each variant beside what a user would pick otherwise: the record of scripts/benchmark_attention.py, and its table."""

import json
import math
import statistics
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import Field, ValidationError

from lib import record
from lib.errors import UsageError

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


def write(found: Benchmark, path: Path) -> Path:
    """Writes a record, whole or not at all. Raises UsageError where it cannot be written."""
    content = json.loads(found.model_dump_json())
    text = json.dumps(content | {"content_sha256": record.checksum(content)}, indent=1) + "\n"
    try:
        return record.write_whole(path, text)
    except OSError as error:
        raise UsageError(f"{path.name} cannot be written: {error.strerror}; name another file") from error


def load(path: Path) -> Benchmark:
    """A record. Raises UsageError, with what is wrong in one line, where the file is none or was changed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = Benchmark.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise UsageError(f"{path.name} is no record of a benchmark: {where}: {first['msg']}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path.name} cannot be read: {error}") from None
    if found.content_sha256 != record.checksum(content):
        raise UsageError(f"{path.name} was changed after it was written: its checksum does not fit")
    return found


def title(found: Benchmark) -> str:
    """Where the turns were taken, and beside which versions, in one line."""
    where = f"{found.threads} threads" if found.environment["device"] == "cpu" else "bf16"
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
        for name, said in ratios(times_ms, found.peers).items():
            peer = said["minimum_best_peer"]
            rows.append(
                {
                    "context": f"{context:,}",
                    "variant": name,
                    "least ms": f"{said['minimum_ms']:,.1f}",
                    "median ms": f"{said['median_ms']:,.1f}",
                    "best peer": peer or "none ran",
                    "its least ms": f"{min(times_ms[peer]):,.1f}" if peer else "–",
                    "ratio of leasts": f"{said['minimum_ratio']:.2f}" if peer else "–",
                    "of medians": f"{said['median_ratio']:.2f}" if peer else "–",
                }
            )
    return pd.DataFrame(rows)
