"""Ratios, intervals and verdicts against cases with a known answer."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from make import make_record, parameters_of, places
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lib import record
from lib.analysis import compare, paired, quality, tables, target
from lib.errors import UsageError
from lib.study import plan


def read(tmp_path, records):
    for one in records:
        record.write(one, tmp_path)
    return record.read(tmp_path)


def blocks(ratio_of, count=8, spread=0.0, **changes):
    """`count` blocks in which each label takes its ratio of sdpa's time; the blocks themselves differ a lot."""
    random, where = np.random.default_rng(0), places(ratio_of, count)

    def one(label, block):
        time_s = 20.0 * (1 + block) * ratio_of[label] * math.exp(spread * random.normal())
        return make_record(label, block, time_s=time_s, position=where[label, block], **changes)

    return [one(label, block) for block in range(count) for label in ratio_of]


def wide(runs):
    return runs.pivot(index="block", columns="label", values="time_s")


def test_ratios_are_taken_inside_blocks_so_drift_between_them_cancels(tmp_path):
    runs = read(tmp_path, blocks({"sdpa": 1.0, "baseline": 1.5, "sdpa_again": 1.0}, spread=1e-6))
    table = compare.ratios(runs, "time_s").set_index("label")
    assert table["ratio"].to_dict() == pytest.approx({"sdpa": 1.0, "baseline": 1.5, "sdpa_again": 1.0}, rel=1e-5)
    assert table.loc["sdpa", "verdict"] == "the reference"


def test_the_interval_is_that_of_the_least_squares_with_block_variant_and_place(tmp_path):
    """The point estimate against statsmodels; with one variant and sdpa alone the interval's too, exactly."""
    import statsmodels.formula.api as smf

    for labels in ({"sdpa": 1.0, "gqa": 1.02}, {"sdpa": 1.0, "baseline": 1.5, "sdpa_again": 1.0, "gqa": 1.01}):
        runs = read(tmp_path / str(len(labels)), blocks(labels, count=7, spread=0.004))
        fit = smf.ols("np.log(time_s) ~ C(label, Treatment('sdpa')) + C(block) + C(position)", runs).fit()
        table = compare.ratios(runs, "time_s").set_index("label")
        for label in set(labels) - {"sdpa"}:
            term = f"C(label, Treatment('sdpa'))[T.{label}]"
            assert math.log(table.loc[label, "ratio"]) == pytest.approx(fit.params[term])
            if len(labels) == 2:
                ends = np.log(table.loc[label, ["low", "high"]].astype(float))
                assert list(ends) == pytest.approx(list(fit.conf_int().loc[term]))


@pytest.mark.parametrize("n", [5, 8])
@pytest.mark.parametrize("mean", [0.0, 0.012, -0.03])
def test_the_paired_t_and_its_two_one_sided_tests_are_scipy_s(n, mean):
    d = mean + 0.01 * np.random.default_rng(n).normal(size=n)
    found, test = paired.paired_t(d), stats.ttest_1samp(d, 0)
    ends = test.confidence_interval(0.95)
    assert [found.mean, found.low, found.high, found.p] == pytest.approx([d.mean(), ends.low, ends.high, test.pvalue])
    margin = math.log(1.02)
    above = stats.ttest_1samp(d, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(d, margin, alternative="less").pvalue
    assert found.equivalence_p == pytest.approx(max(above, below))
    wider = paired.paired_t(d, inflation=4.0, freedom=3.0)  # of the squared error: twice as wide, by t of 3
    half = 2 * stats.sem(d) * stats.t.ppf(0.975, 3)
    assert [wider.low, wider.high] == pytest.approx([d.mean() - half, d.mean() + half])
    assert wider.p == pytest.approx(2 * stats.t.sf(abs(d.mean()) / stats.sem(d) / 2, 3))


def test_what_is_exactly_the_same_in_every_block_needs_no_spread():
    for value, expected in ((0.0, (1, 0)), (0.01, (0, 0)), (0.0199, (0, 1)), (-0.5, (0, 1))):
        found = paired.paired_t([value] * 5)
        assert (found.p, found.equivalence_p) == expected and found.low == found.high == value, value


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03, 0.005], [0.4, 0.6, 0.01], [0.02], [0.04, 0.045, 0.2]])
def test_holm_is_statsmodels_own(p):
    assert paired.holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_a_verdict_is_at_5_percent_and_a_sure_difference_goes_first():
    different, equivalent = "significantly different", "equivalent within 2 %"
    cases = {(0.049, 0.9): different, (0.049, 0.001): different, (0.051, 0.049): equivalent, (0.05, 0.05): None}
    assert {p: paired.verdict(*p) for p in cases} == {p: said or "inconclusive" for p, said in cases.items()}


