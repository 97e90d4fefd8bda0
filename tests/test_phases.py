"""Where a step's time and energy go, by a clock that is told how long everything takes."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_training import make_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from lib import attention
from lib.measure import energy, flops, meter, phases
from lib.model import build_model, devices, gpt2_config
from lib.record.schema import Phase, Slope

CPU = torch.device("cpu")


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(meter.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class Counter(energy.Counter):
    """A counter of a GPU that draws `power(now)` watts by the clock."""

    def __init__(self, clock, power=lambda now: 300.0):
        super().__init__("gpu_energy", monitor=SimpleNamespace())
        self.clock, self.power = clock, power

    def begin(self):
        self.began = self.clock.now

    def end(self):
        self.windows_j.append(self.power(self.began) * (self.clock.now - self.began))


def told(trainer, clock, log, forward=1.0, backward=2.0, optimizer=0.5):
    """The trainer, whose work takes as long as it is told."""
    passes, step = trainer.forward_backward, trainer.take_step

    def timed_passes(step, backward_too=True, **words):
        with_backward = words.get("backward", backward_too)
        clock.now += forward + backward * with_backward
        log.append("forward_backward" if with_backward else "forward")
        return passes(step, with_backward)

    def timed_step(number):
        clock.now += optimizer
        step(number)
        log[-1] = "step"

    trainer.forward_backward, trainer.take_step = timed_passes, timed_step
    return trainer


def test_phases_are_loops_of_their_own_and_their_differences_are_derived(clock):
    log = []
    rows = {row["phase"]: row for row in phases.phases(told(make_trainer(), clock, log), 4, rounds=2, warmup=1)}
    seconds = {name: row["time_s_per_step"] for name, row in rows.items()}
    expected = {"forward": 1.0, "forward_backward": 3.0, "step": 3.5, "backward": 2.0, "optimizer": 0.5}
    assert seconds == pytest.approx(expected)
    assert {name for name, row in rows.items() if row["derived"]} == {"backward", "optimizer"}
    assert {row["energy_null_reason"] for row in rows.values()} == {"no_gpu"}
    # A first look at each, then round by round, the other way round in the second.
    names = ["forward", "forward_backward", "step"]
    assert log == [*names, *[name for name in names for _ in range(5)], *[n for n in names[::-1] for _ in range(5)]]


def test_a_phase_s_joules_are_the_counter_s_where_each_round_is_long_enough(clock, monkeypatch):
    monkeypatch.setattr(meter.energy, "gpu_counter", lambda _: Counter(clock))
    monkeypatch.setattr(meter.energy, "foreign_processes", lambda _: 0)
    rows = {row["phase"]: row for row in phases.phases(told(make_trainer(), clock, [], forward=0.4), 4, rounds=2)}
    assert rows["forward"]["energy_j_per_step"] is None  # rounds of 1.6 s
    assert rows["forward"]["energy_null_reason"] == rows["backward"]["energy_null_reason"] == "window_too_short"
    assert rows["step"]["energy_j_per_step"] == pytest.approx(2.9 * 300)
    assert rows["optimizer"]["energy_j_per_step"] == pytest.approx(0.5 * 300)
    monkeypatch.setattr(meter.energy, "foreign_processes", lambda _: 1)
    rows = phases.phases(told(make_trainer(), clock, [], forward=0.4), 4, rounds=2)
    assert rows[2]["energy_j_per_step"] is None and rows[2]["energy_null_reason"] == "foreign_process"


def test_a_step_takes_the_median_of_the_rounds_and_at_least_the_quickest():
    reading = SimpleNamespace(joules=30.0, reason=None)
    row = phases._per_step(SimpleNamespace(seconds=[6.0, 1.0, 2.0], reading=lambda: reading), steps=10)
    assert row["time_s_per_step"] == 0.2 and row["minimum_time_s_per_step"] == 0.1 and row["energy_j_per_step"] == 1.0


def test_what_is_measured_is_what_a_record_holds():
    found = phases.measured(make_trainer(), 1)
    assert [Phase(**row).phase for row in found["phases"]][:3] == ["forward", "forward_backward", "step"]
    assert Slope(**found["slope"]).layers_with_attention == [0, 1, 2]
    assert len(phases.table(found)) == 6


def everything(trainer):
    moments = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    tensors = [*trainer.model.state_dict().values(), *moments, trainer.losses, torch.get_rng_state()]
    return [tensor.clone() for tensor in tensors], trainer.non_padding_tokens.copy(), list(trainer.model.state_dict())


@pytest.mark.parametrize("measured", [phases.phases, phases.slope])
def test_nothing_stays_behind(measured):
    trainer = make_trainer("mla", dropout=0.1)
    trainer.run()
    before = everything(trainer)
    attentions = [block.attn for block in trainer.model.transformer.h]
    measured(trainer, 3, rounds=2)
    for one, other in zip(before[0], everything(trainer)[0], strict=True):
        assert torch.equal(one, other)
    assert (before[1] == trainer.non_padding_tokens).all() and before[2] == list(trainer.model.state_dict())
    assert [block.attn for block in trainer.model.transformer.h] == attentions
    assert all(weight.grad is None for weight in trainer.model.parameters())


def test_a_failure_leaves_nothing_behind_either(monkeypatch):
    trainer = make_trainer()
    trainer.run()
    before, attentions = everything(trainer), [block.attn for block in trainer.model.transformer.h]
    monkeypatch.setattr(phases, "_forward_backward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        phases.slope(trainer, 3)
    assert [block.attn for block in trainer.model.transformer.h] == attentions
    assert all(torch.equal(one, other) for one, other in zip(before[0], everything(trainer)[0], strict=True))


def slope_of(trainer, clock, per_core, drift=0.0, curved=0.0):
    """The slope where a step takes 5 s, each kept attention `per_core`, and each step `drift` more than the last."""
    calls = []

    def forward_backward(step, backward=True):
        calls.append(step)
        kept = sum(not isinstance(block.attn, phases.Bypassed) for block in trainer.model.transformer.h)
        clock.now += 5 + per_core * kept + curved * kept**2 + drift * len(calls)

    trainer.forward_backward = forward_backward
    return phases.slope(trainer, 4, rounds=4, warmup=1)


def deep_trainer(layers):
    trainer = make_trainer()
    trainer.model = build_model("sdpa", gpt2_config(layers, 8, 2, 16, 30)).double()
    return trainer


def test_the_slope_is_the_price_of_one_core_and_drift_cancels(clock, monkeypatch):
    monkeypatch.setattr(meter.energy, "gpu_counter", lambda _: Counter(clock))
    monkeypatch.setattr(meter.energy, "foreign_processes", lambda _: 0)
    found = slope_of(deep_trainer(12), clock, 0.25)
    assert found["layers_with_attention"] == [0, 3, 6, 9, 12]
    assert found["time_s_per_step"] == pytest.approx([5 + 0.25 * kept for kept in found["layers_with_attention"]])
    assert found["time_s_per_core"] == pytest.approx(0.25) and found["time_r_squared"] == pytest.approx(1)
    assert found["energy_j_per_core"] == pytest.approx(75) and found["energy_null_reason"] is None
    drifting = slope_of(deep_trainer(12), clock, 0.25, drift=0.01)
    assert drifting["time_s_per_core"] == pytest.approx(0.25)
    assert drifting["time_s_per_core_low"] < 0.25 < drifting["time_s_per_core_high"]
    assert drifting["time_r_squared"] < 1


def test_what_is_no_line_shows_in_r_squared_and_a_few_layers_are_all_counted(clock):
    found = slope_of(deep_trainer(4), clock, 0.0, curved=0.3)
    assert found["layers_with_attention"] == [0, 1, 2, 3, 4] and found["time_r_squared"] < 0.95
    assert found["energy_j_per_core"] is None and found["energy_null_reason"] == "no_gpu"


def test_the_interval_is_the_one_of_least_squares():
    costs = {0: [1.0, 1.2], 2: [2.1, 2.0], 4: [2.9, 3.1]}
    found = phases._line("slope", "fit", costs)
    # By hand: x - mean = -2, 0, 2 in both rounds; slopes 1.9/4 and 1.9/4; residual spread over 6 - 3 degrees.
    slope = 0.475
    residuals = []
    for turn in range(2):
        y = [costs[kept][turn] for kept in (0, 2, 4)]
        residuals += [value - sum(y) / 3 - slope * (kept - 2) for kept, value in zip((0, 2, 4), y, strict=True)]
    error = math.sqrt(sum(r**2 for r in residuals) / 3 / 16)
    assert found["slope"] == pytest.approx(slope)
    assert found["slope_high"] - slope == pytest.approx(3.182446 * error, rel=1e-5)  # t of 3 degrees, 97.5 %


def test_a_bypassed_core_is_gpt2_s_projections_and_nothing_else():
    config = gpt2_config(2, 32, 4, 64, 30)
    bypassed, sdpa = phases.Bypassed(config), attention.load("sdpa")(config, 0)
    bypassed.load_state_dict(sdpa.state_dict())
    one, many = torch.randn(2, 1, 32), torch.randn(2, 16, 32)
    torch.testing.assert_close(bypassed(one)[0], sdpa(one)[0])  # a lone token attends to itself
    each = torch.cat([sdpa(many[:, t : t + 1])[0] for t in range(16)], dim=1)
    torch.testing.assert_close(bypassed(many)[0], each)
    model, counted = build_model("sdpa", config), []
    for kept in (2, 1, 0):
        if kept < 2:
            model.transformer.h[kept].attn = phases.Bypassed(config)
        counted.append(flops.counted(model, 16, devices.autocast("fp32", CPU)))
    core = sdpa.core_flops(16, dense=True)
    assert counted[0] - counted[1] == counted[1] - counted[2] == core


def test_the_bypass_copies_nothing_on_its_way_forward():
    class Moved(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function._overloadpacket.__name__ not in ("clone", "copy_", "cat", "_to_copy"), function
            return function(*args, **kwargs or {})

    bypassed, x = phases.Bypassed(gpt2_config(1, 32, 4, 64, 30)), torch.randn(2, 16, 32)
    with Moved():
        out = bypassed(x)[0]
    values = bypassed.c_attn(x)[..., 64:]
    torch.testing.assert_close(out, values @ bypassed.c_proj.weight + bypassed.c_proj.bias)
