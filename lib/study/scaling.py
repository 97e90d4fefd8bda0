"""`python -m lib.study.scaling [params/scaling_long.yaml] --write FOLDER`: what each variant costs, by context length.

Two parts for each length T: one attention `layer` forward and backward, with the most memory that it takes on top of
its weights and input, and a whole small `model` that reads T tokens (prefill) and writes some (decode). Every sample
comes from a process of its own, so that its memory is nobody else's and running out of it ends nothing else; a round
goes through all variants at a length before the next, each round in another order. Memory or time that ran out is a
point as well.

One JSON file per variant, written after each sample; what it holds is not measured again.
"""

import argparse
import contextlib
import inspect
import math
import multiprocessing
import resource
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import pandas as pd
import psutil
import torch
from pydantic import Field, field_validator

from lib import attention, parameters, paths, record
from lib.errors import OutOfMemory, UsageError, one_sentence_when_out_of_memory
from lib.measure import energy, environment, inference
from lib.measure.meter import Meter, Stopwatch, energy_of
from lib.model import build_model, devices, gpt2_config
from lib.record import scaling
from lib.record.scaling import ENERGY, METRICS, Count, Point, Scaling, Setting
from lib.study import plan, runner

WARM_UP = 16  # tokens that start threads and libraries, before memory is looked at
# What this module imports, and not itself: it may run as __main__, and Python warns of a main module that is imported.
PRELOADED = [
    "lib.measure.environment", "lib.measure.inference", "lib.measure.meter", "lib.model", "lib.record.scaling",
    "lib.study.runner",
]  # fmt: skip
LONGEST_WAIT_S = 7 * 24 * 3600  # for a process; poll(2) counts milliseconds in an int
KEPT_FREE = 0.1  # of the free memory, for everything else that runs on a CPU's machine


class Plan(Setting):
    """What is to be measured; made by `checked`."""

    variants: list[str | dict]
    contexts: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)]
    rounds: Count  # processes for each point, in turns over the variants
    time_limit_s: Annotated[float, Field(gt=0, le=LONGEST_WAIT_S)]

    @field_validator("contexts")
    @classmethod
    def ascending(cls, contexts):
        if sorted(set(contexts)) != contexts:
            raise ValueError("lengths must ascend")
        return contexts


def checked(values: dict) -> Plan:
    """The plan in a notebook's `globals()`, or in a profile's values. Raises UsageError for what cannot be measured."""
    made = parameters.modelled(Plan, {name: values[name] for name in Plan.model_fields})
    if made.width % made.heads:
        raise UsageError(f"heads must divide width: {made.heads} heads do not divide {made.width}")
    _entries(made)
    parameters.check_device(made.device)
    return made


def _entries(made: Plan) -> list[SimpleNamespace]:
    """Label, title, attention and options of each variant, of the paper's where none is named. Raises UsageError."""
    entries = []
    for given in made.variants or attention.STUDY_ORDER:
        given = plan.entry(given)
        sizes = {"layers": made.layers, "width": made.width, "heads": made.heads, "positions": made.contexts[-1]}
        parameters.pin(given["attention"])
        layers = parameters.check_attention(SimpleNamespace(**given, **sizes))
        named = parameters.named(given, layers)
        named["sha256"] = attention.source_sha256(given["attention"])
        entries.append(SimpleNamespace(**given | named))
    if len({entry.label for entry in entries}) < len(entries):
        raise UsageError("two variants have the same label; give one of them another")
    return entries


def orders(variants: int, rounds: int) -> list[list[int]]:
    """The order of the variants in each round: a row of a Williams square, in the next round the same row reversed.

    After every second round all variants have had the same mean place, so a steady drift favours none; after the whole
    square every variant has stood in every place and followed every other equally often (Williams 1949).
    """
    square = plan.orders(variants, variants * (1 + variants % 2))
    once = [row for index, row in enumerate(square) if row[::-1] not in square[:index]]
    both = [order for row in once for order in ((row, row[::-1]) if variants > 1 else (row,))]
    return [both[turn % len(both)] for turn in range(rounds)]


