"""A record is whole and true to its schema, or it is not there."""

import json
import os
import shutil
import tempfile
import warnings
from datetime import timedelta

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make import CERTIFICATE, METRICS, fill, make_record, parameters_of, write_blocks
from pydantic import ValidationError

from lib import paths, record
from lib.errors import UsageError


def test_what_is_written_is_what_is_read(tmp_path):
    made = make_record()
    path = record.write(made, tmp_path)
    assert record.load(path).model_copy(update={"content_sha256": ""}) == made
    assert os.listdir(tmp_path) == [f"{made.name}.json"]


def test_a_table_row_per_run_with_units_in_the_columns(tmp_path):
    write_blocks(tmp_path, blocks=2)
    table = record.read(tmp_path)
    assert len(table) == 6
    assert set(METRICS) <= set(table.columns)
    assert table["energy_j"].eq(4e3).all() and table["cpu_energy_j"].isna().all()


def test_every_column_of_the_table_is_its_own_field_of_the_record(tmp_path):
    """A run of which no two facts are alike: seed 7 in block 3 at place 2, causal and yet not certified."""
    values = parameters_of("gqa", 7)
    environment = {"device": "cuda", "device_name": "a GPU", "gpu": {"uuid": "GPU-9"}}
    checks = [{"check": name, "value": 1.0, "limit": 2.0, "says": "s"} for name in ("one", "two")]
    checks = [check | {"verdict": verdict} for check, verdict in zip(checks, ("green", "flagged"), strict=True)]
    begun = record.now() - timedelta(seconds=90)
    made = make_record(
        run_parameters=values,
        study={"session": "s", "block": 3, "position": 2, "profile": "a profile", "variants": ["gqa", "sdpa"]},
        title="GQA 4:1", attention_sha256="a" * 64, started_at=begun, provenance="synthetic", environment=environment,
        certificate=CERTIFICATE | {"passed": False}, checks=checks, flags=["two"], data={"token_sha256": "b" * 64},
    )  # fmt: skip
    record.write(made, tmp_path)
    record.write_failure(failure("another"), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the note of a failed run is no damaged record
        (row,) = record.read(tmp_path).to_dict("records")
    expected = {
        "name": made.name, "label": "gqa", "title": "GQA 4:1", "attention": "gqa", "attention_sha256": "a" * 64,
        "started_at": begun, "finished_at": made.finished_at, "seed": 7, "setting": made.setting,
        "token_sha256": "b" * 64, "profile": "a profile", "session": "s", "block": 3, "position": 2,
        "planned": ["gqa", "sdpa"], "device": "cuda",
        "device_name": "a GPU", "gpu_uuid": "GPU-9", "provenance": "synthetic", "certified": False,
        "parameter_values": values, "data": {"token_sha256": "b" * 64}, "flags": ["two"],
        "kernels": {"forward": ["k"], "backward": ["k"]}, "null_reasons": made.null_reasons,
        "certificate": made.certificate.model_dump(),
    }  # fmt: skip
    expected |= {f"series_{name}": value for name, value in made.series.model_dump().items()}
    of_metrics = {name: None if pd.isna(row[name]) else row[name] for name in METRICS}
    assert of_metrics == made.metrics.model_dump() and expected["certificate"]["causal"]
    assert {name: value for name, value in row.items() if name not in METRICS} == expected


def test_a_label_of_one_s_own_and_runs_by_hand_are_read_as_they_are(tmp_path):
    record.write(make_record("mine", session=None), tmp_path)
    (row,) = record.read(tmp_path).to_dict("records")
    assert (row["label"], row["attention"], row["session"], row["block"]) == ("mine", "mine.py", None, None)


@pytest.mark.parametrize(
    "name", [name for name, value in METRICS.items() if value is not None and name != "parameters"]
)
def test_a_null_without_a_reason_is_refused(name):
    never_null = name.startswith("time_") or name == "non_padding_tokens_per_s"
    reasons = {"cpu_energy_j": "rapl_unavailable", "peak_resident_bytes": "gpu_run"}
    with pytest.raises(ValidationError, match="valid number" if never_null else "null exactly where"):
        make_record(**{name: None}, null_reasons=reasons)


def test_a_metric_that_came_later_is_missing_from_older_records_with_that_reason(tmp_path, monkeypatch):
    """Whoever adds a metric loses none of the committed records."""

    class Later(record.Metrics):
        extra_s: float | None = None

    class LaterRecord(record.Record):
        metrics: Later

    older = record.write(make_record(), tmp_path)
    as_it_was = older.read_bytes()
    monkeypatch.setattr("lib.record.files.Record", LaterRecord)
    (run,) = record.read(tmp_path).to_dict("records")
    assert run["extra_s"] is None and run["null_reasons"]["extra_s"] == "older_record"
    assert older.read_bytes() == as_it_was
    content = json.loads(as_it_was)
    with pytest.raises(ValidationError, match="null exactly where"):  # one that a run should have measured
        LaterRecord.model_validate(content | {"metrics": content["metrics"] | {"extra_s": None}})


SERIES = make_record().series.model_dump()


@pytest.mark.parametrize(
    "change",
    [
        {"null_reasons": {"cpu_energy_j": "because", "peak_resident_bytes": "gpu_run"}},
        {"null_reasons": {name: "no_gpu" for name in ("cpu_energy_j", "peak_resident_bytes", "energy_j")}},
        {"study": {"session": "s", "block": 0}},
        {"kernels": {"forward": None, "backward": ["k"]}},
        {"kernels_null_reason": "empty_profile"},
        {"started_at": record.now() + timedelta(days=1)},
        {"name": "gqa-seed0-00000000"},
        {"series": SERIES | {"epoch_time_s": [10.0] * 3}},
        {"series": SERIES | {name: SERIES[name] + SERIES[name][-1:] for name in ("train_loss", "non_padding_tokens")}},
        {"series": SERIES | {"non_padding_tokens": [64, 256, 192, 256]}},
        {"series": SERIES | {"epoch_energy_j": [1.0]}},
        {"energy_j": float("nan")},
        {"energy_j": float("inf")},
        {"time_s": 0.0},
        {"schema_version": 1},
        {"unknown_field": 1},
        {"provenance": "guessed"},
        {"flags": ["launch_bound"]},
        {"checks": [{"check": "launch_bound", "value": 0.5, "limit": 0.95, "verdict": "flagged", "says": "so"}]},
        {"checks": [{"check": "launch_bound", "value": 0.5, "limit": 0.95, "verdict": "perhaps", "says": "so"}]},
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
    (folder / "incomplete.json").write_bytes(whole[: cut % (len(whole) - 2)] + noise.replace(b"}", b""))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        table = record.read(folder)
    assert list(table["name"]) == [path.stem]
    assert len(said) == 1 and "incomplete.json is left out" in str(said[0].message)


CHANGES = {
    "cut short": lambda text: text[: len(text) // 2],
    "a newer schema": lambda text: text.replace('"schema_version": 2', '"schema_version": 99'),
    "a number changed by hand": lambda text: text.replace('"energy_j": 4000.0', '"energy_j": 3000.0'),
    "a field too many": lambda text: text.replace("{", '{"note": "mine",', 1),
    "JSON of another kind": lambda _: '{"name": "package", "version": "1.0"}',
    "a list": lambda _: "[1, 2]",
    "nested too deeply": lambda _: "[" * 100_000,
    "another encoding": lambda text: text.encode("utf-16"),
    "empty": lambda _: "",
}
SAID = {
    "a newer schema": "its schema_version is 99, this code reads 2",
    "a number changed by hand": "it was changed after it was written",
    "JSON of another kind": "it is JSON of another kind",
    "nested too deeply": "it is nested too deeply",
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_bad_record_among_good_ones_is_named_and_left_out(what, tmp_path):
    good, bad = record.write(make_record("sdpa"), tmp_path), record.write(make_record("gqa"), tmp_path)
    changed = CHANGES[what](bad.read_text())
    bad.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    with pytest.warns(UserWarning, match=f"{bad.name} is left out: {SAID.get(what, '')}"):
        table = record.read(tmp_path)
    assert list(table["name"]) == [good.stem]


def test_a_copy_of_a_record_does_not_count_twice(tmp_path):
    path = record.write(make_record(), tmp_path)
    (tmp_path / f"{path.stem} (copy).json").write_bytes(path.read_bytes())
    with pytest.warns(UserWarning, match="is a copy, or renamed"):
        assert len(record.read(tmp_path)) == 1


def failure(name):
    return record.Failure(
        name=name, label="gqa", setting="0" * 8, study={"block": 2}, finished_at=record.now(),
        reason="out_of_memory", says="asked for too much",
    )  # fmt: skip


def test_a_failed_run_is_noted_apart_and_its_record_ends_the_note(tmp_path):
    made = make_record("gqa")
    record.write_failure(failure(made.name), tmp_path)
    assert record.read(tmp_path).empty
    (noted,) = record.failures(tmp_path).to_dict("records")
    assert noted == {"variant": "gqa", "block": 2, "why": "out of memory", "it said": "asked for too much"}
    record.write(made, tmp_path)
    assert record.failures(tmp_path).empty and len(record.read(tmp_path)) == 1


def test_a_full_disk_loses_no_record(small_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    fill(small_disk)
    made = make_record()
    with pytest.raises(UsageError, match="cannot be written to disk/: No space left on device; it lies in ") as said:
        record.write(made, small_disk)
    assert os.listdir(small_disk) == ["filler"]
    (kept,) = (tmp_path / "elsewhere").rglob("*.json")
    assert str(kept) in str(said.value) and "\n" not in str(said.value)
    (small_disk / "filler").unlink()
    shutil.move(kept, small_disk)
    assert list(record.read(small_disk)["name"]) == [made.name]


def test_where_no_disk_has_room_the_way_out_is_to_make_some(small_disk, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    fill(small_disk)
    with pytest.raises(UsageError, match="No space left on device; make room there and run the cell again"):
        record.write(make_record(), small_disk)


def test_an_old_record_survives_a_failed_write_of_its_successor(tmp_path, monkeypatch):
    path = record.write(make_record(), tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O error")))
    with pytest.raises(UsageError):
        record.write(make_record(time_s=99.0), tmp_path)
    assert path.read_bytes() == before


def test_the_committed_records_are_valid_measured_and_name_no_machine_path():
    others = ("scaling-", "steps-", "capability-")  # of other kinds: test_scaling, _benchmark, _answer
    folders = [path for path in (paths.ROOT / "records").iterdir() if not path.name.startswith(others)]
    files = sorted(path for folder in folders for path in folder.rglob("*.json"))
    assert files
    for path in files:
        found = record.load(path)
        assert found.name == path.stem and found.provenance == "measured"
        assert str(paths.ROOT) not in path.read_text() and '"/' not in json.dumps(found.parameters)


def test_the_committed_runs_of_one_function_agree_step_by_step():
    """baseline, sdpa and flash compute the same: to rounding, until rounding itself has grown."""
    runs = record.read(paths.ROOT / "records" / "quick-cpu")
    runs = runs[runs["label"].isin(["baseline", "sdpa", "flash", "sdpa_again"]) & (runs["seed"] == 0)]
    losses = runs.set_index("label")["series_train_loss"]
    assert len(losses) == 4
    for label, series in losses.items():
        assert series[:20] == pytest.approx(losses["baseline"][:20], abs=1e-4), label


def test_a_run_that_is_made_again_replaces_no_record_in_silence(tmp_path, capsys):
    """As by Run All, or papermill, a second time; written again as it is, nothing is said."""
    first, second, third = (make_record(time_s=time_s) for time_s in (10.0, 20.0, 30.0))
    path = record.write(first, tmp_path)
    was = path.read_bytes()
    record.write(first, tmp_path)
    assert not capsys.readouterr().out and not (tmp_path / record.INCOMPLETE).exists()
    record.write(second, tmp_path)
    said = capsys.readouterr().out
    assert said == f"an earlier record of this run is kept in incomplete/{first.name}-earlier-1/\n"
    record.write(third, tmp_path)
    kept = sorted((tmp_path / record.INCOMPLETE).rglob("*.json"))
    assert [record.load(one).metrics.time_s for one in kept] == [10.0, 20.0] and kept[0].read_bytes() == was
    assert [one.metrics.time_s for one in record.load_all(tmp_path)] == [30.0]