def test_what_is_surely_lower_is_so_at_5_percent_over_all_pairs(monkeypatch):
    """Raw p of 0.01, 0.02 and 0.04 are 0.03, 0.04 and 0.04 by Holm; of 0.02, 0.02 and 0.06 none is below 5 %."""
    values = np.zeros((5, 3))
    for p, expected in (((0.01, 0.02, 0.04), [("a", "b"), ("c", "a"), ("b", "c")]), ((0.02, 0.02, 0.06), [])):
        told = {(0, 1): (-1.0, p[0]), (0, 2): (1.0, p[1]), (1, 2): (-1.0, p[2])}
        tests = {pair: paired.Paired(mean, 0, 0, raw, 1) for pair, (mean, raw) in told.items()}
        monkeypatch.setattr(paired, "compared", lambda values, effects, *pair, tests=tests: tests[pair])
        assert paired.surely_lower(values, None, ["a", "b", "c"], "abc") == expected
    assert paired.surely_lower(values[:4], None, ["a", "b", "c"], "abc") == []


def test_both_p_of_a_table_are_adjusted_for_its_certified_variants(tmp_path, monkeypatch):
    """Raw p by hand: of four variants three are a family; what is 0.04 three times is 0.12."""
    names = ("gqa", "lsh", "mla", "aleak", "sdpa_again")
    raw = dict(zip(names, ((0.01, 1), (0.04, 0.001), (0.4, 0.04), (0.001, 1), (0.04, 0.9)), strict=True))
    made = blocks(dict.fromkeys(("sdpa", *names), 1.0), count=6)
    made = [
        make_record("aleak", one.study.block, certified=False, position=one.study.position)
        if one.label == "aleak" else one
        for one in made
    ]  # fmt: skip
    runs = read(tmp_path, made)
    order = sorted(("sdpa", *names))
    monkeypatch.setattr(
        compare, "compared", lambda values, effects, one, _: paired.Paired(0.1, 0.0, 0.2, *raw[order[one]])
    )
    found = compare.ratios(runs, "time_s").set_index("label")
    expected = {"gqa": 0.03, "lsh": 0.08, "mla": 0.4, "sdpa_again": 0.04}
    assert found["p"].dropna().to_dict() == pytest.approx(expected)
    assert found["verdict"].to_dict() == {
        "sdpa": "the reference", "gqa": "significantly different", "lsh": "equivalent within 2 %",
        "mla": "inconclusive", "aleak": "fails its certificate", "sdpa_again": "significantly different",
    }  # fmt: skip


def test_a_level_is_the_reference_s_geometric_mean_times_the_ratio(tmp_path):
    """gqa misses the two slowest of eight blocks; its plain mean says nothing."""
    made = blocks({"sdpa": 1.0, "gqa": 1.25, "mla": 2.0}, spread=1e-6)
    runs = read(tmp_path, made)
    runs.loc[(runs["label"] == "gqa") & (runs["block"] > 5), "time_s"] = np.nan
    level = compare.ratios(runs, "time_s").set_index("label")["level"]
    middle = stats.gmean([20.0 * (1 + block) for block in range(8)])
    assert level.to_dict() == pytest.approx({"sdpa": middle, "gqa": 1.25 * middle, "mla": 2 * middle}, rel=1e-4)
    by_hand = read(tmp_path / "by hand", [make_record("lsh", session=None)])
    alone = compare.ratios(pd.concat([runs, by_hand], ignore_index=True), "time_s")
    assert alone.set_index("label").loc["lsh", "level"] == pytest.approx(20.0)


def test_the_verdict_follows_the_interval(tmp_path):
    runs = read(tmp_path, blocks({"sdpa": 1.0, "baseline": 1.5, "sdpa_again": 1.0, "gqa": 1.01}, spread=0.004))
    table = compare.ratios(runs, "time_s").set_index("label")
    assert table.loc["baseline", "verdict"] == "significantly different" and table.loc["baseline", "low"] > 1.4
    assert table.loc["sdpa_again", "verdict"] == "equivalent within 2 %"


