"""Ratios, intervals and verdicts against cases with a known answer."""

import math

import numpy as np
import pytest
from make import make_record
from scipy import stats

from lib import compare, record
from lib.errors import UsageError


def read(tmp_path, records):
    for one in records:
        record.write(one, tmp_path)
    return record.read(tmp_path)


def blocks(ratio_of, count=8, spread=0.0, **changes):
    """`count` blocks in which each label takes its ratio of sdpa's time; the blocks themselves differ a lot."""
    random = np.random.default_rng(0)
    return [
        make_record(label, block, time_s=20.0 * (1 + block) * ratio * math.exp(spread * random.normal()), **changes)
        for block in range(count)
        for label, ratio in ratio_of.items()
    ]


def test_ratios_are_taken_inside_blocks_so_drift_between_them_cancels(tmp_path):
    runs = read(tmp_path, blocks({"sdpa": 1.0, "baseline": 1.5, "sdpa_again": 1.0}, spread=1e-6))
    table = compare.ratios(runs, "time_s").set_index("label")
    assert table["ratio"].to_dict() == pytest.approx({"sdpa": 1.0, "baseline": 1.5, "sdpa_again": 1.0}, rel=1e-5)
    assert table.loc["sdpa", "verdict"] == "the reference"


def test_the_interval_is_the_paired_t_s_and_the_verdict_follows_it(tmp_path):
    runs = read(tmp_path, blocks({"sdpa": 1.0, "baseline": 1.5, "sdpa_again": 1.0, "gqa": 1.01}, spread=0.004))
    wide = runs.pivot(index="block", columns="label", values="time_s")
    logs = np.log(wide["baseline"] / wide["sdpa"])
    half = stats.t.ppf(0.975, 7) * logs.std(ddof=1) / math.sqrt(8)
    table = compare.ratios(runs, "time_s").set_index("label")
    found = table.loc["baseline"]
    assert (found["low"], found["high"]) == pytest.approx((math.exp(logs.mean() - half), math.exp(logs.mean() + half)))
    assert found["verdict"] == "different"
    assert table.loc["sdpa_again", "verdict"] == "equivalent"


def test_a_wide_spread_is_undecided_and_few_blocks_get_no_verdict(tmp_path):
    runs = read(tmp_path / "wide", blocks({"sdpa": 1.0, "gqa": 1.0}, spread=0.2))
    assert compare.ratios(runs, "time_s").set_index("label").loc["gqa", "verdict"] == "undecided"
    runs = read(tmp_path / "few", blocks({"sdpa": 1.0, "gqa": 2.0}, count=4))
    table = compare.ratios(runs, "time_s").set_index("label")
    assert table.loc["gqa", "verdict"] == "n = 4" and table["low"].isna().all()


def test_holm_counts_all_comparisons(tmp_path):
    ratio_of = {"sdpa": 1.0} | {f"variant_{n}": 1.0 for n in range(6)}
    runs = read(tmp_path, blocks(ratio_of, spread=0.01))
    wide = runs.pivot(index="block", columns="label", values="time_s")
    raw = {n: stats.ttest_1samp(np.log(wide[n] / wide["sdpa"]), 0).pvalue for n in ratio_of if n != "sdpa"}
    smallest = min(raw, key=raw.get)
    adjusted = compare.ratios(runs, "time_s").set_index("label")["p"]
    assert adjusted[smallest] == pytest.approx(min(1.0, raw[smallest] * 6))


def test_a_torn_block_does_not_count(tmp_path):
    made = blocks({"sdpa": 1.0, "baseline": 1.5}, count=6, spread=1e-6)
    torn = [one for one in made if (one.label, one.sitting.block) != ("baseline", 3)]
    runs = read(tmp_path, [*torn, make_record("baseline", 3, sitting="another day", time_s=999.0)])
    table = compare.ratios(runs, "time_s").set_index("label")
    assert table.loc["baseline", "n"] == 5 and table.loc["baseline", "ratio"] == pytest.approx(1.5, rel=1e-5)


def test_runs_by_hand_are_paired_by_seed(tmp_path):
    runs = read(tmp_path, [make_record(n, sitting=None, time_s=t) for n, t in (("sdpa", 10.0), ("ninth", 20.0))])
    assert compare.ratios(runs, "time_s").set_index("label").loc["ninth", "ratio"] == pytest.approx(2.0)


def test_settings_and_devices_are_never_mixed(tmp_path):
    other_device = {"device": "cuda", "device_name": "a GPU", "gpu": {"uuid": "GPU-2"}}
    runs = read(
        tmp_path,
        [
            *blocks({"sdpa": 1.0, "baseline": 2.0}, count=2),
            make_record("gqa", setting="1" * 8),
            make_record("mla", environment=other_device),
            make_record("lsh", provenance="synthetic"),
        ],
    )
    found = [sorted(group.runs["label"].unique()) for group in compare.groups(runs)]
    assert found[0] == ["baseline", "sdpa"] and sorted(found[1:]) == [["gqa"], ["mla"]]


def test_no_record_is_said_in_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="there is no record"):
        compare.groups(record.read(tmp_path))


def test_a_metric_that_was_not_measured_has_no_ratio(tmp_path):
    runs = read(tmp_path, blocks({"sdpa": 1.0, "baseline": 1.5}, energy_j=None))
    table = compare.ratios(runs, "energy_j")
    assert table.empty or table["ratio"].isna().all()
