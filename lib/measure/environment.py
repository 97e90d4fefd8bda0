"""Where a run ran: versions, processor, GPU and its settings, commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from lib.measure import energy, sampler
from lib.measure.sampler import ask

PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "zeus", "papermill", "pandas", "matplotlib", "numpy")
ROOT = Path(__file__).resolve().parent.parent


def describe(device: torch.device) -> dict:
    """Facts of the machine and the software, for the record."""
    commit, modified = _git()
    return {
        "python": platform.python_version(),
        "platform": platform.system(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "commit": commit,
        "commit_modified": modified,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "gpu": _gpu(device) if device.type == "cuda" else None,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> tuple[str | None, bool | None]:
    """The commit of this checkout, and whether tracked files differ from it; None where there is no git."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _gpu(device: torch.device) -> dict:
    """The GPU as it is found; nothing is ever set. Null where NVML does not answer a question."""
    import pynvml

    properties = torch.cuda.get_device_properties(device)
    facts = {
        "uuid": energy.gpu_uuid(device),
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
    try:
        handle = energy.nvml_handle(device)
    except (pynvml.NVMLError, ValueError):
        return facts
    return facts | {
        "driver": ask(pynvml.nvmlSystemGetDriverVersion),
        "max_sm_clock_mhz": ask(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        "persistence_mode": ask(pynvml.nvmlDeviceGetPersistenceMode, handle),
    }


def gpu_state(device: torch.device) -> dict | None:
    """What drifts while a GPU works: clock, heat, what throttles the clock, and for how long it has so far.

    None without a GPU or an answer; a value is None where NVML does not answer that question.
    """
    import pynvml

    if energy.gpu_uuid(device) is None:
        return None
    try:
        handle = energy.nvml_handle(device)
    except (pynvml.NVMLError, ValueError):
        return None
    now = sampler.sample(handle, 0.0)
    policies = (pynvml.NVML_PERF_POLICY_POWER, pynvml.NVML_PERF_POLICY_THERMAL)
    held = [ask(pynvml.nvmlDeviceGetViolationStatus, handle, policy) for policy in policies]
    return {
        "sm_clock_mhz": now.sm_clock_mhz,
        "temperature_c": now.temperature_c,
        "performance_state": ask(pynvml.nvmlDeviceGetPerformanceState, handle),
        "power_limit_w": now.power_limit_w,
        "throttle_reasons": now.throttle_reasons,
        # The longer of the two: both may hold at once.
        "throttled_s": None if None in held else max(status.violationTime for status in held) / 1e9,
    }