def test_an_order_that_confounds_place_and_variant_gives_points(tmp_path):
    made = blocks({"sdpa": 1.0, "gqa": 1.5}, count=6, spread=0.01)

    def placed(position_of):
        studies = [one.study.model_copy(update={"position": position_of(one.label)}) for one in made]
        return [one.model_copy(update={"study": study}) for one, study in zip(made, studies, strict=True)]

    always, unknown = placed(lambda label: int(label == "gqa")), placed(lambda label: 0)
    said_of = {"place and variant confounded": always, "order unknown": unknown}
    for what, changed in said_of.items():
        said = f"n = 6, {what}"
        runs = read(tmp_path / what, changed)
        found = compare.ratios(runs, "time_s").set_index("label").loc["gqa"]
        assert found["verdict"] == said and pd.isna(found["low"]) and found["ratio"] == pytest.approx(1.5, rel=0.02)
        assert set(tables.ranking(runs)["rank"]) <= {"–", "1–2"}
    assert "not in which order" in compare.about_blocks(runs) and compare.ranks(runs, "time_s") == {}


def test_a_wide_spread_is_undecided_and_few_blocks_get_no_verdict(tmp_path):
    runs = read(tmp_path / "wide", blocks({"sdpa": 1.0, "gqa": 1.0}, spread=0.2))
    assert compare.ratios(runs, "time_s").set_index("label").loc["gqa", "verdict"] == "inconclusive"
    runs = read(tmp_path / "few", blocks({"sdpa": 1.0, "gqa": 2.0}, count=4))
    table = compare.ratios(runs, "time_s").set_index("label")
    assert table.loc["gqa", "verdict"] == "n = 4" and table["low"].isna().all()


def raw_p(runs, label):
    labels = sorted(set(runs["label"]))
    order = runs.pivot(index="block", columns="label", values="position")[labels]
    effects = paired.PlaceEffects(order.to_numpy())
    return float(paired.compared(np.log(wide(runs)[labels]), effects, labels.index(label), labels.index("sdpa")).p)


def test_holm_counts_all_comparisons(tmp_path):
    ratio_of = {"sdpa": 1.0} | {f"variant_{n}": 1.0 for n in range(6)}
    runs = read(tmp_path, blocks(ratio_of, spread=0.01))
    raw = {label: raw_p(runs, label) for label in ratio_of if label != "sdpa"}
    least = min(raw, key=raw.get)
    adjusted = compare.ratios(runs, "time_s").set_index("label")["p"]
    assert adjusted[least] == pytest.approx(min(1.0, raw[least] * 6))


def test_below_five_blocks_the_ratio_is_the_geometric_mean_and_one_failed_certificate_fails_all(tmp_path):
    times = {"sdpa": (20.0, 20.0, 20.0), "gqa": (20.0, 20.0, 160.0)}  # ratios of 1, 1 and 8
    made = [
        make_record(label, block, time_s=own[block], position=(block + (label == "gqa")) % 2)
        for label, own in times.items() for block in range(3)
    ]  # fmt: skip
    assert compare.ratios(read(tmp_path, made), "time_s").set_index("label").loc["gqa", "ratio"] == pytest.approx(2.0)
    runs = read(tmp_path / "six", blocks({"sdpa": 1.0, "gqa": 1.5}, count=6, spread=0.01))
    runs.loc[(runs["label"] == "gqa") & (runs["block"] == 4), "certified"] = False
    found = compare.ratios(runs, "time_s").set_index("label").loc["gqa"]
    assert found["verdict"] == "fails its certificate" and pd.isna(found["p"]) and found["low"] > 1.4
    assert compare.ranks(runs, "time_s") == {"sdpa": (1, 1)}


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


def test_tokens_are_never_mixed_and_a_title_says_what_was_run(tmp_path):
    """Of one setting, on data that changed under their name: the title says which tokens; the larger group is first."""
    made = blocks({"sdpa": 1.0, "gqa": 2.0}, count=1, data={"token_sha256": "a" * 64})
    values = parameters_of("mla") | {"accumulation": 3}
    others = [make_record("lsh", data={"token_sha256": "b" * 64}), make_record(run_parameters=values)]
    first, *rest = compare.groups(read(tmp_path, [*made, *others]))
    assert sorted(first.runs["label"]) == ["gqa", "sdpa"] and len(rest) == 2
    size = "GPT-2 with 2 layers of 32, T = 16, 4 steps of"
    titles = {group.runs["label"].iloc[0]: group.title for group in rest}
    assert first.title == f"{size} 4 rows, builtin data (tokens aaaaaaaa), on a GPU"
    assert titles["lsh"] == f"{size} 4 rows, builtin data (tokens bbbbbbbb), on a GPU"
    assert titles["mla"] == f"{size} 12 rows, builtin data, on a GPU"


