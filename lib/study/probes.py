"""`python -m lib.study.probes [params/probes.yaml] --write FOLDER`: what variants can do, on tasks with known answers.

A cell is one variant, or pattern of variants, on one task at one learning rate from one seed: the small net of
`lib.model.probe` is trained and then tested by difficulty, in a process of its own with one thread, as many at once as
`processes` says. First every rate from `seeds` seeds; then, at each one's best rate, up to `seeds_at_best`.

One JSON file per cell, written when it is done; what is there is not run again.
"""

import argparse
import inspect
import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Annotated, NamedTuple

import pandas as pd
import torch
from pydantic import Field, field_validator

from lib import attention, parameters, paths, record
from lib.data.tasks import IGNORED, TASKS
from lib.errors import UsageError
from lib.measure import energy, environment
from lib.model.probe import ProbeNet
from lib.record import probe
from lib.record.probe import Count, Mixer, Point, Positive, Probe, Result, Setting, check_pattern
from lib.record.schema import Strict
from lib.study import plan

WARMUP_SHARE, WEIGHT_DECAY, CLIP_NORM = 0.1, 0.1, 1.0
TEST_SEQUENCES, CURVE_POINTS = 256, 40
TEST_SEED = 1_000_003  # added to the seed: the tests are no part of the training stream


class Plan(Strict):
    """What is to be tried; made by `checked`."""

    variants: list[str | dict]
    tasks: Annotated[list[str | dict], Field(min_length=1)]
    rates: Annotated[list[Positive], Field(min_length=1)]
    seeds: Count
    seeds_at_best: Count
    steps: Annotated[int, Field(ge=0)]  # 0: as many as the task's own
    processes: Annotated[int, Field(ge=0)]  # 0: one a core

    @field_validator("rates")
    @classmethod
    def each_once(cls, rates):
        if len(set(rates)) < len(rates):
            raise ValueError("each rate once")
        return rates


class Cell(NamedTuple):
    """One variant or pattern on one task, at one rate from one seed."""

    label: str
    title: str
    pattern: tuple[tuple[str, dict], ...]
    setting: Setting
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        values = {
            "pattern": [list(mixer) for mixer in self.pattern], "setting": self.setting.model_dump(),
            "learning_rate": self.learning_rate, "seed": self.seed,
        }  # fmt: skip
        label = parameters.file_name(self.label)
        return f"{self.setting.task}-{label}-rate{self.learning_rate:g}-seed{self.seed}-{parameters.digest(values)}"

    @property
    def group(self) -> tuple:
        """What is compared over rates and seeds."""
        return self.label, self.setting.model_dump_json()


def checked(values: dict) -> Plan:
    """The plan in a notebook's `globals()`, or in a profile's values. Raises UsageError for what cannot be tried."""
    made = parameters.modelled(Plan, {name: values[name] for name in Plan.model_fields})
    cells(made)
    return made


def cells(made: Plan) -> list[Cell]:
    """Every cell of the grid of rates and seeds, the first seed of all before the second. Raises UsageError."""
    found = []
    for seed in range(made.seeds):
        for setting in map(lambda given: _setting(given, made.steps), made.tasks):
            for rate in made.rates:
                for given in made.variants or attention.variants():
                    found.append(_cell(given, setting, rate, seed))
    names = [cell.name for cell in found]
    doubled = next((cell for cell in found if names.count(cell.name) > 1), None)
    if doubled:
        raise UsageError(f"{doubled.label} stands twice for {doubled.setting.task}; leave one out")
    called: dict[tuple, tuple] = {}
    for cell in found:  # one name for two would be one row of every table
        if called.setdefault((cell.setting.task, cell.label), cell.pattern) != cell.pattern:
            raise UsageError(f"two variants or patterns are called {cell.label!r}; give one of them another label")
    return found


