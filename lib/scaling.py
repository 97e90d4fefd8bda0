"""`python -m lib.scaling [params/scaling_long.yaml] --write FOLDER`: what each variant costs, by context length.

Two parts for each length T: one attention `layer` forward and backward, with the most memory that it takes on top of
its weights and input, and a whole small `model` that reads T tokens (prefill) and writes some (decode). Every sample
comes from a process of its own, so that its memory is nobody else's and running out of it ends nothing else; rounds
go through all variants at a length before the next. Memory or time that ran out is a point as well.

One JSON file per variant, written after each sample; what it holds is not measured again.
"""

import argparse
import contextlib
import inspect
import math
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import pandas as pd
import psutil
import torch
from pydantic import Field, ValidationError, field_validator, model_validator

from lib import attention, energy, environment, measure, parameters, record, study, training
from lib.errors import OutOfMemory, UsageError, one_sentence_when_out_of_memory
from lib.model import build_model, gpt2_config
from lib.record import REASONS, Strict

METRICS = {
    "layer": ("forward_backward_s", "peak_bytes", "forward_backward_energy_j"),
    "model": ("prefill_s", "decode_s_per_token", "cache_bytes", "prefill_energy_j", "decode_energy_j_per_token"),
}
ENERGY = {part: tuple(name for name in metrics if "energy" in name) for part, metrics in METRICS.items()}
PART = {metric: part for part, metrics in METRICS.items() for metric in metrics}
OUTCOMES = {"measured": "measured", "out_of_memory": "out of memory", "over_time": "over the time limit"}
WARM_UP = 16  # tokens that start threads and libraries, before memory is looked at
KEPT_FREE = 0.1  # of the free memory, for everything else that runs on a CPU's machine

Count = Annotated[int, Field(ge=1)]
Sample = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Setting(Strict):
    """What all points of a folder have in common."""

    layers: Count  # of the model; the layer is one of them
    width: Count
    heads: Count
    vocabulary: Annotated[int, Field(ge=2)]
    new_tokens: Count
    repeats: Count  # timed in each process, after a warm-up
    energy_window_s: Seconds
    device: Literal[parameters.CHOICES["device"]]
    precision: Literal[parameters.CHOICES["precision"]]


class Plan(Setting):
    """What is to be measured; made by `plan`."""

    variants: list[str | dict]
    contexts: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)]
    rounds: Count  # processes for each point, in turns over the variants
    time_limit_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    @field_validator("contexts")
    @classmethod
    def ascending(cls, contexts):
        if sorted(set(contexts)) != contexts:
            raise ValueError("lengths must ascend")
        return contexts