def test_means_are_over_the_same_seeds_where_there_are_whole_blocks(tmp_path):
    made = blocks({"sdpa": 1.0, "gqa": 1.5}, count=2)
    runs = read(tmp_path, [*made, make_record("gqa", 7, session="torn"), make_record("mla", 5, session="later")])
    shown = compare.comparable(runs)
    assert sorted(zip(shown["label"], shown["block"], strict=True)) == [
        ("gqa", 0), ("gqa", 1), ("mla", 5), ("sdpa", 0), ("sdpa", 1),
    ]  # fmt: skip
    assert compare.comparable(runs[runs["label"] == "mla"])["label"].tolist() == ["mla"]


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
    made += [
        make_record("aleak", one.study.block, certified=False, time_s=one.metrics.time_s, position=one.study.position)
        for one in leaks
    ]
    runs = read(tmp_path, made)
    table = compare.ratios(runs, "time_s").set_index("label")
    raw = {label: raw_p(runs, label) for label in ratio_of if label != "sdpa"}
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
    same = compare.ratios(runs, "forward_flops_causal").set_index("label")
    assert same.loc["gqa", "verdict"] == "equivalent within 2 %"


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
        assert said.startswith(f"{count} whole blocks")
        assert count < 5 or ("not balanced" in said) is not expected
    alphabetical = runs.assign(position=runs.groupby("block")["label"].rank().astype(int) - 1)
    assert not compare.balanced(alphabetical)
    rotated = [(block, place, names[(block + place) % labels]) for block in range(labels) for place in range(labels)]
    rotated = pd.DataFrame(rotated, columns=["block", "position", "label"])
    rotated = rotated.assign(session="another", device_name="a GPU", gpu_uuid="GPU-1")
    assert not compare.balanced(rotated)  # every place, but always the same neighbours
    assert not compare.balanced(pd.concat([runs, rotated]))  # all neighbours, some more often


def test_a_drift_within_blocks_falls_on_no_variant(tmp_path):
    made = []
    for one in blocks({"sdpa": 1.0, "gqa": 1.0, "mla": 1.0, "sdpa_again": 1.0}, count=5, spread=0.001):
        slower = one.metrics.time_s * 1.03**one.study.position
        made.append(make_record(one.label, one.study.block, time_s=slower, position=one.study.position))
    runs = read(tmp_path, made)
    assert compare.ratios(runs, "time_s").set_index("label")["ratio"].to_numpy() == pytest.approx(1.0, abs=0.003)


RANKED = {"sdpa": 1.0, "sdpa_again": 1.0, "gqa": 1.03, "mla": 1.03, "lsh": 2.0}


def test_ranks_are_paired_shared_and_not_given_to_the_control(tmp_path):
    """gqa is 3 % slower in every block, and missing from the slowest: its plain mean is by far the smallest."""
    made = [one for one in blocks(RANKED, count=9, spread=0.002) if (one.label, one.study.block) != ("gqa", 8)]
    runs = read(tmp_path, made)
    assert runs.groupby("label")["time_s"].mean().idxmin() == "gqa"
    assert compare.ranks(runs, "time_s") == {"sdpa": (1, 1), "gqa": (2, 3), "mla": (2, 3), "lsh": (4, 4)}
    runs["time_per_epoch_s"] = runs["time_s"]
    table = tables.ranking(runs).set_index("variant")
    assert table["rank"].to_dict() == {"sdpa": "1", "gqa": "2–3", "mla": "2–3", "lsh": "4", "sdpa_again": "–"}
    seconds = table["s per epoch"].str.replace(",", "").astype(float)
    assert seconds["gqa"] > seconds["sdpa"]


def test_what_was_not_measured_in_the_slowest_block_is_not_ranked_before_what_was(tmp_path):
    """The same where the block is whole, and one number of it missing."""
    made = blocks({"sdpa": 1.0, "gqa": 1.03, "mla": 0.8}, count=8, spread=0.002)
    runs = read(tmp_path, made)
    runs.loc[(runs["label"] == "gqa") & (runs["block"] == 7), "time_s"] = np.nan
    assert compare.ranks(runs, "time_s") == {"mla": (1, 1), "sdpa": (2, 2), "gqa": (3, 3)}
    found = compare.ratios(runs, "time_s").set_index("label")
    assert found.loc["gqa", "n"] == 7 and found.loc["gqa", "level"] > found.loc["sdpa", "level"]


@pytest.mark.parametrize("count", [1, 4])
def test_below_five_blocks_nothing_is_ranked(count, tmp_path):
    runs = read(tmp_path, blocks(RANKED, count=count))
    assert compare.ranks(runs, "time_s") == {} and set(tables.ranking(runs)["rank"]) == {"–"}
    assert "no interval, no verdict, no rank" in compare.about_blocks(runs)
    order = list(tables.ranking(runs)["variant"])
    assert order == ["sdpa", "sdpa_again", "gqa", "lsh", "mla"]  # the study's, whatever they cost


