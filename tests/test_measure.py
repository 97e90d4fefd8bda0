"""Every count against a case worked by hand."""

import time
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from lib.measure import energy, environment, flops, kernels, meter, sampler, warmth
from lib.measure.meter import Meter, Window
from lib.model import build_model, devices, gpt2_config

CPU = torch.device("cpu")
fp32 = devices.autocast("fp32", CPU)


def small(name="sdpa"):
    return build_model(name, gpt2_config(layers=3, width=32, heads=4, positions=64, vocabulary=50))


def test_kernels_name_what_ran_forward_and_backward():
    names = kernels.names(small("sdpa"), 32, fp32)
    assert any("scaled_dot_product_flash_attention" in name for name in names["forward"])
    assert any("backward" in name for name in names["backward"])
    assert not any("scaled_dot_product" in name for name in kernels.names(small("baseline"), 32, fp32)["forward"])


def test_what_one_pass_shows_wrongly_is_outvoted_and_an_empty_profile_is_unknown():
    usual = {"mm": 60.0, "softmax": 30.0, "add": 9.0, "view": 1.0}
    stopped = {"mm": 60.0, "view": 9_000.0}  # put aside in the middle of a view, and the others lost
    assert kernels.usual([usual] * 3 + [stopped] * 2) == ["mm", "softmax", "add"]
    assert kernels.usual([{}] * 5) is None


def test_the_kernels_are_those_of_training_and_of_a_compiled_layer_where_the_run_compiled(monkeypatch):
    model, modes, compiled = small("sdpa").eval(), [], []
    layer = model.transformer.h[0].attn
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *a, **k: modes.append(layer.training) or forward(*a, **k))
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    kernels.names(model, 8, fp32)
    assert set(modes) == {True} and not layer.training and not compiled
    kernels.names(model, 8, fp32, compiled=True)
    assert compiled == [layer]


def test_a_meter_adds_up_its_stretches_and_nothing_between():
    meter = Meter(CPU)
    for _ in range(2):
        with meter.window():
            sum(range(200_000))
        held = meter.window_s
        sum(range(200_000))
        assert meter.window_s == held
    values, reasons = meter.metrics()
    assert len(meter.windows_s) == 2 and values["time_s"] == pytest.approx(sum(meter.windows_s))
    assert values["cpu_time_s"] > 0 and values["energy_j"] is None and reasons["energy_j"] == "no_gpu"


class Status:
    """Stands in for the files of /proc: a peak in KiB for each read, None where there is no such file."""

    peaks: ClassVar[list] = []

    def __init__(self, _):
        pass

    def write_text(self, *_, **__):
        pass

    def read_text(self, **_):
        peak = Status.peaks.pop(0)
        if peak is None:
            raise FileNotFoundError
        return f"VmPeak:\t 9999999 kB\nVmHWM:\t {peak} kB\n"


def test_what_a_run_took_is_the_sum_over_its_windows_and_the_highest_peak(monkeypatch):
    """Two windows of 3 and 7 s, 2 and 5 s of CPU, 50 and 30 bytes of disk, peaks of 500 and 300 KiB."""
    now = {"perf_counter": 10.0, "time": 10.0, "process_time": 1.0}
    for name in now:
        monkeypatch.setattr(meter.time, name, lambda name=name: now[name])
    moved = iter((100, 150, 1000, 1030))
    monkeypatch.setattr(meter, "_disk_bytes", lambda: next(moved))
    monkeypatch.setattr(meter, "_waited_s", lambda: None)
    monkeypatch.setattr(meter, "Path", Status)
    monkeypatch.setattr(Status, "peaks", [500, 300])
    found = Meter(CPU)
    for seconds, cpu_s in ((3, 2), (7, 5)):
        with found.window():
            now |= {"perf_counter": now["perf_counter"] + seconds, "process_time": now["process_time"] + cpu_s}
        now["process_time"] += 9
    values, reasons = found.metrics()
    expected = {"time_s": 10, "cpu_time_s": 7, "cpu_cores_used": 0.7, "disk_bytes": 80, "peak_resident_bytes": 512_000}
    assert {name: values[name] for name in expected} == expected and found.windows_s == [3, 7]
    assert reasons["peak_memory_bytes"] == reasons["energy_j"] == "no_gpu"
    monkeypatch.setattr(Status, "peaks", [None])
    monkeypatch.setattr(meter.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=600))
    found._read_peaks()
    assert found.metrics()[0]["peak_resident_bytes"] == 600 * 1024