class Point(Strict):
    """Samples of one part at one length, from `rounds` processes; or why there are none."""

    part: Literal[tuple(METRICS)]
    context: Annotated[int, Field(ge=2)]
    outcome: Literal[tuple(OUTCOMES)]
    says: str = ""
    rounds: Annotated[int, Field(ge=0)] = 0
    samples: dict[str, Annotated[list[Sample], Field(min_length=1)]] = Field(default_factory=dict)
    null_reasons: dict[str, Literal[tuple(REASONS)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def all_or_nothing(self):
        named = sorted([*self.samples, *self.null_reasons])
        if self.outcome == "measured":
            if named != sorted(METRICS[self.part]) or not self.rounds:
                raise ValueError(f"each metric of a {self.part} has samples or a reason, and no other has")
        elif named or self.rounds or not self.says:
            raise ValueError("a point that was not measured says why, and holds nothing else")
        return self

    def lacks(self, turn: int) -> bool:
        """Whether the round `turn`, from 0, is still to be measured; what ran out is not tried again."""
        return self.outcome == "measured" and self.rounds <= turn

    def joined(self, other: "Point") -> "Point":
        """Both points' samples; a metric that either lacks, both lack. What ran out once is a point that ran out."""
        if other.outcome != "measured":
            return other
        reasons = self.null_reasons | other.null_reasons
        shared = [metric for metric in METRICS[self.part] if metric not in reasons]
        both = {metric: self.samples[metric] + other.samples[metric] for metric in shared}
        return self.model_copy(update={"rounds": self.rounds + other.rounds, "samples": both, "null_reasons": reasons})


class Scaling(Strict):
    """One variant's points: the content of a file."""

    schema_version: Literal[1] = 1
    kind: Literal["scaling"] = "scaling"
    provenance: Literal["measured", "synthetic"]
    finished_at: datetime
    label: str
    attention: str
    attention_sha256: str
    knobs: dict
    setting: Setting
    environment: dict
    points: list[Point]
    content_sha256: str = ""  # of all the rest; filled on writing

    @model_validator(mode="after")
    def each_point_once_and_in_order(self):
        places = [(point.part, point.context) for point in self.points]
        if sorted(set(places)) != places:
            raise ValueError("points stand by part and context, each once")
        return self

    def point(self, part: str, context: int) -> Point | None:
        return next((point for point in self.points if (point.part, point.context) == (part, context)), None)

    def with_point(self, point: Point) -> "Scaling":
        before = self.point(point.part, point.context)
        others = [other for other in self.points if other is not before]
        points = sorted([*others, before.joined(point) if before else point], key=lambda p: (p.part, p.context))
        return self.model_copy(update={"points": points, "finished_at": record.now()})


def write(found: Scaling, folder: Path) -> Path:
    """Writes a variant's file, whole or not at all; returns its path. Raises UsageError where it cannot be written."""
    return record.write_checked(found, folder / f"{found.label}.json")


def load(path: Path) -> Scaling:
    """One variant's file. Raises UsageError, in one line, where it is none or was changed."""
    return record.read_checked(Scaling, path)


def load_all(folder: Path) -> list[Scaling]:
    """The variants of a folder. Raises UsageError where there is none, or they are not of one setting and machine."""
    found = [load(path) for path in sorted(Path(folder).glob("*.json"))]
    found = [one for one in found if one.provenance == "measured"]
    if not found:
        raise UsageError(f"there is no record in {Path(folder).name}/; `python -m lib.scaling --write` makes some")
    if any(_machine(one) != _machine(found[0]) for one in found):
        raise UsageError(f"the records in {Path(folder).name}/ differ in setting or machine; keep them in two folders")
    return found


def _machine(found: Scaling) -> tuple:
    uuid = (found.environment.get("gpu") or {}).get("uuid")
    return found.setting, found.environment["device_name"], found.environment["torch_threads"], uuid


def title(found: list[Scaling]) -> str:
    """Of what and where the points are, in one line."""
    setting, facts = found[0].setting, found[0].environment
    size = f"{setting.layers} layers x {setting.width}, {setting.heads} heads, {setting.precision}, batch 1"
    where = f"{facts['torch_threads']} threads" if facts["device"] == "cpu" else f"torch {facts['packages']['torch']}"
    return f"{size}, on {facts['device_name']} ({where})"


def frame(found: list[Scaling]) -> pd.DataFrame:
    """A row per variant, metric and length: `samples`, their `median` and `least`, their number `n`; None and NaN
    where the point was not measured (`outcome`, `says`) or the metric was not (`reason`)."""
    rows = [
        {
            "label": one.label,
            "metric": metric,
            "context": point.context,
            "outcome": point.outcome,
            "says": point.says,
            "reason": point.null_reasons.get(metric),
            "samples": samples,
            "median": statistics.median(samples) if samples else math.nan,
            "least": min(samples, default=math.nan),
            "n": len(samples),
        }
        for one in found
        for point in one.points
        for metric in METRICS[point.part]
        for samples in [point.samples.get(metric, [])]
    ]
    return pd.DataFrame(rows)


def plan(values: dict) -> Plan:
    """The plan in a notebook's `globals()`, or in a profile's values. Raises UsageError for what cannot be measured."""
    try:
        made = Plan(**{name: values[name] for name in Plan.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    for entry in _entries(made):
        sizes = {"layers": made.layers, "width": made.width, "heads": made.heads, "positions": made.contexts[-1]}
        parameters.check_attention(SimpleNamespace(attention=entry.attention, knobs=entry.knobs, **sizes))
    if made.width % made.heads:
        raise UsageError(f"heads must divide width: {made.heads} heads do not divide {made.width}")
    if made.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device is 'cuda', but PyTorch finds no CUDA device here; use device 'auto' or 'cpu'")
    return made


def _entries(made: Plan) -> list[SimpleNamespace]:
    """Label, attention and knobs of each variant; all that have a file where none is named."""
    entries = []
    for given in made.variants or attention.variants():
        given = given if isinstance(given, dict) else {"attention": given}
        parameters.check_names(given, ("attention", "label", "knobs"))
        if "attention" not in given:
            raise UsageError("each of variants needs its attention, a name or a .py file")
        label = parameters.display_name({"label": "", **given})
        entries.append(SimpleNamespace(**{"knobs": {}, **given, "label": label}))
    if len({entry.label for entry in entries}) < len(entries):
        raise UsageError("two variants have the same label; give one of them another")
    return entries


def measure_all(made: Plan, folder: Path, say=print) -> list[str]:
    """Measures what `folder` lacks of the plan, telling `say` of each sample; returns what ended in an error.

    Raises UsageError where the folder holds points of another setting, machine or definition.
    """
    facts = _apart(_facts, made, limit_s=math.inf)
    setting = Setting(**{n: getattr(made, n) for n in Setting.model_fields} | facts.pop("setting"))
    found = {}
    for entry in _entries(made):
        new = Scaling(
            finished_at=record.now(), label=entry.label, attention=_portable(entry.attention), knobs=entry.knobs,
            attention_sha256=attention.source_sha256(entry.attention), setting=setting, points=[], **facts,
        )  # fmt: skip
        found[entry.label] = _resumed(new, folder)
    failed = []
    for turn in range(made.rounds):
        order = _entries(made)[:: 1 if turn % 2 == 0 else -1]
        for context, part, entry in ((c, p, e) for c in made.contexts for p in METRICS for e in order):
            done = found[entry.label].point(part, context)
            what = f"{entry.label}, {part}, {context} tokens"
            if (done and not done.lacks(turn)) or what in failed:
                continue
            point = _ended_before(found[entry.label], part, context)
            if point is None:
                answer = _apart(_sample, setting, entry, part, context, limit_s=made.time_limit_s)
                if answer["outcome"] == "error":
                    failed.append(what)
                    say(f"FAILED {what}: {answer['says']}")
                    continue
                point = Point(part=part, context=context, **answer)
            found[entry.label] = found[entry.label].with_point(point)
            write(found[entry.label], folder)
            say(f"round {turn + 1}: {what}: {_short(point)}")
    return failed


def measured_here(made: Plan, write_folder: str) -> pd.DataFrame:
    """The plan's points as a `frame`, kept in `write_folder` (from the repository's root) or, if empty, nowhere."""

    def say(line):
        if line.startswith("FAILED"):
            print(line)

    with tempfile.TemporaryDirectory() as scratch:
        folder = record.from_root(write_folder) if write_folder else Path(scratch)
        measure_all(made, folder, say)
        return frame(load_all(folder))


def _portable(name: str) -> str:
    return Path(os.path.relpath(name, record.ROOT)).as_posix() if Path(name).is_absolute() else name


def _short(point: Point) -> str:
    time_s = point.samples.get(METRICS[point.part][0])
    return f"{time_s[-1] * 1e3:.1f} ms" if time_s else point.says


def _resumed(new: Scaling, folder: Path) -> Scaling:
    """What the folder holds of the same, or `new`."""
    path = folder / f"{new.label}.json"
    if not path.exists():
        return new
    old = load(path)
    same = _machine(old) == _machine(new)
    if not same or (old.attention_sha256, old.knobs) != (new.attention_sha256, new.knobs):
        raise UsageError(f"{path.name} holds points of another setting, machine or definition; name another folder")
    return old.model_copy(update={"environment": new.environment})


def _ended_before(found: Scaling, part: str, context: int) -> Point | None:
    """A length is not tried where a shorter one took too long."""
    over = [p.context for p in found.points if p.part == part and p.context < context and p.outcome == "over_time"]
    if not over:
        return None
    says = f"not tried: {min(over):,} tokens were over the time limit"
    return Point(part=part, context=context, outcome="over_time", says=says)


def _apart(work, *words, limit_s: float):
    """What `work(*words)` returns, run in a new process; or a dict with the `outcome` that ended it.

    The process is forked from a server that has imported all this but has run none of it: forking takes
    milliseconds, and nobody's threads, memory or CUDA are inherited.
    """
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(["lib.study", "lib.training"])
    receiving, sending = start.Pipe(duplex=False)
    killed_before = study.killed_for_memory()
    process = start.Process(target=_answer, args=(sending, work, words), daemon=True)
    process.start()
    sending.close()
    try:
        if not receiving.poll(None if limit_s == math.inf else limit_s):
            return {"outcome": "over_time", "says": f"not done within {limit_s:g} s"}
        return receiving.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL and study.killed_for_memory() > killed_before:
            return {"outcome": "out_of_memory", "says": "the system killed the process because memory had run out"}
        return {"outcome": "error", "says": f"its process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        receiving.close()


def _answer(sending, work, words) -> None:
    try:
        answer = work(*words)
    except OutOfMemory as error:
        answer = {"outcome": "out_of_memory", "says": str(error.__cause__).strip().splitlines()[0][:200]}
    except Exception as error:
        says = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        answer = {"outcome": "error", "says": says}
    sending.send(answer)


def _facts(made: Plan) -> dict:
    device = training.choose_device(made.device)
    chosen = {"device": device.type, "precision": training.resolve_precision(made.precision, device)}
    facts = environment.describe(device)
    return {"setting": chosen, "environment": facts, "provenance": energy.provenance()}


@one_sentence_when_out_of_memory()
def _sample(setting: Setting, entry: SimpleNamespace, part: str, context: int) -> dict:
    """One sample of a part at a length, in the process that this is called in."""
    device = training.choose_device(setting.device)
    if device.type == "cpu":
        _spare_the_machine()
    found, reasons = {"layer": _layer, "model": _model}[part](setting, entry, context, device)
    samples = {metric: values for metric, values in found.items() if metric not in reasons}
    return {"outcome": "measured", "rounds": 1, "samples": samples, "null_reasons": reasons}


def _spare_the_machine() -> None:
    """An allocation beyond the memory that is free now fails, in this process alone, instead of ending others'."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # systems other than Linux
        held = psutil.Process().memory_info().data
        limit = held + int((1 - KEPT_FREE) * psutil.virtual_memory().available)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _layer(setting: Setting, entry, context: int, device) -> tuple[dict, dict]:
    """Lists of samples by metric, and the reasons for the metrics that have none."""
    config = gpt2_config(setting.layers, setting.width, setting.heads, context, setting.vocabulary)
    config.n_layer = 1
    layer = build_model(entry.attention, config, **entry.knobs).transformer.h[0].attn.to(device)
    autocast = training.autocast(setting.precision, device)

    def work(hidden, gradient):
        with autocast():
            output = layer(hidden)[0]
        output.backward(gradient.to(output.dtype))
        hidden.grad = None
        layer.zero_grad(set_to_none=True)

    work(*_inputs(WARM_UP, setting.width, device))
    given = _inputs(context, setting.width, device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    meter = measure.Meter(device)
    with meter.stretch():
        work(*given)  # the warm-up at this length
    values, reasons = meter.metrics()
    peak = "peak_memory_bytes" if device.type == "cuda" else "peak_resident_bytes"
    watch = measure.Stopwatch(device)
    for _ in range(setting.repeats):
        with watch:
            work(*given)
    joules = energy.Reading(None, _uncounted(setting, device))
    if joules.reason is None:
        joules = measure.energy_of(lambda: work(*given), device, setting.energy_window_s)
    found = {
        "forward_backward_s": watch.seconds,
        "peak_bytes": [(values[peak] or 0) - held],
        "forward_backward_energy_j": [joules.joules],
    }
    nulls = {"peak_bytes": reasons.get(peak), "forward_backward_energy_j": joules.reason}
    return found, {metric: reason for metric, reason in nulls.items() if reason}


def _inputs(context: int, width: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and their output's gradient, (1, T, C) each, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    hidden, gradient = torch.randn(2, 1, context, width, generator=generator).to(device)
    return hidden.requires_grad_(), gradient


def _model(setting: Setting, entry, context: int, device) -> tuple[dict, dict]:
    positions = context + setting.new_tokens
    config = gpt2_config(setting.layers, setting.width, setting.heads, positions, setting.vocabulary)
    model = build_model(entry.attention, config, **entry.knobs).to(device)
    autocast = training.autocast(setting.precision, device)
    runs = measure.generations(model, context, setting.new_tokens, setting.repeats, autocast)
    found = {
        "prefill_s": [run["prefill_s"] for run in runs],
        "decode_s_per_token": [run["decode_s"] / setting.new_tokens for run in runs],
        "cache_bytes": [measure.cache_bytes(runs[-1]["cache"])],
    }
    del runs
    reason = _uncounted(setting, device)
    if reason is None:
        words = ([context], setting.new_tokens, setting.energy_window_s, autocast)
        (joules,) = measure.inference_energy(model, *words)
        found |= {metric: [joules[metric]] for metric in ENERGY["model"]}
        reason = joules["energy_null_reason"]
    return found, dict.fromkeys(ENERGY["model"], reason) if reason else {}


def _uncounted(setting: Setting, device) -> str | None:
    """Why joules are not worth a try."""
    return energy.gpu_counter(device).reason or (None if setting.energy_window_s else "not_asked_for")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.scaling", description=inspect.cleandoc(__doc__))
    parser.add_argument("profile", nargs="?", help="a YAML file of overrides; without one the notebook's defaults")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="where the records go")
    options = parser.parse_args(words)
    try:
        overrides, _ = study.read_profile(options.profile, "scaling.ipynb")
        values = {name: line.default for name, line in study.known_parameters("scaling.ipynb").items()} | overrides
        folder = options.write or (record.from_root(values["write_folder"]) if values["write_folder"] else None)
        if folder is None:
            raise UsageError("name the folder for the records: --write FOLDER")
        failed = measure_all(plan(values), folder, lambda line: print(line, flush=True))
    except UsageError as error:
        print(f"python -m lib.scaling: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