def _setting(given: str | dict, steps: int) -> Setting:
    given = given if isinstance(given, dict) else {"task": given}
    parameters.check_names(given, ("task", "convolution", "positions"))
    name = given.get("task")
    if not isinstance(name, str) or name not in TASKS:
        raise UsageError(f"there is no task {record.printable(repr(name), 100)}; known: {', '.join(TASKS)}")
    net = TASKS[given["task"]].net
    changes = {name: given[name] for name in ("convolution", "positions") if name in given}
    for name, value in changes.items():
        if type(value) is not bool:
            raise UsageError(f"{name} of {given['task']} must be true or false, not {value!r}")
    return Setting(
        **vars(net) | changes | {"task": given["task"], "steps": steps or net.steps}, warmup_share=WARMUP_SHARE,
        weight_decay=WEIGHT_DECAY, test_sequences=TEST_SEQUENCES,
    )  # fmt: skip


def _cell(given: str | dict, setting: Setting, rate: float, seed: int) -> Cell:
    """`given`: names or paths joined by commas; or a mapping of `attention`, `options` by mixer's name, and `label`."""
    given = plan.entry(given)
    names = [name.strip() for name in given["attention"].split(",")]
    if not all(names):
        raise UsageError(f"variants: {given!r} names no attention, or an empty one between commas")
    options = given["options"]
    if not all(isinstance(one, dict) for one in options.values()):
        raise UsageError(f"options of {given['attention']} go by mixer, for example {{sliding_window: {{window: 16}}}}")
    parameters.check_names(options, [attention.stem(name) for name in names])
    mixers = tuple((paths.portable(name), options.get(attention.stem(name), {})) for name in names)
    sizes = {"layers": len(names), "width": setting.width, "heads": setting.heads, "positions": _context(setting.task)}
    for name in names:
        parameters.pin(name)
    layers = [
        parameters.check_attention(SimpleNamespace(attention=name, options=own, **sizes))[0] for name, own in mixers
    ]
    whole = ",".join(names)
    if len(attention.parts(whole)) == len(names):
        own = attention.label(whole), attention.title(layers, whole)
    else:  # the same over again: it says how deep the net is
        titles = [attention.title([layer], name) for layer, name in zip(layers, names, strict=True)]
        own = "+".join(map(attention.stem, names)), " + ".join(titles)
    label, title = (given["label"] or said for said in own)
    try:
        check_pattern(label, title, [name for name, _ in mixers])
    except ValueError as error:
        raise UsageError(str(error)) from None
    depth = max(setting.layers, len(mixers))
    return Cell(
        label, title, tuple(mixers[i % len(mixers)] for i in range(depth)),
        setting.model_copy(update={"layers": depth}), rate, seed,
    )  # fmt: skip


def _context(task: str) -> int:
    found = TASKS[task]
    return max(found.context(difficulty) for difficulty in (*found.trained_on, *found.tested_on))


def _net(cell: Cell) -> ProbeNet:
    setting, task = cell.setting, TASKS[cell.setting.task]
    sizes = (task.vocabulary, setting.width, setting.heads, _context(task.name))
    return ProbeNet(cell.pattern, *sizes, setting.convolution, setting.mlp, setting.positions)


