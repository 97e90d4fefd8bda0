"""Each check of a run: green, flagged or null, and why."""

import pytest
import torch

from lib import record
from lib.measure import energy, sampler, selfcheck
from lib.measure import meter as meters
from lib.measure.meter import Meter, Window

GREEN = {
    "sm_clock_mhz": 1980, "temperature_c": 60, "performance_state": 0, "power_limit_w": 700.0, "throttle_reasons": [],
    "throttled_s": 5.0,
}  # fmt: skip
METRICS = {"gpu_busy_fraction": 0.99, "mfu": 0.4, "idle_power_w": 80.0, "mean_power_w": 400.0}


SAMPLE = {"sm_clock_mhz": 1980, "temperature_c": 60, "power_limit_w": 700.0, "throttle_reasons": []}
WARMED = {"steady": True, "seconds": 5.0}


def meter(
    monkeypatch, on_gpu=True, first=SAMPLE, last=SAMPLE, others=(0, 0), window_s=60.0, odd=SAMPLE, count=8, waited=0.0
):  # fmt: skip
    """A meter that has measured `window_s` seconds at 400 W by the counter and by the trace; `count` samples, the first
    half of them `first`, the others `last`, but for the newest, `odd`."""
    made = Meter(torch.device("cpu"))
    made.cpu_time_s, made.waited_s = window_s, waited * window_s
    made.windows = [Window(0.0, window_s, 1000.0, 1000.0 + window_s)]
    halves = [SAMPLE | first] * (count // 2) + [SAMPLE | last] * (count // 2)
    halves[-1] = halves[-1] | odd if odd is not SAMPLE else halves[-1]
    if on_gpu:
        monkeypatch.setattr(made, "on_gpu", True)
        made.gpu_counter = energy.Counter("gpu_energy", monitor=object())
        made.gpu_counter.windows_j = [400.0 * window_s]
        made.trace = energy.Trace(*torch.tensor([[999.0], [400.0]], dtype=torch.float64).numpy())
        made.states, made._others = [GREEN, GREEN], list(others)
        moments = [1000.0 + window_s * (place + 0.5) / count for place in range(count)]
        made.samples = [sampler.Sample(m, **s, utilization_percent=97) for m, s in zip(moments, halves, strict=True)]
    return made


def verdicts(made, metrics=METRICS, reasons=None, padding=0.0, warmed=WARMED):
    found = selfcheck.checks(made, metrics, reasons or {}, padding, warmed)
    assert all(check.says for check in found)
    return {check.check: check.verdict for check in found}


def test_a_sound_run_is_green_throughout(monkeypatch):
    assert set(verdicts(meter(monkeypatch)).values()) == {"green"}


@pytest.mark.parametrize(
    ("flagged", "changes"),
    [
        ("launch_bound", {"metrics": METRICS | {"gpu_busy_fraction": 0.949}}),
        ("mfu", {"metrics": METRICS | {"mfu": 1.01}}),
        ("idle", {"metrics": METRICS | {"idle_power_w": 400.0}}),
        ("padding", {"padding": 0.501}),
        ("busy_neighbour", {"waited": 1.86}),  # 35 % of what it could have computed
        ("window_length", {"window_s": 3.9}),
        ("other_processes", {"others": (0, 1)}),
        ("other_processes", {"others": (0, None)}),
        ("warm_up", {"warmed": WARMED | {"steady": False}}),
        ("clock_drift", {"first": {"sm_clock_mhz": 2090}}),
        ("clock_drift", {"first": {"sm_clock_mhz": 1885}}),
        ("clock_under_load", {"first": {"sm_clock_mhz": 1870}, "last": {"sm_clock_mhz": 1860}}),
        ("temperature_drift", {"last": {"temperature_c": 71}}),
        ("temperature_drift", {"last": {"temperature_c": 49}}),
        ("throttling", {"odd": {"throttle_reasons": ["power cap"]}, "count": 40}),
    ],
)
def test_what_is_out_of_bounds_is_flagged_alone(flagged, changes, monkeypatch):
    asked = {name: changes[name] for name in ("metrics", "padding", "warmed") if name in changes}
    found = verdicts(meter(monkeypatch, **{n: v for n, v in changes.items() if n not in asked}), **asked)
    assert [check for check, verdict in found.items() if verdict != "green"] == [flagged]


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": METRICS | {"gpu_busy_fraction": 0.95}}, {"metrics": METRICS | {"mfu": 1.0}}, {"padding": 0.5},
        {"window_s": 4.0}, {"first": {"sm_clock_mhz": 1886}}, {"last": {"sm_clock_mhz": 1882}},
        {"last": {"temperature_c": 70}}, {"last": {"temperature_c": 50}},
        {"metrics": METRICS | {"idle_power_w": 399.0}}, {"odd": {"throttle_reasons": ["power cap"]}, "count": 100},
        {"odd": {"sm_clock_mhz": 1000}, "count": 16},  # one sample is no drift: quarters are compared
    ],
)  # fmt: skip
def test_what_is_just_within_bounds_is_green(changes, monkeypatch):
    asked = {name: changes[name] for name in ("metrics", "padding") if name in changes}
    found = verdicts(meter(monkeypatch, **{n: v for n, v in changes.items() if n not in asked}), **asked)
    assert set(found.values()) == {"green"}, found


