"""The table to take away: each number of each kind of record is found in it, and nothing is dropped in silence."""

import contextlib
import csv
import errno
import gzip
import hashlib
import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import datasets
import make
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from lib import record
from lib.model import devices
from lib.paths import ROOT
from lib.record import benchmark, kinds, probe, scaling, schema, steps
from lib.site import data, dictionary

MOMENT = "2026-11-25T10:00:00Z"
CPU = {"device": "cpu", "device_name": "a CPU", "torch_threads": 2, "packages": {"torch": "2.13.0"}, "commit": "abc"}
GPU = {"device": "cuda", "device_name": "a | GPU", "gpu": {"uuid": "GPU-1"}, "torch_threads": 16, "packages": {}}
SHA = {"attention_sha256": "a" * 64}
WHO = {"label": "sdpa", "title": "SDPA", "attention": "sdpa", "options": {}, **SHA}
PHASE = {"phase": "forward", "derived": False, "time_s_per_step": 0.25, "minimum_time_s_per_step": 0.2}
SLOPE = {
    "layers_with_attention": [0, 2], "time_s_per_step": [1.0, 2.0], "time_s_per_core": 0.5, "time_s_per_core_low": 0.4,
    "time_s_per_core_high": 0.6, "time_r_squared": 0.9, "energy_j_per_step": None, "energy_j_per_core": None,
    "energy_j_per_core_low": None, "energy_j_per_core_high": None, "energy_r_squared": None,
    "energy_null_reason": "window_too_short",
}  # fmt: skip


def a_run(**changes):
    series = make.make_record().series.model_dump()
    series |= {"phases": [PHASE | {"energy_j_per_step": 3.0, "energy_null_reason": None}], "slope": SLOPE}
    parts = {
        "finished_at": MOMENT,
        "series": series,
        "time_s": 20.5,
        "environment": GPU | {"packages": {"torch": "2.11"}},
    }
    return make.make_record(**parts | changes)


def flagged():
    check = {"check": "launch_bound", "value": 1.0, "limit": 0.5, "verdict": "flagged", "says": "it waits"}
    noisy = check | {"check": "busy_neighbour"}
    return a_run(label="linear", certified=False, checks=[check, noisy], flags=["launch_bound", "busy_neighbour"])


def a_failure():
    return record.Failure(
        name="lsh-seed0", label="lsh", setting="0" * 8, finished_at=MOMENT, reason="out_of_memory",
        says='="it", needs 9 GB', study={"profile": "quick", "session": "s", "block": 3, "position": 1},
    )  # fmt: skip


def a_probe(name="cell", **changes):
    mixers = [
        {"attention": "linear", "options": {}, **SHA},
        {"attention": "sdpa", "options": {}, "attention_sha256": "b" * 64},
    ]
    result = {"difficulty": 32, "context": 128, "accuracy": 0.75, "scaled_accuracy": 0.5, "state_bytes": 4096}
    setting = {
        "task": "recall", "width": 64, "heads": 2, "layers": 2, "convolution": True, "mlp": False, "positions": False,
        "batch_size": 32, "steps": 1500, "warmup_share": 0.1, "weight_decay": 0.1, "test_sequences": 8,
    }  # fmt: skip
    values = {
        "name": name, "started_at": MOMENT, "finished_at": MOMENT, "time_s": 47.5, "label": "linear+sdpa",
        "title": "Linear + SDPA", "pattern": mixers, "setting": setting, "learning_rate": 0.003, "seed": 4,
        "parameters": 30912, "environment": CPU, "outcome": "measured", "curve": [], "results": [result],
    }  # fmt: skip
    return probe.Probe(**values | changes)


def diverged():
    return a_probe("diverged", outcome="loss_not_finite", says="from step 7 on", results=[], time_s=None, seed=5)