def measure_all(made: Plan, folder: Path, say=print) -> list[str]:
    """Measures what `folder` lacks of the plan, telling `say` of each sample; returns what ended in an error.

    Raises UsageError where the folder holds points of another setting, machine or definition.
    """
    facts = _apart(_facts, made, limit_s=math.inf)
    setting = Setting(**{n: getattr(made, n) for n in Setting.model_fields} | facts.pop("setting"))
    found = {}
    for entry in _entries(made):
        new = Scaling(
            finished_at=record.now(), label=entry.label, title=entry.title,
            attention=parameters.portable_attention(entry.attention),
            options=entry.options, attention_sha256=entry.sha256, setting=setting,
            points=[], **facts,
        )  # fmt: skip
        found[entry.label] = _resumed(new, folder)
    failed, entries, session = [], _entries(made), runner.new_session()
    for turn, order in enumerate(orders(len(entries), made.rounds)):
        for context, part, entry in ((c, p, entries[e]) for c in made.contexts for p in METRICS for e in order):
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
                sessions = [session] if answer["outcome"] == "measured" else []
                point = Point(part=part, context=context, sessions=sessions, **answer)
            found[entry.label] = found[entry.label].with_point(point)
            scaling.write(found[entry.label], folder)
            say(f"round {turn + 1}: {what}: {_short(point)}")
    return failed


def measured_here(made: Plan, write_folder: str) -> pd.DataFrame:
    """The plan's points as a `frame`, kept in `write_folder` (from the repository's root) or, if empty, nowhere."""

    def say(line):
        if line.startswith("FAILED"):
            print(line)

    with tempfile.TemporaryDirectory() as scratch:
        folder = paths.from_root(write_folder) if write_folder else Path(scratch)
        measure_all(made, folder, say)
        return scaling.frame(scaling.load_all(folder))


def _short(point: Point) -> str:
    time_s = point.samples.get(METRICS[point.part][0])
    return f"{time_s[-1] * 1e3:.1f} ms" if time_s else point.says


def _resumed(new: Scaling, folder: Path) -> Scaling:
    """What the folder holds of the same, or `new`."""
    path = folder / scaling.file_name(new.label)
    if not path.exists():
        return new
    old = scaling.load(path)
    same = scaling.machine(old) == scaling.machine(new)
    if not same or (old.attention_sha256, old.options) != (new.attention_sha256, new.options):
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
    start.set_forkserver_preload(PRELOADED)
    receiving, sending = start.Pipe(duplex=False)
    killed_before = runner.killed_for_memory()
    process = start.Process(target=_answer, args=(sending, work, words), daemon=True)
    process.start()
    sending.close()
    try:
        if not receiving.poll(None if limit_s == math.inf else limit_s):
            return {"outcome": "over_time", "says": f"not done within {limit_s:g} s"}
        return receiving.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL and runner.killed_for_memory() > killed_before:
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
    device = devices.choose(made.device)
    chosen = {"device": device.type, "precision": devices.resolve_precision(made.precision, device)}
    facts = environment.describe(device)
    return {"setting": chosen, "environment": facts, "provenance": energy.provenance()}


