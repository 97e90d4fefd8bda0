"""The record of scripts/benchmark_attention.py: each variant beside what a user would pick otherwise."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lib.record.schema import Strict

AGAIN = ", again (A/A)"  # behind a variant's name: its turn taken a second time in each round

Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Benchmark(Strict):
    """Turns that were taken in one process: `times_ms` and `out_of_memory` by length, then by who took the turn."""

    schema_version: Literal[2] = 2
    kind: Literal["benchmark"] = "benchmark"
    finished_at: datetime
    what: Literal["layer", "step"]
    batch: int
    compiled: bool
    vocabulary: int
    threads: int
    environment: dict
    versions: dict[str, str]  # of the reference implementations' packages
    reference_implementations: dict[str, list[str]]  # by variant, whether they ran or not
    times_ms: dict[int, dict[str, list[Milliseconds]]]
    out_of_memory: dict[int, dict[str, str]]
    absent: dict[str, str]  # reference implementations that are not installed, with the reason
    content_sha256: str = ""  # of all the rest; filled on writing

    @model_validator(mode="after")
    def _numbers_or_reasons(self):
        for context, times_ms in self.times_ms.items():
            silent = set(self.reference_implementations) - set(times_ms) - set(self.out_of_memory.get(context, {}))
            if silent:
                raise ValueError(f"no time and no reason for {', '.join(sorted(silent))} at {context}")
        return self
