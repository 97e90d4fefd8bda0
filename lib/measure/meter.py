"""What a window costs: time, joules, memory, CPU, disk, read at its two ends and nowhere inside.

Beside it, by processes of their own, runs what has to be seen inside: power, clock, heat, utilization.
"""

import contextlib
import itertools
import resource
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

from lib.measure import energy, environment, sampler
from lib.model import devices

FLAGGED_DISAGREEMENT, REFUSED_DISAGREEMENT = 0.05, 0.10  # of the power trace's integral from the counter
CLOCK_JUMP_S = 0.1  # a trace whose clock jumped by more cannot be laid over the window
POWER_PARTS = 600  # of the power trace in a record, and of the samples of clock and heat
# The idle GPU has settled when two readings in a row of its power agree; else it is read when the patience is over.
SETTLING_PART_S, SETTLED_WITHIN, SETTLING_LIMIT_S = 2.0, 0.02, 20.0


class Window(NamedTuple):
    """Begin and end of a measured window, by the steady clock and by the wall clock, which the power trace goes by."""

    begin_s: float
    end_s: float
    begin_wall_s: float
    end_wall_s: float


class Meter:
    """Adds up the measured windows of a run; nothing is read inside one, only at its two ends."""

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = energy.gpu_uuid(device) is not None
        self.gpu_counter = energy.gpu_counter(device)
        self.cpu_counter = energy.cpu_counter()
        self.idle_power = energy.Reading(None, self.gpu_counter.reason or "not_asked_for")  # watts
        self.windows: list[Window] = []
        self.idle: dict | None = None  # how that was read
        self.marks: list[tuple[int, float]] = []  # (step, seconds of the window until the device got there)
        self.states: list[dict] = []  # the idle GPU's clocks and heat, at the begin and after each window
        self.samples: list[sampler.Sample] = []  # of the working GPU, in and between the windows
        self.trace: energy.Trace | None = None
        self.cpu_time_s = 0.0
        self.waited_s: float | None = 0.0  # of its threads, ready and without a core; None where that is not counted
        self.disk_bytes = 0
        self.open = False
        self._others: list[int | None] = []
        self._marked: list = []
        self._peaks = {"allocated": 0, "reserved": 0, "resident": 0}
        self._resident_resettable = True

    @property
    def windows_s(self) -> list[float]:
        return [window.end_s - window.begin_s for window in self.windows]

    @property
    def window_s(self) -> float:
        return sum(self.windows_s)

    @property
    def foreign_processes(self) -> int | None:
        """The most other processes seen on the GPU; None where none was seen but the list could not always be read."""
        seen = max((others for others in self._others if others is not None), default=0)
        return seen or (None if None in self._others else 0)

    def rest(self, idle_s: float) -> energy.Reading:
        """Mean power in watts of the idle GPU with the model loaded, over `idle_s` seconds; 0 asks for none.

        Meant for after the run: a GPU that has worked is warmer and draws more than a cold one, and it is this GPU that
        would have stood there idle instead. It is read once it has settled; `idle` says how long that took. Only where
        the GPU has a counter; else it returns at once, with the reason.
        """
        if self.gpu_counter.monitor is None:
            self.idle_power = energy.Reading(None, self.gpu_counter.reason)
        if not idle_s or self.gpu_counter.monitor is None:
            return self.idle_power
        devices.synchronize(self.device)
        begin_s, watts, settled = time.perf_counter(), [], False
        while not settled and time.perf_counter() - begin_s < SETTLING_LIMIT_S:
            watts.append(self._idle_w(SETTLING_PART_S).joules)
            if watts[-1] is None:
                break
            settled = len(watts) > 1 and abs(watts[-1] / watts[-2] - 1) <= SETTLED_WITHIN
        settling_s, state = time.perf_counter() - begin_s, environment.gpu_state(self.device) or {}
        self.idle = {"settling_s": settling_s, "settled": settled, "temperature_c": state.get("temperature_c")}
        self.idle_power = self._idle_w(idle_s)
        return self.idle_power

    def _idle_w(self, idle_s: float) -> energy.Reading:
        counter = self.gpu_counter.anew()
        counter.begin()
        begin_s = time.perf_counter()
        time.sleep(idle_s)
        slept_s = time.perf_counter() - begin_s
        counter.end()
        found = counter.reading(slept_s)
        if energy.foreign_processes(self.device):
            return energy.Reading(None, "foreign_process")
        return energy.Reading(found.joules and found.joules / slept_s, found.reason)

    @contextlib.contextmanager
    def watching(self):
        """Power, clock, heat and utilization are sampled while the block inside runs, by processes of their own."""
        power, states = energy.PowerMonitor(self.device), sampler.Sampler(energy.gpu_uuid(self.device))
        try:
            yield
        finally:
            self.samples, self.trace = states.stop(), power.stop()

    @contextlib.contextmanager
    def window(self):
        """Measures the block inside it, from an idle device to an idle device. The GPU's counter is waited for outside
        of it: what the device draws until then, and again after it, is taken off (`energy.Counter`)."""
        if not self.windows:
            self._look_around()
        self._reset_peaks()
        self._marked = []
        devices.synchronize(self.device)
        self.gpu_counter.begin()
        self.cpu_counter.begin()
        waited_before = _waited_s()
        disk_before, cpu_before = _disk_bytes(), time.process_time()
        begin_wall_s, begin_s = time.time(), time.perf_counter()
        begun = self._now()
        self.open = True
        yield
        devices.synchronize(self.device)
        self.open = False
        end_s, end_wall_s = time.perf_counter(), time.time()
        cpu_after, disk_after = time.process_time(), _disk_bytes()
        self.cpu_counter.end()
        self.gpu_counter.end()
        self.cpu_time_s += cpu_after - cpu_before
        self._note_waited(waited_before, _waited_s())
        before_s = self.window_s
        self.marks += [(step, before_s + _between_s(begun, moment)) for step, moment in self._marked]
        self.windows.append(Window(begin_s, end_s, begin_wall_s, end_wall_s))
        self.disk_bytes = None if disk_after is None else self.disk_bytes + disk_after - disk_before
        self._read_peaks()
        self._look_around()

    def _note_waited(self, before: dict | None, after: dict | None) -> None:
        if before is None or after is None or self.waited_s is None:
            self.waited_s = None
        else:
            self.waited_s += sum(max(0.0, waited - before.get(thread, 0.0)) for thread, waited in after.items())

    @property
    def waited_share(self) -> float | None:
        """Of the time that this process's threads could have computed in the windows, the share for which other
        processes had the core; None where neither the system counts it nor the window's processor time tells."""
        if self.waited_s is not None:
            wanted_s = self.cpu_time_s + self.waited_s
            return self.waited_s / wanted_s if wanted_s else 0.0
        return None if self.device.type == "cuda" else max(0.0, 1 - self.cpu_time_s / self.window_s)

    def mark(self, step: int) -> None:
        """Notes, without waiting, when the device has finished what it was given so far: `step` steps."""
        self._marked.append((step, self._now()))

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _look_around(self):
        """The GPU's state, and how many others compute on it."""
        state = environment.gpu_state(self.device)
        if state is not None:
            self.states.append(state)
        if self.on_gpu:
            self._others.append(energy.foreign_processes(self.device))

    def _reset_peaks(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux: the resident peak starts anew
        except OSError:
            self._resident_resettable = False

    def _read_peaks(self):
        if self.device.type == "cuda":
            now = {
                "allocated": torch.cuda.max_memory_allocated(self.device),
                "reserved": torch.cuda.max_memory_reserved(self.device),
            }
        else:
            now = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
            with contextlib.suppress(OSError):
                status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
                now["resident"] = int(status.split("VmHWM:")[1].split()[0]) * 1024
        for name, value in now.items():
            self._peaks[name] = max(self._peaks[name], value)

    @property
    def clock_jump_s(self) -> float:
        """By how much the wall clock has left the steady one, at most, between two readings of both."""
        both = [pair for s in self.windows for pair in ((s.begin_s, s.begin_wall_s), (s.end_s, s.end_wall_s))]
        return max((abs((w1 - w0) - (s1 - s0)) for (s0, w0), (s1, w1) in itertools.pairwise(both)), default=0.0)

    def _walls(self) -> list[tuple[float, float]]:
        return [(window.begin_wall_s, window.end_wall_s) for window in self.windows]

    @property
    def trace_j(self) -> float | None:
        """The power trace's integral over the windows; None without a trace that can be laid over them."""
        if self.trace is None or self.clock_jump_s > CLOCK_JUMP_S or self.trace.times_s[0] > self._walls()[0][0]:
            return None
        return float(self.trace.joules_by(self._walls(), sum(end - begin for begin, end in self._walls())))

    @property
    def inside(self) -> list[tuple[float, sampler.Sample]]:
        """The samples inside the windows, with their second of the window; none where the wall clock jumped."""
        return [] if self.clock_jump_s > CLOCK_JUMP_S else sampler.inside(self.samples, self._walls())

    def utilization(self) -> energy.Reading:
        """Mean GPU utilization in percent over the windows: NVML's share of time in which some kernel ran.

        A sample says it of up to a second before it, so those of a window's first second, which may speak of the
        validation before, do not count.
        """
        if not self.on_gpu:
            return energy.Reading(None, "no_gpu")
        late = [(begin + sampler.UTILIZATION_PERIOD_S, end) for begin, end in self._walls()]
        samples = [] if self.clock_jump_s > CLOCK_JUMP_S else sampler.inside(self.samples, late)
        percents = [one.utilization_percent for _, one in samples if one.utilization_percent is not None]
        return energy.Reading(statistics.fmean(percents)) if percents else energy.Reading(None, "no_sample")

    def gpu_series(self) -> list[dict]:
        """The samples inside the windows, at most `POWER_PARTS`, evenly thinned."""
        every = -(-len(self.inside) // POWER_PARTS) or 1
        return [
            {"time_s": round(time_s, 3)} | {name: getattr(one, name) for name in one._fields if name != "wall_s"}
            for time_s, one in self.inside[::every]
        ]

    @property
    def shortest_s(self) -> float:
        """Seconds of the shortest window, by which energy is believed or not."""
        return min(self.windows_s, default=0.0)

    @property
    def disagreement(self) -> float | None:
        """The power trace's integral against the counter, as a share of the counter; None where one is missing."""
        counted, integral_j = self.gpu_counter.reading(self.shortest_s).joules, self.trace_j
        return None if counted is None or integral_j is None else integral_j / counted - 1

    def energy(self) -> energy.Reading:
        """The GPU's joules over the window, after every gate."""
        counted = self.gpu_counter.reading(self.shortest_s)
        if counted.joules is not None and self.foreign_processes:
            return energy.Reading(None, "foreign_process")
        if self.disagreement is not None and abs(self.disagreement) > REFUSED_DISAGREEMENT:
            return energy.Reading(None, "counter_power_disagree")
        return counted

    def log(self) -> list[dict]:
        """The marked steps: seconds of the window until then, and joules, the trace scaled to the window's counter."""
        steps, seconds = zip(*self.marks, strict=True) if self.marks else ((), ())
        joules, integral_j = self.energy().joules, self.trace_j
        if joules is None or integral_j is None:
            energies = [None] * len(steps)
        else:
            energies = (self.trace.joules_by(self._walls(), np.array(seconds)) * joules / integral_j).tolist()
        rows = zip(steps, seconds, energies, strict=True)
        return [{"step": step, "time_s": time_s, "energy_j": joules} for step, time_s, joules in rows]

    def power(self) -> tuple[list[float], list[float]]:
        """The power trace as means over equal parts of the window, `POWER_PARTS` at most: their middles in seconds, and
        watts. Empty without a trace."""
        if self.trace_j is None:
            return [], []
        parts = min(POWER_PARTS, max(1, round(self.window_s / energy.TRACE_PERIOD_S)))
        middles_s = (np.arange(parts) + 0.5) * self.window_s / parts
        return middles_s.round(3).tolist(), self.trace.mean_watts(self._walls(), parts).round(1).tolist()

    def metrics(self) -> tuple[dict, dict]:
        """The window's metrics, and the reasons for those that are None."""
        window_s = self.window_s
        gpu, cpu, idle = self.energy(), self.cpu_counter.reading(window_s), self.idle_power
        utilization = self.utilization()
        if gpu.joules is not None and idle.joules is not None and idle.joules * window_s >= gpu.joules:
            idle = energy.Reading(None, "not_idle")
        net = None if gpu.joules is None or idle.joules is None else gpu.joules - idle.joules * window_s
        on_gpu = self.device.type == "cuda"
        values = {
            "time_s": window_s,
            "energy_j": gpu.joules,
            "mean_power_w": None if gpu.joules is None else gpu.joules / window_s,
            "idle_power_w": idle.joules,
            "net_energy_j": net,
            "gpu_utilization_percent": utilization.joules,
            "cpu_energy_j": cpu.joules,
            "cpu_time_s": self.cpu_time_s,
            "cpu_cores_used": self.cpu_time_s / window_s,
            "disk_bytes": self.disk_bytes,
            "peak_memory_bytes": self._peaks["allocated"] if on_gpu else None,
            "peak_reserved_memory_bytes": self._peaks["reserved"] if on_gpu else None,
            "peak_resident_bytes": self._peaks["resident"] if not on_gpu and self._resident_resettable else None,
        }
        reasons = {"energy_j": gpu.reason, "mean_power_w": gpu.reason, "cpu_energy_j": cpu.reason}
        reasons |= {"idle_power_w": idle.reason, "net_energy_j": gpu.reason or idle.reason}
        reasons["gpu_utilization_percent"] = utilization.reason
        reasons["peak_memory_bytes"] = reasons["peak_reserved_memory_bytes"] = "no_gpu"
        reasons["peak_resident_bytes"] = "gpu_run" if on_gpu else "peak_not_resettable"
        reasons["disk_bytes"] = "not_counted_here"
        return values, {name: reasons[name] for name, value in values.items() if value is None}


def _between_s(begin, end) -> float:
    """Seconds between two moments of `Meter._now`; the device has to have passed both."""
    return begin.elapsed_time(end) / 1000 if isinstance(begin, torch.cuda.Event) else end - begin


def _waited_s() -> dict[str, float] | None:
    """For how many seconds each thread of this process was ready so far, and had no core; None where that is not
    counted (Linux's schedstat counts it)."""
    found = {}
    try:
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                found[task.name] = int((task / "schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None
    return found or None


def _disk_bytes() -> int | None:
    """Bytes that this process has read from and written to disk so far; None where the system does not count them."""
    try:
        counted = psutil.Process().io_counters()
    except (AttributeError, psutil.Error, OSError):
        return None
    return counted.read_bytes + counted.write_bytes


class Stopwatch:
    """Times repetitions of one kind of work, `with` it, from an idle device to an idle device; the counter beside it.

    `seconds`, `walls` (begin and end by the wall clock) and `counter.windows_j` hold an entry for each repetition that
    ended without an error. `counter` is the GPU's where none is given.
    """

    def __init__(self, device: torch.device, counter: energy.Counter | None = None):
        self.device, self.counter = device, counter or energy.gpu_counter(device)
        self.seconds: list[float] = []
        self.walls: list[tuple[float, float]] = []

    def __enter__(self):
        devices.synchronize(self.device)
        self.counter.begin()
        self.begin, self.begin_wall_s = time.perf_counter(), time.time()
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            devices.synchronize(self.device)
            self.seconds.append(time.perf_counter() - self.begin)
            self.walls.append((self.begin_wall_s, time.time()))
            self.counter.end()

    def reading(self) -> energy.Reading:
        """Joules of all repetitions, if each of them was long enough for the counter and nothing else ran."""
        found = self.counter.reading(min(self.seconds, default=0.0))
        if found.joules is not None and energy.foreign_processes(self.device):
            return energy.Reading(None, "foreign_process")
        return found


def energy_of(work, device: torch.device, window_s: float) -> energy.Reading:
    """Joules of one call of `work`, from calls that fill `window_s` seconds; makes none where nothing counts them."""
    if not window_s > 0:
        return energy.Reading(None, "not_asked_for")
    watch = Stopwatch(device)
    if watch.counter.monitor is None:
        return watch.counter.reading(window_s)
    work()
    calls = 0
    with watch:
        while time.perf_counter() - watch.begin < window_s:
            work()
            devices.synchronize(device)
            calls += 1
    found = watch.reading()
    return found if found.joules is None else energy.Reading(found.joules / calls)
