"""A record is whole and true to its schema, or it is not there."""

import json
import os
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make import METRICS, make_record, write_blocks
from pydantic import ValidationError

from lib import record
from lib.errors import UsageError


def test_what_is_written_is_what_is_read(tmp_path):
    made = make_record()
    path = record.write(made, tmp_path)
    assert record.load(path) == made
    assert os.listdir(tmp_path) == [f"{made.name}.json"]


def test_a_table_row_per_run_with_units_in_the_columns(tmp_path):
    write_blocks(tmp_path, blocks=2)
    table = record.read(tmp_path)
    assert len(table) == 6
    assert set(METRICS) <= set(table.columns)
    assert table["energy_j"].eq(4e3).all() and table["cpu_energy_j"].isna().all()


@pytest.mark.parametrize(
    "name", [name for name, value in METRICS.items() if value is not None and name != "parameters"]
)
def test_a_null_without_a_reason_is_refused(name):
    never_null = name.startswith("time_") or name == "useful_tokens_per_s"
    reasons = {"cpu_energy_j": "rapl_unavailable", "peak_resident_bytes": "gpu_run"}
    with pytest.raises(ValidationError, match="valid number" if never_null else "null exactly where"):
        make_record(**{name: None}, null_reasons=reasons)


@pytest.mark.parametrize(
    "change",
    [
        {"null_reasons": {"cpu_energy_j": "because", "peak_resident_bytes": "gpu_run"}},
        {"energy_j": float("nan")},
        {"energy_j": float("inf")},
        {"time_s": 0.0},
        {"schema_version": 2},
        {"unknown_field": 1},
        {"provenance": "guessed"},
        {"flags": ["host_bound"]},
        {"checks": [{"check": "host_bound", "value": 0.5, "limit": 0.95, "verdict": "flagged", "says": "so"}]},
        {"checks": [{"check": "host_bound", "value": 0.5, "limit": 0.95, "verdict": "perhaps", "says": "so"}]},
    ],
)
def test_what_the_schema_does_not_know_is_refused(change):
    with pytest.raises(ValidationError):
        make_record(**change)


@given(cut=st.integers(0, 4000), noise=st.binary(max_size=8))
@settings(max_examples=40, deadline=None)
def test_a_file_that_is_no_record_is_named_and_left_out(tmp_path_factory, cut, noise):
    folder = tmp_path_factory.mktemp("records")
    path = record.write(make_record(), folder)
    whole = path.read_bytes()
    (folder / "torn.json").write_bytes(whole[: cut % (len(whole) - 2)] + noise.replace(b"}", b""))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        table = record.read(folder)
    assert list(table["name"]) == [path.stem]
    assert len(said) == 1 and "torn.json is left out" in str(said[0].message)


def test_a_disk_that_cannot_be_written_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"cannot be written to .*: No space left on device"):
        record.write(make_record(), tmp_path)
    assert os.listdir(tmp_path) == []


def test_an_old_record_survives_a_failed_write_of_its_successor(tmp_path, monkeypatch):
    path = record.write(make_record(), tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O error")))
    with pytest.raises(UsageError):
        record.write(make_record(time_s=99.0), tmp_path)
    assert path.read_bytes() == before


def test_the_committed_records_are_valid_measured_and_name_no_machine_path():
    files = sorted((record.ROOT / "records").rglob("*.json"))
    assert files
    for path in files:
        found = record.load(path)
        assert found.name == path.stem and found.provenance == "measured"
        assert str(record.ROOT) not in path.read_text() and '"/' not in json.dumps(found.parameters)


def test_the_committed_runs_of_one_function_agree_step_by_step():
    """baseline, sdpa and flash compute the same: to rounding, until rounding itself has grown."""
    runs = record.read(record.ROOT / "records" / "quick-cpu")
    runs = runs[runs["label"].isin(["baseline", "sdpa", "flash", "sdpa_again"]) & (runs["seed"] == 0)]
    losses = runs.set_index("label")["series_train_loss"]
    assert len(losses) == 4
    for label, series in losses.items():
        assert series[:20] == pytest.approx(losses["baseline"][:20], abs=1e-4), label
