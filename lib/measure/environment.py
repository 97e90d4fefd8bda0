"""Where a run ran: versions, processor, GPU and its settings, commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from lib import paths
from lib.measure import energy, sampler
from lib.measure.sampler import ask

PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "zeus", "papermill", "pandas", "matplotlib", "numpy")
WHERE_THERE = ("triton", "fla-core")  # they compute in some variants, where they are installed


def describe(device: torch.device) -> dict:
    """Facts of the machine and the software, for the record."""
    commit, modified, reason = git_state()
    return {
        "python": platform.python_version(),
        "platform": platform.system(),
        "packages": {name: _version(name) for name in PACKAGES}
        | {name: found for name in WHERE_THERE if (found := _version(name))},
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "commit": commit,
        "commit_modified": modified,
        "commit_null_reason": reason,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "gpu": _gpu(device) if device.type == "cuda" else None,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(root: Path = paths.ROOT) -> tuple[str | None, bool | None, str | None]:
    """The commit of the repository whose root this is, whether tracked files differ from it, and why both are None.

    A folder without a repository of its own has no commit, wherever it lies: git would answer for the one around it.
    """
    # Where git is told by its environment to look elsewhere (as in a hook), it was told for another purpose.
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {"LC_ALL": "C"}

    def git(*words):
        done = subprocess.run(["git", *words], cwd=root, env=own, capture_output=True, check=True)
        return done.stdout.decode("utf-8", "surrogateescape").rstrip("\n")

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None, None, "no_repository"
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no")), None
    except OSError:
        return None, None, "git_unavailable"
    except subprocess.CalledProcessError as error:
        unknown = b"not a git repository" in error.stderr
        return None, None, "no_repository" if unknown else "git_refuses"


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
