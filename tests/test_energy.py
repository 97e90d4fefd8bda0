"""Joules come from a counter, or are null with the reason: never 0, never an estimate."""

import os
from types import SimpleNamespace

import numpy as np
import pynvml
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib import record
from lib.measure import energy


class FakeMonitor:
    """Stands in for ZeusMonitor: a counter that moves by what it is told."""

    def __init__(self, moves):
        self.moves, self.opened = list(moves), set()

    def begin_window(self, key, sync_execution, restart=False):
        assert not sync_execution  # Zeus would wait for the wrong device
        assert restart or key not in self.opened
        self.opened.add(key)

    def end_window(self, key, sync_execution):
        assert not sync_execution
        self.opened.remove(key)
        joules = self.moves.pop(0)
        return SimpleNamespace(gpu_energy=None if joules is None else {0: joules})


def measured(*moves, window_s=60.0):
    counter = energy.Counter("gpu_energy", FakeMonitor(moves))
    for _ in moves:
        counter.begin()
        counter.end()
    return counter.reading(window_s)


@pytest.mark.parametrize(
    ("moves", "window_s", "expected"),
    [
        ((100.0, 50.0), 60.0, (150.0, None)),
        ((100.0,), 1.999, (None, "window_too_short")),
        ((100.0,), 2.0, (100.0, None)),
        ((0.0, 0.0), 60.0, (None, "counter_zero")),
        ((None,), 60.0, (None, "counter_zero")),
        ((100.0, -3.0), 60.0, (None, "counter_reset")),
    ],
)
def test_a_counter_reading_is_believed_only_where_it_can_be_true(moves, window_s, expected):
    assert tuple(measured(*moves, window_s=window_s)) == expected


def test_the_newest_window_has_a_reading_of_its_own():
    counter = energy.Counter("gpu_energy", FakeMonitor([100.0, 50.0]))
    for _ in range(2):
        counter.begin()
        counter.end()
    assert counter.last(60.0) == (50.0, None) and counter.reading(2.0) == (150.0, None)


def test_all_cpu_packages_count(monkeypatch):
    """Two sockets of 20 and 30 J, asked for by their numbers."""
    asked = []

    def monitor(gpu_indices, cpu_indices):
        asked.append((gpu_indices, cpu_indices))
        moved = SimpleNamespace(cpu_energy={0: 20.0, 1: 30.0})
        return SimpleNamespace(begin_window=lambda *_, **__: None, end_window=lambda *_, **__: moved)

    monkeypatch.setattr("zeus.device.cpu.get_cpus", lambda: [object(), object()])
    monkeypatch.setattr("zeus.monitor.ZeusMonitor", monitor)
    counter = energy.cpu_counter()
    counter.begin()
    counter.end()
    assert asked == [([], [0, 1])] and counter.reading(60.0) == (50.0, None)


class Stepping:
    """A GPU whose counter steps every 100 ms, and the clock that reading it moves by 3 ms: 80 W idle, 300 W at work.

    `late` shares of a step are shown a step later; `stands` are spans of seconds in which the counter does not move.
    """

    def __init__(self, monkeypatch, late=0.0, stands=(), falls_at=None):
        self.now, self.work, self.late, self.stands, self.falls_at = 0.05, [], late, stands, falls_at
        monkeypatch.setattr(energy.time, "perf_counter", lambda: self.now)
        self.counter = energy.Counter("gpu_energy", self, read=self.read)

    def true_j(self, until_s):
        worked_s = sum(max(0.0, min(until_s, end) - begin) for begin, end in self.work if begin < until_s)
        return 80.0 * until_s + 220.0 * worked_s

    def shown_j(self):
        step_s = np.floor(self.now * 10 + 1e-9) / 10
        step_s = next((begin for begin, end in self.stands if begin <= step_s < end), step_s)
        older, newer = (self.true_j(max(0.0, step_s - back)) for back in (0.1, 0.0))
        reset = 1e4 if self.falls_at is not None and self.now >= self.falls_at else 0.0
        return self.late * older + (1 - self.late) * newer - reset

    def read(self):
        self.now += 0.003
        return self.shown_j()

    def begin_window(self, *_, **__):
        self.opened_j = self.shown_j()

    def end_window(self, *_, **__):
        return SimpleNamespace(gpu_energy={0: self.shown_j() - self.opened_j})

    def works(self, seconds):
        self.counter.begin()
        self.work.append((self.now, self.now + seconds))
        self.now += seconds
        self.counter.end()
        self.now += 0.5