def test_what_follows_from_two_sure_differences_is_sure_and_no_circle_ranks():
    assert paired.rank_ranges("abcd", [("a", "b"), ("b", "c")]) == {"a": (1, 2), "b": (2, 3), "c": (3, 4), "d": (1, 4)}
    assert paired.rank_ranges("abc", [("a", "b"), ("b", "a"), ("b", "c"), ("a", "c")]) == {
        "a": (1, 2), "b": (1, 2), "c": (3, 3),
    }  # fmt: skip
    assert paired.rank_ranges("ab", []) == {"a": (1, 2), "b": (1, 2)}


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_noise_of_a_metric_is_what_the_control_differs_by_in_that_metric(count, tmp_path):
    random = np.random.default_rng(1)
    runs = read(tmp_path, blocks({"sdpa": 1.0, "sdpa_again": 1.0, "gqa": 2.0}, count=count, spread=0.01))
    again = runs["label"] == "sdpa_again"
    runs["validation_loss"] = 5.0 + again * (0.02 + 0.001 * random.normal(size=len(runs)))
    runs["decode_latency_s_per_token"] = np.where(again, 0.77, 1.0)
    time, loss, decode = (compare.noise(runs, of) for of in ("time_s", "validation_loss", "decode_latency_s_per_token"))
    assert time.n == loss.n == count and decode.estimate == pytest.approx(0.77)
    assert loss.estimate == pytest.approx(0.02, abs=0.002) and abs(math.log(time.estimate)) < 0.03
    if count == 1:
        assert time.low is time.high is loss.low is None
    else:
        assert time.low < time.estimate < time.high and loss.low < 0.02 < loss.high
    assert (
        compare.noise(runs[~again], "time_s") is None
        and compare.noise(runs.assign(energy_j=np.nan), "energy_j") is None
    )


def test_a_loss_has_its_verdict_by_its_difference_in_nats(tmp_path):
    random = np.random.default_rng(2)
    gaps = {"sdpa": 0.0, "sdpa_again": 0.0, "gqa": 0.1, "mla": 0.0005}
    runs = read(tmp_path, blocks(gaps | dict.fromkeys(gaps, 1.0), count=8))
    runs["validation_loss"] = 4.0 + runs["block"] / 10 + runs["label"].map(gaps) + 0.002 * random.normal(size=len(runs))
    found = compare.differences(runs).set_index("label")
    losses = runs.pivot(index="block", columns="label", values="validation_loss")
    test = stats.ttest_1samp(losses["gqa"] - losses["sdpa"], 0)
    assert found.loc["gqa", "difference"] == pytest.approx((losses["gqa"] - losses["sdpa"]).mean())
    assert list(found.loc["gqa", ["low", "high"]]) == pytest.approx(list(test.confidence_interval()))
    assert found["verdict"].to_dict() == {
        "sdpa": "the reference", "sdpa_again": "equivalent within 0.02 nats", "gqa": "significantly different",
        "mla": "equivalent within 0.02 nats",
    }  # fmt: skip
    table = tables.ranking(runs).set_index("variant")
    assert (
        table.loc["gqa", "loss − SDPA's, nats"].startswith("+0.1") and "p = " in table.loc["gqa", "verdict on the loss"]
    )


def test_quality_is_told_in_two_sentences_with_difference_interval_p_and_n(tmp_path):
    random = np.random.default_rng(2)
    gaps = {"sdpa": 0.0, "sdpa_again": 0.0, "gqa": -0.1, "mla": 0.2, "flash": 0.0005}
    runs = read(tmp_path, blocks(dict.fromkeys(gaps, 1.0), count=8))
    runs["validation_loss"] = 8.6 + runs["block"] / 10 + runs["label"].map(gaps) + 0.002 * random.normal(size=len(runs))
    first, second = quality.sentences(runs)
    found = compare.differences(runs).set_index("label")
    for label, side in (("gqa", "significantly lower"), ("mla", "significantly higher")):
        of = found.loc[label]
        said = f"{side}: {label} {of['difference']:+.3f} nats [{of['low']:+.3f}, {of['high']:+.3f}], p < 0.001, "
        assert of["p"] < 0.001 and f"{said}n = 8" in first and (of["difference"] < 0) == (label == "gqa")
    assert "equivalent within 0.02 nats: flash +" in first and "sdpa_again" not in first
    assert second.startswith("A/A control: ") and "bigrams" in second
    noisy = runs["validation_loss"] + 0.1 * random.normal(size=len(runs))
    doubtful = runs.assign(validation_loss=noisy)
    p = compare.differences(doubtful).set_index("label").loc["gqa", "p"]
    assert 0.001 < p < 1 and (f", p = {p:.2g}, n = 8" in quality.sentences(doubtful)[0])
    few = runs[runs["block"] < 4]
    assert "a verdict needs 5 whole blocks, and there are 4" in quality.sentences(few)[0]
    assert "no run of SDPA" in quality.sentences(runs[runs["label"] != "sdpa"])[0]