def run(cell: Cell) -> Probe:
    """Trains and tests one cell, here."""
    task, setting, started_at, begin = TASKS[cell.setting.task], cell.setting, record.now(), time.perf_counter()
    torch.manual_seed(cell.seed)
    net = _net(cell)
    losses, outcome = _train(net, task, cell), "measured"
    if not all(map(math.isfinite, losses)):
        outcome = "loss_not_finite"
    every = max(1, setting.steps // CURVE_POINTS)
    steps = [step for step in range(every - 1, len(losses), every) if math.isfinite(losses[step])]
    return Probe(
        name=cell.name, provenance=energy.provenance(), started_at=started_at, finished_at=record.now(),
        time_s=time.perf_counter() - begin, label=cell.label, title=cell.title,
        pattern=[
            Mixer(attention=name, options=options, attention_sha256=attention.source_sha256(name))
            for name, options in cell.pattern
        ],
        setting=setting, learning_rate=cell.learning_rate, seed=cell.seed,
        parameters=sum(weight.numel() for weight in net.parameters()),
        environment=environment.describe(torch.device("cpu")), outcome=outcome,
        says="" if outcome == "measured" else f"from step {len(losses)} on",
        curve=[Point(step=step + 1, loss=losses[step]) for step in steps],
        results=_test(net, task, cell) if outcome == "measured" else [],
    )  # fmt: skip


def _train(net: ProbeNet, task, cell: Cell) -> list[float]:
    """The loss of each step; ends with the first that is not finite."""
    losses = []
    for loss in _steps(net, task, cell):
        losses.append(loss)
        if not math.isfinite(loss):
            break
    return losses


def _steps(net: ProbeNet, task, cell: Cell):
    """Trains, and yields the loss of each step."""
    setting, generator = cell.setting, torch.Generator().manual_seed(cell.seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=cell.learning_rate, weight_decay=setting.weight_decay)
    for step in range(setting.steps):
        difficulty = task.trained_on[torch.randint(len(task.trained_on), (1,), generator=generator).item()]
        ids, labels = task.draw(generator, setting.batch_size, difficulty)
        for group in optimizer.param_groups:
            group["lr"] = cell.learning_rate * _rate(step, setting)
        asked = labels != IGNORED
        loss = torch.nn.functional.cross_entropy(net(ids, asked), labels[asked])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP_NORM)
        optimizer.step()
        yield loss.item()


def _rate(step: int, setting: Setting) -> float:
    """Of the peak rate: linear up over the warm-up's share, and a cosine to 0 over all steps."""
    rise = min(1.0, (step + 1) / max(1.0, setting.warmup_share * setting.steps))
    return rise * 0.5 * (1 + math.cos(math.pi * step / setting.steps))


def _test(net: ProbeNet, task, cell: Cell) -> list[Result]:
    return [_tested(net, task, cell, difficulty) for difficulty in task.tested_on]


@torch.no_grad()
def _tested(net: ProbeNet, task, cell: Cell, difficulty: int) -> Result:
    generator, size = torch.Generator().manual_seed(TEST_SEED + cell.seed), cell.setting.batch_size
    right = questions = 0
    for first in range(0, cell.setting.test_sequences, size):
        ids, labels = task.draw(generator, min(size, cell.setting.test_sequences - first), difficulty)
        asked = labels != IGNORED
        right += (net(ids, asked).argmax(-1) == labels[asked]).sum().item()
        questions += asked.sum().item()
    accuracy = right / questions
    return Result(
        difficulty=difficulty, context=ids.shape[1], accuracy=accuracy,
        scaled_accuracy=task.scaled(accuracy, difficulty), state_bytes=net.state_bytes(ids.shape[1]),
    )  # fmt: skip


class Learner:
    """A variant, or a pattern, that learns a task here while one looks on. Raises UsageError for what cannot be."""

    def __init__(self, given: str | dict, task: str, rate: float = 3e-3):
        self.cell, self.losses = _cell(given, _setting(task, 0), rate, 0), []
        torch.manual_seed(self.cell.seed)
        self.net = _net(self.cell)
        self._steps = _steps(self.net, TASKS[task], self.cell)

    def step(self) -> bool:
        """One step more; False where it has had all that the task's schedule holds, or its loss is not finite."""
        loss = next(self._steps, None)
        if loss is not None:
            self.losses.append(loss)
        return loss is not None and math.isfinite(loss)

    def rows(self) -> pd.DataFrame:
        """A row per step with `label`, `title`, `task`, `step` and `loss`, and, the same in all of them, `accuracy` and
        `chance` at the hardest of what it is trained on and tested at."""
        task = TASKS[self.cell.setting.task]
        difficulty = max(set(task.trained_on) & set(task.tested_on))
        steps = range(1, len(self.losses) + 1)
        return pd.DataFrame(
            {
                "label": self.cell.label, "title": self.cell.title, "task": task.name, "step": steps,
                "loss": self.losses, "accuracy": _tested(self.net, task, self.cell, difficulty).accuracy,
                "chance": task.chance(difficulty),
            }
        )  # fmt: skip


