"""Studies made up with a known answer: how often the intervals hold it, and how often a verdict is wrong.

Blocks differ by 10 %, and two runs of one thing in a block by 1 % in their ratio. Seven variants, `sdpa` and the A/A
control stand in their blocks as `lib.study.plan` orders them, and all are compared with the one `sdpa` of the block, so
all comparisons share its noise. Rates are held to four standard errors of a binomial count around what theory gives.
"""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from make import places
from scipy import stats

from lib import attention
from lib.analysis import compare, paired
from lib.study import plan

STUDIES = 3000
LABELS = (*attention.STUDY_ORDER, attention.CONTROL)
REFERENCE = LABELS.index(attention.REFERENCE)
VARIANTS = [place for place, label in enumerate(LABELS) if label not in (attention.REFERENCE, attention.CONTROL)]
SPREAD = 0.01
SIZES = (5, 8, 16)
DRIFTS = {  # of the logarithm, by place
    "none": lambda place: 0.0 * place,
    "0.5 % a place": lambda place: 0.005 * place,
    "a first run 3 % slow": lambda place: 0.03 * (place == 0),
    "ever faster": lambda place: 0.001 * place**2,
}
NOISES = {  # of standard deviation 1, (studies, blocks, labels)
    "normal": lambda random, shape: random.normal(size=shape),
    "heavy tails": lambda random, shape: random.standard_t(3, size=shape) / math.sqrt(3),
    "outliers": lambda random, shape: random.normal(size=shape) * np.where(random.random(shape) < 0.05, 5, 1),
    "one variant five times as noisy": lambda random, shape: random.normal(size=shape) * (1 + 4 * (LABELS_AT == 4)),
    "a reference three times as noisy": lambda random, shape: (
        random.normal(size=shape) * (1 + 2 * (LABELS_AT == REFERENCE))
    ),
}
LABELS_AT = np.arange(len(LABELS))


def design(blocks):
    """The place of each label in each block, (blocks, labels)."""
    where = places(LABELS, blocks)
    return np.array([[where[label, block] for label in LABELS] for block in range(blocks)])


def simulated(blocks, ratios=None, drift="none", noise="normal", studies=STUDIES, seed=0):
    """Logarithms of seconds, (studies, blocks, labels), with the true `ratios` to sdpa by label's index."""
    random, truth = np.random.default_rng(seed), np.zeros(len(LABELS))
    for place, ratio in (ratios or {}).items():
        truth[place] = math.log(ratio)
    block = random.normal(0, 0.10, (studies, blocks, 1))
    runs = NOISES[noise](random, (studies, blocks, len(LABELS))) * SPREAD / math.sqrt(2)
    return truth + block + DRIFTS[drift](design(blocks)) + runs


def compared(logs, label):
    """`Paired` of one label with sdpa, over the studies."""
    studies, blocks, _ = logs.shape
    contrast = paired.PlaceEffects(design(blocks)).between(label, REFERENCE)
    differences = logs.reshape(studies, -1) @ contrast.matrix.T
    return paired.paired_t(differences, contrast.inflation, contrast.freedom)


def test_holm_is_statsmodels_s():
    from statsmodels.stats.multitest import multipletests

    random = np.random.default_rng(0)
    for p in (random.random(1), random.random(7) / 10, np.round(random.random(9), 1) / 10):
        assert list(paired.holm(p)) == pytest.approx(list(multipletests(p, method="holm")[1]))


def coverage(logs, label, ratio=1.0):
    found = compared(logs, label)
    return ((found.low <= math.log(ratio)) & (math.log(ratio) <= found.high)).mean()


def raw_p(logs, of="p"):
    """(studies, variants), the control left out."""
    return np.array([getattr(compared(logs, label), of) for label in VARIANTS]).T


def any_below(p):
    """Share of studies in which Holm leaves some variant below 5 %."""
    return (np.array([paired.holm(row) for row in p]) < 0.05).any(axis=1).mean()


def error(rate, count=STUDIES):
    return 4 * math.sqrt(rate * (1 - rate) / count)


@pytest.mark.parametrize("blocks", SIZES)
def test_intervals_hold_the_true_ratio_as_often_as_they_say(blocks):
    ratios = dict(zip(VARIANTS, (1.5, 0.7, 1.02, 1.0, 0.99, 3.0, 1.1), strict=True))
    logs = simulated(blocks, ratios)
    for label in (*VARIANTS, LABELS.index(attention.CONTROL)):
        assert abs(coverage(logs, label, ratios.get(label, 1.0)) - 0.95) < error(0.95)


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("blocks", [5, 8])
def test_whatever_the_place_does_falls_on_no_variant(blocks, drift):
    logs = simulated(blocks, drift=drift)
    for label in (*VARIANTS, LABELS.index(attention.CONTROL)):
        assert coverage(logs, label) > 0.93


