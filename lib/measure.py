"""What a run costs besides joules: time, memory, CPU, disk, FLOPs, latency, size, kernels."""

import contextlib
import copy
import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from lib import energy


class Meter:
    """Adds up the measured stretches of a run; nothing is read inside one, only at its two ends."""

    def __init__(self, device: torch.device):
        self.device = device
        self.gpu_counter = energy.gpu_counter(device)
        self.cpu_counter = energy.cpu_counter()
        self.stretches_s: list[float] = []
        self.cpu_time_s = 0.0
        self.disk_bytes = 0
        self.foreign_processes = 0
        self.open = False
        self._peaks = {"allocated": 0, "reserved": 0, "resident": 0}
        self._resident_resettable = True

    @property
    def window_s(self) -> float:
        return sum(self.stretches_s)

    @contextlib.contextmanager
    def stretch(self):
        """Measures the block inside it, from an idle device to an idle device."""
        self._reset_peaks()
        synchronize(self.device)
        self.gpu_counter.begin()
        self.cpu_counter.begin()
        disk_before, cpu_before, begin = _disk_bytes(), time.process_time(), time.perf_counter()
        self.open = True
        yield
        synchronize(self.device)
        self.open = False
        self.stretches_s.append(time.perf_counter() - begin)
        self.cpu_time_s += time.process_time() - cpu_before
        self.gpu_counter.end()
        self.cpu_counter.end()
        disk_after = _disk_bytes()
        self.disk_bytes = None if disk_after is None else self.disk_bytes + disk_after - disk_before
        self._read_peaks()
        if self.device.type == "cuda" and self.foreign_processes is not None:
            others = energy.foreign_processes(self.device)
            self.foreign_processes = None if others is None else max(self.foreign_processes, others)

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

    def metrics(self) -> tuple[dict, dict]:
        """The window's metrics, and the reasons for those that are None."""
        window_s = self.window_s
        gpu, cpu = self.gpu_counter.reading(window_s), self.cpu_counter.reading(window_s)
        if gpu.joules is not None and self.foreign_processes:
            gpu = energy.Reading(None, "foreign_process")
        on_gpu = self.device.type == "cuda"
        values = {
            "time_s": window_s,
            "energy_j": gpu.joules,
            "mean_power_w": None if gpu.joules is None else gpu.joules / window_s,
            "cpu_energy_j": cpu.joules,
            "cpu_time_s": self.cpu_time_s,
            "cpu_cores_used": self.cpu_time_s / window_s,
            "disk_bytes": self.disk_bytes,
            "peak_memory_bytes": self._peaks["allocated"] if on_gpu else None,
            "peak_reserved_memory_bytes": self._peaks["reserved"] if on_gpu else None,
            "peak_resident_bytes": self._peaks["resident"] if not on_gpu and self._resident_resettable else None,
        }
        reasons = {"energy_j": gpu.reason, "mean_power_w": gpu.reason, "cpu_energy_j": cpu.reason}
        reasons["peak_memory_bytes"] = reasons["peak_reserved_memory_bytes"] = "no_gpu"
        reasons["peak_resident_bytes"] = "gpu_run" if on_gpu else "peak_not_resettable"
        reasons["disk_bytes"] = "not_counted_here"
        return values, {name: reasons[name] for name, value in values.items() if value is None}


class Utilization:
    """Samples GPU utilization twice a second in a process of its own (nvidia-smi), beside the measured window."""

    def __init__(self, device: torch.device):
        self.process = None
        self.reason = "no_gpu"
        self.samples = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read after the process ended
        if device.type == "cuda":
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
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
    weights = sum(p.numel() for p in blocks.parameters() if p.dim() >= 2) + model.lm_head.weight.numel()
    core, core_dense = (sum(b.attn.core_flops(context, dense=dense) for b in blocks) for dense in (False, True))
    projections = 2 * weights * context
    return {
        "forward_flops_useful": projections + core,
        "forward_flops_dense": projections + core_dense,
        "attention_core_share": core / (projections + core),
    }


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


@torch.no_grad()
def inference(model, contexts: list[int], new_tokens: int, repeats: int, autocast) -> list[dict]:
    """Latency of one sequence by context length: prefill, then greedy decoding with the cache.

    Medians of `repeats`, after a warm-up at the same length. Cache bytes are counted from the cache itself and, beside
    them, from the variant's formula.
    """
    model.eval()
    rows = []
    for context in contexts:
        ids = torch.arange(context, device=model.device)[None] % model.config.vocab_size
        with autocast():
            _generate(model, ids, 1)
            runs = [_generate(model, ids, new_tokens) for _ in range(repeats)]
        cache = runs[-1]["cache"]
        element_bytes = max(tensor.element_size() for tensor in _tensors(cache))
        rows.append(
            {
                "context": context,
                "prefill_latency_s": statistics.median(run["prefill_s"] for run in runs),
                "decode_latency_s_per_token": statistics.median(run["decode_s"] / new_tokens for run in runs),
                "cache_bytes": sum(tensor.numel() * tensor.element_size() for tensor in _tensors(cache)),
                "cache_bytes_analytic": sum(
                    block.attn.cache_bytes(context + new_tokens, element_bytes) for block in model.transformer.h
                ),
            }
        )
    return rows


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

            per_prefill, per_decoding = (_energy_of(work, model.device, window_s) for work in (prefill, decode))
        per_token = None if per_decoding.joules is None else per_decoding.joules / new_tokens
        reason = per_prefill.reason or per_decoding.reason
        rows.append({"context": context, "prefill_energy_j": per_prefill.joules})
        rows[-1] |= {"decode_energy_j_per_token": per_token, "energy_null_reason": reason}
    return rows


def _energy_of(work, device: torch.device, window_s: float) -> energy.Reading:
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
        with profile(activities=activities) as profiler:
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