def learning(variants: list, task: str, seconds: float, rate: float = 3e-3) -> pd.DataFrame:
    """The `rows` of each variant that learns a task here, for so many seconds each."""
    learners = [Learner(given, task, rate) for given in variants]
    for learner in learners:
        end_s = time.perf_counter() + seconds
        while learner.step() and time.perf_counter() < end_s:
            pass
    return pd.concat([learner.rows() for learner in learners], ignore_index=True)


def run_all(made: Plan, folder: Path, say=print) -> list[str]:
    """Runs what `folder` lacks of the plan, telling `say` of each cell; returns what ended without results."""
    failed = _run(cells(made), made, folder, say)
    return failed + _run(further(made, folder), made, folder, say)


def further(made: Plan, folder: Path) -> list[Cell]:
    """The cells of more seeds at the best rates, once `folder` has those of all rates."""
    grid = cells(made)
    more = [cell._replace(seed=seed) for cell in best(grid, folder) for seed in range(made.seeds_at_best)]
    return [cell for cell in more if cell.name not in {one.name for one in grid}]


def best(grid: list[Cell], folder: Path) -> list[Cell]:
    """Of each group that has results, its cell of the best rate (`probe.best_rate`)."""
    groups: dict[tuple, dict[float, dict[float, dict[int, float]]]] = {}
    for cell in grid:
        found = finished(cell, folder)
        for result in found.results if found else ():
            by_rate = groups.setdefault(cell.group, {}).setdefault(result.difficulty, {})
            by_rate.setdefault(cell.learning_rate, {})[cell.seed] = result.scaled_accuracy
    chosen = []
    for group, scaled in groups.items():
        rate = probe.best_rate(scaled)
        chosen.append(next(cell for cell in grid if cell.group == group and cell.learning_rate == rate))
    return chosen


def finished(cell: Cell, folder: Path) -> Probe | None:
    """The record of just this cell, of the variants' files as they are now, where it is there."""
    try:
        found = probe.load(folder / f"{cell.name}.json")
    except UsageError:
        return None
    now = [attention.source_sha256(name) for name, _ in cell.pattern]
    return found if [mixer.attention_sha256 for mixer in found.pattern] == now else None


def _run(wanted: list[Cell], made: Plan, folder: Path, say) -> list[str]:
    todo, failed = [cell for cell in wanted if finished(cell, folder) is None], []
    if len(todo) < len(wanted):
        say(f"{len(wanted) - len(todo)} of {len(wanted)} cells are finished already")
    if not todo:
        return []
    begin, done, at_once = time.monotonic(), 0, made.processes or _cores()
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(["lib.model.probe", "lib.measure.environment"])
    with ProcessPoolExecutor(at_once, mp_context=start, max_tasks_per_child=1) as pool:
        running = {pool.submit(_alone, cell): cell for cell in todo}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, done = running.pop(future), done + 1
                found = _outcome(cell, future)
                probe.write(found, folder)
                if not found.results:
                    failed.append(cell.name)
                left_s = (time.monotonic() - begin) / done * (len(todo) - done)
                say(f"[{done}/{len(todo)}] {_short(found)}; about {_minutes(left_s)} left")
    return failed


def _alone(cell: Cell) -> Probe:
    torch.set_num_threads(1)
    return run(cell)