def on_a_gpu(monkeypatch, joules=(100.0, 300.0), watts=40.0, idle_w=8.0, others=(0, 0)):
    """A meter of two windows, 3 s and 7 s, as a GPU leaves it: the counter's joules, and a trace of so many watts."""
    found = Meter(CPU)
    found.device, found.on_gpu, found._others = torch.device("cuda"), True, list(others)
    found.windows = [Window(0.0, 3.0, 1000.0, 1003.0), Window(5.0, 12.0, 1005.0, 1012.0)]
    found.gpu_counter = energy.Counter("gpu_energy", monitor=object())
    found.gpu_counter.windows_j, found.idle_power = list(joules), energy.Reading(idle_w)
    found.trace = energy.Trace(np.array([999.0]), np.array([watts]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 11)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 22)
    found._read_peaks()
    return found


def test_what_a_gpu_took_is_told_apart(monkeypatch):
    values, reasons = on_a_gpu(monkeypatch).metrics()
    expected = {
        "energy_j": 400, "mean_power_w": 40, "idle_power_w": 8, "net_energy_j": 320, "peak_memory_bytes": 11,
        "peak_reserved_memory_bytes": 22, "peak_resident_bytes": None,
    }  # fmt: skip
    assert {name: values[name] for name in expected} == expected and reasons["peak_resident_bytes"] == "gpu_run"
    values, reasons = on_a_gpu(monkeypatch, idle_w=40.0).metrics()  # as much as in the run
    assert values["energy_j"] == 400 and values["net_energy_j"] is None
    assert reasons["idle_power_w"] == reasons["net_energy_j"] == "not_idle"
    assert on_a_gpu(monkeypatch, idle_w=39.0).metrics()[0]["net_energy_j"] == pytest.approx(10)


def test_another_process_or_a_trace_that_is_a_tenth_off_leaves_no_joules(monkeypatch):
    assert on_a_gpu(monkeypatch, others=(0, 1)).energy() == (None, "foreign_process")
    for watts, expected in ((43.9, 400.0), (36.1, 400.0), (44.1, None), (35.9, None)):
        found = on_a_gpu(monkeypatch, watts=watts)
        assert found.energy().joules == expected and found.disagreement == pytest.approx(watts / 40 - 1)


def test_the_log_is_in_the_counter_s_joules_and_the_trace_in_the_middles_of_its_parts(monkeypatch):
    """The trace says 38 W where the counter says 40: half of the window has half of the counter's joules."""
    found = on_a_gpu(monkeypatch, watts=38.0)
    found.marks = [(1, 5.0), (2, 10.0)]
    assert [point["energy_j"] for point in found.log()] == pytest.approx([200, 400])
    times_s, watts = found.power()
    assert len(times_s) == 100 and times_s[:2] == [0.05, 0.15] and set(watts) == {38.0}


def test_a_stopwatch_times_each_repetition_until_the_device_is_done_and_believes_its_shortest(monkeypatch):
    now = [0.0]

    def waits(_):
        now[0] += 1.0  # the device is a second behind

    monkeypatch.setattr(meter.devices, "synchronize", waits)
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(meter.energy, "foreign_processes", lambda _: 0)
    watch = meter.Stopwatch(CPU, energy.Counter("gpu_energy", monitor=object()))
    watch.counter.begin = watch.counter.end = lambda: None
    for seconds in (2.0, 3.0):
        with watch:
            now[0] += seconds
    watch.counter.windows_j = [5.0, 6.0]
    assert watch.seconds == [3.0, 4.0] and watch.reading() == (11.0, None)
    watch.seconds[0] = 1.0
    assert watch.reading() == (None, "window_too_short")


def test_joules_of_a_call_are_those_of_the_window_over_its_calls_after_a_first_one(monkeypatch):
    """A first call takes 100 J, each other one 5 J in a second."""
    now, spent = [0.0], [0.0]

    class Moving(energy.Counter):
        def begin(self):
            self.began_j = spent[0]

        def end(self):
            self.windows_j.append(spent[0] - self.began_j)

    def work():
        spent[0] += 5.0 if spent[0] else 100.0
        now[0] += 1.0

    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(meter.energy, "gpu_counter", lambda _: Moving("gpu_energy", monitor=object()))
    monkeypatch.setattr(meter.energy, "foreign_processes", lambda _: 0)
    assert meter.energy_of(work, CPU, 12.0) == (5.0, None) and spent == [100.0 + 12 * 5]


