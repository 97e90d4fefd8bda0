"""Each check of a run: green, flagged or null, and why."""

import pytest
import torch

from lib import record
from lib.measure import energy, selfcheck
from lib.measure.meter import Meter, Window

GREEN = {
    "sm_clock_mhz": 1980, "temperature_c": 60, "performance_state": 0, "power_limit_w": 700.0, "throttle_reasons": [],
    "throttled_s": 5.0,
}  # fmt: skip
METRICS = {"gpu_busy_fraction": 0.99, "mfu": 0.4, "idle_power_w": 80.0, "mean_power_w": 400.0}


def meter(monkeypatch, on_gpu=True, states=(GREEN, GREEN), others=(0, 0), window_s=60.0):
    """A meter that has measured `window_s` seconds at 400 W by the counter and by the trace."""
    made = Meter(torch.device("cpu"))
    made.windows = [Window(0.0, window_s, 1000.0, 1000.0 + window_s)]
    if on_gpu:
        monkeypatch.setattr(made, "on_gpu", True)
        made.gpu_counter = energy.Counter("gpu_energy", monitor=object())
        made.gpu_counter.windows_j = [400.0 * window_s]
        made.trace = energy.Trace(*torch.tensor([[999.0], [400.0]], dtype=torch.float64).numpy())
        made.states, made._others = list(states), list(others)
    return made


def verdicts(made, metrics=METRICS, reasons=None, padding=0.0):
    found = selfcheck.checks(made, metrics, reasons or {}, padding)
    assert all(check.says for check in found)
    return {check.check: check.verdict for check in found}


def test_a_sound_run_is_green_throughout(monkeypatch):
    assert set(verdicts(meter(monkeypatch)).values()) == {"green"}


@pytest.mark.parametrize(
    ("flagged", "changes"),
    [
        ("launch_bound", {"metrics": METRICS | {"gpu_busy_fraction": 0.94}}),
        ("mfu", {"metrics": METRICS | {"mfu": 1.01}}),
        ("padding", {"padding": 0.79}),
        ("window_length", {"window_s": 29.0}),
        ("other_processes", {"others": (0, 1)}),
        ("other_processes", {"others": (0, None)}),
        ("clock_drift", {"states": (GREEN, GREEN | {"sm_clock_mhz": 1800})}),
        ("temperature_drift", {"states": (GREEN, GREEN | {"temperature_c": 71})}),
        ("throttling", {"states": (GREEN, GREEN | {"throttled_s": 6.0})}),
        ("throttling", {"states": (GREEN, GREEN | {"throttle_reasons": ["power cap"], "throttled_s": None})}),
    ],
)
def test_what_is_out_of_bounds_is_flagged_alone(flagged, changes, monkeypatch):
    asked = {name: changes.pop(name) for name in ("metrics", "padding") if name in changes}
    found = verdicts(meter(monkeypatch, **changes), **asked)
    assert [check for check, verdict in found.items() if verdict != "green"] == [flagged]


@pytest.mark.parametrize(("trace_w", "verdict"), [(415.0, "green"), (430.0, "flagged"), (450.0, "null")])
def test_counter_against_integral(trace_w, verdict, monkeypatch):
    made = meter(monkeypatch)
    made.trace = made.trace._replace(watts=made.trace.watts * trace_w / 400)
    assert verdicts(made)["counter_against_power"] == verdict
    expected = (None, "counter_power_disagree") if verdict == "null" else (24_000.0, None)
    assert made.energy() == expected


def test_what_a_card_does_not_say_is_null_and_never_green(monkeypatch):
    silent = dict.fromkeys(GREEN)
    found = verdicts(meter(monkeypatch, states=(silent, silent)))
    assert {found[check] for check in ("clock_drift", "temperature_drift", "throttling")} == {"null"}


def test_without_a_gpu_every_check_of_it_is_null_with_the_reason(monkeypatch):
    made, none = meter(monkeypatch, on_gpu=False), dict.fromkeys(METRICS)
    reasons = {"gpu_busy_fraction": "no_gpu", "mfu": "peak_unknown", "net_energy_j": "no_gpu"}
    found = selfcheck.checks(made, none, reasons, 0.1)
    assert {check.check for check in found if check.verdict != "null"} == {"padding"}
    said = {check.says for check in found if check.verdict == "null"}
    assert said == {record.REASONS["no_gpu"], record.REASONS["peak_unknown"]}
