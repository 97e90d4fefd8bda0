"""Joules and watts, from the hardware's own instruments through Zeus (You et al. 2023, NSDI, "Zeus").

Nothing else here reads power. A reading is a number, or null with one of `lib.record.REASONS`; never 0 for "unknown",
never an estimate. The GPU's energy counter is the measurement; the power trace beside it is a check of the plumbing.

The counter steps ten times a second (every 100 ± 2 ms on an H100): read at any moment it is up to a step old, and since
a GPU draws more at a window's end than before its begin, a window of 7 s would lose 0.4 % of its joules, one of 0.6 s
5 %. So a window is counted from one step to another, and what the idle GPU drew between them and the work is taken off;
see `Counter`.
"""

import contextlib
import os
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pynvml
import torch
from zeus.exception import ZeusBaseError

from lib.startup import quick_imports

# A step of the counter is known to 10 ms (`TICK_WITHIN_S`), so the idle time at a window's two ends to 20 ms, and an
# idle GPU draws no more than a working one: a window's joules are known to 20 ms of its own length. At 2 s that is 1 %,
# half of the 2 % within which two variants are called equivalent.
EDGES_S = 0.02
SHORTEST_WINDOW_S = 2.0
TICK_WITHIN_S = EDGES_S  # from the begin of the last read of the old value to the end of the first read of the new one
TICK_TRIES = 5  # a busy machine may put this process aside between two reads: then the next step is taken
STUCK_AFTER_S = 1.0  # counters move ten times a second or so: one that stands still for this long is stuck
TRACE_PERIOD_S = 0.1
PATIENCE_S = 10.0  # for the trace's process to answer
LOST = {"gpu_energy": "gpu_lost", "cpu_energy": "rapl_unavailable"}  # why a counter that answered does so no more
# NVML's own, what Zeus makes of them, RAPL's files, and Zeus's for a process of its own that does not start.
ERRORS = (pynvml.NVMLError, ZeusBaseError, OSError, RuntimeError)
VISIBLE = "CUDA_VISIBLE_DEVICES"


class Reading(NamedTuple):
    """Energy in joules, or None and the reason."""

    joules: float | None
    reason: str | None = None


class Tick(NamedTuple):
    """A step of a counter: when, by the steady clock, and what it then showed in joules."""

    moment_s: float
    joules: float


def _watts(begin: Tick, end: Tick) -> float:
    return (end.joules - begin.joules) / (end.moment_s - begin.moment_s)


