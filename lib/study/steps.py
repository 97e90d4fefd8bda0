"""`python -m lib.study.steps [params/steps_gpu.yaml] --write FILE`: a training step of each variant, with intervals.

All variants lie in the memory of one process and take turns: in a round each has one measurement window at each length,
whole training steps from one step of the GPU's energy counter to another (`lib.measure.energy.Counter`), and `sdpa`
has a second one as the A/A control. Rounds are in the order of a Williams square, so that over a whole square (as many
rounds as variants, or twice as many where their number is odd) each stands in every place and behind every other.
Ratios are taken inside rounds, where drift of clock and heat cancels.

That is what a study of whole runs (`python -m lib.study`) says of cost, in minutes instead of hours: there is no loss,
tokens are random and no row is padded. The file is written after each round; the same command adds those that it lacks.
"""

import argparse
import contextlib
import inspect
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from lib import attention, certificate, parameters, paths, record, training
from lib.data.corpus import Corpus, Rows
from lib.errors import OutOfMemory, UsageError, is_out_of_memory
from lib.measure import energy, environment, kernels, sampler
from lib.measure.meter import Stopwatch
from lib.measure.warmth import Warmth
from lib.model import build_model, devices, gpt2_config
from lib.record import steps
from lib.record.schema import DEVICES, PRECISIONS, Strict
from lib.record.steps import Count, Entry, Round, Seconds, Setting, Size, Steps, Turn
from lib.study import plan, runner

ROWS = 64  # of random tokens, over and over
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 5e-5, 0.1, 1.0
FIRST_STEPS, TIMED_STEPS, BEFORE_STEPS = 2, 3, 2  # never timed; to know how many fill a window; before each window
# A window is to be so much longer than asked for, so that none falls short of it: by the few steps that were timed
# before the first round, and by the window before.
FIRST_MARGIN, MARGIN = 1.15, 1.05
BUSY_STEPS = 3
EXAMINED_LAYERS, EXAMINED_TOKENS = 2, 2048


QUICK = (Size(context=128, batch_size=4), Size(context=512, batch_size=1))


class Plan(Strict):
    """What is to be measured; the defaults take a minute on a CPU."""

    variants: list[str | dict] = Field(default_factory=list)
    layers: Count = 2
    width: Count = 128
    heads: Count = 4
    vocabulary: Annotated[int, Field(ge=2)] = 4096
    sizes: Annotated[list[Size], Field(min_length=1, default_factory=lambda: list(QUICK))]
    window_s: Seconds = 0.3
    rounds: Count = 8
    compile: bool = False
    device: str = "auto"
    precision: str = "auto"


def read_plan(profile: str | None, **changes) -> Plan:
    """The plan in a YAML file, or the defaults. Raises UsageError for what cannot be measured."""
    try:
        given = (plan.read_yaml(Path(profile)) if profile else None) or {}
        if not isinstance(given, dict):
            raise UsageError(f"the profile {profile} must be lines of `name: value`")
        parameters.check_names(given, Plan.model_fields)
        made = parameters.modelled(Plan, given | changes)
    except (OSError, ValueError) as error:
        raise UsageError(f"the profile {profile} cannot be read as YAML: {record.printable(error)}") from None
    for name, choices in (("device", DEVICES), ("precision", PRECISIONS)):
        if getattr(made, name) not in choices:
            raise UsageError(f"{name} must be one of {', '.join(choices)}, not {getattr(made, name)!r}")
    if made.width % made.heads:
        raise UsageError(f"heads must divide width: {made.heads} heads do not divide {made.width}")
    if len({size.context for size in made.sizes}) < len(made.sizes):
        raise UsageError("sizes must have a context each of its own")
    parameters.check_device(made.device)
    return made


def entries_of(made: Plan) -> list[SimpleNamespace]:
    """Attention, options, label and title of each variant, of the paper's and the A/A control where none is named."""
    found, longest = [], max(size.context for size in made.sizes)
    for given in made.variants or [*attention.STUDY_ORDER, plan.CONTROL_RUN]:
        given = plan.entry(given)
        sizes = {"layers": made.layers, "width": made.width, "heads": made.heads, "positions": longest}
        parameters.pin(given["attention"])
        layers = parameters.check_attention(SimpleNamespace(**given, **sizes))
        named = parameters.named(given, layers)
        found.append(SimpleNamespace(**given | named))
    labels = [entry.label for entry in found]
    if len(set(labels)) < len(labels):
        raise UsageError("two variants have the same label; give one of them another")
    if attention.REFERENCE not in labels:
        raise UsageError(f"ratios are to {attention.REFERENCE}; put it among the variants")
    return found


