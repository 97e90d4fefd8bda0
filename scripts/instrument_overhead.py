#!/usr/bin/env python3
"""What the instruments cost: the same training steps unmonitored, under ours, and the way that was published.

`ours` is what train.ipynb does: counters at the window's ends, power, clock and heat sampled by other processes, log
points, and the live curve, drawn and packed as a kernel packs it for the browser. `published` counts the model's FLOPs
by running it once more and calls nvidia-smi, in every step ("Attentions Under the Microscope", main.py:112-130). All
take turns in one process, in the orders of a Williams square, so that over every four repeats each stands in every
place and behind every other; `again` is `unmonitored` a second time: its ratio is the noise. Ratios are geometric means
with 95 % paired-t intervals, each by itself, and no verdict.
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
from jupyter_client.session import Session
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from lib import model, parameters, progress, training
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


class Page:
    """Stands where the notebook's page would: what it is shown is packed and signed as a kernel does it."""

    def __init__(self):
        self.session, self.shown_bytes = Session(key=b"key"), 0

    def update(self, data, raw):
        message = self.session.msg("update_display_data", {"data": data, "metadata": {}, "transient": {}})
        self.shown_bytes += sum(map(len, self.session.serialize(message)))


def ours(trainer) -> float:
    p = trainer.p
    trainer.meter = Meter(trainer.device)
    live = progress.Live(trainer.steps, p.batch_size * p.accumulation * p.context)
    live.handle = Page()
    with trainer.meter.watching():
        trainer.run(live)
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
    config = model.config_of(vars(p), data.vocabulary, p.dropout)
    return training.Trainer(model.build_model(p.attention, config, p.seed, **p.options), data, p)


def compare(trainer, repeats: int) -> dict:
    """Seconds of each way by repeat, and their ratios to `unmonitored`."""
    trainer.warm_up()
    names, seconds = list(WAYS), {name: [] for name in WAYS}
    orders = [plan.orders(len(names), 1)[0], *plan.orders(len(names), repeats)]
    for repeat, order in enumerate(orders, -1):  # the first time pays for start-up and does not count
        for name in (names[which] for which in order):
            with trainer.snapshot_and_restore():
                trainer.model.train()
                taken_s = WAYS[name](trainer)
            if repeat >= 0:
                seconds[name].append(taken_s)
        print(f"repeat {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
    ratios = {name: ratio(taken, seconds["unmonitored"]) for name, taken in seconds.items() if name != "unmonitored"}
    balanced = repeats % len(names) == 0
    return {"steps": trainer.steps, "seconds": seconds, "balanced": balanced, "ratio_to_unmonitored": ratios}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", nargs="?", help="a params/*.yaml; by default the notebook's own sizes")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="training steps of each turn (20)")
    parser.add_argument("--repeats", type=int, default=8, metavar="N", help="turns of each way, at least 2 (8)")
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
    options.out.write_text(text, encoding="utf-8") if options.out else print(text, end="")
    for name, said in found["ratio_to_unmonitored"].items():
        print(f"{name:<10} {said['ratio']:.4f} [{said['low']:.4f}, {said['high']:.4f}], n = {said['n']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