def test_a_check_shows_the_number_that_it_is_about(monkeypatch):
    """The value against a pencil, with its sign, and the limit beside it."""
    made = meter(monkeypatch, first={"sm_clock_mhz": 1800}, last={"temperature_c": 50}, waited=0.25)
    made.windows = [Window(0.0, 20.0, 1000.0, 1020.0), Window(20.0, 60.0, 1020.0, 1060.0)]
    made.gpu_counter.windows_j, made.states = [8_000.0, 16_000.0], [GREEN | {"sm_clock_mhz": 2000}, GREEN]
    made.trace = made.trace._replace(watts=made.trace.watts * 0.98)
    found = {c.check: c for c in selfcheck.checks(made, METRICS, {}, 0.25, WARMED)}
    expected = {
        "counter_against_power": -0.02, "window_length": 20.0, "launch_bound": 0.99, "warm_up": None,
        "clock_drift": 1980 / 1800 - 1, "clock_under_load": 1 - 1890 / 2000, "temperature_drift": -10.0,
        "throttling": 0.0, "other_processes": 0.0, "busy_neighbour": 0.2, "padding": 0.25, "mfu": 0.4, "idle": 0.2,
    }  # fmt: skip
    assert {name: check.value for name, check in found.items()} == pytest.approx(expected)
    limits = (0.05, 4.0, 0.95, None, 0.05, 0.05, 10.0, 0.01, 0.0, 0.1, 0.5, 1.0, 1.0)
    assert [found[name].limit for name in expected] == list(limits)


def test_the_shortest_window_counts_and_not_the_sum(monkeypatch):
    made = meter(monkeypatch)
    made.windows.append(Window(60.0, 61.5, 1060.0, 1061.5))
    assert made.energy() == (None, "window_too_short") and verdicts(made)["window_length"] == "null"


def test_a_throttled_share_is_never_above_one(monkeypatch):
    held = SAMPLE | {"throttle_reasons": ["power cap", "heat (hardware)"]}
    found = {c.check: c for c in selfcheck.checks(meter(monkeypatch, first=held, last=held), METRICS, {}, 0.0, WARMED)}
    assert found["throttling"].value == 1 and "heat (hardware) 100.0%, power cap 100.0%" in found["throttling"].says


@pytest.mark.parametrize(
    ("trace_w", "verdict"),
    [
        (415.0, "green"), (385.0, "green"), (421.0, "flagged"), (379.0, "flagged"), (439.0, "flagged"),
        (361.0, "flagged"), (441.0, "null"), (359.0, "null"),
    ],
)  # fmt: skip
def test_counter_against_integral(trace_w, verdict, monkeypatch):
    made = meter(monkeypatch)
    made.trace = made.trace._replace(watts=made.trace.watts * trace_w / 400)
    assert verdicts(made)["counter_against_power"] == verdict
    expected = (None, "counter_power_disagree") if verdict == "null" else (24_000.0, None)
    assert made.energy() == expected


SAMPLED = ("clock_drift", "clock_under_load", "temperature_drift", "throttling")


def test_what_a_gpu_does_not_say_is_null_and_never_green(monkeypatch):
    silent = dict.fromkeys(SAMPLE)
    found = verdicts(meter(monkeypatch, first=silent, last=silent), warmed=WARMED | {"steady": None})
    assert {found[check] for check in (*SAMPLED, "warm_up")} == {"null"}
    made = meter(monkeypatch)
    made.samples = []
    checks = {check.check: check for check in selfcheck.checks(made, METRICS, {}, 0.0, WARMED)}
    assert {(checks[name].verdict, checks[name].says) for name in SAMPLED} == {("null", record.REASONS["no_sample"])}


def test_without_a_gpu_every_check_of_it_is_null_with_the_reason(monkeypatch):
    made, none = meter(monkeypatch, on_gpu=False), dict.fromkeys(METRICS)
    reasons = {"gpu_busy_fraction": "no_gpu", "mfu": "peak_unknown", "net_energy_j": "no_gpu"}
    found = selfcheck.checks(made, none, reasons, 0.1, {"steady": None, "seconds": 1.0})
    assert {check.check for check in found if check.verdict != "null"} == {"padding", "busy_neighbour"}
    said = {check.says for check in found if check.verdict == "null"}
    assert said == {record.REASONS["no_gpu"], record.REASONS["peak_unknown"]}


def test_a_busy_neighbour_is_seen_where_the_system_counts_and_where_it_does_not(monkeypatch):
    """A thread that waits for a core is counted by Linux; else by what the window lacks of one core."""
    made = meter(monkeypatch, on_gpu=False)
    made._note_waited({"1": 1.0, "2": 5.0}, {"1": 2.5, "3": 0.5})  # thread 2 has ended, thread 3 begun
    assert made.waited_s == 2.0 and made.waited_share == pytest.approx(2 / 62)
    made._note_waited(None, {"1": 2.5})
    assert made.waited_s is None
    made.cpu_time_s = 0.35 * 60
    assert made.waited_share == pytest.approx(0.65)
    assert verdicts(made)["busy_neighbour"] == "flagged"
    made.device = torch.device("cuda")
    assert made.waited_share is None and verdicts(made)["busy_neighbour"] == "null"


def test_what_a_thread_waits_for_a_core_is_read_from_the_system():
    found = meters._waited_s()
    assert found is None or (found and all(seconds >= 0 for seconds in found.values()))
