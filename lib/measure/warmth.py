"""Whether a working GPU has come to the heat and the clock at which it stays."""

import statistics
import time

import torch

from lib.measure import environment

# An H100 under load goes from 31 to 52 °C in three seconds and is steady after five; below its power limit the clock
# stays where it is, at the limit it falls as the chip warms.
STEADY_OVER_S = 3.0  # nothing may move for so long
TEMPERATURE_WITHIN_C = 1  # NVML's own step
CLOCK_WITHIN = 0.02  # of the medians of that time's halves
LIMIT_S = 20.0  # a GPU that is not steady then is measured as it is, and its record says so
LOOK_EVERY_S = 0.25


class Warmth:
    """Looks at a GPU between the steps that warm it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.begin_s = time.perf_counter()
        self.looks: list[tuple[float, int | None, int | None]] = []  # seconds since the begin, °C, MHz

    def look(self) -> None:
        """Asks the GPU how it is, where the last time is `LOOK_EVERY_S` ago."""
        passed_s = time.perf_counter() - self.begin_s
        if not self.looks or passed_s - self.looks[-1][0] >= LOOK_EVERY_S:
            state = environment.gpu_state(self.device) or {}
            self.looks.append((passed_s, state.get("temperature_c"), state.get("sm_clock_mhz")))

    def rising(self) -> bool:
        """Whether there is something to wait for, and time for it."""
        return self.steady is False and self.looks[-1][0] < LIMIT_S

    @property
    def steady(self) -> bool | None:
        """None where there is no GPU, or it does not say."""
        if not self.looks:
            return None
        now_s = self.looks[-1][0]
        old = [index for index, look in enumerate(self.looks) if now_s - look[0] >= STEADY_OVER_S]
        last = self.looks[old[-1] if old else 0 :]
        if any(value is None for look in last for value in look):
            return None
        if not old:
            return False
        heats, clocks = ([look[which] for look in last] for which in (1, 2))
        half = len(clocks) // 2
        before, after = statistics.median(clocks[:half]), statistics.median(clocks[half:])
        return max(heats) - min(heats) <= TEMPERATURE_WITHIN_C and abs(after / before - 1) <= CLOCK_WITHIN

    @property
    def temperature_c(self) -> int | None:
        return self.looks[-1][1] if self.looks else None
