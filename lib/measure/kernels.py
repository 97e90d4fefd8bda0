"""What torch's profiler sees: the kernels of an attention layer, and how much of a step the GPU computes."""

import math
import time
from collections.abc import Callable

import torch

from lib.measure import energy
from lib.model import devices


def names(model, context: int, autocast) -> dict[str, list[str]]:
    """Names of what one attention layer runs, forward and backward: CUDA kernels on a GPU, ATen operators on a CPU.

    Those with 2 % or more of the time, the longest first. Profiled outside the measured window.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    layer = model.transformer.h[0].attn
    hidden = torch.randn(1, context, model.config.n_embd, device=model.device, requires_grad=True)

    def profiled(run):
        with profile(activities=activities, acc_events=True) as profiler:  # else PyTorch 2.11 warns
            result = run()
            devices.synchronize(model.device)
        events = [e for e in profiler.key_averages() if not on_gpu or e.device_type == torch.autograd.DeviceType.CUDA]
        spent = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events}
        total = sum(spent.values())
        return result, [n for n, t in sorted(spent.items(), key=lambda item: -item[1]) if t >= 0.02 * total]

    with autocast():
        for _ in range(2):  # the first time pays for start-up
            output, forward = profiled(lambda: layer(hidden)[0])
            _, backward = profiled(lambda out=output: out.sum().backward())
    layer.zero_grad(set_to_none=True)
    return {"forward": forward, "backward": backward}


def busy_fraction(device: torch.device, run: Callable[[], None]) -> energy.Reading:
    """Share of the time of `run()` in which the GPU computes: kernels of one run, profiled, over the time of another.

    Two runs, so that the profiler's own time, which is the host's, is not taken for waiting.
    """
    if device.type != "cuda":
        return energy.Reading(None, "no_gpu")
    from torch.profiler import ProfilerActivity, profile

    devices.synchronize(device)
    begin = time.perf_counter()
    run()
    devices.synchronize(device)
    wall_s = time.perf_counter() - begin
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:  # else PyTorch 2.11 warns
        run()
        devices.synchronize(device)
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
