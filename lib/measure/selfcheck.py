"""What a reviewer would ask of a run, answered from its own measurements: green, flagged, or null with the reason.

The limits are judgements, except where design and physics give them (the counter's, the window's, an MFU above 1).
"""

from lib.measure.meter import CLOCK_JUMP_S, FLAGGED_DISAGREEMENT, Meter
from lib.record import REASONS
from lib.record.schema import Check

SHORT_WINDOW_S = 30.0
BUSY_SHARE = 0.95
CLOCK_DRIFT = 0.05
TEMPERATURE_DRIFT_C = 10.0
THROTTLED_SHARE = 0.01
PADDING_SHARE = 0.5


def checks(meter: Meter, metrics: dict, reasons: dict, padding_share: float) -> list[Check]:
    """The checks of a finished run; `metrics` and `reasons` are those of its record."""
    busy, mfu = metrics["gpu_busy_fraction"], metrics["mfu"]
    return [
        _counter_against_power(meter),
        _window_length(meter),
        _bounded(
            "launch_bound", busy, BUSY_SHARE, busy is not None and busy >= BUSY_SHARE,
            "the GPU computes {value:.1%} of a step's time", reasons.get("gpu_busy_fraction"),
        ),
        *_drift(meter),
        _throttling(meter),
        _other_processes(meter),
        _bounded(
            "padding", padding_share, PADDING_SHARE, padding_share <= PADDING_SHARE,
            "{value:.1%} of the positions that were trained on are padding",
        ),
        _bounded("mfu", mfu, 1.0, mfu is not None and mfu <= 1, "{value:.1%} of the device's peak", reasons.get("mfu")),
        _idle(metrics, reasons),
    ]  # fmt: skip


def _bounded(name: str, value: float | None, limit: float, good: bool, says: str, reason: str | None = None) -> Check:
    if value is None:
        return _null(name, limit, REASONS[reason])
    return Check(
        check=name, value=value, limit=limit, verdict="green" if good else "flagged", says=says.format(value=value)
    )


def _null(name: str, limit: float | None, says: str) -> Check:
    return Check(check=name, value=None, limit=limit, verdict="null", says=says)


def _counter_against_power(meter: Meter) -> Check:
    name, limit = "counter_against_power", FLAGGED_DISAGREEMENT
    counted, difference = meter.gpu_counter.reading(meter.window_s), meter.disagreement
    if counted.joules is None:
        return _null(name, limit, REASONS[counted.reason])
    if difference is None:
        jumped = meter.clock_jump_s > CLOCK_JUMP_S
        why = f"the wall clock jumped by {meter.clock_jump_s:.1f} s" if jumped else "there is no power trace"
        return Check(check=name, value=None, limit=limit, verdict="flagged", says=f"the counter is unchecked: {why}")
    says = "the power trace gives {value:+.1%} against the counter"
    check = _bounded(name, difference, limit, abs(difference) <= limit, says)
    refused = meter.energy().reason == "counter_power_disagree"
    return check.model_copy(update={"verdict": "null", "says": f"{check.says}: no energy"}) if refused else check


def _window_length(meter: Meter) -> Check:
    name, counted = "window_length", meter.gpu_counter.reading(meter.window_s)
    if counted.joules is None:
        return _null(name, SHORT_WINDOW_S, REASONS[counted.reason])
    good = meter.window_s >= SHORT_WINDOW_S
    return _bounded(name, meter.window_s, SHORT_WINDOW_S, good, "the counter ran for {value:.1f} s")


def _drift(meter: Meter) -> list[Check]:
    def ends(name):
        values = [state[name] for state in (meter.states[0], meter.states[-1])] if meter.states else []
        return values if values and None not in values else None

    clock, heat = ends("sm_clock_mhz"), ends("temperature_c")
    change = clock and clock[0] and clock[1] / clock[0] - 1
    rise = heat and heat[1] - heat[0]
    unknown = "nvml_unavailable" if meter.on_gpu else "no_gpu"
    return [
        _bounded(
            "clock_drift", change, CLOCK_DRIFT, change is not None and abs(change) <= CLOCK_DRIFT,
            "the clock changed by {value:+.1%} from the window's begin to its end", unknown,
        ),
        _bounded(
            "temperature_drift", rise, TEMPERATURE_DRIFT_C, rise is not None and abs(rise) <= TEMPERATURE_DRIFT_C,
            "the temperature changed by {value:+.0f} °C from the window's begin to its end", unknown,
        ),
    ]  # fmt: skip


def _throttling(meter: Meter) -> Check:
    name, limit = "throttling", THROTTLED_SHARE
    if not meter.on_gpu:
        return _null(name, limit, REASONS["no_gpu"])
    held_s = [state["throttled_s"] for state in meter.states]
    share = (held_s[-1] - held_s[0]) / meter.window_s if held_s and None not in held_s else None
    lists = [state["throttle_reasons"] for state in meter.states if state["throttle_reasons"] is not None]
    seen = sorted({reason for reasons in lists for reason in reasons})
    if share is None and not lists:
        return _null(name, limit, REASONS["nvml_unavailable"])
    share_says = "" if share is None else f"power or heat held the clock down for {share:.1%} of the window"
    seen_says = f"seen at its ends: {', '.join(seen)}" if seen else "nothing seen at its ends"
    verdict = "flagged" if seen or (share or 0) > limit else "green"
    says = "; ".join(filter(None, (share_says, seen_says)))
    return Check(check=name, value=share, limit=limit, verdict=verdict, says=says)


def _other_processes(meter: Meter) -> Check:
    name, others = "other_processes", meter.foreign_processes
    if not meter.on_gpu:
        return _null(name, 0, REASONS["no_gpu"])
    if others is None:
        unknown = "whether others computed on the GPU is unknown: the list cannot be read, or hides this process"
        return Check(check=name, value=None, limit=0, verdict="flagged", says=unknown)
    return _bounded(name, others, 0, others == 0, "{value} other processes seen on the GPU")


def _idle(metrics: dict, reasons: dict) -> Check:
    idle_w, mean_w = metrics["idle_power_w"], metrics["mean_power_w"]
    if idle_w is None or mean_w is None:
        return _null("idle", 1, REASONS[reasons["net_energy_j"]])
    says = "{value:.1%} of the mean power is drawn by the idle gpu"
    return _bounded("idle", idle_w / mean_w, 1, idle_w < mean_w, says)
