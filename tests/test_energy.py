"""Joules come from a counter, or are null with the reason: never 0, never an estimate."""

from types import SimpleNamespace

import pytest
import torch

from lib import energy, record


class FakeMonitor:
    """Stands in for ZeusMonitor: a counter that moves by what it is told."""

    def __init__(self, moves):
        self.moves, self.opened = list(moves), set()

    def begin_window(self, key, restart=False):
        assert restart or key not in self.opened
        self.opened.add(key)

    def end_window(self, key):
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
        ((100.0,), 9.9, (None, "window_too_short")),
        ((0.0, 0.0), 60.0, (None, "counter_zero")),
        ((None,), 60.0, (None, "counter_zero")),
        ((100.0, -3.0), 60.0, (None, "counter_reset")),
    ],
)
def test_a_counter_reading_is_believed_only_where_it_can_be_true(moves, window_s, expected):
    assert tuple(measured(*moves, window_s=window_s)) == expected


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
    """A card as NVML shows it, with answers that a test may change."""
    import pynvml

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
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1-2-3"))
    return answers


def test_a_card_without_a_usable_counter_gives_its_reason(nvml, monkeypatch):
    import pynvml

    card, error = torch.device("cuda", 0), pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    for change, reason in (
        ({"init": error}, "nvml_unavailable"),
        ({"init": None, "mig": [1, 1]}, "mig"),
        ({"mig": error, "counter": error}, "counter_unsupported"),
    ):
        nvml.update(change)
        assert energy.gpu_counter(card).reading(60.0) == (None, reason)
    nvml.update({"mig": [0, 0], "counter": 1})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    assert energy.gpu_counter(card).reason == "mig"


def test_zeus_without_a_gpu_never_reads_as_0_joules(nvml):
    """NVML answers here, but Zeus finds no card: its own monitor would count 0 J in silence."""
    assert energy.gpu_counter(torch.device("cuda", 0)).reading(60.0) == (None, "nvml_unavailable")


def test_other_processes_are_counted_or_unknown(nvml):
    import os

    card = torch.device("cuda", 0)
    own, other = SimpleNamespace(pid=os.getpid()), SimpleNamespace(pid=-1)
    for listed, expected in (([own], 0), ([own, other], 1), ([other], None)):
        nvml["processes"] = listed
        assert energy.foreign_processes(card) == expected
