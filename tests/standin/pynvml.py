"""A stand-in for NVIDIA's management library: two GPUs whose true energy is known, and every way they may fail.

First on a process's PYTHONPATH it takes the place of nvidia-ml-py there and in the processes started from it. Constants
and errors are the real module's; answers follow the scenario, a JSON file that the variable NVML_STANDIN names and that
may change while a process runs:

    start      when the power's shape begins, by the wall clock
    shape      constant, square, ramp, real, "worked" or "cooling"
    at_work    the shape is that of a working GPU: drawn while `work` says so, and `IDLE_W` else
    scale      of the counter against the truth (1)
    late_s     by which the counter shows what was used later than it was (0)
    reset_at   seconds after which the counter starts anew
    stuck_at   seconds after which it stands still
    errors     {function: error code}
    capped     under load the clock falls to 1400 MHz, by the power cap, and only then
    mig, architecture, processes, throttled, clock, temperature, utilization, known_as
"""

import importlib.machinery
import json
import math
import os
import sys
import time
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).resolve().parent
_spec = importlib.machinery.PathFinder.find_spec("pynvml", [path for path in sys.path if Path(path).resolve() != HERE])
exec(_spec.loader.get_code("pynvml"), globals())

__synthetic__ = True
CARDS = ("GPU-standin-0", "GPU-standin-1")
CARD = CARDS[1]  # the one that is measured; the other draws 50 W, so that taking it for this one is seen
GRID_S, LENGTH_S = 0.01, 300.0
IDLE_W = 120.0  # what an H100 draws right after work
now = time.time  # a test may put a clock of its own here
spend = lambda seconds: None  # noqa: E731 - and here what makes that clock go on while the counter is read
_read_s = np.random.default_rng(0).choice([0.0026, 0.003, 0.0034, 0.016], 10_000, p=[0.33, 0.33, 0.33, 0.01]).tolist()
_work: list[list[float]] = []  # begin and end of what the GPU was given to do; the last may have no end yet


def scenario() -> dict:
    path = os.environ["NVML_STANDIN"]
    found = os.stat(path)
    return _scenario(path, found.st_ino, found.st_mtime_ns)


@lru_cache(1)
def _scenario(path, *_):
    return json.loads(Path(path).read_text())


def work(begins: bool) -> None:
    """From now on the GPU works, or idles."""
    if begins:
        _work.append([now(), math.inf])
    else:
        _work[-1][1] = now()


def working(moment: float) -> bool:
    return any(begin <= moment < end for begin, end in _work)