@one_sentence_when_out_of_memory()
def _sample(setting: Setting, entry: SimpleNamespace, part: str, context: int) -> dict:
    """One sample of a part at a length, in the process that this is called in. Raises UsageError for another text."""
    parameters.pin(entry.attention)
    if attention.source_sha256(entry.attention) != entry.sha256:
        raise UsageError(f"{entry.attention} was changed since the study began; start it again")
    device = devices.choose(setting.device)
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
    """Lists of samples by metric, and the reasons for the metrics that have none. Of a pattern: its layers on the same
    input, over their number."""
    config = gpt2_config(setting.layers, setting.width, setting.heads, context, setting.vocabulary)
    config.n_layer = len(attention.parts(entry.attention))
    blocks = build_model(entry.attention, config, **entry.options).transformer.h
    layers = torch.nn.ModuleList(block.attn for block in blocks).to(device)  # of a pattern, one of each
    autocast = devices.autocast(setting.precision, device)

    def work(hidden, gradient):
        with autocast():
            outputs = [layer(hidden)[0] for layer in layers]
        torch.autograd.backward(outputs, [gradient.to(output.dtype) for output in outputs])
        hidden.grad = None
        layers.zero_grad(set_to_none=True)

    work(*_inputs(WARM_UP, setting.width, device))
    given = _inputs(context, setting.width, device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    meter = Meter(device)
    with meter.window():
        work(*given)  # the warm-up at this length
    values, reasons = meter.metrics()
    peak = "peak_memory_bytes" if device.type == "cuda" else "peak_resident_bytes"
    grown_bytes = None if values[peak] is None else (values[peak] - held) // len(layers)
    watch = Stopwatch(device, energy.no_counter())  # joules have a window of their own
    for _ in range(setting.repeats):
        with watch:
            work(*given)
    joules = energy.Reading(None, _uncounted(setting, device))
    if joules.reason is None:
        joules = energy_of(lambda: work(*given), device, setting.energy_window_s)
    found = {
        "forward_backward_s": [seconds / len(layers) for seconds in watch.seconds],
        "peak_activation_bytes": [grown_bytes],
        "forward_backward_energy_j": [joules.joules and joules.joules / len(layers)],
    }
    # What the warm-up freed is still the process's: few tokens may need no more than that.
    hidden = None if grown_bytes is None or grown_bytes > 0 else "peak_not_above"
    nulls = {"peak_activation_bytes": reasons.get(peak, hidden), "forward_backward_energy_j": joules.reason}
    return found, {metric: reason for metric, reason in nulls.items() if reason}


def _inputs(context: int, width: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and their output's gradient, (1, T, C) each, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    hidden, gradient = torch.randn(2, 1, context, width, generator=generator).to(device)
    return hidden.requires_grad_(), gradient


def _model(setting: Setting, entry, context: int, device) -> tuple[dict, dict]:
    positions = context + setting.new_tokens
    config = gpt2_config(setting.layers, setting.width, setting.heads, positions, setting.vocabulary)
    model = build_model(entry.attention, config, **entry.options).to(device)
    autocast = devices.autocast(setting.precision, device)
    runs = inference.generations(model, context, setting.new_tokens, setting.repeats, autocast)
    found = {
        "prefill_s": [run["prefill_s"] for run in runs],
        "decode_s_per_token": [run["decode_s"] / setting.new_tokens for run in runs],
        "cache_bytes": [inference.cache_bytes(runs[-1]["cache"])],
    }
    del runs
    reason = _uncounted(setting, device)
    if reason is None:
        words = ([context], setting.new_tokens, setting.energy_window_s, autocast)
        (joules,) = inference.joules(model, *words)
        found |= {metric: [joules[metric]] for metric in ENERGY["model"]}
        reason = joules["energy_null_reason"]
    return found, dict.fromkeys(ENERGY["model"], reason) if reason else {}


def _uncounted(setting: Setting, device) -> str | None:
    """Why joules are not worth a try."""
    return energy.gpu_counter(device).reason or (None if setting.energy_window_s else "not_asked_for")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.study.scaling", description=inspect.cleandoc(__doc__))
    parser.add_argument("profile", nargs="?", help="a YAML file of overrides; without one the notebook's defaults")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="where the records go")
    options = parser.parse_args(words)
    try:
        overrides, _ = plan.read_profile(options.profile, "scaling.ipynb")
        values = {name: line.default for name, line in plan.known_parameters("scaling.ipynb").items()} | overrides
        folder = options.write or (paths.from_root(values["write_folder"]) if values["write_folder"] else None)
        if folder is None:
            raise UsageError("name the folder for the records: --write FOLDER")
        failed = measure_all(checked(values), folder, lambda line: print(line, flush=True))
    except UsageError as error:
        print(f"python -m lib.study.scaling: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