@pytest.mark.parametrize("jump_s", [5.0, -5.0])
def test_a_wall_clock_that_jumps_in_a_stretch_or_between_two_is_seen(jump_s, monkeypatch):
    for where in ("inside", "between"):
        found, ahead_s, wall = Meter(CPU), [0.0], time.time
        monkeypatch.setattr(time, "time", lambda ahead_s=ahead_s, wall=wall: wall() + ahead_s[0])
        for _ in range(2):
            with found.window():
                ahead_s[0] += jump_s if where == "inside" else 0.0
            ahead_s[0] += jump_s if where == "between" else 0.0
        monkeypatch.undo()
        assert found.clock_jump_s == pytest.approx(5.0, abs=0.05)
        found.trace = energy.Trace(np.array([0.0]), np.array([100.0]))
        assert found.trace_j is None and found.power() == ([], [])


def test_marks_are_seconds_of_the_window_and_not_of_what_lies_between():
    meter = Meter(CPU)
    for step in (1, 2):
        with meter.window():
            sum(range(200_000))
            meter.mark(step)
        sum(range(2_000_000))
    first, second = (point["time_s"] for point in meter.log())
    assert 0 < first <= meter.windows_s[0] < second <= meter.window_s
    assert [point["energy_j"] for point in meter.log()] == [None, None]


def test_another_process_that_was_seen_once_stays_seen(monkeypatch):
    for seen, expected in (((0, 0), 0), ((0, None), None), ((None, 2, 0), 2), ((2, None), 2)):
        meter = Meter(CPU)
        meter._others = list(seen)
        assert meter.foreign_processes == expected


def test_without_a_gpu_idle_power_takes_no_time_and_has_its_reason(monkeypatch):
    monkeypatch.setattr(time, "sleep", None)
    assert Meter(CPU).rest(30.0) == (None, "no_gpu")


def test_two_kernels_at_once_are_busy_once():
    assert kernels.covered([(0, 2), (5, 6), (1, 3), (5.5, 5.7)]) == 4
    assert kernels.covered([]) == 0
    assert kernels.busy_fraction(CPU, run=None) == (None, "no_gpu")


def test_only_what_ran_on_the_gpu_is_busy_time():
    def event(kind, begin, end, named=False):
        span = SimpleNamespace(start=begin, end=end)
        return SimpleNamespace(device_type=kind, time_range=span, is_user_annotation=named)

    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [event(cuda, 0, 2), event(cpu, 0, 9), event(cuda, 0, 9, named=True), event(cuda, 5, 6)]
    assert kernels._on_device(events) == [(0, 2), (5, 6)]
    assert kernels._share(events, 6e-6).joules == pytest.approx(0.5)
    assert kernels._share(events[1:3], 6e-6) == (None, "empty_profile")  # unknown, and not 0


def test_mfu_is_useful_flops_over_the_device_s_peak():
    assert flops.mfu(98.94e12, "NVIDIA H200", "bf16").joules == pytest.approx(0.1)
    assert flops.mfu(16.52e12, "NVIDIA GeForce RTX 4090", "fp32").joules == pytest.approx(0.2)
    for unknown in ("NVIDIA H200 MIG 1g.18gb", "some CPU"):
        assert flops.mfu(1e12, unknown, "bf16") == (None, "peak_unknown")


def test_model_flops_are_those_of_the_tokens_that_are_no_padding():
    model = small()
    by_length = {tokens: flops.analytic(model, tokens)["forward_flops_causal"] for tokens in (3, 16)}
    assert flops.non_padding(model, [[3, 16], [16, 0]]) == by_length[3] + 2 * by_length[16]


