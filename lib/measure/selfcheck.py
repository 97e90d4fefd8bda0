"""What a reviewer would ask of a run, answered from its own measurements: green, flagged, or null with the reason."""

import statistics

from lib.measure.energy import EDGES_S
from lib.measure.meter import CLOCK_JUMP_S, FLAGGED_DISAGREEMENT, Meter
from lib.measure.sampler import summary
from lib.record import REASONS
from lib.record.schema import Check

# Every limit and its reason; the last four shares are judgements. That of the counter against the power trace, 5 %, is
# what NVML's documentation says that its reading of power is good for.
SHORT_WINDOW_S = 4.0  # the edges of such a window are known to 0.5 % of its joules, a quarter of the 2 % of equivalence
BUSY_SHARE = 0.95  # where the GPU waits longer, 5 % of the time and more are Python's and would hide in any ratio
CLOCK_DRIFT = 0.05  # time follows the clock: as much drift as the GPU may wait
CLOCK_LOSS = 0.05  # below the highest clock seen, idle or not: the same share of speed
TEMPERATURE_DRIFT_C = 10.0  # leakage grows by about a percent of a GPU's power over so many degrees
THROTTLED_SHARE = 0.01  # of the samples: one in a hundred is an accident, more is how the run was
WAITED_SHARE = 0.1  # a tenth of a window lost to a neighbour is more than most variants differ by
PADDING_SHARE = 0.5  # more padding than text was computed
HIGHEST_MFU = 1.0  # above the peak something is counted wrongly
HIGHEST_IDLE = 1.0  # of the mean power: a GPU that draws more idle was not idle


def checks(meter: Meter, metrics: dict, reasons: dict, padding_share: float, warmed: dict | None = None) -> list[Check]:
    """The checks of a finished run; `metrics` and `reasons` are those of its record, `warmed` its trainer's."""
    busy, mfu = metrics["gpu_busy_fraction"], metrics["mfu"]
    return [
        _counter_against_power(meter),
        _window_length(meter),
        _bounded(
            "launch_bound", busy, BUSY_SHARE, busy is not None and busy >= BUSY_SHARE,
            "the GPU computes {value:.1%} of a step's time", reasons.get("gpu_busy_fraction"),
        ),
        _warm(meter, warmed),
        *_sampled(meter),
        _other_processes(meter),
        _busy_neighbour(meter),
        _bounded(
            "padding", padding_share, PADDING_SHARE, padding_share <= PADDING_SHARE,
            "{value:.1%} of the positions that were trained on are padding",
        ),
        _bounded(
            "mfu", mfu, HIGHEST_MFU, mfu is not None and mfu <= HIGHEST_MFU, "{value:.1%} of the device's peak",
            reasons.get("mfu"),
        ),
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
    counted, difference = meter.gpu_counter.reading(meter.shortest_s), meter.disagreement
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
    name, counted = "window_length", meter.gpu_counter.reading(meter.shortest_s)
    if counted.joules is None:
        return _null(name, SHORT_WINDOW_S, REASONS[counted.reason])
    says = f"the shortest window took {{value:.1f}} s: its joules are known to {EDGES_S / meter.shortest_s:.1%}"
    return _bounded(name, meter.shortest_s, SHORT_WINDOW_S, meter.shortest_s >= SHORT_WINDOW_S, says)


def _warm(meter: Meter, warmed: dict | None) -> Check:
    name, steady = "warm_up", None if warmed is None else warmed["steady"]
    if steady is None:
        return _null(name, None, REASONS["nvml_unavailable" if meter.on_gpu else "no_gpu"])
    says = "heat and clock had come to rest" if steady else "heat or clock were still moving"
    says += f" after {warmed['seconds']:.0f} s of warm-up"
    return Check(check=name, value=None, limit=None, verdict="green" if steady else "flagged", says=says)


def _sampled(meter: Meter) -> list[Check]:
    """What the samples inside the windows say of clock and heat."""
    samples = [one for _, one in meter.inside]
    found = summary(samples) or {}
    unknown = "no_gpu" if not meter.on_gpu else "nvml_unavailable" if samples else "no_sample"
    clocks = [one.sm_clock_mhz for one in samples if one.sm_clock_mhz]
    drift = loss = None
    if clocks:
        part = max(1, len(clocks) // 4)
        drift = statistics.median(clocks[-part:]) / statistics.median(clocks[:part]) - 1
        highest = max([*clocks, *(state["sm_clock_mhz"] or 0 for state in meter.states)])
        loss = 1 - statistics.median(clocks) / highest
    ends = found.get("temperature_c_begin"), found.get("temperature_c_end")
    rise = None if None in ends else ends[1] - ends[0]
    share, by = found.get("throttled_share"), found.get("throttled_by", {})
    named = f" ({', '.join(f'{reason} {part:.1%}' for reason, part in by.items())})" if by else ""
    return [
        _bounded(
            "clock_drift", drift, CLOCK_DRIFT, drift is not None and abs(drift) <= CLOCK_DRIFT,
            "the clock changed by {value:+.1%} from the window's first quarter to its last", unknown,
        ),
        _bounded(
            "clock_under_load", loss, CLOCK_LOSS, loss is not None and loss <= CLOCK_LOSS,
            "the clock under load was {value:.1%} below the highest seen", unknown,
        ),
        _bounded(
            "temperature_drift", rise, TEMPERATURE_DRIFT_C, rise is not None and abs(rise) <= TEMPERATURE_DRIFT_C,
            "the temperature changed by {value:+.0f} °C from the window's begin to its end", unknown,
        ),
        _bounded(
            "throttling", share, THROTTLED_SHARE, share is not None and share <= THROTTLED_SHARE,
            "the clock was throttled in {value:.1%} of the samples" + named, unknown,
        ),
    ]  # fmt: skip


def _other_processes(meter: Meter) -> Check:
    name, others = "other_processes", meter.foreign_processes
    if not meter.on_gpu:
        return _null(name, 0, REASONS["no_gpu"])
    if others is None:
        unknown = "whether others computed on the GPU is unknown: the list cannot be read, or hides this process"
        return Check(check=name, value=None, limit=0, verdict="flagged", says=unknown)
    return _bounded(name, others, 0, others == 0, "{value} other processes seen on the GPU")


def _busy_neighbour(meter: Meter) -> Check:
    """Whether other processes had the cores that this one wanted: seconds of the wall then say little of it."""
    name, share = "busy_neighbour", meter.waited_share
    if share is None:
        return _null(name, WAITED_SHARE, REASONS["not_counted_here"])
    says = "for {value:.1%} of the time that it could have computed other processes had its cores"
    return _bounded(name, share, WAITED_SHARE, share <= WAITED_SHARE, says)


def _idle(metrics: dict, reasons: dict) -> Check:
    idle_w, mean_w = metrics["idle_power_w"], metrics["mean_power_w"]
    if idle_w is None or mean_w is None:
        return _null("idle", HIGHEST_IDLE, REASONS[reasons["net_energy_j"]])
    says = "{value:.1%} of the mean power is drawn by the idle GPU"
    return _bounded("idle", idle_w / mean_w, HIGHEST_IDLE, idle_w < mean_w, says)