class Counter:
    """One kind of energy counter, read at both ends of each measured window.

    `monitor` is a `zeus.monitor.ZeusMonitor`, or None with the `reason` why there is none; `field` names the part of
    its measurement that counts (`gpu_energy` or `cpu_energy`). A counter that stops answering ends no run: it has no
    reading from then on.

    `read` gives the counter's joules at once. Where it is given, windows go from step to step of the counter, while the
    device idles: `begin` waits for two of them, `end` for three. The first ones let pass what the counter still owes of
    the work before (it may be late by a step), and between the last two of `end` nothing but the idle GPU is counted.
    That power, times the idle time between the steps and the work, is taken off: `edges_j`, window by window. Exact
    where the idle power is the same over that third of a second (`after_w` shows it twice); the times are known to
    `EDGES_S`.
    """

    def __init__(self, field: str, monitor=None, reason: str | None = None, read: Callable[[], float] | None = None):
        self.field, self.monitor, self.reason, self.read = field, monitor, reason, read
        self.windows_j: list[float] = []
        self.edges_j: list[float] = []  # taken off each window, of what the counter counted
        self.after_w: list[tuple[float, float]] = []  # between steps 1 and 2, and 2 and 3, after each window
        self.stuck = False
        self._begun_s = 0.0
        self._opened: Tick | None = None

    def anew(self) -> "Counter":
        """The same counter, without the windows that were measured so far."""
        return Counter(self.field, self.monitor, self.reason, self.read)

    def begin(self) -> None:
        """Opens a window. The device has to be idle: Zeus is told not to wait for it (it would ask another device)."""
        if self.monitor is not None:
            with self._losing_it():
                self._opened = (self._ticks(2) or [None])[-1]
                # A cell that failed may have left its window open; that one is void.
                self.monitor.begin_window("window", sync_execution=False, restart=True)
        self._begun_s = time.perf_counter()

    def end(self) -> None:
        """Closes the window. The device has to be idle."""
        worked_s = time.perf_counter() - self._begun_s
        if self.monitor is None:
            return
        with self._losing_it(), warnings.catch_warnings():
            # Zeus warns of 0 J, and advises an estimate in its place; here it becomes a reason.
            warnings.simplefilter("ignore", UserWarning)
            first, closed = self._ticks(2) or (None, None)
            counted = getattr(self.monitor.end_window("window", sync_execution=False), self.field)
            joules, last, edges_j = sum((counted or {}).values()), self._ticks(1), 0.0
            self.stuck |= joules == 0 and worked_s > STUCK_AFTER_S
            if self._opened and closed and last:
                self.after_w.append((_watts(first, closed), _watts(closed, *last)))
                edges_j = self.after_w[-1][1] * (closed.moment_s - self._opened.moment_s - worked_s)
            self.edges_j.append(edges_j)
            self.windows_j.append(joules - edges_j)

    def _ticks(self, count: int) -> list[Tick] | None:
        """The next `count` steps; None of a counter that is not read or does not step."""
        found = []
        while self.read is not None and not self.stuck and len(found) < count:
            found.append(self._next_tick())
        return found if found and None not in found else None

    def _next_tick(self) -> Tick | None:
        since_s = time.perf_counter()
        before_j, tries = self.read(), 0
        give_up_s = since_s + STUCK_AFTER_S
        while True:
            asked_s = time.perf_counter()
            joules, now_s = self.read(), time.perf_counter()
            if joules != before_j:
                tries += 1
                if now_s - since_s <= TICK_WITHIN_S or tries == TICK_TRIES:
                    return Tick((since_s + now_s) / 2, joules)
                give_up_s = now_s + STUCK_AFTER_S
            elif now_s > give_up_s:
                self.stuck = True
                return None
            before_j, since_s = joules, asked_s

    @contextlib.contextmanager
    def _losing_it(self):
        try:
            yield
        except ERRORS as error:
            self.monitor, self.reason = None, _reason_of(error, LOST[self.field])

    def reading(self, shortest_s: float) -> Reading:
        """The sum over all windows, the shortest of which took `shortest_s` seconds, if it can be trusted."""
        return self._trusted(self.windows_j, shortest_s)

    def last(self, window_s: float) -> Reading:
        """The newest window, of `window_s` seconds, alone."""
        return self._trusted(self.windows_j[-1:], window_s)

    def _trusted(self, windows_j: list[float], shortest_s: float) -> Reading:
        if self.monitor is None:
            return Reading(None, self.reason)
        if shortest_s < SHORTEST_WINDOW_S:
            return Reading(None, "window_too_short")
        if any(below < 0 for below in (*windows_j, *(watts for pair in self.after_w for watts in pair))):
            return Reading(None, "counter_reset")
        if self.stuck or not sum(windows_j) > 0:
            return Reading(None, "counter_zero")
        return Reading(sum(windows_j))


def _monitors():
    """Zeus's module of monitors; here, because many a machine has nothing for them to read."""
    with quick_imports():
        import zeus.monitor
    return zeus.monitor


def no_counter() -> Counter:
    """Stands where joules are not asked for: nothing is waited for."""
    return Counter("gpu_energy", reason="not_asked_for")