def test_without_the_place_in_the_model_a_drift_takes_intervals_of_five_blocks_off_the_truth():
    """What the model is for: a plain paired t held the truth of some variant in 0.815 of these studies."""
    logs = simulated(5, drift="0.5 % a place")
    plain = [paired.paired_t(logs[:, :, label] - logs[:, :, REFERENCE]) for label in (*VARIANTS, len(LABELS) - 1)]
    assert min(((found.low <= 0) & (found.high >= 0)).mean() for found in plain) < 0.85


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("blocks", [5, 8])
def test_heavy_tails_outliers_and_unequal_noise_leave_the_coverage(blocks, noise):
    logs = simulated(blocks, drift="0.5 % a place", noise=noise)
    for label in (*VARIANTS, LABELS.index(attention.CONTROL)):
        assert 0.925 < coverage(logs, label) < 0.985 + error(0.985)


def test_a_plain_paired_t_keeps_its_coverage_where_there_is_no_place():
    """Of losses, over any number of blocks."""
    random = np.random.default_rng(0)
    for draw in (random.standard_normal, lambda shape: random.standard_t(3, shape)):
        found = paired.paired_t(draw((STUDIES, 8)))
        held = ((found.low <= 0) & (found.high >= 0)).mean()
        assert 0.947 - error(0.947) < held < 0.985


@pytest.mark.parametrize("blocks", SIZES)
def test_where_nothing_differs_hardly_a_study_says_that_something_does(blocks):
    logs = simulated(blocks)
    p = raw_p(logs)
    # Not far below 0.05 either: the comparisons share sdpa's noise, which makes Holm careful, not idle.
    assert 0.02 < any_below(p) < 0.05 + error(0.05)
    control = compared(logs, LABELS.index(attention.CONTROL))
    assert abs((control.p < 0.05).mean() - 0.05) < error(0.05)  # the A/A control's alarm
    assert (p < 0.05).any(axis=1).mean() > 0.10  # what Holm is there for


def test_the_a_a_control_is_no_threshold():
    """Without any difference every second variant differs from sdpa by more than the control does."""
    logs = simulated(8)
    control = np.abs(compared(logs, LABELS.index(attention.CONTROL)).mean)
    exceeds = np.mean([np.abs(compared(logs, label).mean) > control for label in VARIANTS])
    assert abs(exceeds - 0.5) < 0.03


@pytest.mark.parametrize("blocks", SIZES)
@pytest.mark.parametrize("ratio", [1.02, 1 / 1.02])
def test_differences_as_large_as_the_margin_are_rarely_called_equivalent_in_any_variant(blocks, ratio):
    p = raw_p(simulated(blocks, dict.fromkeys(VARIANTS, ratio)), "equivalence_p")
    assert any_below(p) < 0.05 + error(0.05)
    if blocks > 5:
        assert (p < 0.05).any(axis=1).mean() > 0.12  # what the correction is there for


def test_what_is_the_same_is_found_equivalent():
    assert any_below(raw_p(simulated(16), "equivalence_p")) > 0.99


def test_where_nothing_differs_hardly_a_study_ranks_anything():
    """Holm over all pairs of the eight."""
    logs, effects = simulated(8), paired.PlaceEffects(design(8))
    pairs = itertools.combinations(range(len(attention.STUDY_ORDER)), 2)
    contrasts = [effects.between(*pair) for pair in pairs]
    tests = [paired.paired_t(logs.reshape(STUDIES, -1) @ of.matrix.T, of.inflation, of.freedom) for of in contrasts]
    assert any_below(np.array([test.p for test in tests]).T) < 0.05 + error(0.05)


def test_one_that_is_slower_is_last_alone_and_the_others_share_their_ranks():
    names, effects, alone = list(attention.STUDY_ORDER), paired.PlaceEffects(design(8)), 0
    for study in simulated(8, {4: 1.05}, studies=20):
        lower = paired.surely_lower(study, effects, list(LABELS), names)
        ranges = paired.rank_ranges(names, lower)
        alone += ranges.pop(LABELS[4]) == (8, 8) and set(ranges.values()) == {(1, 7)}
    assert alone >= 18