@pytest.mark.parametrize("late", [0.0, 0.8])
@pytest.mark.parametrize("seconds", [5.07, 7.06])
def test_what_the_idle_gpu_drew_between_steps_and_work_is_taken_off(monkeypatch, late, seconds):
    """A window is its work's joules, to 20 ms of the power of a GPU at work; the edges are the idle GPU's."""
    gpu = Stepping(monkeypatch, late)
    for _ in range(2):
        gpu.works(seconds)
    for joules, edges_j in zip(gpu.counter.windows_j, gpu.counter.edges_j, strict=True):
        assert joules == pytest.approx(300.0 * seconds, abs=energy.EDGES_S * 300)
        assert 0.1 * 80 < edges_j < 0.6 * 80
    (first, second), _ = gpu.counter.after_w
    assert second == pytest.approx(80, rel=0.1) and (first > 150) == (late > 0)
    assert gpu.counter.reading(seconds).joules == pytest.approx(600.0 * seconds, abs=2 * energy.EDGES_S * 300)


def test_a_counter_that_is_stuck_in_one_window_of_two_or_falls_behind_its_work_has_no_joules(monkeypatch):
    for stands, which in (([(0.6, 99.0)], 0), ([(6.4, 99.0)], 1)):
        gpu = Stepping(monkeypatch, stands=stands)
        for _ in range(2):
            gpu.works(5.0)
        assert gpu.counter.reading(5.0) == (None, "counter_zero"), which
    for falls_at in (5.35, 5.45):  # between two steps after the work; at the second one the window has its joules
        gpu = Stepping(monkeypatch, falls_at=falls_at)
        gpu.works(5.0)
        assert gpu.counter.reading(5.0).reason == "counter_reset"
    assert gpu.counter.windows_j[0] > 0


def test_a_window_without_a_joule_is_stuck_only_where_it_was_long_enough(monkeypatch):
    """Where nothing steps aside for the counter: RAPL's, say. One of a second and more that stood still is stuck."""
    for worked_s, expected in ((1.5, (None, "counter_zero")), (0.5, (7.0, None))):
        now = [0.0]
        monkeypatch.setattr(energy.time, "perf_counter", lambda now=now: now[0])
        counter = energy.Counter("gpu_energy", FakeMonitor([0.0, 7.0]))
        for seconds in (worked_s, 60.0):
            counter.begin()
            now[0] += seconds
            counter.end()
        assert counter.reading(60.0) == expected


def test_a_window_left_open_by_a_cell_that_failed_is_void():
    counter = energy.Counter("gpu_energy", FakeMonitor([7.0]))
    counter.begin()
    counter.begin()
    counter.end()
    assert counter.reading(60.0).joules == 7.0


def test_a_run_on_the_cpu_has_no_gpu_energy_and_says_why():
    counter = energy.gpu_counter(torch.device("cpu"))
    counter.begin()
    counter.end()
    assert counter.reading(60.0) == (None, "no_gpu")


def test_every_reason_has_a_sentence():
    reasons = {energy.cpu_counter().reason, "no_gpu", "window_too_short", "counter_zero", "counter_reset", "mig"}
    assert reasons - {None} <= set(record.REASONS)


@pytest.fixture
def nvml(monkeypatch):
    """A GPU as NVML shows it, with answers that a test may change."""
    answers = {"mig": [0, 0], "counter": 1, "init": None, "processes": []}

    def answer(name):
        def give(*_):
            if isinstance(answers[name], Exception):
                raise answers[name]
            return answers[name]

        return give

    monkeypatch.setattr(pynvml, "nvmlInit", answer("init"))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMigMode", answer("mig"))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", answer("counter"))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", answer("processes"))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetIndex", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1-2-3"))
    return answers


def test_a_card_without_a_usable_counter_gives_its_reason(nvml, monkeypatch):
    gpu, error = torch.device("cuda", 0), pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    for change, reason in (
        ({"init": pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)}, "nvml_unavailable"),
        ({"init": None, "mig": [1, 1]}, "mig"),
        ({"mig": error, "counter": error}, "counter_unsupported"),
    ):
        nvml.update(change)
        assert energy.gpu_counter(gpu).reading(60.0) == (None, reason)
    nvml.update({"mig": [0, 0], "counter": 1})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    assert energy.gpu_counter(gpu).reason == "mig"