def gpu_counter(device: torch.device) -> Counter:
    """The counter of the GPU that `device` is, or why there is none."""
    if gpu_uuid(device) is None:
        return Counter("gpu_energy", reason="no_gpu")
    # Zeus answers 0 J in silence where it finds no GPU, so whether there is one is asked of NVML first.
    reason = _nvml_reason(device)
    if reason:
        return Counter("gpu_energy", reason=reason)
    try:
        with _shown_to_zeus(device):
            from zeus.device import get_gpus

            # Where Zeus knows no counter it would integrate power instead, sampled as fast as one processor can.
            if not get_gpus().supports_get_total_energy_consumption(0):
                return Counter("gpu_energy", reason="counter_unsupported")
            monitor = _monitors().ZeusMonitor(gpu_indices=[0], cpu_indices=[], approx_instant_energy=False)
    except ERRORS as error:
        return Counter("gpu_energy", reason=_reason_of(error, "nvml_unavailable"))
    return Counter("gpu_energy", monitor, read=lambda: monitor.gpus.get_total_energy_consumption(0) / 1000)


def cpu_counter() -> Counter:
    """The RAPL counters of all CPU packages, or why there is none."""
    from zeus.device.cpu import get_cpus
    from zeus.device.cpu.common import ZeusCPUInitError, ZeusCPUNoPermissionError

    try:
        packages = len(get_cpus())
        if not packages:
            return Counter("cpu_energy", reason="rapl_unavailable")
        with _shown_to_zeus(None):
            return Counter("cpu_energy", _monitors().ZeusMonitor(gpu_indices=[], cpu_indices=list(range(packages))))
    except (ZeusCPUNoPermissionError, PermissionError):
        return Counter("cpu_energy", reason="permission")
    except (ZeusCPUInitError, OSError, RuntimeError):
        return Counter("cpu_energy", reason="rapl_unavailable")


class Trace(NamedTuple):
    """Power by the wall clock (`time.time()`): each value holds until the next. Zeus sends only values that changed."""

    times_s: np.ndarray
    watts: np.ndarray

    def joules_by(self, windows: list[tuple[float, float]], window_s) -> np.ndarray:
        """Energy from the window's begin to each of its moments `window_s`, by zero-order hold.

        The window is what the `windows` (begin, end) hold and nothing between them; the trace must begin before.
        """
        before_j = np.concatenate([[0.0], np.cumsum(self.watts[:-1] * np.diff(self.times_s))])

        def since_start_j(wall_s):
            held = np.searchsorted(self.times_s, wall_s, side="right") - 1
            return before_j[held] + self.watts[held] * (wall_s - self.times_s[held])

        begins, ends = np.array(windows).T
        until_s = np.cumsum(ends - begins)
        until_j = np.cumsum(since_start_j(ends) - since_start_j(begins))
        at = np.minimum(np.searchsorted(until_s, window_s), len(until_s) - 1)  # the window that holds the moment
        left_s = np.maximum(until_s[at] - window_s, 0.0)
        return until_j[at] - (since_start_j(ends[at]) - since_start_j(ends[at] - left_s))

    def mean_watts(self, windows: list[tuple[float, float]], parts: int) -> np.ndarray:
        """Mean power in `parts` equal parts of the window."""
        edges_s = np.linspace(0.0, sum(end - begin for begin, end in windows), parts + 1)
        return np.diff(self.joules_by(windows, edges_s)) / np.diff(edges_s)


class PowerMonitor:
    """Reads the GPU's power ten times a second in a process of its own, from construction to `stop`."""

    def __init__(self, device: torch.device):
        self.monitor = None
        if gpu_uuid(device) is None:
            return
        try:
            with _shown_to_zeus(device):
                self.monitor = _monitors().PowerMonitor([0], TRACE_PERIOD_S, power_domains=["device_instant"])
            give_up_s = time.monotonic() + PATIENCE_S
            while self.monitor.get_power() is None and time.monotonic() < give_up_s:
                time.sleep(TRACE_PERIOD_S)
        except (*ERRORS, ValueError):  # Zeus's ValueError: the GPU has no such sensor
            self.monitor = None

    def stop(self) -> Trace | None:
        """The trace, or None where there is none or its process came to an end before."""
        if self.monitor is None:
            return None
        (process,), (stop,) = self.monitor.processes.values(), self.monitor.stop_events.values()
        time.sleep(2 * TRACE_PERIOD_S)  # what was read inside the window arrives
        stop.set()
        # Zeus kills a process that waits for its samples to be fetched, and loses them: fetch until it has ended.
        give_up_s = time.monotonic() + PATIENCE_S
        while process.is_alive() and time.monotonic() < give_up_s:
            self.monitor.get_power_timeline("device_instant")
            process.join(0.02)
        samples = self.monitor.get_power_timeline("device_instant")[0]
        whole = process.exitcode == 0  # not where it failed, a lost GPU say, or had to be killed
        self.monitor.stop()
        return Trace(*np.array(samples).T) if samples and whole else None