class Bench:
    """One variant's model and optimizer, and a trainer for each length."""

    def __init__(self, entry: SimpleNamespace, made: Plan, device: torch.device):
        self.entry, self.device = entry, device
        longest = max(size.context for size in made.sizes)
        config = gpt2_config(made.layers, made.width, made.heads, longest, made.vocabulary)
        with torch.device(device):  # the weights' values do not matter: they need not be made on the host
            self.model = build_model(entry.attention, config, **entry.options).train()
        self.trainers, self.peak, self.steps = {}, {}, {}  # by context
        for size in made.sizes:
            trainer = training.Trainer(self.model, _random_rows(size, made.vocabulary), _run(made, size))
            trainer.optimizer = next((other.optimizer for other in self.trainers.values()), trainer.optimizer)
            self.trainers[size.context] = trainer

    def run(self, context: int, count: int) -> None:
        for step in range(count):
            self.trainers[context].take_step(step % len(self.trainers[context].rows))

    @property
    def optimizer(self):
        return next(iter(self.trainers.values())).optimizer

    def held_bytes(self) -> int:
        """Of weights, buffers and AdamW's moments."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *moments]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def prepare(self, context: int, window_s: float) -> None:
        """First steps, the most memory that they take, and how many steps fill a window. Raises OutOfMemory."""
        self.run(context, FIRST_STEPS)
        before = _allocated(self.device, reset=True)
        self.trainers[context].pin_buffers()
        watch = Stopwatch(self.device, energy.no_counter())
        with watch:
            self.run(context, TIMED_STEPS)
        if before is not None:
            self.peak[context] = self.held_bytes() + torch.cuda.max_memory_allocated(self.device) - before
        self.plan(context, FIRST_MARGIN * window_s, TIMED_STEPS / watch.seconds[0])

    def plan(self, context: int, window_s: float, steps_per_s: float) -> None:
        self.steps[context] = max(1, math.ceil(window_s * steps_per_s))

    def move(self, away: bool) -> None:
        """To the host's memory, or back; pinned, so that it is a matter of a second."""

        def moved(tensor):
            if not away or self.device.type != "cuda":
                return tensor.to(self.device, non_blocking=True)
            return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)

        self.model._apply(moved)
        for state in self.optimizer.state.values():
            state.update({name: moved(value) for name, value in state.items()})

    def let_go(self) -> None:
        """Forgets what a step that failed has left."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _allocated(device: torch.device, reset: bool = False) -> int | None:
    if device.type != "cuda":
        return None
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _run(made: Plan, size: Size) -> SimpleNamespace:
    """Parameters of a run of train.ipynb, as far as its trainer asks."""
    return SimpleNamespace(
        context=size.context, batch_size=size.batch_size, accumulation=1, steps_per_epoch=ROWS // size.batch_size or 1,
        epochs=1, warmup_steps=1, seed=0, learning_rate=LEARNING_RATE, lr_warmup_steps=0, schedule="constant",
        weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM, device=made.device, precision=made.precision,
        compile=made.compile,
    )  # fmt: skip


def examined_as(made: Plan, device: torch.device, attention_name: str = attention.REFERENCE) -> certificate.Setting:
    """For the certificate: the model that is timed, trained at the shortest size, with two of its layers, which are
    alike, or all of a longer pattern, and up to `EXAMINED_TOKENS`, in training as well. All of it, in float64, would
    take more of a lent GPU than what is measured."""
    shortest = min(made.sizes, key=lambda size: size.context)
    longest = max(size.context for size in made.sizes)
    context = min(shortest.context, EXAMINED_TOKENS)
    layers = max(EXAMINED_LAYERS, len(attention.parts(attention_name)))
    return certificate.Setting(
        layers=min(made.layers, layers), width=made.width, heads=made.heads,
        positions=min(longest, EXAMINED_TOKENS), context=context,
        batch_size=shortest.batch_size, device=device.type, precision=devices.resolve_precision(made.precision, device),
    )  # fmt: skip


def _random_rows(size: Size, vocabulary: int) -> Corpus:
    count = max(ROWS, size.batch_size)
    tokens = np.random.default_rng(0).integers(0, vocabulary, count * size.context).astype(np.uint32)
    rows = Rows(tokens, np.arange(count) * size.context, np.full(count, size.context), size.context, 0)
    return Corpus(rows, rows, vocabulary)


class Session:
    """Everything of one process: the benches, their record, and the sampler beside them."""

    def __init__(self, made: Plan, say=print):
        self.made, self.say, self.device = made, say, devices.choose(made.device)
        self.precision = devices.resolve_precision(made.precision, self.device)
        self.id, self.alone = runner.new_session(), set()  # (context, label) that need the GPU for themselves
        self.benches: dict[str, Bench] = {}
        self.counter = energy.gpu_counter(self.device)
        self.warm: bool | None = None

    def new_record(self) -> Steps:
        made = self.made
        shared = {name: getattr(made, name) for name in Setting.model_fields if name not in ("device", "precision")}
        entries = []
        for entry in entries_of(made):
            self.say(f"{entry.label}: certificate, weights")
            examined = examined_as(made, self.device, entry.attention)
            passed = bool(certificate.certify(entry.attention, entry.options, examined)["passed"])
            self.benches[entry.label] = bench = Bench(entry, made, self.device)
            facts = {name: getattr(entry, name) for name in ("label", "title", "options")}
            facts |= {"attention": paths.portable(entry.attention), "certified": passed}
            facts |= {"attention_sha256": attention.source_sha256(entry.attention)}
            entries.append(Entry(**facts, parameters=sum(weight.numel() for weight in bench.model.parameters())))
        return Steps(
            provenance=energy.provenance(), finished_at=record.now(),
            setting=Setting(**shared, device=self.device.type, precision=self.precision),
            environment=environment.describe(self.device), entries=entries,
            examined=examined_as(made, self.device).values(),
        )  # fmt: skip

    def prepare(self, found: Steps) -> Steps:
        """First steps of all at all lengths; what runs out of memory even alone, or fails, is noted as failed."""
        failed = {label: dict(lengths) for label, lengths in found.failed.items()}
        for size in self.made.sizes:
            for label in self.benches:
                if size.context in failed.get(label, {}):
                    continue
                says = self._prepared(label, size.context)
                if says is not None:
                    failed.setdefault(label, {})[size.context] = says
                planned = self.benches[label].steps.get(size.context)
                self.say(f"{label}, {size.context} tokens: {says or f'{planned} steps a window'}")
        return found.model_copy(update={"failed": failed})

    def _prepared(self, label: str, context: int) -> str | None:
        bench = self.benches[label]
        for tried in (False, True):
            try:
                with self._to_itself(label, tried):
                    bench.prepare(context, self.made.window_s)
                    self.alone |= {(context, label)} if tried else set()
                    return None
            except Exception as error:  # of one variant: the others' minutes on a GPU are not lost with it
                full = isinstance(error, (OutOfMemory, MemoryError)) or is_out_of_memory(str(error))
                if not full and label == attention.REFERENCE:  # nothing can be compared with it
                    raise
                says = f"{'out of memory' if full else type(error).__name__}: {record.printable(error, 200)}"
            bench.let_go()
            if not full:
                break
        return says

    @contextlib.contextmanager
    def _to_itself(self, label: str, alone: bool):
        """The GPU's free memory is all for one variant, none of it still cached in another's sizes; with `alone` the
        other models wait in the host's memory."""
        others = [bench for name, bench in self.benches.items() if name != label] if alone else []
        try:
            for bench in others:
                bench.move(away=True)
            self.benches[label].let_go()
            yield
        finally:
            if alone:
                self.benches[label].let_go()
            for bench in others:
                bench.move(away=False)

    def warm_up(self, found: Steps) -> None:
        """Steps until the GPU's heat and clock are steady; on a CPU, or where the GPU says nothing, none."""
        context = self.made.sizes[0].context
        label = next((label for label in self.benches if context not in found.failed.get(label, {})), None)
        warmth = Warmth(self.device)
        warmth.look()
        while label is not None and warmth.rising():
            self.benches[label].run(context, 1)
            warmth.look()  # while the GPU works
            devices.synchronize(self.device)
        self.warm = warmth.steady

    def round(self, number: int, found: Steps, states: sampler.Sampler) -> Round:
        """Every variant once at every length."""
        begun_at, turns = record.now(), []
        for size in self.made.sizes:
            for position, label in enumerate(order(list(self.benches), number)):
                if size.context not in found.failed.get(label, {}):
                    turns.append(self.turn(label, size.context, position, states))
        return Round(session=self.id, begun_at=begun_at, warm=self.warm, turns=turns)

    def turn(self, label: str, context: int, position: int, states: sampler.Sampler) -> Turn:
        """One measurement window, after steps that bring back what the others' turns have pushed out of caches."""
        bench, alone = self.benches[label], (context, label) in self.alone
        watch = Stopwatch(self.device, self.counter.anew())
        with self._to_itself(label, alone):
            bench.run(context, BEFORE_STEPS)
            with watch:
                bench.run(context, bench.steps[context])
        steps_made = bench.steps[context]
        bench.plan(context, MARGIN * self.made.window_s, steps_made / watch.seconds[0])
        counter, others = watch.counter, energy.foreign_processes(self.device) if energy.gpu_uuid(self.device) else None
        joules = counter.last(watch.seconds[0])
        if joules.joules is not None and others:
            joules = energy.Reading(None, "foreign_process")
        samples = [one for _, one in sampler.inside(states.samples(), watch.walls)]
        return Turn(
            label=label, context=context, position=position, steps=steps_made, time_s=watch.seconds[0],
            energy_j=joules.joules, energy_null_reason=joules.reason,
            edges_j=counter.edges_j[-1] if joules.joules is not None else None,
            after_w=list(counter.after_w[-1]) if joules.joules is not None and counter.after_w else [],
            peak_memory_bytes=bench.peak.get(context), gpu=sampler.summary(samples), other_processes=others,
            alone=alone,
        )  # fmt: skip

    def busy(self, found: Steps, until_s: float):
        """The record with the share of each variant's step in which the GPU computes, after each of them; profiled, so
        behind all that is timed, and for as long as there is time (`time.monotonic`)."""
        shares = {label: dict(lengths) for label, lengths in found.busy.items()}
        for size in self.made.sizes:
            for label, bench in self.benches.items():
                known = size.context in shares.get(label, {}) or size.context in found.failed.get(label, {})
                if not known and (size.context, label) not in self.alone and time.monotonic() < until_s:
                    share = kernels.busy_fraction(self.device, lambda b=bench, s=size: b.run(s.context, BUSY_STEPS))
                    shares.setdefault(label, {})[size.context] = share.joules
                    yield found.model_copy(update={"busy": shares})


