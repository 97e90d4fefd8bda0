"""Thousands of runs: what is held of each, what is read when, and that nothing is worked out twice."""

import json
import pickle
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import learning, make_record, write_blocks

from lib import record
from lib.analysis import compare, figures, paired, target
from lib.errors import UsageError
from lib.record import files, parallel, series

STEPS = 20_000


def long_record(steps=STEPS, block=0, losses=None):
    found = make_record().series.model_dump()
    found["train_loss"] = losses or [10 - 5 * step / steps + 1e-3 * (step % 7) for step in range(steps)]
    found["non_padding_tokens"] = [100 * (step + 1) + step % 7 for step in range(steps)]
    found["epoch_time_s"] = [10.0, 11.0]
    return make_record(block=block, series=found)


@pytest.fixture(scope="module")
def made():
    return long_record()


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=200).map(sorted))
def test_counts_are_the_list_that_they_stand_for(values):
    held = series.Counts(values)
    assert list(held) == values and len(held) == len(values) and held == values and held[-1] == values[-1]
    assert held[::3] == values[::3] and series.as_array(held).tolist() == values
    assert series.only_grows(values * 1) and series.only_grows(values[::-1]) == (values[0] == values[-1])


def test_a_table_of_long_runs_holds_a_twentieth_of_their_series_and_gives_all_of_it(made, tmp_path):
    path = record.write(made, tmp_path)
    row = record.read(tmp_path).iloc[0]
    held = len(pickle.dumps([row[name] for name in row.index if name.startswith("series_")]))
    assert held < 2 * STEPS * 32 / 20  # a number in a list takes 32 bytes
    for name, values in made.series.model_dump().items():
        found = row[f"series_{name}"]
        assert (found or values) == values and (values is None or list(found) == values), name
    step = series.every(STEPS)
    assert row["series_train_loss"][::step] == made.series.train_loss[::step]
    path.touch()
    with pytest.raises(UsageError, match="has changed or gone since it was read"):
        list(row["series_train_loss"])
    assert len(row["series_train_loss"][::step]) <= series.MOST_DRAWN  # a curve is drawn without its file


def test_what_is_the_same_in_many_runs_is_held_once(tmp_path):
    write_blocks(tmp_path, blocks=3)
    runs = record.read(tmp_path)
    for name in ("certificate", "data", "kernels", "null_reasons"):
        assert len({id(one) for one in runs[name]}) == len({json.dumps(one) for one in runs[name]}), name


def test_a_long_record_comes_in_by_the_quick_way_as_by_the_close_one(made, tmp_path, monkeypatch):
    path = record.write(made, tmp_path)
    assert (
        files._quickly(path.read_text())
        == files._closely(path.read_text())
        == made.model_copy(update={"content_sha256": json.loads(path.read_text())["content_sha256"]})
    )
    monkeypatch.setattr(files, "_closely", lambda text: pytest.fail("each number is looked at alone"))
    assert record.load(path).series == made.series


def signed(content):
    return json.dumps(content | {"content_sha256": record.checksum(content)}, indent=1) + "\n"