def a_scaling(**changes):
    setting = {
        "layers": 1, "width": 16, "heads": 2, "vocabulary": 9, "new_tokens": 4, "repeats": 3, "energy_window_s": 0.0,
        "device": "cpu", "precision": "auto",
    }  # fmt: skip
    samples = {"forward_backward_s": [1.0, 9.0, 2.0, 4.0, 5.0, 3.0], "peak_activation_bytes": [100.0, 104.0]}
    point = {
        "part": "layer", "context": 64, "outcome": "measured", "rounds": 2, "sessions": ["a", "b"], "samples": samples,
        "null_reasons": {"forward_backward_energy_j": "no_gpu"},
    }  # fmt: skip
    late = {"part": "layer", "context": 128, "outcome": "over_time", "says": "not done within 9 s"}
    values = {"provenance": "measured", "finished_at": MOMENT, "setting": setting, "environment": CPU, **WHO}
    return scaling.Scaling(**values | {"points": [point, late]} | changes)


def some_steps():
    entries = [WHO | {"certified": True, "parameters": 9}]
    entries += [WHO | {"label": "lsh", "attention": "lsh", "title": "LSH", "certified": False, "parameters": 8}]
    turn = {
        "label": "sdpa", "context": 512, "position": 0, "steps": 10, "time_s": 2.5, "energy_j": 500.0,
        "energy_null_reason": None, "edges_j": 0.0, "after_w": [], "peak_memory_bytes": 2.0**30, "gpu": None,
        "other_processes": 1,
    }  # fmt: skip
    short = turn | {"energy_j": None, "energy_null_reason": "window_too_short", "time_s": 1.25}
    rounds = [{"session": "s", "begun_at": MOMENT, "warm": None, "turns": [one]} for one in (turn, short)]
    setting = {
        "layers": 1, "width": 16, "heads": 2, "vocabulary": 30, "sizes": [{"context": 512, "batch_size": 2}],
        "window_s": 1.0, "compile": False, "device": "cuda", "precision": "bf16",
    }  # fmt: skip
    return steps.Steps(
        provenance="measured", finished_at=MOMENT, environment=GPU, entries=entries, rounds=rounds, setting=setting,
        failed={"lsh": {512: "out of memory: 9 GB"}}, busy={"sdpa": {512: 0.875}},
    )  # fmt: skip


def a_benchmark():
    taken = {"sdpa": [8.5, 9.5], "sdpa, again (A/A)": [8.25, 9.25], "transformers": [7.5, 7.75]}
    return benchmark.Benchmark(
        finished_at=MOMENT, what="layer", batch=4, compiled=False, vocabulary=9, threads=1, environment=CPU,
        versions={}, reference_implementations={"sdpa": ["transformers"], "lsh": ["reformer"]},
        times_ms={512: taken}, out_of_memory={512: {"lsh": "no room"}}, absent={"reformer": "not installed"},
    )  # fmt: skip


def fill(folder: Path) -> Path:
    """A record of each kind, two of some, in a folder."""
    record.write(a_run(), folder / "runs")
    record.write(flagged(), folder / "runs")
    record.write_failure(a_failure(), folder / "runs")
    for one in (a_probe(), diverged()):
        probe.write(one, folder / "cells")
    scaling.write(a_scaling(), folder)
    steps.write(some_steps(), folder / "steps.json")
    record.write_checked(a_benchmark(), folder / "layer.json")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What was written of `fill`'s records: the folder, and the table as pandas reads it."""
    folder = tmp_path_factory.mktemp("data")
    said = []
    done = data.write(folder / "out", fill(folder / "records"), said.append)
    assert not done.left_out and not said
    return SimpleNamespace(folder=folder / "out", records=folder / "records", done=done, rows=read(folder / "out"))


def read(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / data.PARQUET, dtype_backend="pyarrow")


def one(rows: pd.DataFrame, **where) -> pd.Series:
    for name, value in where.items():
        rows = rows[rows[name].isna() if value is None else rows[name].eq(value).fillna(False)]
    assert len(rows) == 1, (where, len(rows))
    return rows.iloc[0]