def nvml_handle(device: torch.device):
    """NVML's handle of a CUDA device, found by UUID: NVML counts all gpus, CUDA only the visible ones."""
    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(gpu_uuid(device))


def gpu_uuid(device: torch.device) -> str | None:
    """How NVML names the GPU of a CUDA device; None for any other device."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


def provenance() -> str:
    """`synthetic` where a stand-in answers instead of NVML; such a record reaches no table."""
    return "synthetic" if getattr(pynvml, "__synthetic__", False) else "measured"


def foreign_processes(device: torch.device) -> int | None:
    """How many other processes compute on the GPU; None where the list cannot be read or does not show this one."""
    try:
        running = {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(nvml_handle(device))}
    except (pynvml.NVMLError, ValueError):
        return None
    # In a container NVML gives the host's process numbers, among which this process cannot be told from others.
    return len(running) - 1 if os.getpid() in running else None


@contextlib.contextmanager
def _shown_to_zeus(device: torch.device | None):
    """Zeus sees the GPU of `device` alone, as number 0, in the processes that it starts too; or no GPU.

    It reads the variable that CUDA has read long before, but understands numbers only, and those in NVML's order.
    """
    import zeus.device.gpu

    before = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = "" if device is None else str(pynvml.nvmlDeviceGetIndex(nvml_handle(device)))
    zeus.device.gpu._gpus = None  # Zeus would keep what it saw first
    try:
        yield
    finally:
        del os.environ[VISIBLE]
        if before is not None:
            os.environ[VISIBLE] = before


def _nvml_reason(device: torch.device) -> str | None:
    """Why the GPU's counter cannot be the run's energy; None if it can."""
    if os.environ.get(VISIBLE, "").startswith("MIG"):
        return "mig"
    try:
        handle = nvml_handle(device)
    except (pynvml.NVMLError, ValueError) as error:
        return "mig" if _is_part_of_a_gpu(device) else _reason_of(error, "nvml_unavailable")
    try:
        if pynvml.nvmlDeviceGetMigMode(handle)[0]:
            return "mig"
    except pynvml.NVMLError:
        pass  # a GPU that cannot be split says so with an error
    try:
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return _reason_of(error, "nvml_unavailable")
    return None


def _is_part_of_a_gpu(device: torch.device) -> bool:
    """Whether NVML knows the device by the name of a MIG part, as in a container that was given one."""
    try:
        pynvml.nvmlInit()
        pynvml.nvmlDeviceGetHandleByUUID(gpu_uuid(device).replace("GPU-", "MIG-", 1))
    except (pynvml.NVMLError, ValueError):
        return False
    return True


def _reason_of(error: Exception, otherwise: str) -> str:
    """The reason that NVML's error stands for, also where Zeus raised its own from it."""
    cause = error if isinstance(error, pynvml.NVMLError) else error.__cause__
    return {
        pynvml.NVML_ERROR_NOT_SUPPORTED: "counter_unsupported",
        pynvml.NVML_ERROR_NO_PERMISSION: "permission",
        pynvml.NVML_ERROR_GPU_IS_LOST: "gpu_lost",
    }.get(getattr(cause, "value", None), otherwise)