FAULTS = {
    "a number beyond": ("train_loss", 1e300, "beyond what is measured"),
    "a number too near 0": ("train_loss", 1e-200, "beyond what is measured"),
    "a count beyond": ("non_padding_tokens", 2**60, "beyond what is counted"),
    "fewer tokens": ("non_padding_tokens", 1, "tokens seen so far become fewer"),
    "text": ("train_loss", "5.0", "valid number"),
    "true": ("train_loss", True, "valid number"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_number_comes_in_by_the_quick_way_that_the_close_one_refuses(fault, made, tmp_path):
    name, value, said = FAULTS[fault]
    content = json.loads(made.model_dump_json())
    content["series"][name][777] = value
    (tmp_path / f"{made.name}.json").write_text(signed(content))
    with pytest.raises(ValueError, match=said):
        record.load(tmp_path / f"{made.name}.json")


def test_one_digit_that_was_changed_in_a_long_list_is_seen(made, tmp_path):
    path = record.write(made, tmp_path)
    text = path.read_text()
    place = text.index("9.9", text.index("train_loss"), len(text))
    path.write_text(text[:place] + "9.8" + text[place + 3 :])
    with pytest.raises(ValueError, match="checksum"):
        record.load(path)
    long = json.dumps([10.0**300] * 500)
    path.write_text(text.replace('"data": {', f'"data": {{"more": {long}', 1))  # a list that is no series
    assert files._quickly(path.read_text()) is None


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    """Two long records, two short ones, one that was edited and one that is none."""
    folder = tmp_path_factory.mktemp("records")
    edited = record.write(make_record("mla"), folder)
    edited.write_text(edited.read_text().replace('"time_s": ', '"time_s": 1', 1))
    (folder / "none.json").write_text("{}")
    for one in (
        made,
        make_record("gqa", block=1, series=made.series.model_dump()),
        make_record("lsh"),
        make_record("mqa"),
    ):
        record.write(one, folder)
    return folder


def what_is_read(folder):
    with pytest.warns() as warned:
        runs = record.read(folder)
    assert {Path(one.filename).name for one in warned} == {Path(__file__).name}
    return runs, [str(one.message) for one in warned]


def alike(one, other):
    assert list(one.columns) == list(other.columns) and list(one["name"]) == list(other["name"])
    for name in one.columns:
        assert [type(value) for value in one[name]] == [type(value) for value in other[name]], name
        assert all((a == b) or (a != a and b != b) for a, b in zip(one[name], other[name], strict=True)), name
    ours, theirs = (
        [list(found.curve) for found in runs["series_train_loss"] if isinstance(found, series.InFile)]
        for runs in (one, other)
    )
    assert ours == theirs and len(ours) == 2


def test_several_processes_read_what_one_does_and_refuse_what_it_refuses(folder, monkeypatch):
    alone, why = what_is_read(folder)
    monkeypatch.setattr(parallel, "MOST_ALONE", 0)
    monkeypatch.setattr(parallel, "_cores", lambda: 2)
    monkeypatch.setattr(files, "row", lambda path: pytest.fail("it is read here"))
    there, why_there = what_is_read(folder)
    assert len(alone) == 4 and len(why) == 2 and any("its checksum does not fit" in said for said in why)
    assert why_there == why
    alike(there, alone)
    assert len({id(one) for one in there["certificate"]}) == len({id(one) for one in alone["certificate"]})


@pytest.mark.parametrize("command", ["import sys; sys.exit(1)", "print('{'); input()"], ids=["ends", "half an answer"])
def test_what_another_process_leaves_unanswered_is_read_here(command, folder, monkeypatch):
    alone, why = what_is_read(folder)
    monkeypatch.setattr(parallel, "MOST_ALONE", 0)
    monkeypatch.setattr(parallel, "_cores", lambda: 2)
    monkeypatch.setattr(parallel, "COMMAND", [sys.executable, "-c", command])
    there, why_there = what_is_read(folder)
    alike(there, alone)
    assert why_there == why


def test_a_few_records_start_no_process(folder, monkeypatch):
    monkeypatch.setattr(parallel, "_ask", lambda *_: pytest.fail("a process is started"))
    assert len(what_is_read(folder)[0]) == 4


@pytest.fixture
def counted(monkeypatch):
    """How often a function was called."""

    def count(of, name):
        calls, real = [], getattr(of, name)
        monkeypatch.setattr(of, name, lambda *given, **named: calls.append(given) or real(*given, **named))
        return calls

    return count


def test_what_all_figures_share_is_worked_out_once(tmp_path, counted):
    write_blocks(tmp_path, ("sdpa", "sdpa_again", "gqa", "mla"), blocks=6, validation=learning(5.1))
    runs = compare.groups(record.read(tmp_path))[0].runs
    of_design, fits = counted(paired.PlaceEffects, "_without_blocks"), counted(target, "isotonic_regression")
    tables_of = counted(target, "to_target")
    for cached in (compare._whole, compare._pairs, compare._compared):
        cached.cache_clear()
    compare._effects_of.cache_clear()
    drawn = [draw(runs) for draw in figures.FIGURES]
    assert len(drawn) == len(figures.FIGURES)
    assert compare._whole.cache_info().misses <= 2 and compare._pairs.cache_info().misses <= 2  # one of flagged runs
    assert len(of_design) <= 2 * 2  # of names and of places; times to a target may be of fewer runs
    assert len(fits) == len(runs) and len(tables_of) == 1
    metrics = {name for name in record.Metrics.model_fields if runs[name].notna().any()}
    assert compare._compared.cache_info().misses <= len(metrics) + 2 * len(target.COSTS)
    plt.close("all")


def test_a_table_that_is_changed_in_place_is_compared_anew(tmp_path):
    write_blocks(tmp_path, ("sdpa", "gqa"), blocks=6)
    runs = compare.groups(record.read(tmp_path))[0].runs
    before = compare.ratios(runs, "time_s").set_index("label")
    before.loc["gqa", "ratio"] = 7.0  # what was given out is the caller's own
    runs.loc[runs["label"] == "gqa", "time_s"] *= 2
    after = compare.ratios(runs, "time_s").set_index("label")
    assert after.loc["gqa", "ratio"] == pytest.approx(2) and after.loc["gqa", "n"] == 6
    runs.loc[runs.index[runs["label"] == "gqa"][0], "session"] = "another"
    assert compare.ratios(runs, "time_s").set_index("label").loc["gqa", "n"] == 5
    runs.loc[runs["label"] == "gqa", "certified"] = False
    assert compare.ratios(runs, "time_s").set_index("label").loc["gqa", "verdict"] == "fails its certificate"


def test_contrasts_of_places_are_those_of_the_whole_design_matrix():
    """Beside the normal equations over all columns at once, for a design with a hole."""
    random = np.random.default_rng(0)
    places = np.array([random.permutation(5) for _ in range(9)])
    observed = np.ones((9, 5), dtype=bool)
    observed[2, 3] = False
    values = np.where(observed, random.normal(size=(9, 5)), 0.0)
    block, variant = (index.ravel() for index in np.indices((9, 5)))
    here = observed.ravel()
    design = np.concatenate([np.eye(9)[block], np.eye(5)[variant], np.eye(5)[places.ravel()]], axis=1)[here]
    fitted = np.linalg.lstsq(design, values.ravel()[here], rcond=None)[0]
    effect = dict(enumerate(fitted[14:]))
    contrast = paired.PlaceEffects(places, observed).between(1, 4)
    plain = values[:, 1] - values[:, 4] - [effect[one] - effect[other] for one, other in places[:, [1, 4]]]
    assert contrast.differences(values) == pytest.approx(plain)
    assert contrast.matrix @ values.ravel() == pytest.approx(plain)
    matrix = contrast.matrix
    centred = matrix - matrix.mean(0)
    spread = centred @ centred.T
    assert contrast.freedom == pytest.approx(np.trace(spread) ** 2 / np.square(spread).sum())
    assert contrast.inflation == pytest.approx(9 * 8 * np.square(matrix.mean(0)).sum() / np.trace(spread))