def test_a_gpu_s_counter_is_read_in_joules(nvml, monkeypatch):
    gpus = SimpleNamespace(get_total_energy_consumption=lambda _: 5_500)  # NVML's millijoules, through Zeus
    gpus.supports_get_total_energy_consumption = lambda _: True
    monkeypatch.setattr("zeus.device.get_gpus", lambda: gpus)
    monkeypatch.setattr("zeus.monitor.ZeusMonitor", lambda **_: SimpleNamespace(gpus=gpus))
    assert energy.gpu_counter(torch.device("cuda", 0)).read() == 5.5


def test_zeus_without_a_gpu_never_reads_as_0_joules(nvml):
    """NVML answers here, but Zeus finds no GPU: its own monitor would count 0 J in silence."""
    assert energy.gpu_counter(torch.device("cuda", 0)).reading(60.0) == (None, "nvml_unavailable")


def test_a_trace_holds_each_value_until_the_next():
    """Worked by hand: 100 W from 0 s, 300 W from 4 s, 200 W from 10 s; two windows, and a gap that does not count."""
    trace = energy.Trace(np.array([0.0, 4.0, 10.0]), np.array([100.0, 300.0, 200.0]))
    windows = [(1.0, 5.0), (9.0, 12.0)]
    moments = {0: 0, 3: 300, 4: 600, 5: 900, 6: 1100, 7: 1300}  # seconds of the window: joules
    assert trace.joules_by(windows, np.array(list(moments))).tolist() == list(moments.values())
    assert trace.mean_watts(windows, 7).tolist() == [100, 100, 100, 300, 300, 200, 200]


@given(
    changes=st.lists(st.tuples(st.floats(0.01, 3), st.floats(1, 700)), min_size=1, max_size=20),
    cuts=st.lists(st.floats(0.1, 20), min_size=1, max_size=4),
)
def test_values_that_did_not_change_may_be_left_out_of_a_trace(changes, cuts):
    """What Zeus does: its own `get_energy`, by trapezoids, is wrong then; a held value is not."""
    times = 1000 + np.cumsum([0.0, *(gap for gap, _ in changes)])
    watts = np.array([50.0, *(watts for _, watts in changes)])
    middles = (times[1:] + times[:-1]) / 2
    full = energy.Trace(np.sort(np.concatenate([times, middles])), np.repeat(watts, 2)[: 2 * len(times) - 1])
    ends = 1000 + np.cumsum(cuts)
    windows = list(zip(np.concatenate([[1000.0], ends[:-1] + 0.05]), ends, strict=True))
    window_s = np.linspace(0, sum(end - begin for begin, end in windows), 13)
    sparse = energy.Trace(times, watts).joules_by(windows, window_s)
    assert sparse == pytest.approx(full.joules_by(windows, window_s))
    assert (np.diff(sparse) > 0).all()


def test_a_counter_that_fails_ends_no_run_and_says_why():
    class Broken(FakeMonitor):
        def end_window(self, key, sync_execution):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    counter = energy.Counter("gpu_energy", Broken([]))
    for _ in range(2):
        counter.begin()
        counter.end()
    assert counter.reading(60.0) == (None, "gpu_lost")


def test_without_a_gpu_there_is_no_trace_and_no_variable_is_changed(monkeypatch):
    monkeypatch.setenv(energy.VISIBLE, "GPU-1-2-3")
    assert energy.PowerMonitor(torch.device("cpu")).stop() is None
    assert energy.cpu_counter().reading(60.0).reason in ("rapl_unavailable", "permission", "counter_zero")
    assert os.environ[energy.VISIBLE] == "GPU-1-2-3"


def test_other_processes_are_counted_or_unknown(nvml):
    gpu = torch.device("cuda", 0)
    own, other = SimpleNamespace(pid=os.getpid()), SimpleNamespace(pid=-1)
    for listed, expected in (([own], 0), ([own, other], 1), ([other], None)):
        nvml["processes"] = listed
        assert energy.foreign_processes(gpu) == expected