def test_cpu_seconds_stand_beside_the_wall_clock(tmp_path):
    """A neighbour slows the clock of half of the runs; processor time says what the runs cost."""
    cpu = {"device": "cpu", "device_name": "a CPU"}
    made = [
        one.model_copy(update={"metrics": one.metrics.model_copy(update={"cpu_time_s": one.metrics.time_s})})
        for one in blocks({"sdpa": 1.0, "gqa": 0.9}, count=8, spread=1e-3, environment=cpu)
    ]
    runs = read(tmp_path, made)
    random = np.random.default_rng(0)
    runs["time_s"] = runs["time_s"] * random.uniform(1, 3, len(runs))
    table = tables.processor(runs).set_index("variant")
    assert table.loc["gqa", "CPU seconds, ratio to SDPA"].startswith("0.9")
    assert table.loc["gqa", "verdict on CPU seconds"].startswith("significantly different")
    assert table.loc["gqa", "verdict on wall clock"].startswith("inconclusive")
    main = tables.ranking(runs)
    assert {"CPU s per run", "peak resident GiB"} < set(main) and "peak GPU GiB" not in main
    assert "peak GPU GiB" in tables.ranking(runs.assign(device="cuda"))


def test_flags_are_counted_and_the_table_is_made_again_without_what_they_spoil(tmp_path):
    made = blocks({"sdpa": 1.0, "gqa": 1.5, "mla": 1.2}, count=8, spread=0.001)
    flag = {
        "flags": ["counter"],
        "checks": [{"check": "counter", "value": 1.0, "limit": 0.5, "verdict": "flagged", "says": "s"}],
    }
    spoilt = [
        make_record("gqa", one.study.block, time_s=10 * one.metrics.time_s, position=one.study.position, **flag)
        if (one.label, one.study.block) == ("gqa", 3) else one
        for one in made
    ]  # fmt: skip
    runs = read(tmp_path, spoilt)
    runs["time_per_epoch_s"] = runs["time_s"]
    table, without = (of(runs).set_index("variant") for of in (tables.ranking, tables.without_flagged))
    assert table["flagged"].to_dict() == {"sdpa": "0 of 8", "gqa": "1 of 8", "mla": "0 of 8"}
    assert float(table.loc["gqa", "ratio to SDPA"].split()[0]) > 1.8 and without.loc["gqa", "ratio to SDPA"].startswith(
        "1.50"
    )
    assert without.loc["gqa", "n"] == "7" and without.loc["mla", "n"] == "8"
    assert "No run is flagged" in tables.without_flagged(read(tmp_path / "clean", made))


def curve(label, losses, block=0, tokens=None, **changes):
    """A run of ten steps an epoch; epochs take 10, 20, 30... s and 100, 200, 300... J."""
    epochs = len(losses) - 1
    tokens = tokens or (0, *(100 * 2**epoch for epoch in range(epochs)))
    seen = [int(n) for n in np.interp(np.arange(1, 10 * epochs + 1), np.arange(0, 10 * epochs + 1, 10), tokens)]
    series = {
        "train_loss": [5.0] * len(seen), "non_padding_tokens": seen, "inference": [], "log": [], "power_time_s": [],
        "power_w": [], "phases": [], "slope": None,
        "epoch_time_s": [10.0 * (1 + epoch) for epoch in range(epochs)],
        "epoch_energy_j": [] if changes.get("energy_j", 1) is None else [100.0 * (1 + n) for n in range(epochs)],
        "validation": [{"non_padding_tokens": n, "loss": loss} for n, loss in zip(tokens, losses, strict=True)],
    }  # fmt: skip
    return make_record(label, block, series=series, validation_loss=losses[-1], **changes)


FALLING = [9.0, 8.0, 7.0, 6.0, 5.0, 4.5, 4.2, 4.0, 3.9]  # at 0, 100, 200, ... 12,800 tokens