@lru_cache
def watts(shape: str) -> np.ndarray:
    """Power over `LENGTH_S` seconds, each value for `GRID_S`."""
    t = np.arange(0, LENGTH_S, GRID_S)
    if shape == "constant":
        return np.full_like(t, 300.0)
    if shape == "square":
        return np.where(t % 2 < 1, 400.0, 100.0)
    if shape == "ramp":
        return np.minimum(100 + 10 * t, 700.0)
    if shape == "worked":
        return np.where(t < 75, 300.0, 80.0)
    if shape == "cooling":
        return np.where(t < 70, 300.0, 80.0 + 200 * np.exp(-(t - 70) / 20))
    random = np.random.default_rng(0)
    busy = 480 + 40 * np.sin(2 * math.pi * t / 0.37) + np.repeat(random.normal(0, 25, len(t) // 2), 2)
    hot = np.where(t % 25 > 18, 0.7, 1.0)  # held down by heat for seven seconds of 25
    return np.where(t % 11 < 0.4, 150.0, busy * hot)  # and short pauses


def true_joules(begin_s: float, end_s: float, shape: str, start: float) -> float:
    """What the measured GPU used between two moments of the wall clock, at work throughout."""
    return _joules_by(shape, end_s - start) - _joules_by(shape, begin_s - start)


@lru_cache
def _cumulated(shape: str) -> list[float]:
    return [0.0, *(np.cumsum(watts(shape)) * GRID_S).tolist()]


def _joules_by(shape: str, t: float) -> float:
    known = _cumulated(shape)
    place = min(max(t, 0.0) / GRID_S, len(known) - 1.000001)
    before = int(place)
    return known[before] + (known[before + 1] - known[before]) * (place - before)


def _used_j(said: dict, t: float) -> float:
    """What the measured GPU used until a second of the scenario."""
    shape, start = said["shape"], said["start"]
    if not said.get("at_work"):
        return _joules_by(shape, t)
    used_j = IDLE_W * t
    for begin, end in ((begin - start, min(end - start, t)) for begin, end in _work if begin - start < t):
        used_j += _joules_by(shape, end) - _joules_by(shape, begin) - IDLE_W * (end - begin)
    return used_j


def _watts(said: dict, t: float) -> float:
    idle = said.get("at_work") and not working(said["start"] + t)
    return IDLE_W if idle else watts(said["shape"])[int(t / GRID_S + 0.5)]


def _answers(function):
    def answer(*words):
        code = scenario().get("errors", {}).get(function.__name__)
        if code is not None:
            raise NVMLError(code)  # noqa: F821 - the real module's
        return function(*words)

    globals()[function.__name__] = answer
    return answer


@_answers
def nvmlInit():
    pass


def nvmlShutdown():
    pass


@_answers
def nvmlDeviceGetCount():
    return len(CARDS)


@_answers
def nvmlDeviceGetHandleByIndex(index):
    return index


@_answers
def nvmlDeviceGetHandleByUUID(uuid):
    names = scenario().get("known_as", CARDS)
    if uuid not in names:
        raise NVMLError(NVML_ERROR_NOT_FOUND)  # noqa: F821
    return names.index(uuid)


@_answers
def nvmlDeviceGetIndex(card):
    return card


@_answers
def nvmlDeviceGetName(card):
    return f"stand-in {card}"  # two kinds of cards


@_answers
def nvmlDeviceGetC2cModeInfoV(card):
    raise NVMLError(NVML_ERROR_NOT_SUPPORTED)  # noqa: F821


@_answers
def nvmlDeviceGetArchitecture(card):
    return scenario().get("architecture", NVML_DEVICE_ARCH_HOPPER)  # noqa: F821


@_answers
def nvmlDeviceGetMigMode(card):
    return [scenario().get("mig", 0)] * 2


@_answers
def nvmlDeviceGetFieldValues(card, fields):
    """The power at this moment, as the sensor has it: anew every 20 ms."""
    t = math.floor((now() - scenario()["start"]) / 0.02 + 1e-6) * 0.02
    power_w = _watts(scenario(), t) if card == 1 else 50.0
    return [SimpleNamespace(nvmlReturn=NVML_SUCCESS, value=SimpleNamespace(uiVal=int(power_w * 1000)))]  # noqa: F821


@_answers
def nvmlDeviceGetTotalEnergyConsumption(card):
    """Millijoules, as the counter has them: anew every 100 ms. A read takes its time."""
    said = scenario()
    _read_s.append(_read_s.pop(0))
    spend(_read_s[-1] / 2)
    try:
        return _counted_mj(card, said)
    finally:
        spend(_read_s[-1] / 2)


def _counted_mj(card, said) -> int:
    t = min(math.floor((now() - said["start"]) * 10 + 1e-6) / 10, said.get("stuck_at", math.inf))
    if card == 0:
        return int(50e3 * t)
    before_j = 1000.0
    if t >= said.get("reset_at", math.inf):
        before_j = -_used_j(said, said["reset_at"])
    return int((before_j + _used_j(said, t - said.get("late_s", 0.0))) * said.get("scale", 1.0) * 1000)


@_answers
def nvmlDeviceGetComputeRunningProcesses(card):
    listed = scenario().get("processes", ["own"])
    return [SimpleNamespace(pid=os.getpid() if process == "own" else process) for process in listed]


@_answers
def nvmlDeviceGetPowerManagementLimit(card):
    return 700_000


def _capped(said: dict) -> bool:
    return bool(said.get("capped")) and working(now())


@_answers
def nvmlDeviceGetCurrentClocksEventReasons(card):
    said = scenario()
    return 0x04 if said.get("throttled") or _capped(said) else 0x01


@_answers
def nvmlDeviceGetViolationStatus(card, policy):
    return SimpleNamespace(violationTime=0)


@_answers
def nvmlDeviceGetClockInfo(card, clock):
    said = scenario()
    return 1400 if _capped(said) else said.get("clock", 1980)


@_answers
def nvmlDeviceGetUtilizationRates(card):
    return SimpleNamespace(gpu=scenario().get("utilization", 97), memory=40)


@_answers
def nvmlDeviceGetTemperature(card, sensor):
    return scenario().get("temperature", 55)


@_answers
def nvmlDeviceGetPerformanceState(card):
    return 0