# kind, where, unit, value: each worked out by hand from what is above
KNOWN = [
    ("run", {"label": "sdpa", "part": "run", "metric": "time_s"}, "s", 20.5),
    ("run", {"label": "sdpa", "part": "run", "metric": "energy_per_non_padding_token_j"}, "J/token", 0.04),
    ("run", {"label": "sdpa", "part": "run", "metric": "parameters"}, "parameter", 1000.0),
    ("run", {"label": "sdpa", "part": "inference", "context": 8, "metric": "prefill_latency_s"}, "s", 0.01),
    ("run", {"label": "sdpa", "part": "inference", "context": 16, "metric": "cache_bytes_analytic"}, "byte", 10.0),
    ("run", {"label": "sdpa", "part": "forward", "metric": "energy_j_per_step"}, "J/step", 3.0),
    ("run", {"label": "sdpa", "part": "slope", "metric": "time_s_per_core_high"}, "s/core", 0.6),
    ("probe", {"metric": "accuracy", "difficulty": 32, "context": 128}, "1", 0.75),
    ("probe", {"metric": "scaled_accuracy", "difficulty": 32}, "1", 0.5),
    ("probe", {"metric": "state_bytes", "difficulty": 32}, "byte", 4096.0),
    ("probe", {"metric": "time_s", "seed": 4, "learning_rate": 0.003, "task": "recall"}, "s", 47.5),
    # medians of three samples each; a mean would be 4 and 4
    ("scaling", {"metric": "forward_backward_s", "context": 64, "block": 0, "session": "a"}, "s", 2.0),
    ("scaling", {"metric": "forward_backward_s", "context": 64, "block": 1, "session": "b"}, "s", 4.0),
    ("scaling", {"metric": "peak_activation_bytes", "context": 64, "block": 1}, "byte", 104.0),
    # of one step: 2.5 s and 500 J by 10, and 500 J by 2.5 s
    ("steps", {"metric": "time_s_per_step", "label": "sdpa", "block": 0, "context": 512}, "s/step", 0.25),
    ("steps", {"metric": "energy_j_per_step", "label": "sdpa", "block": 0}, "J/step", 50.0),
    ("steps", {"metric": "mean_power_w", "label": "sdpa", "block": 0}, "W", 200.0),
    ("steps", {"metric": "time_s_per_step", "label": "sdpa", "block": 1}, "s/step", 0.125),
    ("steps", {"metric": "peak_memory_bytes", "label": "sdpa", "block": 0}, "byte", 2.0**30),
    ("steps", {"metric": "other_processes", "label": "sdpa", "block": 0}, "process", 1.0),
    ("steps", {"metric": "gpu_busy_fraction", "label": "sdpa", "context": 512}, "1", 0.875),
    ("steps", {"metric": "parameters", "label": "lsh"}, "parameter", 8.0),
    ("benchmark", {"metric": "time_ms", "label": "sdpa", "attention": "sdpa", "block": 1, "context": 512}, "ms", 9.5),
    ("benchmark", {"label": "sdpa, again (A/A)", "attention": "sdpa", "block": 0}, "ms", 8.25),
    ("benchmark", {"label": "transformers", "attention": None, "reference_of": "sdpa", "block": 1}, "ms", 7.75),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "where", "unit", "value"), KNOWN, ids=lambda value: str(value)[:60])
def test_a_number_of_a_record_stands_in_the_table_with_its_unit(made, kind, where, unit, value):
    row = one(made.rows, kind=kind, **where)
    assert (row["value"], row["unit"]) == (value, unit) and pd.isna(row["null_reason"])


