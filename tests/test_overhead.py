"""scripts/instrument_overhead.py: the ratios by hand, and that every way trains the same steps and leaves no trace."""

import importlib.util
import math
from itertools import pairwise

import pytest
import torch
from make import TINY, tiny_profile
from test_training import make_trainer

from lib.paths import ROOT


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("instrument_overhead", ROOT / "scripts" / "instrument_overhead.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_ratio_is_the_geometric_mean_of_pairs_with_its_t_interval(script):
    """Logarithms 0 and ln 4: mean ln 2, standard error ln 2, and 12.706 of them on either side (t, one degree)."""
    found = script.ratio([1.0, 8.0], [1.0, 2.0])
    assert found["ratio"] == pytest.approx(2.0) and found["n"] == 2
    assert math.log(found["high"] / 2, 2) == pytest.approx(12.706, abs=1e-3)
    assert math.log(2 / found["low"], 2) == pytest.approx(12.706, abs=1e-3)


def test_every_way_takes_its_turns_on_the_same_steps_and_leaves_no_trace(script, monkeypatch):
    trainer = make_trainer(steps_per_epoch=3, epochs=1, dtype=torch.float32)
    steps, calls, way = [], [], [""]
    step = trainer.take_step
    monkeypatch.setattr(trainer, "take_step", lambda number: steps.append((way[0], number)) or step(number))
    monkeypatch.setattr(script, "nvidia_smi", lambda: calls.append(way[0]))
    for name, run in list(script.WAYS.items()):
        monkeypatch.setitem(script.WAYS, name, lambda trained, name=name, run=run: way.insert(0, name) or run(trained))
    shown, page = [], script.Page
    monkeypatch.setattr(script, "Page", lambda: shown.append(page()) or shown[-1])
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    found = script.compare(trainer, repeats=4)
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.model.parameters(), strict=True))
    assert {name: len(taken) for name, taken in found["seconds"].items()} == dict.fromkeys(script.WAYS, 4)
    turns = [name for name, number in steps[3:] if number == 0]
    assert {tuple(sorted(turns[at : at + 4])) for at in range(0, 20, 4)} == {tuple(sorted(script.WAYS))}
    rounds = [turns[at : at + 4] for at in range(4, 20, 4)]
    assert all({one[place] for one in rounds} == set(script.WAYS) for place in range(4))  # each in every place
    behind = [pair for one in rounds for pair in pairwise(one)]
    assert len(set(behind)) == 12  # and behind every other
    assert found["balanced"]
    assert len(shown) == 5 and min(page.shown_bytes for page in shown) > 1000  # the curve of each turn under ours
    assert calls == ["published"] * 3 * 5 and [number for _, number in steps] == [0, 1, 2] * (len(steps) // 3)
    assert set(found["ratio_to_unmonitored"]) == {"again", "ours", "published"}


def test_the_script_makes_its_trainer_from_a_profile(script, tmp_path):
    trainer = script.make_trainer(tiny_profile(tmp_path), 2)
    assert trainer.steps == 2 and trainer.p.layers == TINY["layers"]
