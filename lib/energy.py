"""Joules, from the hardware's own counters through Zeus (You et al. 2023, NSDI, "Zeus"). Nothing else here reads power.

A reading is joules, or null with one of `lib.record.REASONS`; never 0 for "unknown", never an estimate.
"""

import os
from typing import NamedTuple

import torch

SHORTEST_WINDOW_S = 10.0


class Reading(NamedTuple):
    """Energy in joules, or None and the reason."""

    joules: float | None
    reason: str | None = None


class Counter:
    """One kind of energy counter, read at both ends of each measured stretch.

    `monitor` is a `zeus.monitor.ZeusMonitor`, or None with the `reason` why there is none; `field` names the part of
    its measurement that counts (`gpu_energy` or `cpu_energy`).
    """

    def __init__(self, field: str, monitor=None, reason: str | None = None):
        self.field, self.monitor, self.reason = field, monitor, reason
        self.stretches_j: list[float] = []

    def begin(self) -> None:
        if self.monitor is not None:
            # A cell that failed may have left its window open; that one is void.
            self.monitor.begin_window("stretch", restart=True)

    def end(self) -> None:
        if self.monitor is not None:
            counted = getattr(self.monitor.end_window("stretch"), self.field)
            self.stretches_j.append(sum((counted or {}).values()))

    def reading(self, window_s: float) -> Reading:
        """The sum over all stretches, `window_s` seconds in all, if it can be trusted."""
        if self.monitor is None:
            return Reading(None, self.reason)
        if window_s < SHORTEST_WINDOW_S:
            return Reading(None, "window_too_short")
        if any(joules < 0 for joules in self.stretches_j):
            return Reading(None, "counter_reset")
        if not sum(self.stretches_j) > 0:
            return Reading(None, "counter_zero")
        return Reading(sum(self.stretches_j))


def gpu_counter(device: torch.device) -> Counter:
    """The counter of the GPU that `device` is, or why there is none."""
    if device.type != "cuda":
        return Counter("gpu_energy", reason="no_gpu")
    # Zeus answers 0 J in silence where it finds no GPU, so whether there is one is asked of NVML first.
    reason = _nvml_reason(device)
    if reason:
        return Counter("gpu_energy", reason=reason)
    from zeus.monitor import ZeusMonitor

    try:
        index = device.index if device.index is not None else torch.cuda.current_device()
        monitor = ZeusMonitor(gpu_indices=[index], cpu_indices=[], approx_instant_energy=False)
    except Exception:  # NVML's, amdsmi's and Zeus's own errors have no common class; each means: no counter
        return Counter("gpu_energy", reason="nvml_unavailable")
    if len(monitor.gpus) <= index:
        return Counter("gpu_energy", reason="nvml_unavailable")
    return Counter("gpu_energy", monitor)


def cpu_counter() -> Counter:
    """The RAPL counters of all CPU packages, or why there is none."""
    from zeus.device.cpu import get_cpus
    from zeus.device.cpu.common import ZeusCPUInitError, ZeusCPUNoPermissionError
    from zeus.monitor import ZeusMonitor

    try:
        packages = len(get_cpus())
        if not packages:
            return Counter("cpu_energy", reason="rapl_unavailable")
        return Counter("cpu_energy", ZeusMonitor(gpu_indices=[], cpu_indices=list(range(packages))))
    except (ZeusCPUNoPermissionError, PermissionError):
        return Counter("cpu_energy", reason="permission")
    except (ZeusCPUInitError, OSError, RuntimeError):
        return Counter("cpu_energy", reason="rapl_unavailable")


def _nvml_reason(device: torch.device) -> str | None:
    """Why the GPU's counter cannot be the run's energy; None if it can."""
    import pynvml

    if os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG"):
        return "mig"
    try:
        handle = nvml_handle(device)
    except (pynvml.NVMLError, ValueError):
        return "nvml_unavailable"
    try:
        if pynvml.nvmlDeviceGetMigMode(handle)[0]:
            return "mig"
    except pynvml.NVMLError:
        pass  # a card that cannot be split says so with an error
    try:
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return "counter_unsupported"
    return None


def nvml_handle(device: torch.device):
    """NVML's handle of a CUDA device, found by UUID: NVML counts all cards, CUDA only the visible ones."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def foreign_processes(device: torch.device) -> int | None:
    """How many other processes compute on the GPU; None where the list cannot be read or does not show this one."""
    import pynvml

    try:
        running = {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(nvml_handle(device))}
    except (pynvml.NVMLError, ValueError):
        return None
    # In a container NVML gives the host's process numbers, among which this process cannot be told from others.
    return len(running) - 1 if os.getpid() in running else None
