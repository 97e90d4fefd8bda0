#!/usr/bin/env python3
"""What the instruments cost: the same training steps unmonitored, under ours, and the way that was published.

`ours` is what train.ipynb does: counters at the window's ends, power and utilization sampled by other processes, log
points. `published` counts the model's FLOPs by running it once more and calls nvidia-smi, in every step ("Attentions
Under the Microscope", main.py:112-130). All take turns in one process, in another order each time, and `again` is
`unmonitored` a second time: its ratio is the noise. Ratios are geometric means with 95 % paired-t intervals.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from lib import model, parameters, training
from lib.data import corpus
from lib.errors import UsageError
from lib.measure import environment
from lib.measure.meter import Meter
from lib.model import devices
from lib.study import plan

QUERY = ("nvidia-smi", "--query-gpu=power.draw,memory.used,utilization.gpu", "--format=csv,noheader,nounits")


def unmonitored(trainer) -> float:
    """Seconds of the steps and nothing else, from idle device to idle device, as in all of these."""
    devices.synchronize(trainer.device)
    begin = time.perf_counter()
    for step in range(trainer.steps):
        trainer.take_step(step)
    devices.synchronize(trainer.device)
    return time.perf_counter() - begin


def ours(trainer) -> float:
    trainer.meter = Meter(trainer.device)
    with trainer.meter.watching():
        trainer.run()
    return trainer.meter.window_s


def published(trainer) -> float:
    ids, _ = trainer.corpus.train.batch(trainer.rows[0][0])
    ids = ids.to(trainer.device)
    devices.synchronize(trainer.device)
    begin = time.perf_counter()
    for step in range(trainer.steps):
        trainer.take_step(step)
        devices.synchronize(trainer.device)
        nvidia_smi()
        with torch.no_grad(), trainer.autocast(), FlopCounterMode(display=False):
            trainer.model(ids, use_cache=False)
    devices.synchronize(trainer.device)
    return time.perf_counter() - begin


def nvidia_smi() -> bool:
    """Whether nvidia-smi answered."""
    try:
        return subprocess.run(QUERY, capture_output=True).returncode == 0
    except OSError:
        return False


WAYS = {"unmonitored": unmonitored, "again": unmonitored, "ours": ours, "published": published}


def ratio(seconds: list[float], reference: list[float]) -> dict:
    """Geometric mean of the paired ratios, with its 95 % interval from the t distribution of their logarithms."""
    logs = [math.log(one / other) for one, other in zip(seconds, reference, strict=True)]
    low, high = stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
    return {"ratio": math.exp(sum(logs) / len(logs)), "low": math.exp(low), "high": math.exp(high), "n": len(logs)}


def make_trainer(profile: str | None, steps: int) -> training.Trainer:
    overrides, _ = plan.read_profile(profile)
    short = {"steps_per_epoch": steps, "epochs": 1, "validation_sequences": 1}
    p = SimpleNamespace(**{name: line.default for name, line in plan.known_parameters().items()} | overrides | short)
    parameters.check_values(vars(p))
    data = corpus.load(p)
    config = model.gpt2_config(p.layers, p.width, p.heads, p.positions, data.vocabulary, p.dropout)
    return training.Trainer(model.build_model(p.attention, config, p.seed, **p.options), data, p)


def compare(trainer, repeats: int) -> dict:
    """Seconds of each way by repeat, and their ratios to `unmonitored`."""
    trainer.warm_up()
    names, seconds = list(WAYS), {name: [] for name in WAYS}
    for repeat in range(-1, repeats):  # the first time pays for start-up and does not count
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            with trainer.snapshot_and_restore():
                trainer.model.train()
                taken_s = WAYS[name](trainer)
            if repeat >= 0:
                seconds[name].append(taken_s)
        print(f"repeat {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
    ratios = {name: ratio(taken, seconds["unmonitored"]) for name, taken in seconds.items() if name != "unmonitored"}
    return {"steps": trainer.steps, "seconds": seconds, "ratio_to_unmonitored": ratios}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", nargs="?", help="a params/*.yaml; by default the notebook's own sizes")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="training steps of each turn (20)")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="turns of each way, at least 2 (10)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON goes; by default the terminal")
    options = parser.parse_args(words)
    if options.repeats < 2 or options.steps < 1:
        parser.error("an interval needs --repeats 2 or more, and a turn --steps 1 or more")
    try:
        trainer = make_trainer(options.profile, options.steps)
    except UsageError as error:
        parser.error(str(error))
    answers = nvidia_smi()
    found = compare(trainer, options.repeats) | {
        "nvidia_smi": "answers" if answers else "does not answer: each of its calls failed at once and cost less",
        "profile": options.profile,
        "environment": environment.describe(trainer.device),
    }
    text = json.dumps(found, indent=1) + "\n"
    options.out.write_text(text) if options.out else print(text, end="")
    for name, said in found["ratio_to_unmonitored"].items():
        print(f"{name:<10} {said['ratio']:.4f} [{said['low']:.4f}, {said['high']:.4f}], n = {said['n']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
