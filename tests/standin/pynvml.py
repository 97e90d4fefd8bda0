"""A stand-in for NVIDIA's management library: two GPUs whose true energy is known, and every way they may fail.

First on a process's PYTHONPATH it takes the place of nvidia-ml-py there and in the processes started from it. Constants
and errors are the real module's; answers follow the scenario, a JSON file that the variable NVML_STANDIN names and that
may change while a process runs:

    start      when the power's shape begins, by the wall clock
    shape      constant, square, ramp, real or "put to work"
    scale      of the counter against the truth (1)
    reset_at   seconds after which the counter starts anew
    stuck_at   seconds after which it stands still
    errors     {function: error code}
    mig, architecture, processes, throttled, clock, known_as
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
now = time.time  # a test may put a clock of its own here


def scenario() -> dict:
    return json.loads(Path(os.environ["NVML_STANDIN"]).read_text())


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
    if shape == "put to work":
        return np.where(t < 35, 80.0, 300.0)
    random = np.random.default_rng(0)
    busy = 480 + 40 * np.sin(2 * math.pi * t / 0.37) + np.repeat(random.normal(0, 25, len(t) // 2), 2)
    hot = np.where(t % 25 > 18, 0.7, 1.0)  # held down by heat for seven seconds of 25
    return np.where(t % 11 < 0.4, 150.0, busy * hot)  # and short pauses


def true_joules(begin_s: float, end_s: float, shape: str, start: float) -> float:
    """What the measured GPU used between two moments of the wall clock."""
    return float(np.diff(_joules_by(shape, np.array([begin_s, end_s]) - start))[0])


def _joules_by(shape: str, t) -> np.ndarray:
    edges = np.arange(0, LENGTH_S + GRID_S / 2, GRID_S)
    return np.interp(t, edges, np.concatenate([[0.0], np.cumsum(watts(shape)) * GRID_S]))


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
    power_w = watts(scenario()["shape"])[int(t / GRID_S + 0.5)] if card == 1 else 50.0
    return [SimpleNamespace(nvmlReturn=NVML_SUCCESS, value=SimpleNamespace(uiVal=int(power_w * 1000)))]  # noqa: F821


@_answers
def nvmlDeviceGetTotalEnergyConsumption(card):
    """Millijoules, as the counter has them: anew every 100 ms."""
    said = scenario()
    t = min(math.floor((now() - said["start"]) * 10 + 1e-6) / 10, said.get("stuck_at", math.inf))
    if card == 0:
        return int(50e3 * t)
    before_j = 1000.0
    if t >= said.get("reset_at", math.inf):
        before_j = -float(_joules_by(said["shape"], said["reset_at"]))
    return int((before_j + _joules_by(said["shape"], t)) * said.get("scale", 1.0) * 1000)


@_answers
def nvmlDeviceGetComputeRunningProcesses(card):
    listed = scenario().get("processes", ["own"])
    return [SimpleNamespace(pid=os.getpid() if process == "own" else process) for process in listed]


@_answers
def nvmlDeviceGetPowerManagementLimit(card):
    return 700_000


@_answers
def nvmlDeviceGetCurrentClocksEventReasons(card):
    return 0x04 if scenario().get("throttled") else 0x01


@_answers
def nvmlDeviceGetViolationStatus(card, policy):
    return SimpleNamespace(violationTime=0)


@_answers
def nvmlDeviceGetClockInfo(card, clock):
    return scenario().get("clock", 1980)


@_answers
def nvmlDeviceGetTemperature(card, sensor):
    return scenario().get("temperature", 55)


@_answers
def nvmlDeviceGetPerformanceState(card):
    return 0
