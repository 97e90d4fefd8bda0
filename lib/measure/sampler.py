"""The GPU's clock, heat and limits, sampled while it works by a process of its own.

`python -m lib.measure.sampler UUID` writes a line of JSON every `PERIOD_S` seconds until it is ended. It imports no
PyTorch, so it starts in a fraction of a second, and one sample takes about a millisecond of NVML's time (H100).
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import pynvml

from lib import paths

PERIOD_S = 0.25
PATIENCE_S = 10.0  # for the first sample
UTILIZATION_PERIOD_S = 1.0  # the longest over which NVML averages it (nvml.h, nvmlUtilization_t)

# Of NVML's reasons for a lower clock those that slow a working GPU (nvml.h, nvmlClocksEventReasons).
THROTTLE = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}


class Sample(NamedTuple):
    """The GPU at a moment of the wall clock; None where NVML does not answer a question."""

    wall_s: float
    sm_clock_mhz: int | None
    temperature_c: int | None
    power_limit_w: float | None
    throttle_reasons: list[str] | None
    utilization_percent: float | None


def ask(question, *words):
    """NVML's answer, or None where it has none."""
    try:
        answer = question(*words)
    except pynvml.NVMLError:
        return None
    return answer.decode() if isinstance(answer, bytes) else answer


def sample(handle, wall_s: float) -> Sample:
    """What NVML says of a GPU now."""
    limit_mw = ask(pynvml.nvmlDeviceGetPowerManagementLimit, handle)
    reasons = ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    rates = ask(pynvml.nvmlDeviceGetUtilizationRates, handle)
    return Sample(
        wall_s,
        ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        None if limit_mw is None else limit_mw / 1000,
        None if reasons is None else [name for bit, name in THROTTLE.items() if reasons & bit],
        None if rates is None else rates.gpu,
    )


def inside(samples: list[Sample], windows: list[tuple[float, float]]) -> list[tuple[float, Sample]]:
    """The samples inside the windows (begin and end by the wall clock), each with its second of the whole window."""
    found, before_s = [], 0.0
    for begin_s, end_s in windows:
        found += [(before_s + one.wall_s - begin_s, one) for one in samples if begin_s <= one.wall_s <= end_s]
        before_s += end_s - begin_s
    return found


def summary(samples: list[Sample]) -> dict | None:
    """What the samples of a window say together; None without any. A value is None where NVML never said it.

    `throttled_share` is the share of samples that some reason throttled, `throttled_by` the same by reason: at most 1.
    """
    if not samples:
        return None
    clocks, heats, limits = (
        [value for value in (getattr(one, name) for one in samples) if value is not None]
        for name in ("sm_clock_mhz", "temperature_c", "power_limit_w")
    )
    answered = [one.throttle_reasons for one in samples if one.throttle_reasons is not None]
    seen = sorted({reason for reasons in answered for reason in reasons})
    return {
        "samples": len(samples),
        "sm_clock_mhz_minimum": min(clocks, default=None),
        "sm_clock_mhz_median": statistics.median(clocks) if clocks else None,
        "sm_clock_mhz_maximum": max(clocks, default=None),
        "temperature_c_begin": heats[0] if heats else None,
        "temperature_c_end": heats[-1] if heats else None,
        "power_limit_w_minimum": min(limits, default=None),
        "power_limit_w_maximum": max(limits, default=None),
        "throttled_share": sum(map(bool, answered)) / len(answered) if answered else None,
        "throttled_by": {r: sum(r in reasons for reasons in answered) / len(answered) for r in seen},
    }


class Sampler:
    """Samples the GPU that NVML calls `uuid` from construction to `stop`; None, no GPU: nothing to sample."""

    def __init__(self, uuid: str | None):
        self.process = None
        if uuid is None:
            return
        self.lines = tempfile.TemporaryFile()  # noqa: SIM115 - read while the process writes, and after
        found = [str(paths.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(found)}
        command = [sys.executable, "-m", __name__, uuid]
        self.process = subprocess.Popen(command, stdout=self.lines, stderr=subprocess.DEVNULL, env=env)
        give_up_s = time.monotonic() + PATIENCE_S
        while not self.samples() and self.process.poll() is None and time.monotonic() < give_up_s:
            time.sleep(0.02)

    def samples(self) -> list[Sample]:
        """What was sampled so far; a line that is not whole yet waits for the next look."""
        if self.process is None:
            return []
        # Not `seek` and `read`: the process writes where the place of this very file stands.
        *whole, _ = os.pread(self.lines.fileno(), os.fstat(self.lines.fileno()).st_size, 0).decode().split("\n")
        return [Sample(*json.loads(line)) for line in whole]

    def stop(self) -> list[Sample]:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
        return self.samples()


def main(uuid: str) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        parent = os.getppid()
        while os.getppid() == parent:  # it does not outlive the run, however that ends
            begin = time.monotonic()
            print(json.dumps(sample(handle, time.time())), flush=True)
            time.sleep(max(0.0, PERIOD_S - (time.monotonic() - begin)))


if __name__ == "__main__":
    main(sys.argv[1])
