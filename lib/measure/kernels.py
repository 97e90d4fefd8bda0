"""What torch's profiler sees: the kernels of an attention layer, and how much of a step the GPU computes."""

import math
import statistics
import time
from collections.abc import Callable

import torch

from lib import attention
from lib.measure import energy
from lib.model import devices

PASSES = 5  # profiled: in a single one, whatever the machine did meanwhile makes one operator long and hides others
SMALL_SHARE = 0.02  # of the time: what takes less is not named


def names(model, context: int, autocast, compiled: bool = False) -> dict[str, list[str] | None]:
    """Names of what one attention layer runs, forward and backward: CUDA kernels on a GPU, ATen operators on a CPU. Of
    a pattern, one layer of each of its variants.

    Those with 2 % or more of the time by the median of several passes, the longest first; None where the profiler saw
    nothing. In training mode and, where the run was `compiled`, of the layer compiled by itself: which of the compiled
    model's kernels are the attention's cannot be told. Profiled outside the measured window.
    """
    blocks = model.transformer.h[: len(attention.parts(model.config.attention))]
    own = torch.nn.ModuleList({type(block.attn): block.attn for block in blocks}.values())
    layers = [torch.compile(layer) if compiled else layer for layer in own]
    hidden = torch.randn(1, context, model.config.n_embd, device=model.device, requires_grad=True)
    passes = {"forward": [], "backward": []}
    mode = model.training
    own.train()
    with autocast():
        for number in range(1 + PASSES):
            outputs, forward = _profiled(model.device, lambda: [layer(hidden)[0] for layer in layers])
            _, backward = _profiled(model.device, lambda out=outputs: sum(each.sum() for each in out).backward())
            if number:  # the first one pays for start-up
                passes["forward"].append(forward)
                passes["backward"].append(backward)
    own.train(mode)
    own.zero_grad(set_to_none=True)
    return {name: usual(found) for name, found in passes.items()}


def _profiled(device: torch.device, run: Callable):
    """What `run()` returns, and microseconds by name of what it ran."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:  # else PyTorch 2.11 warns
        result = run()
        devices.synchronize(device)
    events = [e for e in profiler.key_averages() if not on_gpu or e.device_type == torch.autograd.DeviceType.CUDA]
    return result, {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events}


def usual(passes: list[dict[str, float]]) -> list[str] | None:
    """Names with `SMALL_SHARE` or more of the time, the longest first, from the times by name of several passes."""
    known = {name for one in passes for name in one}
    spent = {name: statistics.median(one.get(name, 0.0) for one in passes) for name in known}
    least = SMALL_SHARE * sum(spent.values())
    return [name for name, time in sorted(spent.items(), key=lambda item: -item[1]) if time >= least > 0] or None


def busy_fraction(device: torch.device, run: Callable[[], None]) -> energy.Reading:
    """Share of the time of `run()` in which the GPU computes: kernels of one run, profiled, over the time of another.

    Two runs, so that the profiler's own time, which is the host's, is not taken for waiting. A profile without a kernel
    says nothing: None, as a profiler that lost its events looks the same.
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
    return _share(profiler.events(), wall_s)


def _share(events, wall_s: float) -> energy.Reading:
    ran = _on_device(events)
    if not ran:
        return energy.Reading(None, "empty_profile")
    return energy.Reading(min(1.0, covered(ran) / 1e6 / wall_s))


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
