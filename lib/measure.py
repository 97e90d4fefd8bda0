"""What a run costs besides joules: time, memory, CPU, disk, FLOPs, latency, size, kernels."""

import contextlib
import copy
import itertools
import math
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from lib import energy, environment
from lib.errors import one_sentence_when_out_of_memory

FLAGGED_DISAGREEMENT, REFUSED_DISAGREEMENT = 0.05, 0.10  # of the power trace's integral from the counter
CLOCK_JUMP_S = 0.1  # a trace whose clock jumped by more cannot be laid over the window
POWER_PARTS = 600  # of the power trace in a record


class Stretch(NamedTuple):
    """Begin and end of a measured stretch, by the steady clock and by the wall clock, which the power trace goes by."""

    begin_s: float
    end_s: float
    begin_wall_s: float
    end_wall_s: float


class Meter:
    """Adds up the measured stretches of a run; nothing is read inside one, only at its two ends."""

    def __init__(self, device: torch.device):
        self.device = device
        self.on_card = energy.card_uuid(device) is not None
        self.gpu_counter = energy.gpu_counter(device)
        self.cpu_counter = energy.cpu_counter()
        self.idle_power = energy.Reading(None, self.gpu_counter.reason or "not_asked_for")  # watts
        self.stretches: list[Stretch] = []
        self.marks: list[tuple[int, float]] = []  # (step, seconds of the window until the device got there)
        self.states: list[dict] = []  # the GPU's clocks and heat, at the begin and after each stretch
        self.trace: energy.Trace | None = None
        self.utilization = energy.Reading(None, "not_asked_for" if device.type == "cuda" else "no_gpu")  # percent
        self.cpu_time_s = 0.0
        self.disk_bytes = 0
        self.open = False
        self._others: list[int | None] = []
        self._marked: list = []
        self._peaks = {"allocated": 0, "reserved": 0, "resident": 0}
        self._resident_resettable = True

    @property
    def stretches_s(self) -> list[float]:
        return [stretch.end_s - stretch.begin_s for stretch in self.stretches]

    @property
    def window_s(self) -> float:
        return sum(self.stretches_s)

    @property
    def foreign_processes(self) -> int | None:
        """The most other processes seen on the GPU; None where none was seen but the list could not always be read."""
        seen = max((others for others in self._others if others is not None), default=0)
        return seen or (None if None in self._others else 0)

    def rest(self, idle_s: float) -> energy.Reading:
        """Mean power in watts of the idle card with the model loaded, over `idle_s` seconds; 0 asks for none.

        Only where the card has a counter; else it returns at once, with the reason.
        """
        counter = energy.Counter(self.gpu_counter.field, self.gpu_counter.monitor, self.gpu_counter.reason)
        if idle_s and counter.monitor is not None:
            synchronize(self.device)
            counter.begin()
            begin = time.perf_counter()
            time.sleep(idle_s)
            slept_s = time.perf_counter() - begin
            counter.end()
            idle = counter.reading(slept_s)
            if energy.foreign_processes(self.device):
                idle = energy.Reading(None, "foreign_process")
            self.idle_power = energy.Reading(idle.joules and idle.joules / slept_s, idle.reason)
        return self.idle_power

    @contextlib.contextmanager
    def watching(self):
        """Power and utilization are sampled while the block inside it runs, by processes of their own."""
        power, utilization = energy.PowerMonitor(self.device), Utilization(self.device)
        try:
            yield
        finally:
            self.utilization, self.trace = utilization.mean_percent(), power.stop()

    @contextlib.contextmanager
    def stretch(self):
        """Measures the block inside it, from an idle device to an idle device."""
        if not self.stretches:
            self._look_around()
        self._reset_peaks()
        self._marked = []
        synchronize(self.device)
        self.gpu_counter.begin()
        self.cpu_counter.begin()
        disk_before, cpu_before = _disk_bytes(), time.process_time()
        begin_wall_s, begin_s = time.time(), time.perf_counter()
        begun = self._now()
        self.open = True
        yield
        synchronize(self.device)
        self.open = False
        end_s, end_wall_s = time.perf_counter(), time.time()
        self.gpu_counter.end()
        self.cpu_counter.end()
        self.cpu_time_s += time.process_time() - cpu_before
        before_s = self.window_s
        self.marks += [(step, before_s + _between_s(begun, moment)) for step, moment in self._marked]
        self.stretches.append(Stretch(begin_s, end_s, begin_wall_s, end_wall_s))
        disk_after = _disk_bytes()
        self.disk_bytes = None if disk_after is None else self.disk_bytes + disk_after - disk_before
        self._read_peaks()
        self._look_around()

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
        """The card's state, and how many others compute on it."""
        state = environment.gpu_state(self.device)
        if state is not None:
            self.states.append(state)
        if self.on_card:
            self._others.append(energy.foreign_processes(self.device))

    def _reset_peaks(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the resident peak starts anew
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
                status = Path("/proc/self/status").read_text()
                now["resident"] = int(status.split("VmHWM:")[1].split()[0]) * 1024
        for name, value in now.items():
            self._peaks[name] = max(self._peaks[name], value)

    @property
    def clock_jump_s(self) -> float:
        """By how much the wall clock has left the steady one, at most, between two readings of both."""
        both = [pair for s in self.stretches for pair in ((s.begin_s, s.begin_wall_s), (s.end_s, s.end_wall_s))]
        return max((abs((w1 - w0) - (s1 - s0)) for (s0, w0), (s1, w1) in itertools.pairwise(both)), default=0.0)

    def _walls(self) -> list[tuple[float, float]]:
        return [(stretch.begin_wall_s, stretch.end_wall_s) for stretch in self.stretches]

    @property
    def trace_j(self) -> float | None:
        """The power trace's integral over the stretches; None without a trace that can be laid over them."""
        if self.trace is None or self.clock_jump_s > CLOCK_JUMP_S or self.trace.times_s[0] > self._walls()[0][0]:
            return None
        return float(self.trace.joules_by(self._walls(), sum(end - begin for begin, end in self._walls())))

    @property
    def disagreement(self) -> float | None:
        """The power trace's integral against the counter, as a share of the counter; None where one is missing."""
        counted, integral_j = self.gpu_counter.reading(self.window_s).joules, self.trace_j
        return None if counted is None or integral_j is None else integral_j / counted - 1

    def energy(self) -> energy.Reading:
        """The GPU's joules over the window, after every gate."""
        counted = self.gpu_counter.reading(self.window_s)
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
            "gpu_utilization_percent": self.utilization.joules,
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
        reasons["gpu_utilization_percent"] = self.utilization.reason
        reasons["peak_memory_bytes"] = reasons["peak_reserved_memory_bytes"] = "no_gpu"
        reasons["peak_resident_bytes"] = "gpu_run" if on_gpu else "peak_not_resettable"
        reasons["disk_bytes"] = "not_counted_here"
        return values, {name: reasons[name] for name, value in values.items() if value is None}


def _between_s(begin, end) -> float:
    """Seconds between two moments of `Meter._now`; the device has to have passed both."""
    return begin.elapsed_time(end) / 1000 if isinstance(begin, torch.cuda.Event) else end - begin


class Utilization:
    """Samples GPU utilization twice a second in a process of its own (nvidia-smi), beside the measured window."""

    def __init__(self, device: torch.device):
        self.process = None
        self.reason = "no_gpu"
        self.samples = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read after the process ended
        if device.type == "cuda":
            uuid = energy.card_uuid(device)
            query = f"nvidia-smi -i {uuid} --query-gpu=utilization.gpu --format=csv,noheader,nounits -lms 500"
            try:
                self.process = subprocess.Popen(query.split(), stdout=self.samples, stderr=subprocess.DEVNULL)
            except OSError:
                self.reason = "nvidia_smi_unavailable"

    def mean_percent(self) -> energy.Reading:
        """Stops sampling; the mean, or None and the reason."""
        if self.process is None:
            return energy.Reading(None, self.reason)
        self.process.terminate()
        self.process.wait()
        self.samples.seek(0)
        lines = [line.strip() for line in self.samples.read().splitlines()]
        numbers = [float(line) for line in lines if line.replace(".", "", 1).isdigit()]
        return energy.Reading(statistics.fmean(numbers)) if numbers else energy.Reading(None, "nvidia_smi_unavailable")


# Dense peaks in FLOP/s (no sparsity) by the name that CUDA gives a card: bf16 on tensor cores, fp32 on the others, as
# PyTorch multiplies float32 unless TF32 is asked for. From NVIDIA's data sheets of H100 and H200 (SXM), A100 and L40S,
# and the Ada whitepaper's table of the RTX 4090 (bf16 with fp32 accumulation).
PEAK_FLOPS_PER_S = {
    "NVIDIA H200": {"bf16": 989.4e12, "fp32": 66.9e12},
    "NVIDIA H100 80GB HBM3": {"bf16": 989.4e12, "fp32": 66.9e12},
    "NVIDIA A100-SXM4-40GB": {"bf16": 312e12, "fp32": 19.5e12},
    "NVIDIA A100-SXM4-80GB": {"bf16": 312e12, "fp32": 19.5e12},
    "NVIDIA A100-PCIE-40GB": {"bf16": 312e12, "fp32": 19.5e12},
    "NVIDIA A100 80GB PCIe": {"bf16": 312e12, "fp32": 19.5e12},
    "NVIDIA L40S": {"bf16": 362.05e12, "fp32": 91.6e12},
    "NVIDIA GeForce RTX 4090": {"bf16": 165.2e12, "fp32": 82.6e12},
}


def mfu(useful_flops_per_s: float, device_name: str, precision: str) -> energy.Reading:
    """Model FLOPs utilization (Chowdhery et al. 2022, appendix B): useful FLOP/s over the device's dense peak.

    `precision` is bf16 or fp32. Where the peak is not in the table, a CPU's too: None and `peak_unknown`.
    """
    if device_name not in PEAK_FLOPS_PER_S:
        return energy.Reading(None, "peak_unknown")
    return energy.Reading(useful_flops_per_s / PEAK_FLOPS_PER_S[device_name][precision])


def busy_share(device: torch.device, run: Callable[[], None]) -> energy.Reading:
    """Share of the time of `run()` in which the GPU computes: kernels of one run, profiled, over the time of another.

    Two runs, so that the profiler's own time, which is the host's, is not taken for waiting.
    """
    if device.type != "cuda":
        return energy.Reading(None, "no_gpu")
    from torch.profiler import ProfilerActivity, profile

    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    wall_s = time.perf_counter() - begin
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:  # else PyTorch 2.11 warns
        run()
        synchronize(device)
    return energy.Reading(min(1.0, covered(_on_device(profiler.events())) / 1e6 / wall_s))


def _on_device(events) -> list[tuple[float, float]]:
    """Begin and end in microseconds of what ran on the GPU; a named region there spans the gaps in it too."""
    cuda = torch.autograd.DeviceType.CUDA
    ran = [event for event in events if event.device_type == cuda and not event.is_user_annotation]
    return [(event.time_range.start, event.time_range.end) for event in ran]


def covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals: kernels of two streams at once count once."""
    total, reached = 0.0, -math.inf
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _disk_bytes() -> int | None:
    """Bytes that this process has read from and written to disk so far; None where the system does not count them."""
    try:
        counted = psutil.Process().io_counters()
    except (AttributeError, psutil.Error, OSError):
        return None
    return counted.read_bytes + counted.write_bytes


def flops(model, context: int) -> dict:
    """FLOPs of one forward over one sequence of `context` tokens, analytically, and the core's share.

    `useful` honours causality, windows and buckets, `dense` counts every score. A matrix product counts two per weight
    and token (Kaplan et al. 2020, section 2.1); norms, activations and the embedding look-up are left out, as usual.
    """
    blocks = model.transformer.h
    projections = 2 * context * (_matrix_weights(blocks) + model.lm_head.weight.numel())
    for attn in (b.attn for b in blocks if hasattr(b.attn, "projection_flops")):
        projections += attn.projection_flops(context) - 2 * context * _matrix_weights(attn)
    core, core_dense = (sum(b.attn.core_flops(context, dense=dense) for b in blocks) for dense in (False, True))
    return {
        "forward_flops_useful": projections + core,
        "forward_flops_dense": projections + core_dense,
        "attention_core_share": core / (projections + core),
    }


def _matrix_weights(module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() >= 2)


def counted_flops(model, context: int, autocast) -> int:
    """FLOPs of the same forward as torch's `FlopCounterMode` counts them: fused kernels dense."""
    ids = torch.zeros(1, context, dtype=torch.long, device=model.device)
    counter = FlopCounterMode(display=False, custom_mapping={CPU_FLASH: _fused_attention_flops})
    with torch.no_grad(), autocast(), counter:
        model(ids, use_cache=False)
    return counter.get_total_flops()


CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _fused_attention_flops(query_shape, key_shape, value_shape, *_, **__) -> int:
    """torch counts its CPU flash kernel as nothing; this is the formula that it has for the CUDA ones."""
    batch, heads, queries, width = query_shape
    return 2 * batch * heads * queries * key_shape[2] * (width + value_shape[3])


@one_sentence_when_out_of_memory()
@torch.no_grad()
def inference(
    model, contexts: list[int], new_tokens: int, repeats: int, autocast, energy_window_s: float = 0.0
) -> list[dict]:
    """Latency and joules of one sequence by context length: prefill, then greedy decoding with the cache.

    Latencies are medians of `repeats`, after a warm-up at the same length. Cache bytes are counted from the cache
    itself and, beside them, from the variant's formula. Joules are those of `inference_energy`.
    """
    model.eval()
    rows = []
    for context in contexts:
        runs = generations(model, context, new_tokens, repeats, autocast)
        cache = runs[-1]["cache"]
        element_bytes = max(tensor.element_size() for tensor in _tensors(cache))
        rows.append(
            {
                "context": context,
                "prefill_latency_s": statistics.median(run["prefill_s"] for run in runs),
                "decode_latency_s_per_token": statistics.median(run["decode_s"] / new_tokens for run in runs),
                "cache_bytes": cache_bytes(cache),
                "cache_bytes_analytic": sum(
                    block.attn.cache_bytes(context + new_tokens, element_bytes) for block in model.transformer.h
                ),
            }
        )
    joules = inference_energy(model, contexts, new_tokens, energy_window_s, autocast)
    return [row | found for row, found in zip(rows, joules, strict=True)]


@torch.no_grad()
def generations(model, context: int, new_tokens: int, repeats: int, autocast) -> list[dict]:
    """`repeats` times, after a warm-up: `prefill_s` for one sequence of `context` tokens, `decode_s` for `new_tokens`
    greedy steps after it, and the `cache` as they leave it."""
    model.eval()
    ids = torch.arange(context, device=model.device)[None] % model.config.vocab_size
    with autocast():
        _generate(model, ids, 1)
        return [_generate(model, ids, new_tokens) for _ in range(repeats)]


def cache_bytes(cache) -> int:
    """Bytes of all tensors that a cache holds."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(cache))


def _generate(model, ids, new_tokens) -> dict:
    """Prefill, then `new_tokens` greedy steps, each timed from an idle device to an idle device."""
    synchronize(model.device)
    begin = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    synchronize(model.device)
    prefilled = time.perf_counter()
    out = _decode(model, out, new_tokens)
    synchronize(model.device)
    end = time.perf_counter()
    return {"prefill_s": prefilled - begin, "decode_s": end - prefilled, "cache": out.past_key_values}


def _decode(model, out, new_tokens):
    for _ in range(new_tokens):
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    return out


@torch.no_grad()
def inference_energy(model, contexts: list[int], new_tokens: int, window_s: float, autocast) -> list[dict]:
    """Joules of what `inference` times, a row per context: one prefill, and one decoded token.

    Each is repeated for `window_s` seconds or more inside one window of the GPU's counter, so 10 s are the least that
    give a number; None has its `null_reason`. Every repetition of decoding starts from a copy of the prompt's cache,
    and the copying counts with it: once per `new_tokens` tokens.
    """
    model.eval()
    rows = []
    for context in contexts:
        ids = torch.arange(context, device=model.device)[None] % model.config.vocab_size
        with autocast():
            prefilled = model(ids, use_cache=True, logits_to_keep=1)

            def prefill(ids=ids):
                model(ids, use_cache=True, logits_to_keep=1)

            def decode(prefilled=prefilled):
                _decode(model, copy.deepcopy(prefilled), new_tokens)

            per_prefill, per_decoding = (energy_of(work, model.device, window_s) for work in (prefill, decode))
        per_token = None if per_decoding.joules is None else per_decoding.joules / new_tokens
        reason = per_prefill.reason or per_decoding.reason
        rows.append({"context": context, "prefill_energy_j": per_prefill.joules})
        rows[-1] |= {"decode_energy_j_per_token": per_token, "energy_null_reason": reason}
    return rows


def energy_of(work, device: torch.device, window_s: float) -> energy.Reading:
    """Joules of one call of `work`, from calls that fill `window_s` seconds; makes none where nothing counts them."""
    if not window_s > 0:
        return energy.Reading(None, "not_asked_for")
    watch = Stopwatch(device)
    if watch.counter.monitor is None:
        return watch.counter.reading(window_s)
    work()
    calls, begin = 0, time.perf_counter()
    with watch:
        while time.perf_counter() - begin < window_s:
            work()
            synchronize(device)
            calls += 1
    found = watch.reading()
    return found if found.joules is None else energy.Reading(found.joules / calls)


class Stopwatch:
    """Times repetitions of one kind of work, `with` it, from an idle device to an idle device; the counter beside it.

    `seconds` and `counter.stretches_j` hold an entry for each repetition that ended without an error.
    """

    def __init__(self, device: torch.device):
        self.device, self.counter = device, energy.gpu_counter(device)
        self.seconds: list[float] = []

    def __enter__(self):
        synchronize(self.device)
        self.counter.begin()
        self.begin = time.perf_counter()
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            synchronize(self.device)
            self.seconds.append(time.perf_counter() - self.begin)
            self.counter.end()

    def reading(self) -> energy.Reading:
        """Joules of all repetitions, if each of them was long enough for the counter and nothing else ran."""
        found = self.counter.reading(min(self.seconds, default=0.0))
        if found.joules is not None and energy.foreign_processes(self.device):
            return energy.Reading(None, "foreign_process")
        return found


def _tensors(cache):
    return [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]


def kernels(model, context: int, autocast) -> dict[str, list[str]]:
    """Names of what one attention layer runs, forward and backward: CUDA kernels on a GPU, ATen operators on a CPU.

    Those with 2 % or more of the time, the longest first. Profiled outside the measured window.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    layer = model.transformer.h[0].attn
    hidden = torch.randn(1, context, model.config.n_embd, device=model.device, requires_grad=True)

    def names(run):
        with profile(activities=activities, acc_events=True) as profiler:  # else PyTorch 2.11 warns
            result = run()
            synchronize(model.device)
        events = [e for e in profiler.key_averages() if not on_gpu or e.device_type == torch.autograd.DeviceType.CUDA]
        spent = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events}
        total = sum(spent.values())
        return result, [n for n, t in sorted(spent.items(), key=lambda item: -item[1]) if t >= 0.02 * total]

    with autocast():
        for _ in range(2):  # the first time pays for start-up
            output, forward = names(lambda: layer(hidden)[0])
            _, backward = names(lambda out=output: out.sum().backward())
    layer.zero_grad(set_to_none=True)
    return {"forward": forward, "backward": backward}


def checkpoint_bytes(model) -> int:
    """Bytes on disk of the model as `save_pretrained` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