def _outcome(cell: Cell, future) -> Probe:
    """What a process gave, or a record that says what ended it."""
    try:
        return future.result()
    except Exception as error:
        says = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
    return Probe(
        name=cell.name, started_at=record.now(), finished_at=record.now(), time_s=None, label=cell.label,
        title=cell.title, setting=cell.setting, learning_rate=cell.learning_rate, seed=cell.seed, parameters=0,
        pattern=[
            Mixer(attention=name, options=options, attention_sha256=attention.source_sha256(name))
            for name, options in cell.pattern
        ],
        environment=environment.describe(torch.device("cpu")), outcome="error", says=says, curve=[], results=[],
    )  # fmt: skip


def _short(found: Probe) -> str:
    said = ", ".join(f"{result.difficulty}: {result.scaled_accuracy:.2f}" for result in found.results)
    return f"{found.label}, {found.setting.task}, rate {found.learning_rate:g}, seed {found.seed}: {said or found.says}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def cost(made: Plan, folder: Path | None, earlier: Path = paths.ROOT / "records") -> list[str]:
    """What the plan holds, what is there, and what the rest will take by earlier cells of the same task; in words."""
    grid = cells(made)
    groups = len({cell.group for cell in grid})
    todo = [cell for cell in grid if folder is None or finished(cell, folder) is None]
    further = groups * max(0, made.seeds_at_best - made.seeds)
    lines = [f"{len(grid)} cells of {groups} variants and tasks, {len(grid) - len(todo)} finished, "
             f"and up to {further} more seeds at the best rates"]  # fmt: skip
    seconds = {}
    for path in earlier.glob("capability-*/*.json"):
        try:
            found = probe.load(path)
        except UsageError:
            continue
        if found.results:
            seconds.setdefault(found.setting.task, []).append(found.time_s)
    unknown = sorted({cell.setting.task for cell in todo} - set(seconds))
    if unknown:
        return [*lines, f"to be expected: unknown, no earlier cell of {', '.join(unknown)}"]
    per_seed = {cell.group: median(seconds[cell.setting.task]) for cell in grid}
    total_s = sum(median(seconds[cell.setting.task]) for cell in todo)
    total_s += sum(per_seed.values()) * max(0, made.seeds_at_best - made.seeds)
    at_once = made.processes or _cores()
    return [*lines, f"to be expected: about {_minutes(total_s / at_once)} with {at_once} processes"]


def planned(profile: str | None) -> Plan:
    """The plan of a profile over the notebook's defaults. Raises UsageError."""
    overrides, _ = plan.read_profile(profile, "capability.ipynb")
    known = plan.known_parameters("capability.ipynb")
    return checked({name: line.default for name, line in known.items()} | overrides)


def run_one(made: Plan, folder: Path, name: str, say=print) -> list[str]:
    """Runs the one cell of that name, for a cluster that runs each as a job; as `run_all` otherwise."""
    cell = next((cell for cell in (*cells(made), *further(made, folder)) if cell.name == name), None)
    if cell is None:
        raise UsageError(
            f"there is no cell {name!r} in this plan; those of more seeds come when all rates are finished"
        )
    return _run([cell], made, folder, say)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.study.probes", description=inspect.cleandoc(__doc__))
    parser.add_argument("profile", nargs="?", help="a YAML file of overrides; without one the notebook's defaults")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="where the records go")
    parser.add_argument("--only", metavar="NAME", help="just this cell, as `workflow/probes.smk` runs it")
    parser.add_argument("--plan", action="store_true", help="only check and count the cells, and what they will take")
    options = parser.parse_args(words)
    try:
        made = planned(options.profile)
        if options.only is None:
            print("\n".join(cost(made, options.write)), flush=True)
        if options.plan:
            return 0
        if options.write is None:
            raise UsageError("name the folder for the records: --write FOLDER")
        say = partial(print, flush=True)
        one = (options.only,) if options.only else ()
        failed = (run_one if one else run_all)(made, options.write, *one, say)
    except UsageError as error:
        print(f"python -m lib.study.probes: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command runs what is missing", file=sys.stderr)
        return 130
    for name in failed:
        print(f"FAILED {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