def test_the_resident_peak_is_the_window_s_own():
    block = bytearray(300 << 20)  # a peak from before the window
    block[:: 1 << 12] = b"\1" * len(block[:: 1 << 12])
    del block
    meter = Meter(CPU)
    with meter.window():
        block = bytearray(100 << 20)
        block[:: 1 << 12] = b"\1" * len(block[:: 1 << 12])
        del block
    import psutil

    values, reasons = meter.metrics()
    if values["peak_resident_bytes"] is None:
        assert reasons["peak_resident_bytes"] == "peak_not_resettable"
    else:
        resident = psutil.Process().memory_info().rss
        assert resident + (60 << 20) < values["peak_resident_bytes"] < resident + (200 << 20)


def sample(wall_s, **said):
    return sampler.Sample(wall_s, *[said.get(name) for name in sampler.Sample._fields[1:]])


def test_samples_count_where_they_lie_inside_a_window():
    found = sampler.inside([sample(t) for t in (0.5, 1.0, 1.5, 3.0, 4.0, 9.0)], [(1.0, 2.0), (4.0, 6.0)])
    assert [(time_s, one.wall_s) for time_s, one in found] == [(0.0, 1.0), (0.5, 1.5), (1.0, 4.0)]


def test_a_summary_is_of_what_was_said_and_no_share_is_above_one():
    said = [([], 1980, 40), (["power cap"], 1400, 50), (["power cap", "heat (hardware)"], 1300, 55), (None, None, None)]
    samples = [sample(0, throttle_reasons=r, sm_clock_mhz=c, temperature_c=t) for r, c, t in said]
    found = sampler.summary(samples)
    assert (found["samples"], found["throttled_share"]) == (4, pytest.approx(2 / 3))
    assert found["throttled_by"] == pytest.approx({"heat (hardware)": 1 / 3, "power cap": 2 / 3})
    clocks = [found[f"sm_clock_mhz_{which}"] for which in ("minimum", "median", "maximum")]
    assert clocks == [1300, 1400, 1980] and found["power_limit_w_minimum"] is None
    assert (found["temperature_c_begin"], found["temperature_c_end"]) == (40, 55)
    assert sampler.summary([]) is None and sampler.summary(samples[3:])["throttled_share"] is None


def test_utilization_is_of_the_windows_and_of_nothing_that_may_lie_before(monkeypatch):
    meter = Meter(CPU)
    assert meter.utilization() == (None, "no_gpu")
    monkeypatch.setattr(meter, "on_gpu", True)
    meter.windows = [Window(0, 4, 1000, 1004), Window(5, 9, 1005, 1009)]
    meter.samples = [
        sample(1000 + t, utilization_percent=p) for t, p in ((0.5, 9), (2, 80), (4.5, 9), (5.9, 9), (7, 90))
    ]
    assert meter.utilization() == (85.0, None)
    meter.samples = meter.samples[:1]
    assert meter.utilization() == (None, "no_sample")


def test_a_record_holds_no_more_samples_than_it_has_room_for():
    meter = Meter(CPU)
    meter.windows, meter.samples = [Window(0, 900, 0, 900)], [sample(t / 4, sm_clock_mhz=t) for t in range(3600)]
    series = meter.gpu_series()
    assert len(series) == 600 and series[1] == series[0] | {"time_s": 1.5, "sm_clock_mhz": 6}


@pytest.mark.parametrize(
    ("heat", "clock", "steady", "seconds"),
    {
        "as an H100": (lambda t: round(54 - 20 * 0.3**t), lambda t: 1980, True, (5, 9)),
        "throttled": (lambda t: 54, lambda t: 1980 - 60 * min(t, 8), True, (8, 13)),
        "for ever": (lambda t: round(40 + 2 * t), lambda t: 1980, False, (19.5, 21)),
        "at once": (lambda t: 54, lambda t: 1980, True, (3, 3.6)),
        "silent": (lambda t: None, lambda t: None, None, (0, 0.3)),
    }.values(),
)
def test_warm_up_lasts_until_heat_and_clock_rest_or_patience_ends(heat, clock, steady, seconds, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(warmth.time, "perf_counter", lambda: now[0])
    answer = lambda device: {"temperature_c": heat(now[0]), "sm_clock_mhz": clock(now[0])}  # noqa: E731
    monkeypatch.setattr(environment, "gpu_state", answer)
    found = warmth.Warmth(CPU)
    found.look()
    while found.rising():
        now[0] += 0.03  # a step
        found.look()
    assert found.steady is steady and seconds[0] <= now[0] <= seconds[1]
    assert found.temperature_c == heat(found.looks[-1][0])