def order(labels: list[str], number: int) -> list[str]:
    """The order of round `number`: a Williams square of the variants, through which the A/A control wanders."""
    others = [label for label in labels if label != attention.CONTROL]
    found = [others[which] for which in plan.orders(len(others), number + 1)[number]]
    if len(others) < len(labels):
        found.insert(number % len(labels), attention.CONTROL)
    return found


def measure(made: Plan, path: Path, within_s: float = math.inf, say=print) -> Steps:
    """Measures the rounds of the plan that the file lacks, for as long as one is expected to end within `within_s`.

    Raises UsageError where the file is of another setting, machine or definition.
    """
    if path.exists() and len(steps.load(path).rounds) >= made.rounds:
        return steps.load(path)
    begin_s = time.monotonic()
    session = Session(made, say)
    found = _resumed(session.new_record(), path)
    resumed, found = found, session.prepare(found)
    if resumed.rounds and found.failed != resumed.failed:
        new = sorted(set(found.failed) - set(resumed.failed)) or sorted(found.failed)
        raise UsageError(f"{path.name} has rounds in which {new[0]} did not fail, as it does now; name another file")
    states, longest_s = sampler.Sampler(energy.gpu_uuid(session.device)), 0.0
    try:
        session.warm_up(found)
        for number in range(len(found.rounds), made.rounds):
            round_s = time.monotonic()
            if round_s - begin_s + longest_s > within_s:
                say(f"no time for round {number + 1} of {made.rounds}: {longest_s:.0f} s")
                break
            rounds = [*found.rounds, session.round(number, found, states)]
            found = found.model_copy(update={"rounds": rounds, "finished_at": record.now()})
            steps.write(found, path)
            longest_s = max(longest_s, time.monotonic() - round_s)
            say(f"round {number + 1} of {made.rounds}: {time.monotonic() - round_s:.0f} s")
    finally:
        states.stop()
    for more in session.busy(found, begin_s + within_s) if found.rounds else ():
        found = more
        steps.write(found, path)  # each is kept, should the next be cut off
    steps.write(found, path)
    return found