def test_the_target_is_passed_well_before_the_end_and_reached_in_log_tokens(tmp_path):
    faster = [9.0, 7.0, 6.0, 5.0, 4.0, 3.8, 3.6, 3.5, 3.4]
    runs = read(tmp_path, [curve("sdpa", FALLING), curve("gqa", faster)])
    found = target.to_target(runs).set_index("label")
    # At two thirds of 12,800 tokens sdpa is at 4.0 - 0.1 log2(8,533 / 6,400) nats.
    goal = 4.0 - 0.1 * math.log2(4 / 3)
    assert found["target"].to_numpy() == pytest.approx(goal) and found.loc["sdpa", "tokens"] == pytest.approx(
        12800 * 2 / 3
    )
    # gqa is at 4.0 at 800 tokens and at 3.8 at 1,600; its fifth epoch has 800 tokens.
    tokens = 800 * 2 ** ((4.0 - goal) / 0.2)
    assert found.loc["gqa", "tokens"] == pytest.approx(tokens)
    share = (tokens - 800) / 800
    assert found.loc["gqa", "time_s"] == pytest.approx(100 + share * 50, rel=1e-3)
    assert found.loc["gqa", "energy_j"] == pytest.approx(1000 + share * 500, rel=1e-3)
    assert found.loc["gqa", "time_s_ratio"] == pytest.approx(found.loc["gqa", "time_s"] / found.loc["sdpa", "time_s"])
    assert found["censored"].isna().all() and found["reason"].isna().all()


def test_a_target_is_reached_within_what_the_control_differs_by(tmp_path):
    again = [loss + (0.02 if index % 2 else -0.02) for index, loss in enumerate(FALLING)]
    close = [*FALLING[:-3], 4.1, 4.0, 3.97]  # never quite there
    made = [curve("sdpa", FALLING), curve("sdpa_again", again), curve("gqa", close)]
    made.append(curve("lsh", [*FALLING[:-3], 4.4, 4.35, 4.3]))
    runs = read(tmp_path / "with", made)
    assert target.tolerance(runs) == pytest.approx(0.02)
    found = target.to_target(runs).set_index("label")
    assert list(found.index[found["censored"].notna()]) == ["lsh"]
    # What a curve lacks is told to the target itself, and not to what is allowed beyond it.
    assert found.loc["lsh", "gap_nats"] == pytest.approx(4.3 - found.loc["lsh", "target"])
    assert "within 0.020 nats" in target.rule(runs)
    alone = read(tmp_path / "without", [made[0], made[2]])
    assert target.tolerance(alone) == 0 and "no A/A control" in target.rule(alone)
    assert target.to_target(alone).set_index("label").loc["gqa", "censored"] == ">"


def test_the_tolerance_is_the_root_mean_square_of_the_gaps(tmp_path):
    again = [loss + 0.03 * (place == 4) for place, loss in enumerate(FALLING)]  # one of eight validations
    runs = read(tmp_path, [curve("sdpa", FALLING), curve("sdpa_again", again)])
    assert target.tolerance(runs) == pytest.approx(0.03 / math.sqrt(8))


def test_a_lucky_validation_does_not_reach_a_target(tmp_path):
    lucky = [9.0, 8.0, 3.0, 6.5, 6.0, 5.5, 5.0, 4.6, 4.5]
    runs = read(tmp_path, [curve("sdpa", FALLING), curve("gqa", lucky)])
    assert target.to_target(runs).set_index("label").loc["gqa", "censored"] == ">"


@pytest.mark.parametrize("epochs", [1, 7])
def test_too_few_validations_are_no_curve(epochs, tmp_path):
    runs = read(tmp_path, [curve(label, FALLING[: epochs + 1]) for label in ("sdpa", "sdpa_again", "gqa")])
    found = target.to_target(runs)
    assert set(found["reason"]) == {f"not enough validations: raise epochs ({epochs}, at least 8 are needed)"}
    assert found[["tokens", "time_s", "energy_j"]].isna().all(axis=None)


def test_what_is_not_reached_reached_at_once_or_refused_says_so(tmp_path):
    runs = read(
        tmp_path,
        [
            curve("sdpa", FALLING),
            curve("lsh", [*FALLING[:-3], 4.4, 4.35, 4.3]),
            curve("mla", [6.0, *(3.9 - n / 10 for n in range(8))]),
            curve("aleak", [6.0, *(2.0 - n / 10 for n in range(8))], certified=False),
            curve("gqa", FALLING, energy_j=None),
        ],
    )
    found = target.to_target(runs).set_index("label")
    assert found.loc["lsh", "censored"] == ">" and found.loc["mla", "censored"] == "<"
    spent = ["tokens", "time_s", "energy_j"]
    assert list(found.loc["lsh", spent]) == pytest.approx([12800, 360, 3600])
    assert list(found.loc["mla", spent]) == pytest.approx([100, 10, 100])
    assert found.loc["lsh", "gap_nats"] == pytest.approx(4.3 - found.loc["lsh", "target"])
    assert found.loc["aleak", ["tokens", "time_s", "energy_j"]].isna().all()
    assert found.loc["aleak", "reason"] == "fails its certificate"
    assert found.loc["gqa", "time_s"] > 0 and pd.isna(found.loc["gqa", "energy_j"])
    assert found.loc["gqa", "reason"] == "the run used no GPU"


