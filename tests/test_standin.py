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
from lib.analysis import compare
from lib.errors import UsageError

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


STEP_S, PEAK_W = 0.1, 700.0  # of the counter and of the trace; no shape is above
WORST = {1: 0.30, 5: 0.03, 10: 0.02, 30: 0.01, 60: 0.01}  # error by the window's length in seconds


def test_counter_and_trace_are_within_their_steps_of_the_true_joules(said):
    worst = {}
    for row in said["replay"]:
        for instrument in ("counter_j", "trace_j"):
            error_j = row[instrument] - row["true_j"]
            assert abs(error_j) <= row["parts"] * STEP_S * PEAK_W or row["window_s"] > 10, row
            key = row["window_s"], instrument
            worst[key] = max(worst.get(key, 0.0), abs(error_j) / row["true_j"])
    print(*(f"{s:>3} s {name:<10} {error:.2%}" for (s, name), error in sorted(worst.items())), sep="\n")
    assert len(said["replay"]) == 4 * 5 * 2 * 2
    assert all(error <= WORST[window_s] for (window_s, _), error in worst.items()), worst


def test_a_window_has_energy_from_ten_seconds_on_and_every_log_point_its_part(said):
    for row in said["replay"]:
        joules, reason = row["reading"]
        at_marks = [point["energy_j"] for point in row["log"]]
        assert sum(row["power_w"]) * row["window_s"] / len(row["power_w"]) == pytest.approx(row["trace_j"], rel=1e-3)
        if row["window_s"] < 10:
            assert (joules, reason) == (None, "window_too_short") and set(at_marks) == {None}
        else:
            assert reason is None and joules == pytest.approx(row["counter_j"])
            assert at_marks == sorted(at_marks) and at_marks[-1] == pytest.approx(joules)
        assert [point["time_s"] for point in row["log"]][-1] == pytest.approx(row["window_s"])


@pytest.mark.parametrize(
    ("fault", "reason"),
    {
        "reset": "counter_reset",  # in the second of three windows: the sum is positive
        "reset and counted on": "counter_power_disagree",  # the window's own difference is positive too
        "stuck": "counter_zero",
        "stuck later": "counter_zero",
        "stuck in a window": "counter_power_disagree",
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
        "slower and hotter": ["clock_drift", "temperature_drift"],
    }.items(),
)
def test_what_is_doubtful_keeps_its_joules_and_is_flagged(said, what, flags):
    found = said["faults"][what]
    scale = float(what.rpartition(" ")[2]) if "times" in what else 1.0
    assert found["energy_j"] == pytest.approx(300.0 * (11 if what == "flagged length" else 60) * scale)
    assert [check for check, verdict in found["checks"].items() if verdict == "flagged"] == flags


def test_idle_power_has_gates_of_its_own(said):
    found = said["faults"]
    assert (found["nothing"]["idle_w"], found["nothing"]["net_j"]) == pytest.approx((80.0, 60 * (300.0 - 80.0)))
    for what, reason in (("uuid", "not_asked_for"), ("short idle", "window_too_short"), ("busy idle", "not_idle")):
        assert found[what]["energy_j"] == pytest.approx(18000.0)
        assert (found[what]["idle_w"], found[what]["idle_reason"], found[what]["net_j"]) == (None, reason, None)
    assert found["lost altogether"]["idle_w"] == pytest.approx(300.0)  # measured before the GPU was lost
    assert found["mig"]["idle_reason"] == "mig"


def test_a_real_run_under_zeus_and_its_process_is_true_and_synthetic(said):
    live = said["live"]
    result = record.load(Path(live["record"]))
    assert result.provenance == "synthetic"
    print(f"true {live['true_j']} J, counter {result.series.epoch_energy_j} J, trace {live['trace_j']:.1f} J in all")
    assert result.series.epoch_energy_j == pytest.approx(live["true_j"], rel=0.05)
    assert sum(result.series.epoch_energy_j) == pytest.approx(result.metrics.energy_j)
    assert live["trace_j"] == pytest.approx(sum(live["true_j"]), rel=0.05)
    assert result.series.log[-1].step == 22
    assert 0.8 < result.series.log[-1].energy_j / result.metrics.energy_j < 1  # the window ends half a second later
    assert 50 < len(result.series.power_w) == len(result.series.power_time_s) <= 600
    verdicts = {check.check: check.verdict for check in result.checks}
    assert verdicts["counter_against_power"] == "green" and verdicts["idle"] == "null"
    assert "window_length" in result.flags and len(result.gpu_states) == 3


def test_a_run_outlives_its_gpu_s_instruments(said):
    lost = said["lost"]
    result = record.load(Path(lost["record"]))
    assert not lost["trace"]
    assert result.metrics.energy_j is None and result.null_reasons["energy_j"] == "gpu_lost"
    assert len(result.series.train_loss) == 8 and None not in result.series.train_loss
    assert result.series.epoch_energy_j == [] and result.series.power_w == []


def test_no_synthetic_record_reaches_a_table(said, tmp_path):
    synthetic = record.load(Path(said["live"]["record"]))
    record.write(synthetic, tmp_path)
    with pytest.raises(UsageError, match="no record"):
        compare.groups(record.read(tmp_path))
    record.write(make_record("sdpa"), tmp_path)
    (group,) = compare.groups(record.read(tmp_path))
    assert list(group.runs["provenance"]) == ["measured"]