def power_of_t(ratio, blocks, alpha):
    """Of a two-sided paired t test at `alpha`, by the noncentral t distribution (its far tail left out)."""
    shift, limit = math.log(ratio) / SPREAD * math.sqrt(blocks), stats.t.ppf(1 - alpha / 2, blocks - 1)
    return stats.nct.sf(limit, blocks - 1, shift)


def test_what_a_study_of_so_many_blocks_can_see():
    """The chance that one variant which differs, among six that do not, is called different: printed by `pytest -s`.

    Holm's lies below a paired t test at 5 %; the place in the model costs little of it.
    """
    print("\nblocks  difference  called different  theory at 0.05/7..0.05")
    for blocks in SIZES:
        for ratio in (1.01, 1.02, 1.05):
            p = raw_p(simulated(blocks, {VARIANTS[0]: ratio}))
            seen = np.mean([paired.holm(row)[0] < 0.05 for row in p])
            least, most = (power_of_t(ratio, blocks, alpha) for alpha in (0.05 / 7, 0.05))
            print(f"{blocks:6}  {ratio - 1:10.0%}  {seen:16.3f}  {least:.3f}..{most:.3f}")
            assert 0.7 * least - error(least) <= seen <= most + error(most)


def test_the_place_in_the_model_makes_intervals_a_little_wider():
    """By the design: a few per cent at eight blocks."""
    logs = simulated(8)
    with_place, without = compared(logs, 0), paired.paired_t(logs[:, :, 0] - logs[:, :, REFERENCE])
    wider = (with_place.high - with_place.low).mean() / (without.high - without.low).mean()
    assert 1.0 < wider < 1.1


def test_the_interval_is_as_wide_as_the_design_says():
    half = {n: SPREAD * stats.t.ppf(0.975, n - 1) / math.sqrt(n) for n in (3, 8)}
    assert round(100 * half[3], 1) == 2.5 and round(100 * half[8], 2) == 0.84
    logs = np.random.default_rng(0).normal(0, 1, 8)
    logs = SPREAD * (logs - logs.mean()) / logs.std(ddof=1)
    assert paired.paired_t(logs).high == pytest.approx(half[8])


def test_a_table_of_records_says_what_the_arrays_say():
    (logs,) = simulated(8, dict(zip(VARIANTS, (1.05, 1.01, 1.0, 1.0, 0.99, 1.0, 0.9), strict=True)), studies=1)
    where = places(LABELS, 8)
    runs = pd.DataFrame(
        [
            {"label": label, "session": "s", "block": block, "seed": block, "position": where[label, block]}
            | {"time_s": math.exp(logs[block, place])}
            for block in range(8)
            for place, label in enumerate(LABELS)
        ]
    ).assign(device_name="a GPU", gpu_uuid="GPU-1", certified=True)
    table = compare.ratios(runs, "time_s").set_index("label")
    tests = {label: compared(logs[None], LABELS.index(label)) for label in table.index.drop(attention.REFERENCE)}
    for label, test in tests.items():
        found = table.loc[label, ["ratio", "low", "high"]].astype(float)
        assert list(np.log(found)) == pytest.approx([float(test.mean[0]), float(test.low[0]), float(test.high[0])])
    family = [LABELS[place] for place in VARIANTS]
    adjusted = {
        of: paired.holm([float(getattr(tests[label], of)[0]) for label in family]) for of in tests["gqa"]._fields[3:]
    }
    assert list(table.loc[family, "p"]) == pytest.approx(list(adjusted["p"]))
    assert table.loc[attention.CONTROL, "p"] == pytest.approx(float(tests[attention.CONTROL].p[0]))
    verdicts = [paired.verdict(p, q) for p, q in zip(adjusted["p"], adjusted["equivalence_p"], strict=True)]
    assert list(table.loc[family, "verdict"]) == verdicts and len(set(verdicts)) > 1


def test_the_blocks_that_a_study_should_have_are_said_beforehand():
    """By the plan, which does not import the analysis: the two must mean the same."""
    assert plan.FEWEST_BLOCKS == compare.FEWEST_BLOCKS
    for variants in (2, 3, 8, 9):
        names = ["sdpa", *(f"v{n}" for n in range(1, variants))]
        for blocks in (plan.balanced_after(variants) - 1, plan.balanced_after(variants)):
            where = places(names, blocks).items()
            runs = pd.DataFrame([{"label": name, "block": block, "position": place} for (name, block), place in where])
            runs = runs.assign(session="s", device_name="a GPU", gpu_uuid="GPU-1")
            assert compare.balanced(runs) is (blocks == plan.balanced_after(variants))
