"""The instruments on a stand-in for NVIDIA's library, the real Zeus and its processes between: true joules, and faults.

What runs stands in standin/scenes.py; every record that it makes is synthetic, and none of those reaches a table.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from make import make_record

from lib import paths, record
from lib.analysis import compare, paired
from lib.errors import UsageError
from lib.measure import energy, selfcheck

STANDIN = Path(__file__).resolve().parent / "standin"


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the scenes found; both scripts run at once, since one of them mostly waits."""
    folder, processes = tmp_path_factory.mktemp("standin"), []
    for script in ("replayed", "real"):
        found = [str(STANDIN), str(paths.ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        changes = {"PYTHONPATH": os.pathsep.join(found), "NVML_STANDIN": str(folder / f"{script}_scenario.json")}
        Path(changes["NVML_STANDIN"]).write_text('{"start": 0.0, "shape": "constant"}')
        command = [sys.executable, str(STANDIN / "scenes.py"), script, str(folder)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=os.environ | changes, **pipes))
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return json.loads((folder / "replayed.json").read_text()) | json.loads((folder / "real.json").read_text())


# Error by the window's length in seconds; the trace has no counter's steps to go by: its values are up to 100 ms old.
WORST = {
    "counter_j": {1: 0.02, 5: 0.004, 10: 0.002, 30: 0.001, 60: 0.001},
    "trace_j": {1: 0.30, 5: 0.08, 10: 0.02, 30: 0.01, 60: 0.01},
}


def test_counter_and_trace_are_near_the_true_joules(said):
    worst = {}
    for row in said["replay"]:
        for instrument in WORST:
            key = instrument, row["window_s"]
            worst[key] = max(worst.get(key, 0.0), abs(row[instrument] / row["true_j"] - 1))
    print(*(f"{s:>3} s {name:<10} {error:.2%}" for (name, s), error in sorted(worst.items())), sep="\n")
    assert len(said["replay"]) == 4 * 5 * 2 * 2
    assert all(error <= WORST[name][window_s] for (name, window_s), error in worst.items()), worst
    # What is promised: the edges of each of three windows to `EDGES_S`.
    assert all(worst["counter_j", window_s] <= 3 * energy.EDGES_S / window_s for window_s in (5, 10, 30, 60))


def test_twenty_windows_of_seven_seconds_are_within_a_thousandth(said):
    """Wherever between two steps of the counter they begin and end, and though it may show its joules late."""
    rows = [row for row in said["edges"] if row["window_s"] == 7 and row["aligned"]]
    assert {row["late_s"] for row in rows} == {0.0, 0.08} and len(rows) == 10
    for row in rows:
        assert abs(row["error"]) < 0.001 and row["reading"][1] is None, row
    late = [row["after_w"] for row in rows if row["late_s"]]
    assert max(first for pairs in late for first, _ in pairs) > 250  # what such a counter still owed of the work
    assert all(second == pytest.approx(120, rel=0.1) for pairs in late for _, second in pairs)


def test_without_waiting_for_the_counter_s_steps_they_are_not(said):
    errors = [row["error"] for row in said["edges"] if not row["aligned"]]
    assert all(-0.006 < error < -0.002 for error in errors), errors


def test_twenty_windows_of_six_tenths_of_a_second_are_too_short(said):
    rows = [row for row in said["edges"] if row["window_s"] == 0.6]
    assert len(rows) == 5 and all(row["reading"] == [None, "window_too_short"] for row in rows)


def test_the_limits_of_a_window_are_those_that_its_edges_ask_for():
    refused, flagged = (energy.EDGES_S / shortest for shortest in (energy.SHORTEST_WINDOW_S, selfcheck.SHORT_WINDOW_S))
    assert [refused, flagged] == pytest.approx([paired.EQUIVALENT_WITHIN / 2, paired.EQUIVALENT_WITHIN / 4])


def test_a_window_has_energy_from_two_seconds_on_and_every_log_point_its_part(said):
    for row in said["replay"]:
        joules, reason = row["reading"]
        at_marks = [point["energy_j"] for point in row["log"]]
        assert sum(row["power_w"]) * row["window_s"] / len(row["power_w"]) == pytest.approx(row["trace_j"], rel=1e-3)
        if row["window_s"] / row["parts"] < 2:
            assert (joules, reason) == (None, "window_too_short") and set(at_marks) == {None}
        elif reason is None:
            assert joules == pytest.approx(row["counter_j"])
            assert at_marks == sorted(at_marks) and at_marks[-1] == pytest.approx(joules)
        assert [point["time_s"] for point in row["log"]][-1] == pytest.approx(row["window_s"])


@pytest.mark.parametrize(
    ("fault", "reason"),
    {
        "reset": "counter_reset",  # in the second of three windows: the sum is positive
        "reset and counted on": "counter_power_disagree",  # the window's own difference is positive too
        "stuck": "counter_zero",
        "stuck later": "counter_zero",
        "stuck in a window": "counter_zero",
        "unsupported": "counter_unsupported",
        "too old": "counter_unsupported",
        "lost before": "gpu_lost",
        "lost in the window": "gpu_lost",
        "lost altogether": "gpu_lost",
        "no driver": "nvml_unavailable",
        "mig": "mig",
        "mig by variable": "mig",
        "mig by name": "mig",
        "permission": "permission",
        "foreign": "foreign_process",
        "foreign for a while": "foreign_process",
        "short": "window_too_short",
        "counter times 1.15": "counter_power_disagree",
    }.items(),
)
def test_every_fault_gives_its_reason_and_no_joules(said, fault, reason):
    found = said["faults"][fault]
    assert (found["energy_j"], found["reason"], found["net_j"], found["net_reason"]) == (None, reason, None, reason)
    assert set(found["log"]) == {None} and reason in record.REASONS
    assert found["checks"]["counter_against_power"] == ("green" if "foreign" in fault else "null")


@pytest.mark.parametrize(
    ("what", "flags"),
    {
        "nothing": [],
        "uuid": [],  # CUDA_VISIBLE_DEVICES names the GPU by its UUID
        "uuids": [],
        "other numbers": [],
        "crashed before": [],  # a cell failed and left its window open
        "flagged length": ["window_length"],
        "hidden processes": ["other_processes"],
        "no trace": ["counter_against_power"],
        "counter times 1.04": [],
        "counter times 0.93": ["counter_against_power"],
        "clock jumps": ["counter_against_power"],
        "throttled": ["throttling"],
        "capped": ["clock_under_load", "throttling"],  # and its states before and after look as if nothing was
        "slower and hotter": ["clock_drift", "temperature_drift"],
    }.items(),
)
def test_what_is_doubtful_keeps_its_joules_and_is_flagged(said, what, flags):
    found = said["faults"][what]
    scale = float(what.rpartition(" ")[2]) if "times" in what else 1.0
    assert found["energy_j"] == pytest.approx(300.0 * 60 * scale, rel=1e-3)
    of_the_gpu = {check: verdict for check, verdict in found["checks"].items() if check != "busy_neighbour"}
    assert [check for check, verdict in of_the_gpu.items() if verdict == "flagged"] == flags


def test_what_drags_a_working_gpu_down_is_seen_though_an_idle_one_shows_nothing(said):
    found = said["faults"]["capped"]
    assert {state["sm_clock_mhz"] for state in found["states"]} == {1980}
    assert not any(state["throttle_reasons"] for state in found["states"])
    assert found["summary"]["sm_clock_mhz_median"] == 1400
    assert found["summary"]["throttled_share"] == 1 and found["summary"]["throttled_by"] == {"power cap": 1}
    assert len(found["series"]) == found["summary"]["samples"] == 120
    assert all(0 < sample["time_s"] <= 60 for sample in found["series"])


def test_utilization_is_that_of_the_window(said):
    assert said["faults"]["busy between"]["utilization"] == pytest.approx(50)


def test_idle_power_is_read_when_it_has_settled_and_has_gates_of_its_own(said):
    found = said["faults"]
    assert found["nothing"]["idle_w"] == pytest.approx(80.0, rel=1e-3) and found["nothing"]["idle"]["settled"]
    assert found["nothing"]["net_j"] == pytest.approx(60 * (300.0 - 80.0), rel=1e-3)
    assert not found["still cooling"]["idle"]["settled"] and found["still cooling"]["idle"]["settling_s"] >= 20
    assert found["still cooling"]["idle_w"] < 150  # of the 230 W that it drew when the run had just ended
    for what, reason in (("uuid", "not_asked_for"), ("short idle", "window_too_short"), ("busy idle", "not_idle")):
        assert found[what]["energy_j"] == pytest.approx(18000.0, rel=1e-3)
        assert (found[what]["idle_w"], found[what]["idle_reason"], found[what]["net_j"]) == (None, reason, None)
    assert found["mig"]["idle_reason"] == "mig" and found["lost altogether"]["idle_reason"] == "gpu_lost"


def test_a_real_run_under_zeus_and_its_process_is_true_and_synthetic(said):
    live = said["live"]
    result = record.load(Path(live["record"]))
    assert result.provenance == "synthetic"
    print(f"true {live['true_j']} J, counter {result.series.epoch_energy_j} J, trace {live['trace_j']:.1f} J in all")
    assert result.series.epoch_energy_j == pytest.approx(live["true_j"], rel=0.05)
    assert sum(result.series.epoch_energy_j) == pytest.approx(result.metrics.energy_j)
    assert live["trace_j"] == pytest.approx(sum(live["true_j"]), rel=0.05)
    assert result.series.log[-1].step == 12
    assert 0.8 < result.series.log[-1].energy_j / result.metrics.energy_j < 1  # the window ends half a second later
    assert 30 < len(result.series.power_w) == len(result.series.power_time_s) <= 600
    verdicts = {check.check: check.verdict for check in result.checks}
    assert verdicts["counter_against_power"] == "green" and verdicts["idle"] == "null"
    assert "window_length" in result.flags and len(result.gpu_states) == 3
    assert len(result.series.gpu) == result.gpu_summary.samples >= 10  # four a second, by a process of its own
    assert result.gpu_summary.sm_clock_mhz_median == 1980 and result.metrics.gpu_utilization_percent == 97
    assert result.warm_up.steady and result.warm_up.steps >= 3


def test_a_run_outlives_its_gpu_s_instruments(said):
    lost = said["lost"]
    result = record.load(Path(lost["record"]))
    assert not lost["trace"]
    assert result.metrics.energy_j is None and result.null_reasons["energy_j"] == "gpu_lost"
    assert len(result.series.train_loss) == 8 and None not in result.series.train_loss
    assert result.series.epoch_energy_j == [] and result.series.power_w == []


def test_turns_of_training_steps_have_true_joules_and_the_gpu_s_clock(said):
    found = said["stepped"]
    turns = [turn for one in found["rounds"] for turn in one["turns"]]
    assert found["provenance"] == "synthetic" and [one["warm"] for one in found["rounds"]] == [True, True]
    assert sorted(turn["label"] for turn in turns) == ["linear", "linear", "sdpa", "sdpa"]
    for turn in turns:
        assert turn["energy_j"] == pytest.approx(300.0 * turn["time_s"], abs=300 * 2 * energy.EDGES_S)
        assert turn["after_w"] == pytest.approx([300.0, 300.0], rel=0.5) and turn["other_processes"] == 0
    seen = [turn["gpu"] for turn in turns if turn["gpu"]]  # four times a second: not in every so short window
    assert seen and {gpu["sm_clock_mhz_median"] for gpu in seen} == {1980}


def test_no_synthetic_record_reaches_a_table(said, tmp_path):
    synthetic = record.load(Path(said["live"]["record"]))
    record.write(synthetic, tmp_path)
    with pytest.raises(UsageError, match="no record"):
        compare.groups(record.read(tmp_path))
    record.write(make_record("sdpa"), tmp_path)
    (group,) = compare.groups(record.read(tmp_path))
    assert list(group.runs["provenance"]) == ["measured"]
