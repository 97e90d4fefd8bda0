"""Studies made up with a known answer: how often the intervals hold it, and how often a verdict is wrong.

Blocks differ by 10 %, and two runs of one thing in a block by 1 % in their ratio. Seven variants and the A/A control
are compared with one `sdpa` per block, so all comparisons share its noise, as they do in a study. Rates are held to
four standard errors of a binomial count around the rate that theory gives.
"""

import gc
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lib import attention
from lib.analysis import compare

STUDIES = 3000
VARIANTS = ("baseline", "gqa", "linear", "sliding_window", "lsh", "flash", "mla")
SPREAD = 0.01
SIZES = (5, 8, 16)
ALIKE = (1.0,) * len(VARIANTS)


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # statsmodels collects in each of thousands of calls


def simulated(blocks, ratios=ALIKE, studies=STUDIES, seed=0):
    """Seconds, (studies, labels, blocks): the variants with their ratios, then the A/A control, then sdpa."""
    random = np.random.default_rng(seed)
    truth = np.log([*ratios, 1.0, 1.0])[:, None]
    block = random.normal(0, 0.10, (studies, 1, blocks))
    return 20 * np.exp(truth + block + random.normal(0, SPREAD / math.sqrt(2), (studies, len(truth), blocks)))


def paired(times):
    """`Paired` over (studies, variants and the A/A control)."""
    return compare.paired_t(np.log(times[:, :-1] / times[:, -1:]))


def adjust(found):
    """Holm's p of the variants, (studies, variants)."""
    return np.array([compare.holm(row) for row in found.p[:, : len(VARIANTS)]])


def error(rate, count=STUDIES):
    return 4 * math.sqrt(rate * (1 - rate) / count)


def power_of_t(ratio, blocks, alpha):
    """Of a two-sided paired t test at `alpha`, by the noncentral t distribution (its far tail left out)."""
    shift, limit = math.log(ratio) / SPREAD * math.sqrt(blocks), stats.t.ppf(1 - alpha / 2, blocks - 1)
    return stats.nct.sf(limit, blocks - 1, shift)


@pytest.mark.parametrize("blocks", SIZES)
def test_intervals_hold_the_true_ratio_as_often_as_they_say(blocks):
    found = paired(simulated(blocks, ratios=(1.5, 0.7, 1.02, 1.0, 0.99, 3.0, 1.1)))
    for place, truth in enumerate((1.5, 0.7, 1.02, 1.0, 0.99, 3.0, 1.1, 1.0)):
        held = (found.low[:, place] <= truth) & (truth <= found.high[:, place])
        assert abs(held.mean() - 0.95) < error(0.95)


@pytest.mark.parametrize("blocks", SIZES)
def test_where_nothing_differs_hardly_a_study_says_that_something_does(blocks):
    found = paired(simulated(blocks))
    false = (adjust(found) < 0.05).any(axis=1).mean()
    # Not far below 0.05 either: the comparisons share sdpa's noise, which makes Holm careful, not idle.
    assert 0.02 < false < 0.05 + error(0.05)
    assert abs((found.p[:, -1] < 0.05).mean() - 0.05) < error(0.05)  # the A/A control's alarm
    assert (found.p[:, :-1] < 0.05).any(axis=1).mean() > 0.10  # what Holm is there for


@pytest.mark.parametrize("blocks", SIZES)
def test_a_difference_as_large_as_the_margin_is_rarely_called_equivalent(blocks):
    for ratio in (1.02, 1 / 1.02):
        found = paired(simulated(blocks, ratios=(ratio,) * len(VARIANTS)))
        assert found.within[:, 0].mean() < 0.05 + error(0.05)


def test_what_a_study_of_so_many_blocks_can_see():
    """The chance that one variant which differs, among six that do not, is called different: printed by `pytest -s`.

    Holm's lies between a test at a seventh of 5 % and one at 5 %.
    """
    print("\nblocks  difference  called different  theory at 0.05/7..0.05")
    for blocks in SIZES:
        for ratio in (1.01, 1.02, 1.05):
            found = paired(simulated(blocks, ratios=(ratio, *ALIKE[1:])))
            seen, raw = (adjust(found)[:, 0] < 0.05).mean(), (found.p[:, 0] < 0.05).mean()
            least, most = (power_of_t(ratio, blocks, alpha) for alpha in (0.05 / 7, 0.05))
            print(f"{blocks:6}  {ratio - 1:10.0%}  {seen:16.3f}  {least:.3f}..{most:.3f}")
            assert least - error(least) <= seen <= most + error(most)
            assert abs(raw - most) <= error(most)


def test_the_interval_is_as_wide_as_the_design_says():
    half = {n: SPREAD * stats.t.ppf(0.975, n - 1) / math.sqrt(n) for n in (3, 8)}
    assert round(100 * half[3], 1) == 2.5 and round(100 * half[8], 2) == 0.84
    logs = np.random.default_rng(0).normal(0, 1, 8)
    logs = SPREAD * (logs - logs.mean()) / logs.std(ddof=1)
    assert math.log(compare.paired_t(logs).high) == pytest.approx(half[8])


def test_a_table_of_records_says_what_the_arrays_say():
    times = simulated(8, ratios=(1.05, 1.01, 1.0, 1.0, 0.99, 1.0, 0.9), studies=1)
    found = paired(times)
    labels = (*VARIANTS, attention.CONTROL, attention.REFERENCE)
    runs = pd.DataFrame(
        [
            {"label": label, "session": "s", "block": block, "seed": block, "time_s": times[0, place, block]}
            for block in range(8)
            for place, label in enumerate(labels)
        ]
    ).assign(device_name="a GPU", gpu_uuid="GPU-1", certified=True)
    table = compare.ratios(runs, "time_s").set_index("label").loc[[*VARIANTS, attention.CONTROL]]
    for name in ("ratio", "low", "high"):
        assert list(table[name]) == pytest.approx(list(getattr(found, name)[0]))
    assert list(table["p"]) == pytest.approx([*adjust(found)[0], found.p[0, -1]])
    verdicts = [compare.verdict(p, within) for p, within in zip(table["p"], found.within[0], strict=True)]
    assert list(table["verdict"]) == verdicts and {"significantly different", "equivalent within 2 %"} <= set(verdicts)
