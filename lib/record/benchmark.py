"""The record of scripts/benchmark_attention.py: each variant beside what a user would pick otherwise."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lib.record.schema import ARCHITECTURES, Count, Environment, Moment, Strict, Text

AGAIN = ", again (A/A)"  # behind a variant's name: its turn taken a second time in each round

Milliseconds = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
Context = Annotated[int, Field(ge=1, le=2**27)]


class Benchmark(Strict):
    """Turns that were taken in one process: `times_ms` and `out_of_memory` by length, then by who took the turn."""

    schema_version: Literal[2] = 2
    kind: Literal["benchmark"] = "benchmark"
    finished_at: Moment
    what: Literal["layer", "step"]
    batch: Count
    compiled: bool
    architecture: Literal[ARCHITECTURES] = "gpt2"  # of `step`
    vocabulary: Count
    threads: Count
    environment: Environment
    versions: dict[Text, Text]  # of the reference implementations' packages
    reference_implementations: dict[Text, list[Text]]  # by variant, whether they ran or not
    times_ms: dict[Context, dict[Text, Annotated[list[Milliseconds], Field(min_length=1, max_length=10**5)]]]
    out_of_memory: dict[Context, dict[Text, Text]]
    absent: dict[Text, Text]  # reference implementations that are not installed, with the reason
    content_sha256: str = ""  # of all the rest; filled on writing

    @model_validator(mode="after")
    def _numbers_or_reasons(self):
        for context, times_ms in self.times_ms.items():
            silent = set(self.reference_implementations) - set(times_ms) - set(self.out_of_memory.get(context, {}))
            if silent:
                raise ValueError(f"no time and no reason for {', '.join(sorted(silent))} at {context}")
        return self