def test_a_summary_with_a_censored_block_has_a_bound_and_no_interval(tmp_path):
    made, labels = [], ("sdpa", "gqa", "lsh", "mla")
    where = places(labels, 6)
    for block in range(6):
        slow, fast = [*FALLING[:-3], 4.4, 4.35, 4.3], [6.0, *(3.9 - n / 10 for n in range(8))]
        losses = {
            "sdpa": FALLING, "gqa": [loss - 0.3 - block / 100 for loss in FALLING], "lsh": FALLING if block else slow,
            "mla": fast if block else slow,
        }  # fmt: skip
        made += [curve(label, losses[label], block, position=where[label, block]) for label in labels]
    runs = read(tmp_path, made)
    table, found = target.to_target(runs), target.summary(runs).set_index("label")
    gqa = table[table["label"] == "gqa"]
    assert found.loc["gqa", "time_s"] == pytest.approx(stats.gmean(gqa["time_s"]))
    assert found.loc["gqa", "energy_j_low"] < found.loc["gqa", "energy_j_ratio"] < found.loc["gqa", "energy_j_high"] < 1
    assert found.loc["gqa", ["n", "reached"]].tolist() == [6, 6] and pd.isna(found.loc["gqa", "censored"])
    assert found.loc["gqa", "time_s_verdict"] == "significantly different"
    assert found.loc["lsh", ["censored", "reached"]].tolist() == [">", 5]
    assert found.loc["lsh", "energy_j"] == pytest.approx(stats.gmean(table[table["label"] == "lsh"]["energy_j"]))
    assert found.loc["lsh", ["time_s_low", "energy_j_low"]].isna().all()
    bounds = table.loc[table["label"] == "lsh", "energy_j_ratio"]
    assert found.loc["lsh", "energy_j_ratio"] == pytest.approx(stats.gmean(bounds)) and bounds.nunique() == 2
    assert pd.isna(found.loc["mla", "time_s"]) and "not reached in some" in found.loc["mla", "reason"]
    assert found.loc["sdpa", "energy_j_ratio"] == 1 and pd.isna(found.loc["sdpa", "energy_j_low"])


@pytest.mark.parametrize("shape", ["falling", "flat"])
def test_the_control_s_cost_to_a_target_is_centred_on_1_and_has_no_bounds(shape):
    """Curves with noise, over many blocks; of a flat one too, where reaching is all noise."""
    random, rows = np.random.default_rng(0), []
    tokens = 1000 * np.arange(1, 9)
    mean = 3 + 4 * (tokens / 1000) ** -0.3 if shape == "falling" else 4 + 2 * np.exp(-tokens / 1000)
    for block in range(150):
        of_block = random.normal(0, 0.05)
        for label in ("sdpa", "sdpa_again"):
            losses = (mean + of_block + random.normal(0, 0.01, len(tokens))).tolist()
            points = [{"non_padding_tokens": int(n), "loss": loss} for n, loss in zip(tokens, losses, strict=True)]
            rows.append({"label": label, "block": block, "seed": block, "series_validation": points})
    runs = pd.DataFrame(rows).assign(session="s", device_name="a GPU", gpu_uuid="GPU-1", certified=True, energy_j=None)
    runs = runs.assign(series_epoch_time_s=[[1.0] * 8] * len(runs), series_epoch_energy_j=[[]] * len(runs))
    runs = runs.assign(
        series_non_padding_tokens=[list(range(100, 8001, 100))] * len(runs), null_reasons=[{}] * len(runs)
    )
    found = target.to_target(runs)
    assert found["censored"].isna().all() and found["tokens"].notna().all()
    logs = np.log(found.loc[found["label"] == "sdpa_again", "time_s_ratio"])
    assert abs(logs.mean()) < 4 * logs.std() / math.sqrt(len(logs)) and 0.35 < (logs > 0).mean() < 0.65
    assert found.loc[found["label"] == "sdpa", "tokens"].max() < 7900  # well before its end, in every block


def test_the_pareto_front_holds_what_no_other_beats():
    points = {"a": (1, 9), "b": (2, 5), "c": (3, 5), "d": (4, 1), "e": (4, 1), "f": (5, 3), "g": (math.nan, 0)}
    front = compare.pareto_front(*zip(*points.values(), strict=True))
    assert "".join(itertools.compress(points, front)) == "abde"