@pytest.mark.parametrize(
    ("kind", "where", "reason"),
    [
        ("run", {"label": "sdpa", "part": "run", "metric": "cpu_energy_j"}, "rapl_unavailable"),
        ("run", {"label": "sdpa", "part": "inference", "context": 8, "metric": "prefill_energy_j"}, "not_asked_for"),
        ("run", {"label": "sdpa", "part": "slope", "metric": "energy_j_per_core"}, "window_too_short"),
        ("failure", {"label": "lsh", "metric": "time_s", "block": 3, "profile": "quick"}, "out_of_memory"),
        ("failure", {"label": "lsh", "metric": "validation_loss"}, "out_of_memory"),
        ("probe", {"metric": "accuracy", "seed": 5, "difficulty": None}, "loss_not_finite"),
        ("probe", {"metric": "time_s", "seed": 5}, "loss_not_finite"),
        ("scaling", {"metric": "forward_backward_energy_j", "context": 64, "block": None}, "no_gpu"),
        ("scaling", {"metric": "forward_backward_s", "context": 128}, "over_time"),
        ("steps", {"metric": "energy_j_per_step", "label": "sdpa", "block": 1}, "window_too_short"),
        ("steps", {"metric": "mean_power_w", "label": "sdpa", "block": 1}, "window_too_short"),
        ("steps", {"metric": "throttled_share", "label": "sdpa", "block": 1}, "not_said"),
        ("steps", {"metric": "time_s_per_step", "label": "lsh", "context": 512}, "out_of_memory"),
        ("benchmark", {"label": "lsh", "attention": "lsh"}, "out_of_memory"),
        ("benchmark", {"label": "reformer", "reference_of": "lsh"}, "absent"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_was_not_measured_is_a_row_with_its_reason_and_no_number(made, kind, where, reason):
    row = one(made.rows, kind=kind, **where)
    assert row["null_reason"] == reason and pd.isna(row["value"])


def test_each_row_has_a_number_or_a_reason_and_each_number_of_a_record_is_one_row(made):
    rows = made.rows
    assert (rows["value"].isna() ^ rows["null_reason"].isna()).all()
    assert not rows.duplicated(["record", "row"]).any()
    assert not rows.duplicated(["record", "part", "label", "metric", "context", "difficulty", "block"]).any()
    counted = rows.groupby("kind").size().to_dict()
    run = len(schema.Metrics.model_fields) + 2 * 6 + 3 + 8  # two contexts, a phase, a slope
    assert counted == {
        "run": 2 * run, "failure": len(schema.Metrics.model_fields), "probe": 5 + 5, "scaling": 2 * 2 + 1 + 3,
        "steps": 3 * 6 + 1 + 2, "benchmark": 3 * 2 + 2,
    }  # fmt: skip
    assert made.done.rows == counted and made.done.records == {
        "run": 2, "failure": 1, "probe": 2, "scaling": 1, "steps": 1, "benchmark": 1,
    }  # fmt: skip


def test_who_where_and_when_stand_in_each_row(made):
    said = {name: value for name, value in one(made.rows, kind="run", label="linear", part="run", metric="mfu").items()}
    assert said["certified"] is False and said["flags"] == "launch_bound busy_neighbour"
    assert said["record"].startswith("runs/linear-seed0-") and said["folder"] == "runs" and said["session"] == "s1"
    assert (said["precision"], said["device_name"], said["gpu_uuid"], said["torch"]) == (
        "bf16",
        "a | GPU",
        "GPU-1",
        "2.11",
    )
    assert (said["steps"], said["layers"], said["context"], said["compile"]) == (4, 2, 16, False)
    assert said["finished_at"] == pd.Timestamp(MOMENT) and said["provenance"] == "measured"
    assert one(made.rows, kind="run", label="sdpa", part="run", metric="mfu")["certified"] is True
    cell = one(made.rows, kind="probe", seed=4, metric="accuracy")
    assert (cell["attention"], cell["options"]) == ("linear,sdpa", "[{}, {}]") and pd.isna(cell["certified"])
    assert cell["attention_sha256"] == f"{'a' * 64},{'b' * 64}" and cell["convolution"] is True and cell["threads"] == 2
    assert one(made.rows, kind="scaling", metric="forward_backward_s", block=0)["precision"] == "fp32"
    turn = one(made.rows, kind="steps", metric="parameters", label="lsh")
    assert turn["certified"] is False and turn["precision"] == "bf16"
    assert one(made.rows, kind="benchmark", label="transformers", block=0)["batch_size"] == 4
    signs = made.rows.groupby("kind")["content_sha256"].first()
    assert signs["steps"] == json.loads((made.records / "steps.json").read_text())["content_sha256"]


def test_automatic_precision_is_what_the_model_takes():
    for device, precision in data.AUTOMATIC.items():
        assert devices.resolve_precision("auto", SimpleNamespace(type=device)) == precision


def test_both_files_hold_the_same_and_datasets_finds_the_table(made, tmp_path, monkeypatch):
    entries = pd.read_csv(made.folder / data.DICTIONARY, keep_default_na=False)
    types = {"text": "string", "integer": "int64", "number": "float64", "boolean": "bool"}
    types = {
        name: types.get(kind, "string") for name, kind in entries[entries["entry"] == "column"][["name", "type"]].values
    }
    read_back = pd.read_csv(made.folder / data.CSV, dtype={name: f"{kind}[pyarrow]" for name, kind in types.items()},
                            keep_default_na=False, na_values=[""])  # fmt: skip
    for name in ("started_at", "finished_at"):
        read_back[name] = pd.to_datetime(read_back[name]).astype(made.rows[name].dtype)
    pd.testing.assert_frame_equal(read_back, made.rows, check_exact=True, check_dtype=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    loaded = datasets.load_dataset(str(made.folder), cache_dir=str(tmp_path))
    assert list(loaded) == ["train"]
    pd.testing.assert_frame_equal(
        loaded["train"].to_pandas(), pd.read_parquet(made.folder / data.PARQUET), check_dtype=False
    )


def test_numbers_stand_in_the_csv_in_full(tmp_path):
    value = 0.1 + 0.2
    probe.write(a_probe(time_s=value), tmp_path / "records")
    data.write(tmp_path / "out", tmp_path / "records")
    with gzip.open(tmp_path / "out" / data.CSV, "rt", newline="", encoding="utf-8") as file:
        (found,) = [row["value"] for row in csv.DictReader(file) if row["metric"] == "time_s"]
    assert found == "0.30000000000000004" and float(found) == value


def test_no_text_is_taken_for_a_formula_and_none_is_empty(made):
    assert set(made.rows.loc[made.rows["kind"] == "failure", "says"]) == {'\'="it", needs 9 GB'}
    with gzip.open(made.folder / data.CSV, "rt", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = {row[name] for row in rows for name in data.TEXTS}
    assert not [text for text in texts if text.startswith(data.FORMULA)]
    assert data._text("") is None and data._text("＝1") == "'＝1" and data._text("a=1") == "a=1"


# What is not in


def spoil(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_left_out_is_named_and_the_exit_code_says_so(tmp_path, capsys):
    records, words = fill(tmp_path / "records"), ["--records", str(tmp_path / "records")]
    assert data.main([str(tmp_path / "whole"), *words]) == 0 and capsys.readouterr().err == ""
    spoil(records / "steps.json", finished_at="2026-11-25T11:00:00Z")  # and its checksum as it was
    spoil(records / "cells" / "cell.json", schema_version=9)
    (records / "survey.json").write_text('{"kind": "survey"}')
    (records / "notes.txt").write_text("no record")
    (records / "again").mkdir()
    (records / "again" / "layer.json").write_bytes((records / "layer.json").read_bytes())
    record.write(a_run(label="mla", provenance="synthetic"), records / "made-up")
    os.symlink(tmp_path, records / "link")
    assert data.main([str(tmp_path / "out"), *words]) == 1
    said = capsys.readouterr().err.splitlines()
    wanted = {
        r"left out: steps.json: it was changed after it was written",
        r"left out: cells/cell.json: is no Probe record: schema_version",
        r"left out: survey.json: its kind is 'survey'",
        r"left out: again/layer.json: it is the same record as layer.json",
        r"left out: made-up/mla-\w+-\w+.json: it is synthetic",
        r"left out: link \(a link\): put there what it leads to",
    }
    assert len(said) == len(wanted) + 1 and said[-1].startswith("6 files were left out")
    assert all(any(re.match(pattern, line) for line in said) for pattern in wanted), said
    rows, card = read(tmp_path / "out"), (tmp_path / "out" / data.CARD).read_text()
    assert set(rows["kind"]) == {"run", "failure", "probe", "scaling", "benchmark"} and "mla" not in set(rows["label"])
    assert all(name in card for name in ("`steps.json: it was changed", "`notes.txt`", "is synthetic"))


def test_a_prediction_is_no_measurement(tmp_path):
    predicted = next((ROOT / "predictions").glob("*.json"))
    probe.write(a_probe(), tmp_path / "records")
    (tmp_path / "records" / predicted.name).write_bytes(predicted.read_bytes())
    done = data.write(tmp_path / "out", tmp_path / "records")
    assert done.records == {"probe": 1} and not done.left_out
    assert "predictions (1 lay among the records)" in (tmp_path / "out" / data.CARD).read_text()


def test_what_cannot_be_written_is_one_sentence_and_nothing_of_others_is_lost(tmp_path, capsys):
    records = tmp_path / "records"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my own")
    for folder, of, says in (
        (tmp_path / "out", tmp_path / "gone", "there is no folder"),
        (tmp_path / "out", tmp_path / "mine", "there is no record of a measurement"),
        (records / "out", records, "lies in the folder of records"),
        (tmp_path / "mine", records, "holds another README.md"),
        (records / "cell.json", tmp_path / "other", "cannot be written: File exists"),
    ):
        probe.write(a_probe(), records)
        probe.write(a_probe(), tmp_path / "other")
        assert data.main([str(folder), "--records", str(of)]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1
    assert (tmp_path / "mine" / "README.md").read_text() == "my own"
    assert not any((tmp_path / "out").iterdir())


def test_a_full_disk_is_no_fault_of_a_record(made, tmp_path, monkeypatch, capsys):
    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "AT_ONCE", 7)
    monkeypatch.setattr(data.Table, "flush", full)
    assert data.main([str(tmp_path / "out"), "--records", str(made.records)]) == 2
    said = capsys.readouterr().err
    assert said.endswith("out cannot be written: No space left on device; make room or name another folder\n")
    assert said.count("\n") == 1 and not any((tmp_path / "out").iterdir())


# The same bytes


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_records_give_the_same_bytes_whatever_the_order_of_files(made, tmp_path, monkeypatch):
    scan = os.scandir

    @contextlib.contextmanager
    def shuffled(folder):
        with scan(folder) as entries:
            yield sorted(entries, key=lambda entry: hashlib.sha256(entry.name.encode()).digest())

    monkeypatch.setattr(os, "scandir", shuffled)
    monkeypatch.setattr(data, "AT_ONCE", 7)  # of the table itself, not of its groups of rows
    done = data.write(tmp_path / "out", made.records)
    again = data.write(tmp_path / "out", made.records)  # over its own files
    assert done.version == again.version == made.done.version
    first, second = contents(made.folder), contents(tmp_path / "out")
    assert set(first) == {*data.FILES, data.SUMS}
    assert {name for name in first if first[name] != second[name]} == {data.PARQUET, data.CROISSANT, data.SUMS}
    monkeypatch.undo()
    data.write(tmp_path / "more", made.records)
    assert contents(tmp_path / "more") == first


def test_the_version_changes_when_a_record_does_and_not_with_what_is_no_record(made, tmp_path):
    records = fill(tmp_path / "records")
    (records / "notes.txt").write_text("no record")
    assert data.write(tmp_path / "a", records).version == made.done.version
    probe.write(a_probe(time_s=48.5), records / "cells")
    other = data.write(tmp_path / "b", records).version
    assert other != made.done.version and (tmp_path / "b" / data.VERSION).read_text() == f"{other}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+\+[0-9a-f]{12}", other)


def test_checksums_fit_and_see_a_change(made, tmp_path):
    check = ["sha256sum", "--check", "--strict", data.SUMS]
    done = subprocess.run(check, cwd=made.folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == len(data.FILES)


# Dictionary, card and metadata


def numbers_of(model) -> set[str]:
    """Fields of a schema that hold one number."""
    return {
        name for name, field in model.model_fields.items()
        if not ({"str", "bool", "list", "dict", "Literal"} & set(re.findall(r"\w+", str(field.annotation))))
    }  # fmt: skip


def test_every_metric_of_every_schema_has_an_entry_and_no_other():
    """A metric that is added to a schema is red here until the dictionary says what it means."""
    assert set(dictionary.METRICS) == set(data.ROWS) == set(kinds.LOADERS) - {"prediction"}
    points = numbers_of(schema.Latency) - {"context", "energy_null_reason"}
    phases, slope = numbers_of(schema.Phase), numbers_of(schema.Slope)
    assert set(dictionary.RUN) == set(schema.Metrics.model_fields) == set(dictionary.METRICS["failure"])
    assert set(dictionary.POINTS) == points and set(dictionary.PHASES) == phases and set(dictionary.SLOPE) == slope
    assert set(dictionary.METRICS["run"]) == {*dictionary.RUN, *points, *phases, *slope}
    assert set(dictionary.METRICS["scaling"]) == set(scaling.PART)
    assert set(dictionary.METRICS["probe"]) == (numbers_of(probe.Result) - {"difficulty", "context"}) | {
        "time_s",
        "parameters",
    }
    assert {"gpu_busy_fraction", "parameters", *data.TURNS} == set(dictionary.METRICS["steps"])


def test_every_column_metric_unit_and_reason_of_the_table_is_in_the_dictionary(made):
    entries = pd.read_csv(made.folder / data.DICTIONARY, keep_default_na=False)
    assert entries["meaning"].str.len().min() >= 5 and not entries.duplicated(["entry", "name", "kind"]).any()
    of = {entry: rows.set_index(["kind", "name"]) for entry, rows in entries.groupby("entry")}
    assert (
        [name for _, name in of["column"].index]
        == list(made.rows.columns)
        == pq.read_schema(made.folder / data.PARQUET).names
    )
    assert {code for _, code in of["null_reason"].index} == {
        *schema.REASONS, *schema.FAILURES, *scaling.OUTCOMES, *probe.OUTCOMES, *dictionary.OWN_REASONS,
    } - {"measured"}  # fmt: skip
    for (kind, metric), rows in made.rows.groupby(["kind", "metric"]):
        said = of["metric"].loc[kind, metric]
        assert set(rows["unit"]) == {said["unit"]} and said["rows"] == len(rows)
        assert said["null_reasons"].split() == sorted(set(rows["null_reason"].dropna()))
    for code, rows in made.rows.groupby("null_reason"):
        assert of["null_reason"].loc["", code]["rows"] == len(rows)


@pytest.mark.parametrize(
    ("metric", "unit"),
    [
        ("time_per_epoch_s", "s/epoch"), ("causal_flops_per_s", "FLOP/s"), ("forward_flops_full", "FLOP"), ("mfu", "1"),
        ("decode_energy_j_per_token", "J/token"), ("non_padding_tokens_per_s", "token/s"), ("cpu_cores_used", "core"),
        ("gpu_utilization_percent", "%"), ("attention_core_share", "1"), ("train_loss", "nat/token"),
        ("net_energy_j", "J"),
    ],
)  # fmt: skip
def test_a_unit_follows_from_the_name(metric, unit):
    assert dictionary.unit(metric) == unit


def test_a_name_without_a_unit_is_refused():
    with pytest.raises(ValueError, match="'speed' ends in no unit"):
        dictionary.unit("speed")


def test_the_card_counts_cites_and_names_every_column_metric_and_reason(made):
    card = (made.folder / data.CARD).read_text()
    head = yaml.safe_load(card.split("---")[1])
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert head["license"] == cited["license"].lower() and head["version"] == made.done.version
    assert head["size_categories"] == ["n<1K"] and head["configs"][0]["data_files"][0]["path"] == data.PARQUET
    assert f"{len(made.rows):,} rows from 8 records" in card and cited["title"] in card and made.done.version in card
    nulls = made.rows["null_reason"].notna().groupby(made.rows["kind"]).sum()
    assert f"| steps | 1 | 21 | {nulls['steps']} | `a \\| GPU` 1 |" in card
    for name in (*dictionary.COLUMNS, *dictionary.NULL_REASONS, *(one.name for one in dictionary.metrics())):
        assert f"| `{name}` |" in card, name
    tables = [line for line in card.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {3, 4, 6, 8}
    assert [data._size(count) for count in (999, 1000, 10**7 - 1, 10**7)] == ["n<1K", "1K<n<10K", "1M<n<10M", "n>10M"]


def test_a_stranger_s_text_is_no_markup_on_the_card():
    assert data._code("a`<script>`|\nb") == "`a'<script>'| b`"


def test_croissant_has_what_the_format_requires_and_its_checksums_fit(made):
    """https://docs.mlcommons.org/croissant/docs/croissant-spec.html: dataset, resources, record sets, fields."""
    said = json.loads((made.folder / data.CROISSANT).read_text())
    required = {"@context", "@type", "conformsTo", "description", "license", "name", "url", "creator", "datePublished"}
    assert required | {"distribution", "recordSet", "version", "citeAs"} <= set(said)
    assert said["@type"] == "sc:Dataset" and said["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    assert said["@context"]["conformsTo"] == "dct:conformsTo" and said["@context"]["recordSet"] == "cr:recordSet"
    assert said["datePublished"] == "2026-11-25" and said["version"] == made.done.version  # of the latest record
    files = {file["@id"]: file for file in said["distribution"]}
    assert set(files) == {data.PARQUET, data.CSV, data.DICTIONARY}
    for name, file in files.items():
        content = (made.folder / name).read_bytes()
        assert file["@type"] == "cr:FileObject" and file["contentUrl"] == name and file["encodingFormat"]
        assert file["sha256"] == hashlib.sha256(content).hexdigest() and file["contentSize"] == f"{len(content)} B"
    (table,) = said["recordSet"]
    assert table["@type"] == "cr:RecordSet" and [field["name"] for field in table["field"]] == list(made.rows.columns)
    ids = [field["@id"] for field in table["field"]]
    assert len(set(ids)) == len(ids) and all(key["@id"] in ids for key in table["key"])
    arrow = pq.read_schema(made.folder / data.PARQUET)
    types = {"string": "sc:Text", "int64": "sc:Integer", "double": "sc:Float", "bool": "sc:Boolean"}
    for field in table["field"]:
        assert field["@type"] == "cr:Field" and field["description"]
        assert field["source"] == {"fileObject": {"@id": data.PARQUET}, "extract": {"column": field["name"]}}
        assert field["dataType"] == types.get(str(arrow.field(field["name"]).type), ["sc:Date", "sc:DateTime"])


def test_the_committed_records_are_all_in(tmp_path):
    done = data.write(tmp_path, ROOT / "records")
    rows = read(tmp_path)
    assert not done.left_out and sum(done.records.values()) == len(list((ROOT / "records").rglob("*.json")))
    assert not rows.duplicated(["record", "part", "label", "metric", "context", "difficulty", "block"]).any()
    assert (rows["value"].isna() ^ rows["null_reason"].isna()).all() and "not_said" not in set(rows["null_reason"])
    found = pd.concat([steps.frame(steps.load(file)) for file in (ROOT / "records" / "steps-gpu").glob("*.json")])
    turns = rows[(rows["kind"] == "steps") & (rows["metric"] == "energy_j_per_step")]
    assert turns["value"].sum() == pytest.approx(found["energy_j_per_step"].sum()) and len(turns) == len(found)
