"""Ratios, intervals and verdicts against cases with a known answer."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from make import make_record
from scipy import stats

from lib import record
from lib.analysis import compare
from lib.errors import UsageError
from lib.study import plan


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
    assert found["verdict"] == "significantly different"
    assert table.loc["sdpa_again", "verdict"] == "equivalent within 2 %"


def test_a_wide_spread_is_undecided_and_few_blocks_get_no_verdict(tmp_path):
    runs = read(tmp_path / "wide", blocks({"sdpa": 1.0, "gqa": 1.0}, spread=0.2))
    assert compare.ratios(runs, "time_s").set_index("label").loc["gqa", "verdict"] == "inconclusive"
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
    incomplete = [one for one in made if (one.label, one.study.block) != ("baseline", 3)]
    runs = read(tmp_path, [*incomplete, make_record("baseline", 3, session="another day", time_s=999.0)])
    table = compare.ratios(runs, "time_s").set_index("label")
    assert table.loc["baseline", "n"] == 5 and table.loc["baseline", "ratio"] == pytest.approx(1.5, rel=1e-5)


def test_runs_by_hand_are_paired_by_seed(tmp_path):
    runs = read(tmp_path, [make_record(n, session=None, time_s=t) for n, t in (("sdpa", 10.0), ("ninth", 20.0))])
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


def test_the_control_and_the_uncertified_are_not_of_holm_s_family(tmp_path):
    ratio_of = {"sdpa": 1.0, "sdpa_again": 1.0, "gqa": 1.0, "mla": 1.0, "aleak": 1.0}
    made = blocks(ratio_of, spread=0.01)
    leaks = [one for one in made if one.label == "aleak"]
    made = [one for one in made if one.label != "aleak"]
    made += [make_record("aleak", one.study.block, certified=False, time_s=one.metrics.time_s) for one in leaks]
    runs = read(tmp_path, made)
    table = compare.ratios(runs, "time_s").set_index("label")
    wide = runs.pivot(index="block", columns="label", values="time_s")
    raw = {n: stats.ttest_1samp(np.log(wide[n] / wide["sdpa"]), 0).pvalue for n in ratio_of if n != "sdpa"}
    assert table.loc["sdpa_again", "p"] == pytest.approx(raw["sdpa_again"])
    assert min(table.loc[["gqa", "mla"], "p"]) == pytest.approx(min(1, 2 * min(raw["gqa"], raw["mla"])))
    assert pd.isna(table.loc["aleak", "p"]) and table.loc["aleak", "verdict"] == "fails its certificate"
    assert table.loc["aleak", "low"] < 1.02


def test_a_count_that_is_the_same_in_every_block_needs_no_spread(tmp_path):
    runs = read(tmp_path, blocks({"sdpa": 1.0, "gqa": 1.0}))
    runs["parameters"] = np.where(runs["label"] == "gqa", 1500, 1000)
    table = compare.ratios(runs, "parameters").set_index("label")
    assert list(table.loc["gqa", ["ratio", "low", "high"]]) == pytest.approx([1.5] * 3)
    assert table.loc["gqa", "verdict"] == "significantly different"
    assert (
        compare.ratios(runs, "forward_flops_causal").set_index("label").loc["gqa", "verdict"] == "equivalent within 2 %"
    )


def test_a_metric_that_is_missing_on_one_side_or_zero_takes_its_block_out(tmp_path):
    made = blocks({"sdpa": 1.0, "gqa": 1.1}, count=7)
    changed = {("sdpa", 0): {"energy_j": None}, ("gqa", 1): {"energy_j": None}}
    made = [make_record(one.label, one.study.block, **changed.get((one.label, one.study.block), {})) for one in made]
    runs = read(tmp_path, made)
    runs.loc[(runs["label"] == "gqa") & (runs["block"] == 2), "energy_j"] = 0.0
    found = compare.ratios(runs, "energy_j").set_index("label").loc["gqa"]
    assert found["n"] == 4 and found["ratio"] == pytest.approx(1.0) and found["verdict"] == "n = 4"
    assert compare.ratios(runs, "disk_bytes").set_index("label")["ratio"].isna().all()  # 0 in each


def test_a_label_twice_in_a_block_is_two_things_under_one_name(tmp_path):
    made = blocks({"sdpa": 1.0, "gqa": 1.5}, count=6, spread=1e-6)
    runs = read(tmp_path, made)
    runs = pd.concat(
        [runs, runs[(runs["label"] == "gqa") & (runs["block"] == 0)].assign(time_s=1e9)], ignore_index=True
    )
    assert set(compare.ratios(runs, "time_s")["n"]) == {5}  # of sdpa too: the block as a whole is out
    by_hand = runs.assign(session=None, block=None)
    assert compare.ratios(by_hand, "time_s").set_index("label").loc["gqa", "n"] == 5


def test_a_block_on_two_gpus_does_not_count(tmp_path):
    made = blocks({"sdpa": 1.0, "gqa": 1.5}, count=2)
    other = {"device": "cuda", "device_name": "a GPU", "gpu": {"uuid": "GPU-2"}}
    runs = read(tmp_path, [*made[:3], make_record("gqa", 1, environment=other)])
    assert set(compare.whole_blocks(runs)["block"]) == {0}


def test_a_variant_added_later_tears_no_block_and_gets_points_alone(tmp_path):
    made = blocks({"sdpa": 1.0, "gqa": 1.5}, count=6, spread=1e-3)
    runs = read(tmp_path, [*made, *(make_record("mine", n, session="later", time_s=30.0 * (1 + n)) for n in range(6))])
    table = compare.ratios(runs, "time_s").set_index("label")
    assert table.loc["gqa", "verdict"] == "significantly different"
    assert table.loc["mine", "ratio"] == pytest.approx(1.5, rel=0.01) and pd.isna(table.loc["mine", "low"])
    assert table.loc["mine", "verdict"] == "n = 6, not in one session"


@pytest.mark.parametrize("labels", [3, 4])
def test_blocks_are_balanced_after_whole_williams_squares_alone(labels, tmp_path):
    names = ["sdpa", "gqa", "mla", "lsh"][:labels]
    square = labels * (1 + labels % 2)
    for count, expected in ((square - 1, False), (square, True), (2 * square, True)):
        runs = []
        for block, order in enumerate(plan.orders(labels, count)):
            for position, which in enumerate(order):
                runs.append({"label": names[which], "session": "s", "block": block, "position": position})
        runs = pd.DataFrame(runs).assign(device_name="a GPU", gpu_uuid="GPU-1")
        assert compare.balanced(runs) is expected
        said = compare.about_blocks(runs)
        assert said.startswith(f"{count} whole blocks") and ("not balanced" in said) is not expected
    alphabetical = runs.assign(position=runs.groupby("block")["label"].rank().astype(int) - 1)
    assert not compare.balanced(alphabetical)
    rotated = [(block, place, names[(block + place) % labels]) for block in range(labels) for place in range(labels)]
    rotated = pd.DataFrame(rotated, columns=["block", "position", "label"])
    rotated = rotated.assign(session="another", device_name="a GPU", gpu_uuid="GPU-1")
    assert not compare.balanced(rotated)  # every place, but always the same neighbours
    assert not compare.balanced(pd.concat([runs, rotated]))  # all neighbours, some more often


def curve(label, losses, block=0, tokens=(0, 100, 200, 400), **changes):
    """A run of three epochs of ten steps that took 10, 20 and 40 s and 100, 300 and 500 J."""
    seen = [int(n) for n in np.interp(np.arange(1, 31), [0, 10, 20, 30], tokens)]
    series = {
        "train_loss": [5.0] * 30, "non_padding_tokens": seen, "epoch_time_s": [10.0, 20.0, 40.0], "inference": [],
        "log": [], "power_time_s": [], "power_w": [], "phases": [], "slope": None,
        "epoch_energy_j": [] if changes.get("energy_j", 1) is None else [100.0, 300.0, 500.0],
        "validation": [{"non_padding_tokens": n, "loss": loss} for n, loss in zip(tokens, losses, strict=True)],
    }  # fmt: skip
    return make_record(label, block, series=series, validation_loss=losses[-1], **changes)


def test_cost_to_target_is_interpolated_in_log_tokens_and_read_off_the_run_s_own_epochs(tmp_path):
    runs = read(tmp_path, [curve("sdpa", [6.0, 5.0, 4.5, 4.0]), curve("gqa", [6.0, 5.0, 4.2, 3.8])])
    found = compare.to_target(runs).set_index("label")
    assert list(found.loc["sdpa", ["tokens", "time_s", "energy_j"]]) == [400, 70, 900]
    # Half way down from 4.2 to 3.8, so half way from 200 to 400 in the logarithm: at 283 tokens of epoch 3, 200 long.
    tokens = 200 * math.sqrt(2)
    share = (tokens - 200) / 200
    assert found.loc["gqa", "tokens"] == pytest.approx(tokens)
    assert found.loc["gqa", "time_s"] == pytest.approx(30 + share * 40)
    assert found.loc["gqa", "energy_j"] == pytest.approx(400 + share * 500)
    assert found.loc["gqa", "energy_j_ratio"] == pytest.approx((400 + share * 500) / 900)
    assert found["censored"].isna().all() and found["reason"].isna().all()


def test_what_is_not_reached_reached_at_once_or_refused_says_so(tmp_path):
    runs = read(
        tmp_path,
        [
            curve("sdpa", [6.0, 5.0, 4.5, 4.0]),
            curve("lsh", [6.0, 5.0, 4.4, 4.3]),
            curve("mla", [6.0, 3.9, 3.5, 3.2]),
            curve("aleak", [6.0, 2.0, 1.0, 0.5], certified=False),
            curve("gqa", [6.0, 5.0, 4.0, 3.9], energy_j=None),
            curve("linear", [3.0, 2.9, 2.8, 2.7]),
        ],
    )
    found = compare.to_target(runs).set_index("label")
    assert list(found.loc["lsh", ["censored", "tokens", "time_s", "energy_j"]]) == [">", 400, 70, 900]
    assert found.loc["lsh", "gap_nats"] == pytest.approx(0.3)
    assert list(found.loc["mla", ["censored", "tokens", "time_s", "energy_j"]]) == ["<", 100, 10, 100]
    assert found.loc["aleak", ["tokens", "time_s", "energy_j"]].isna().all()
    assert found.loc["aleak", "reason"] == "fails its certificate"
    assert found.loc["gqa", "time_s"] == 30 and pd.isna(found.loc["gqa", "energy_j"])
    assert found.loc["gqa", "reason"] == "the run used no GPU"
    assert pd.isna(found.loc["linear", "tokens"]) and "without training" in found.loc["linear", "reason"]


def test_a_summary_with_a_censored_block_has_a_bound_and_no_interval(tmp_path):
    made = []
    for block in range(6):
        made += [curve("sdpa", [6.0, 5.0, 4.5, 4.0], block), curve("gqa", [6.0, 5.0, 4.2, 3.8 - block / 100], block)]
        made += [curve("lsh", [6.0, 5.0, 4.2, 3.8 if block else 4.1], block)]
        made += [curve("mla", [6.0, 3.9 if block else 5.0, 4.2, 4.1], block)]
    table = compare.to_target(read(tmp_path, made))
    found = compare.target_summary(table).set_index("label")
    gqa = table[table["label"] == "gqa"]
    assert found.loc["gqa", "time_s"] == pytest.approx(stats.gmean(gqa["time_s"]))
    assert found.loc["gqa", "energy_j_low"] < found.loc["gqa", "energy_j_ratio"] < found.loc["gqa", "energy_j_high"] < 1
    assert found.loc["gqa", ["n", "reached"]].tolist() == [6, 6] and pd.isna(found.loc["gqa", "censored"])
    assert found.loc["lsh", ["censored", "reached"]].tolist() == [">", 5]
    assert found.loc["lsh", "energy_j"] == pytest.approx(stats.gmean(table[table["label"] == "lsh"]["energy_j"]))
    assert found.loc["lsh", ["time_s_low", "energy_j_low"]].isna().all()
    assert pd.isna(found.loc["mla", "time_s"]) and "not reached in some" in found.loc["mla", "reason"]
    assert found.loc["sdpa", "energy_j_ratio"] == 1 and pd.isna(found.loc["sdpa", "energy_j_low"])


def test_the_pareto_front_holds_what_no_other_beats():
    points = {"a": (1, 9), "b": (2, 5), "c": (3, 5), "d": (4, 1), "e": (4, 1), "f": (5, 3), "g": (math.nan, 0)}
    front = compare.pareto_front(*zip(*points.values(), strict=True))
    assert "".join(itertools.compress(points, front)) == "abde"