def _resumed(new: Steps, path: Path) -> Steps:
    """What the file holds of the same, or `new`."""
    if not path.exists():
        return new
    old = steps.load(path)
    if _identity(old) != _identity(new):
        raise UsageError(f"{path.name} holds rounds of another setting, machine or definition; name another file")
    return old


def _identity(found: Steps) -> tuple:
    facts, gpu = found.environment, found.environment["gpu"] or {}
    machine = facts["device_name"], facts["torch_threads"], facts["packages"], gpu.get("uuid"), found.provenance
    return found.setting, found.entries, machine


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.study.steps", description=inspect.cleandoc(__doc__))
    parser.add_argument("profile", nargs="?", help="a YAML file of overrides; without one a minute on a CPU")
    parser.add_argument("--write", type=Path, required=True, metavar="FILE", help="where the record goes")
    parser.add_argument("--rounds", type=int, metavar="N", help="how many rounds, instead of the profile's")
    parser.add_argument("--within-s", type=float, default=math.inf, metavar="S", help="begin no round that ends later")
    options = parser.parse_args(words)
    try:
        made = read_plan(options.profile, **{"rounds": options.rounds} if options.rounds is not None else {})
        with runner.stoppable():
            found = measure(made, options.write, options.within_s, lambda line: print(line, flush=True))
    except UsageError as error:
        print(f"python -m lib.study.steps: {error}", file=sys.stderr)
        return 2
    except runner.Stopped as signal_name:
        print(f"\nstopped by {signal_name}; the same command adds the rounds that are missing", file=sys.stderr)
        return 130
    print(f"{len(found.rounds)} of {made.rounds} rounds in {options.write}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
