"""Claims about cost by context length against cases whose answer is known: made-up processes, simulated studies."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from lib.analysis import crossovers, growth, growth_figures, growth_tables, style
from lib.analysis.growth import Costs
from lib.errors import UsageError
from lib.record import scaling as stored

CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)
SEEDS = 300  # studies of a simulation
METRICS = ("forward_backward_s", "prefill_s", "decode_s_per_token", "cache_bytes")


def points(costs, metric="forward_backward_s", contexts=CONTEXTS, n=1, noise=0.0, seed=0, in_turns=True):
    """A frame as `lib.record.scaling.frame` gives it, of `n` processes with relative normal `noise`.

    `costs` is label to a function of T, which gives one cost, or one for each process; None where memory ran out.
    """
    rows, random = [], np.random.default_rng(seed)
    for label, cost in costs.items():
        for context in contexts:
            value = cost(context)
            row = {"label": label, "title": label, "metric": metric, "context": context, "outcome": "measured"}
            row |= {"says": "", "reason": None, "sessions": ["s"] * n if in_turns else []}
            if value is None:
                row |= {"outcome": "out_of_memory", "says": "made up", "sessions": []}
                row |= {"samples": [], "processes": [], "value": np.nan, "n": 0}
            else:
                each = np.broadcast_to(value, n) * np.exp(noise * random.standard_normal(n))
                row |= {"samples": list(each), "processes": list(each), "n": n}
                row |= {"value": float(np.exp(np.log(each).mean()))}
            rows.append(row)
    return pd.DataFrame(rows)


def polynomial(*coefficients):
    return lambda context: sum(c * (context / growth.UNIT) ** power for power, c in enumerate(coefficients))


def floored(floor, *coefficients):
    return lambda context: max(floor, polynomial(0, *coefficients)(context))


def simulated(curves, n, noise, seeds=SEEDS, contexts=CONTEXTS, in_turns=True, drift=0.0):
    """For each of many studies a `Costs` per curve: `n` rounds, which differ by `drift` as a whole."""
    random, sessions = np.random.default_rng(n), (("s",) * n if in_turns else (),) * len(contexts)
    truth = [np.log([curve(context) for context in contexts]) for curve in curves]
    for _ in range(seeds):
        rounds = drift * random.standard_normal((n, 1))
        scatter = noise * random.standard_normal((len(curves), n, len(contexts)))
        yield [
            Costs(str(place), np.array(contexts), logs + rounds + own, sessions)
            for place, (logs, own) in enumerate(zip(truth, scatter, strict=True))
        ]


def crossed(rows):
    return [row for row in rows if "low" in row]


def near(rate, count, errors=4):
    return errors * np.sqrt(rate * (1 - rate) / count)


# What a point is.


def test_a_process_counts_with_its_median_and_a_point_with_their_geometric_mean():
    """Minima are constant and means grow as T^4: the exponent, the fit and the ratio are the medians', of T²."""

    def of(label, factor):
        made = []
        for context in CONTEXTS:
            k = factor * (context / 1024) ** 2
            samples = [factor * 0.01, 2 * k, 200 * k**2, factor * 0.01, 8 * k, 300 * k**2]  # medians 2k, 8k
            values = {"forward_backward_s": samples, "peak_activation_bytes": [1.0, 1.0]}
            nulls = {"forward_backward_energy_j": "no_gpu"}
            made.append(stored.Point(part="layer", context=context, outcome="measured", rounds=2, samples=values,
                                     null_reasons=nulls))  # fmt: skip
        return stored.Scaling.model_construct(label=label, title=label, points=made)

    frame = stored.frame([of("sdpa", 1.0), of("linear", 3.0)])
    row = frame.query("label == 'sdpa' and context == 2048 and metric == 'forward_backward_s'").iloc[0]
    assert row["processes"] == pytest.approx([8, 32]) and row["n"] == 2
    assert row["value"] == pytest.approx(16)
    assert growth.exponents(frame, "forward_backward_s", 256)["exponent"].to_numpy() == pytest.approx([2, 2])
    assert growth.ratios(frame, "forward_backward_s", "sdpa")["ratio"].to_numpy() == pytest.approx([3.0] * 6)
    assert growth.fits(frame, "forward_backward_s")["sdpa"].coefficients == pytest.approx([0, 0, 4], abs=1e-9)
    cell = growth_tables.points_table(frame).query("variant == 'sdpa' and context == '2,048'").iloc[0, 2]
    assert cell == "16,000 (8,000 to 32,000)"


def test_rounds_that_are_not_there_at_every_length_are_left_out_of_claims_and_said():
    made = points({"sdpa": lambda t: float(t)}, n=3)
    made.at[2, "processes"], made.at[2, "n"] = made.at[2, "processes"][:2], 2
    costs = growth.costs_of(made, "forward_backward_s", "sdpa")
    assert costs.n == 2 and costs.logs.shape == (2, 6) and len(costs.sessions[0]) == 2
    assert "Two processes" in growth_tables.allowed(made) and "count in the points alone: 5" in growth_tables.allowed(
        made
    )


def test_joules_are_fitted_only_where_every_point_has_them():
    seconds = points({"sdpa": polynomial(1, 1)})
    energies = ("forward_backward_energy_j", "prefill_energy_j", "decode_energy_j_per_token")
    joules = pd.concat([seconds, *(points({"sdpa": polynomial(1, 1)}, metric) for metric in energies)])
    assert growth.cost_metrics(joules)["prefill"] == "prefill_energy_j"
    assert growth.basis("prefill_energy_j", joules) == "joules"
    joules.loc[(joules["metric"] == energies[0]) & (joules["context"] == 256), ["value", "reason"]] = np.nan, "no_gpu"
    assert growth.cost_metrics(joules)["prefill"] == "prefill_s"
    assert growth.basis("prefill_s", joules) == "seconds; joules not measured: the run used no GPU"


# Resamples and ratios.


@pytest.mark.parametrize(("n", "lowest"), [(2, 0.90), (3, 0.90), (5, 0.92), (10, 0.92)])
@pytest.mark.parametrize("in_turns", [True, False])
def test_a_ratio_s_interval_holds_the_true_ratio_as_often_as_it_says(n, lowest, in_turns):
    """Paired as 95 %, unpaired at least so; with a drift of 10 % from round to round, which pairing takes away."""
    held = []
    for one, other in simulated([polynomial(1, 2)] * 2, n, 0.01, in_turns=in_turns, drift=0.1 if in_turns else 0):
        _, drawn = crossovers.difference(one, other, 400)
        low, high = growth.interval(drawn)
        held.append((low <= 0) & (high >= 0))
        if in_turns:
            assert (high - low).max() < 0.5  # the drift of 10 % alone would make it wider with two rounds
    assert lowest <= np.mean(held) <= (0.985 if in_turns else 1)


@pytest.mark.parametrize("in_turns", [True, False])
def test_rounds_are_paired_only_if_they_were_measured_in_turns(in_turns):
    slow = np.array([1.0, 1.5, 0.8, 1.2, 1.1])
    made = points({"sdpa": lambda t: t * slow, "linear": lambda t: t * slow / 2}, n=5, in_turns=in_turns)
    found = growth.ratios(made, "forward_backward_s", "sdpa")
    assert (found["paired"] == in_turns).all() and found["ratio"].to_numpy() == pytest.approx(0.5)
    width = (found["high"] - found["low"]).max()
    assert width < 1e-9 if in_turns else width > 0.2
    known = [["s" if label == "sdpa" else "t"] * 5 for label in made["label"]]
    other_session = made.assign(sessions=pd.Series(known, index=made.index))
    assert not growth.ratios(other_session, "forward_backward_s", "sdpa")["paired"].any()
    said = growth_tables.conclusion(made, ["forward_backward_s"], "sdpa")[-1]
    assert ("the ratios are of rounds" in said) == in_turns and ("count as independent" in said) != in_turns


def test_one_process_has_no_interval_and_claims_nothing():
    made = points({"sdpa": lambda t: float(t), "linear": lambda t: t / 1e3})
    ratio = growth.ratios(made, "forward_backward_s", "sdpa")
    assert ratio["ratio"].to_numpy() == pytest.approx(1e-3) and ratio[["low", "high"]].isna().all(axis=None)
    (row,) = crossovers.crossovers(made, "forward_backward_s", ["sdpa"]).to_dict("records")
    assert row["becomes"] == "n = 1" and np.isnan(row["context"])
    assert growth.fits(made, "forward_backward_s")["sdpa"].p is None
    assert "nothing is claimed" in growth_tables.conclusion(made, ["forward_backward_s"], "sdpa")[-1]
    table = growth_tables.crossovers_table(made, ["forward_backward_s"], ["sdpa"])
    assert table.iloc[0, 2] == "n = 1: no claim"


# Exponents.


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_exponents_and_their_intervals(n):
    """Over the points where there are fewer than three processes, over the processes where there are more."""
    exact = growth.exponents(points({"sdpa": lambda t: 3e-9 * t**1.7}, n=n), "forward_backward_s", 256).iloc[0]
    assert exact["exponent"] == pytest.approx(1.7) and exact["n"] == 6
    covered, seeds = 0, 60
    for seed in range(seeds):
        made = points({"sdpa": lambda t: t**1.7}, n=n, noise=0.05, seed=seed)
        found = growth.exponents(made, "forward_backward_s", 1024).iloc[0]
        covered += found["low"] <= 1.7 <= found["high"]
        assert found["n"] == 4 and found["by"] == ("processes" if n > 2 else "points")
    assert abs(covered / seeds - 0.95) < near(0.95, seeds)
    table = growth_tables.exponents_table(made, 1024)
    assert table.loc[0, "intervals from"] == found["by"]
    bend = points({"sdpa": polynomial(1, 0, 1)}, n=n, noise=1e-6)  # no power of T: far off the line, well known
    width = growth.exponents(bend, "forward_backward_s", 256).eval("high - low").iloc[0]
    assert width < 1e-4 if n > 2 else width > 0.5


def test_a_row_says_what_a_mixer_costs_beside_the_reference_and_how_it_grows():
    costs = {
        "sdpa": lambda t: max(t, 1024) ** 2 / 8192,
        "mamba2": lambda t: 2.0 * t,
        "lost": lambda t: t if t < 8192 else None,
    }
    made = points(costs, n=3)
    memory = points({"sdpa": lambda t: t, "mamba2": lambda t: t / 4}, "peak_activation_bytes", n=3)
    token = points({"sdpa": lambda t: 2.0, "lost": lambda t: 1.0}, "decode_s_per_token", n=3)
    table = growth_tables.growth_table(pd.concat([made, memory, token]), "sdpa", 1500).set_index("variant")
    time, bytes_, decode, grows, holds = (table[column] for column in table)
    assert time.name == "Forward and backward of one layer, ÷ sdpa at 8,192" and grows.name.endswith("from 2,048")
    assert time.to_dict() == {"sdpa": "1", "mamba2": "2.00 [2.00, 2.00]", "lost": "–"}
    assert bytes_.to_dict() == {"sdpa": "1", "mamba2": "0.25 [0.25, 0.25]", "lost": "–"}
    assert decode.to_dict() == {"sdpa": "1", "mamba2": "–", "lost": "0.50 [0.50, 0.50]"}
    assert grows.to_dict() == {"sdpa": "2.00 [2.00, 2.00]", "mamba2": "1.00 [1.00, 1.00]", "lost": "1.00 [1.00, 1.00]"}
    assert holds.to_dict() == {"sdpa": "1.00 [1.00, 1.00]", "mamba2": "1.00 [1.00, 1.00]", "lost": "–"}
    with pytest.raises(UsageError, match="spda"):
        growth_tables.growth_table(made, "spda", 2048)


def test_an_interval_is_the_middle_95_percent():
    assert growth.interval(np.linspace(0, 1, 1001)) == pytest.approx((0.025, 0.975))


def test_two_rounds_are_drawn_as_wide_as_student_s():
    """Deviations of ±0.1 at each of two lengths: of a mean of two, one degree of freedom for each length."""
    costs = Costs("sdpa", np.array([256, 512]), np.array([[0.1, 1.1], [-0.1, 0.9]]), ((), ()))
    (drawn,) = growth.resamples([costs])
    widest = stats.t.ppf(0.975, 2) / min(stats.norm.ppf(0.975), 2) * np.sqrt(2) * 0.1
    assert np.abs(drawn - [0.0, 1.0]).max() == pytest.approx(widest)
    assert set(np.round((drawn[:, 0] / widest), 9)) == {-1.0, 0.0, 1.0}


def test_slopes_and_curves_go_through_geometric_means():
    """1, 1 and 8 are 2 in the geometric mean, 1 in the median and at the least."""
    skewed = points({"sdpa": lambda t: (1, 1, 8) if t < 1024 else (2, 2, 2)}, n=3, contexts=CONTEXTS[:4])
    assert growth.exponents(skewed, "forward_backward_s", 256).loc[0, "exponent"] == pytest.approx(0)
    fit = growth.fits(points({"sdpa": lambda t: (1, 1, 8)}, n=3), "forward_backward_s")["sdpa"]
    assert fit.coefficients == pytest.approx([2, 0, 0])


def test_of_one_process_the_slope_s_interval_is_student_s_over_the_points():
    costs = dict(zip(CONTEXTS, (1.0, 2.3, 3.8, 8.1, 15.0, 33.0), strict=True))
    found = growth.exponents(points({"sdpa": costs.get}), "forward_backward_s", 256).iloc[0]
    line = stats.linregress(np.log(CONTEXTS), np.log(list(costs.values())))
    half = stats.t.ppf(0.975, 4) * line.stderr
    assert (found["low"], found["high"]) == pytest.approx((line.slope - half, line.slope + half))


def test_three_lengths_make_no_curve_four_do_and_a_decoded_token_s_is_straight():
    for count in (3, 4):
        made = points({"sdpa": lambda t: 1.0 + t}, "decode_s_per_token", CONTEXTS[:count])
        found = growth.fits(made, "decode_s_per_token")
        assert [len(fit.coefficients) for fit in found.values()] == ([] if count == 3 else [2])


@pytest.mark.parametrize(("p", "contradicted"), [(None, False), (0.049, True), (0.051, False)])
def test_a_curve_is_contradicted_below_five_percent(p, contradicted):
    assert growth.Fit(np.ones(3), None, p, 3).contradicted is contradicted


def test_numbers_stand_in_the_units_that_their_columns_name():
    made = pd.concat([points({"sdpa": lambda t, cost=cost: cost}, metric, (256,)) for metric, cost in
                      (("prefill_s", 0.5), ("decode_s_per_token", 0.25), ("forward_backward_s", 2.0),
                       ("cache_bytes", 3 * 2**20), ("peak_activation_bytes", 5 * 2**20))])  # fmt: skip
    row = growth_tables.points_table(made).iloc[0]
    assert row["Prefill of the model, ms"] == "500" and row["Decoding a token, ms"] == "250"
    assert row["Forward and backward of one layer, ms"] == "2,000" and row["Cache, MiB"] == "3"
    assert row["Activation memory of one layer, MiB"] == "5"


def test_too_few_lengths_give_no_interval_and_no_fit():
    made = points({"sdpa": lambda t: float(t) if t < 1024 else None, "mla": lambda t: 1.0 if t < 512 else None})
    found = growth.exponents(made, "forward_backward_s", 256).set_index("label")
    assert found.loc["sdpa", "exponent"] == pytest.approx(1) and np.isnan(found.loc["sdpa", "low"])
    assert np.isnan(found.loc["mla", "exponent"])
    assert growth.fits(made, "forward_backward_s") == {}
    table = growth_tables.fits_table(made, "forward_backward_s")
    assert set(table.drop(columns=["variant", "the repeats"]).to_numpy().ravel()) == {"too few lengths measured"}


# Fits.


@given(st.lists(st.floats(0.01, 100), min_size=6, max_size=6))
def test_coefficients_are_never_negative_and_the_least_squares_of_all_such(costs):
    """Against scipy's bounded solver, another algorithm."""
    made = points({"sdpa": dict(zip(CONTEXTS, costs, strict=True)).get})
    found = growth.fits(made, "forward_backward_s")["sdpa"].coefficients
    terms = growth.powers(CONTEXTS, 2) / np.array(costs)[:, None]
    best = optimize.lsq_linear(terms, np.ones(6), bounds=(0, np.inf), method="bvls")
    assert (found >= 0).all()
    assert ((terms @ found - 1) ** 2).sum() == pytest.approx(2 * best.cost, rel=1e-6, abs=1e-9)


def test_fits_recover_known_coefficients_and_their_intervals_cover():
    true, covered, seeds = np.array([0.02, 0.03, 0.01]), [], 80
    exact = growth.fits(points({"sdpa": polynomial(*true)}, n=3), "forward_backward_s")["sdpa"]
    assert exact.coefficients == pytest.approx(true) and exact.at([2048])[0] == pytest.approx(0.12)
    assert not exact.contradicted and exact.intervals == pytest.approx(np.stack([true, true], axis=1))
    for seed in range(seeds):
        made = points({"sdpa": polynomial(*true)}, n=5, noise=0.03, seed=seed)
        fit = growth.fits(made, "forward_backward_s", draws=300)["sdpa"]
        if not fit.contradicted:
            low, high = fit.intervals.T
            covered.append((low <= true) & (true <= high))
    assert len(covered) > seeds * (0.95 - near(0.95, seeds))  # the true curve is contradicted in one of twenty
    assert (np.mean(covered, axis=0) > 0.95 - near(0.95, seeds)).all()


def test_an_intercept_below_nothing_is_none():
    """As the committed sdpa's, -2.8 ms: superlinear costs, whose unbounded line would start below 0."""
    made = points({"sdpa": lambda t: t**1.5}, n=2, noise=0.01)
    assert growth.fits(made, "forward_backward_s")["sdpa"].coefficients[0] == 0


@pytest.mark.parametrize(
    ("curve", "noise", "contradicted"),
    [(floored(1, 0.3, 0.4), 0.003, True), (floored(1, 0.3, 0.4), 0.03, True), (polynomial(1, 1, 1), 0.03, False)],
    ids=["floor", "floor, noisy", "quadratic"],
)
def test_a_fit_that_the_repeats_contradict_has_no_interval_and_says_so(curve, noise, contradicted):
    made = points({"sdpa": curve}, n=5, noise=noise)
    fit = growth.fits(made, "forward_backward_s", draws=50)["sdpa"]
    assert fit.contradicted == contradicted and (fit.intervals is None) == contradicted
    row = growth_tables.fits_table(made, "forward_backward_s").iloc[0]
    assert ("contradict this curve" in row["the repeats"]) == contradicted
    assert ("[" in row["b, ms per K"]) != contradicted


def test_lack_of_fit_is_the_f_test_of_statsmodels():
    """A straight line in a covariate against one mean per length, with an effect per round in both."""
    random, x = np.random.default_rng(3), np.arange(6.0)
    logs = 0.1 * x**1.5 + 0.05 * random.standard_normal((4, 6)) + random.standard_normal((4, 1))
    fitted = sm.OLS(logs.mean(axis=0), sm.add_constant(x)).fit().fittedvalues
    rounds, lengths = np.repeat(np.eye(4), 6, axis=0), np.tile(np.eye(6), (4, 1))
    line = sm.OLS(logs.ravel(), np.column_stack([rounds, np.tile(x, 4)])).fit()
    means = sm.OLS(logs.ravel(), np.column_stack([rounds, lengths[:, 1:]])).fit()
    assert growth.lack_of_fit(logs, fitted, 2) == pytest.approx(means.compare_f_test(line)[1])
    assert growth.lack_of_fit(logs[:1], fitted, 2) is None and growth.lack_of_fit(logs, fitted, 6) is None


# Crossovers.


@pytest.mark.parametrize("contexts", [CONTEXTS, tuple(256 * 2**power for power in range(9))], ids=["6", "9"])
@pytest.mark.parametrize("n", [3, 5])
def test_curves_that_are_alike_do_not_cross(n, contexts):
    alike = simulated([polynomial(1, 1, 1)] * 2, n, 0.03, contexts=contexts)
    rows = [crossovers.compared(*pair, draws=500) for pair in alike]
    assert sum(len(crossed(found)) > 0 for found in rows) <= 0.05 * SEEDS
    # Nor is one of them surely cheaper up to the longest more often than in one of twenty.
    claimed = np.mean([found[0]["becomes"] != "inconclusive" for found in rows])
    assert claimed <= 0.05 + near(0.05, SEEDS)


@pytest.mark.parametrize("n", [3, 5])
def test_curves_with_one_floor_do_not_cross_where_both_lie_on_it(n):
    pairs = simulated([floored(2, 0.2, 0.5), floored(2, 0.9, 0.05)], n, 0.01)
    assert sum(len(crossed(crossovers.compared(*pair, draws=500))) > 0 for pair in pairs) <= 0.05 * SEEDS


QUADRATIC = [polynomial(1, 0, 1), polynomial(2.5, 0.5)]  # K² - K/2 - 3/2 = 0: K = 3/2
FLOORED = [floored(1, 0.3, 0.4), polynomial(1.5, 0.6)]  # 0.4 K² - 0.3 K - 1.5 = 0
BOTH_FLOORED = [floored(2, 1, 0.25), floored(3.1, 1.3, 0.02)]  # 0.25 K² + K = 3.1, where the other is on its floor
CROSSING = {
    "quadratic": (QUADRATIC, 1536),
    "floored": (FLOORED, 1024 * (0.3 + np.sqrt(0.09 + 2.4)) / 0.8),
    "both floored": (BOTH_FLOORED, 1024 * (-1 + np.sqrt(1 + 3.1)) / 0.5),
}


@pytest.mark.parametrize("noise", [0.003, 0.01, 0.03])
@pytest.mark.parametrize("curves", CROSSING)
def test_a_crossover_s_interval_holds_the_true_one(curves, noise):
    pair, true = CROSSING[curves]
    held = []
    for one, other in simulated(
        pair, 5, noise, seeds=200, drift=0.1
    ):  # a slow round must not hide that a curve does not fit
        (row,) = crossovers.compared(one, other, draws=400)
        held.append(row["low"] <= true <= row["high"])
        assert row["becomes"] == "more expensive" and row["until"] == 8192
    assert 0.90 <= np.mean(held) <= 0.99


def test_a_crossover_by_hand_both_ways_round():
    costs = {"sdpa": polynomial(1, 0, 1), "linear": polynomial(2.5, 0.5), "lsh": polynomial(200.0, 30.0)}
    made = points(costs | {"flash": polynomial(1, 0, 1)}, n=5, noise=0.003)
    found = crossovers.crossovers(made, "forward_backward_s", ["sdpa", "linear"]).set_index(["against", "label"])
    there, back = found.loc[("sdpa", "linear")], found.loc[("linear", "sdpa")]
    assert there["becomes"] == "cheaper" and back["becomes"] == "more expensive"
    for row in (there, back):
        assert row["context"] == pytest.approx(1536, rel=0.01) and not row["between"] and row["n"] == 5
        assert 1500 < row["low"] < 1536 < row["high"] < 1570
    lsh = found.loc[("sdpa", "lsh")]
    assert (lsh["becomes"], lsh["context"], lsh["first"]) == ("more expensive", 256, 256)
    assert lsh["ratio_low"] < lsh["ratio"] < lsh["ratio_high"]
    assert lsh["ratio"] == pytest.approx(207.5 / 1.0625, rel=0.02)
    assert found.loc[("sdpa", "flash"), "becomes"] == "inconclusive"
    assert ("sdpa", "sdpa") not in found.index
    words = growth_tables.crossovers_table(made, ["forward_backward_s"], ["sdpa"]).set_index("variant").iloc[:, 1]
    assert words["linear"].startswith("cheaper from 1,53") and words["linear"].endswith("] up to 8,192")
    assert words["lsh"].startswith("more expensive at every length: 19") and words["lsh"].endswith("] at 256")
    assert words["flash"].startswith("inconclusive: ") and words["flash"].endswith("] at 8,192")


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("factor", [1 / 6, 6])
def test_a_sixfold_difference_is_told_with_its_sign_and_from_where_on(n, factor):
    """Alike up to 1,024, then apart by a factor that grows to six."""
    true = dict(zip(CONTEXTS, [1, 1, 1, factor**0.4, factor**0.7, factor], strict=True))
    held = []
    for pair in simulated([true.get, lambda _: 1.0], n, 0.05, seeds=100):
        *_, row = crossovers.compared(*pair, draws=400)
        assert row["becomes"] == ("cheaper" if factor < 1 else "more expensive") and row["until"] == 8192
        if "ratio" in row:
            held.append(row["ratio_low"] <= true[row["context"]] <= row["ratio_high"])
            assert 512 <= row["context"] <= 4096
            assert (row["ratio_high"] < 1) if factor < 1 else (row["ratio_low"] > 1)
    assert len(held) > 90 and np.mean(held) > 0.8  # fewer than 95: the length was chosen for its ratio


def test_two_processes_give_no_crossover_but_the_sign_that_lasts():
    made = points(dict(zip(("sdpa", "linear"), QUADRATIC, strict=True)), n=2, noise=0.003)
    (row,) = crossovers.crossovers(made, "forward_backward_s", ["sdpa"]).to_dict("records")
    assert (row["becomes"], row["context"], row["n"]) == ("cheaper", 2048, 2) and np.isnan(row["low"])


def test_where_no_curve_fits_a_crossover_lies_between_two_measured_lengths():
    steps = {256: 1, 512: 3, 1024: 4, 2048: 16, 4096: 18, 8192: 60}
    made = points({"sdpa": steps.get, "mine": polynomial(0, 5)}, n=5, noise=0.002)
    (row,) = crossovers.crossovers(made, "forward_backward_s", ["sdpa"]).query("context > 1024").to_dict("records")[:1]
    # mine 5 against 4 at 1,024, 10 against 16 at 2,048: on the straight line in logarithms.
    where = 1024 * 2 ** (np.log(5 / 4) / (np.log(5 / 4) + np.log(16 / 10)))
    assert row["between"] and (row["low"], row["high"], row["until"]) == (1024, 2048, 2048)
    assert row["context"] == pytest.approx(where, rel=0.01) and row["becomes"] == "cheaper"
    words = growth_tables.crossovers_table(made, ["forward_backward_s"], ["sdpa"]).iloc[0, 2]
    assert "between the measured 1,024 and 2,048 up to 2,048; " in words


def test_what_was_not_measured_at_the_same_lengths_is_not_compared():
    made = points({"sdpa": lambda t: 1.0 if t < 1024 else None, "mla": lambda t: 1.0 if t >= 1024 else None}, n=3)
    assert crossovers.crossovers(made, "forward_backward_s", ["sdpa"]).empty
    assert "nothing to compare" in growth_tables.conclusion(made, ["forward_backward_s"], "sdpa")[0]
    for ask in (
        lambda: growth_tables.crossovers_table(made, ["forward_backward_s"], ["flash"]),
        lambda: growth_tables.conclusion(made, ["forward_backward_s"], "flash"),
    ):
        with pytest.raises(UsageError, match="no points of flash; name some of sdpa, mla"):
            ask()


@pytest.mark.parametrize("lost", [("mla",), ("sdpa",), ("sdpa", "mla")])
def test_a_variant_that_ran_out_at_every_length_stops_nothing_else(lost):
    costs = dict.fromkeys(("sdpa", "mla"), polynomial(1, 1)) | dict.fromkeys(lost, lambda t: None)
    made = every(costs, n=3)
    for draw in (FIGURES["time"], FIGURES["cache"]):
        draw(made)
    said = growth_tables.conclusion(made, ["forward_backward_s"], "sdpa")
    assert "nothing to compare" in said[0]
    assert said[1].startswith("No point was measured" if len(lost) == 2 else "3 processes for each point")
    assert crossovers.crossovers(made, "forward_backward_s", ["sdpa"]).empty
    assert len(growth_tables.exponents_table(made, 256)) == len(growth_tables.fits_table(made, "prefill_s")) == 2
    if len(lost) == 1:
        found = crossovers.decision_map(made, "prefill_s", "decode_s_per_token")
        assert found.labels == [label for label in ("sdpa", "mla") if label not in lost]
        FIGURES["map"](made)


def test_the_conclusion_puts_each_variant_on_the_side_where_its_interval_is():
    costs = {"sdpa": lambda t: t, "linear": lambda t: t / 4, "mla": lambda t: t * 2, "flash": lambda t: t}
    sentence, *_, last = growth_tables.conclusion(points(costs, n=3, noise=0.005), ["forward_backward_s"], "sdpa")
    assert sentence.startswith("Forward and backward of one layer, over sdpa's at 8,192 tokens (n = 3): ")
    less, more, alike = sentence.split(": ", 1)[1].split("; ")
    assert less.startswith("costs less: linear 0.25 [") and more.startswith("costs more: mla 2.0")
    assert alike.startswith("inconclusive: flash 1.0") and not {"flash", "mla"} & set(less.split())
    assert not {"flash", "linear"} & set(more.split()) and last.startswith("3 processes for each point allow")


# The decision map.


def both(read, write, **words):
    return pd.concat([points(read, "prefill_s", **words), points(write, "decode_s_per_token", **words)])


def mapped(read, write, lengths=6, shares=3, **words):
    return crossovers.decision_map(both(read, write, **words), "prefill_s", "decode_s_per_token", lengths, shares)


def test_the_decision_map_of_a_constructed_case():
    """Reading costs sdpa K² and linear K, so 2 and 1 a token at T = 2,048 and alike at 1,024; writing is sdpa's."""
    read = {"sdpa": polynomial(0, 0, 1), "linear": polynomial(0, 1)}
    write = {"sdpa": polynomial(0.0001), "linear": polynomial(0.01)}
    found = mapped(read, write, n=3, noise=1e-6)
    assert found.contexts == pytest.approx(CONTEXTS) and list(found.shares) == [0, 0.5, 1]
    cheapest = np.array(found.labels)[found.cheapest]
    assert list(cheapest[0]) == ["sdpa", "sdpa", cheapest[0, 2], "linear", "linear", "linear"]
    assert list(cheapest[2]) == ["sdpa"] * 6
    # Half and half at 8,192: sdpa (8/1024 + 0.0001) / 2, linear (1/1024 + 0.01) / 2.
    assert cheapest[1, 5] == "sdpa" and not found.open[0, 3:].any() and not found.open[2].any()
    sdpa, linear = found.labels.index("sdpa"), found.labels.index("linear")
    assert found.over[sdpa, 0] == pytest.approx([1, 1, 1, 2, 4, 8], rel=1e-3)
    assert found.over[linear, 1, 5] == pytest.approx((1 / 1024 + 0.01) / (8 / 1024 + 0.0001), rel=1e-3)


def test_the_cheapest_is_compared_with_all_others_and_not_with_the_second_alone():
    """Best 1.0 ± 0.04, second 1.2 ± 0.04, third 1.25 ± 0.99: the third may be the cheapest."""
    unit = stats.norm.ppf((np.arange(5) + 0.5) / 5)
    unit = unit / unit.std(ddof=1) * np.sqrt(5) / stats.t.ppf(0.975, 4)  # processes whose 95 % interval is ± 1
    three = {"sdpa": (1.0, 0.04), "linear": (1.2, 0.04), "lsh": (1.25, 0.99)}
    turn = {"sdpa": 0, "linear": 2, "lsh": 1}
    cost = {
        name: lambda t, mean=mean, half=half, by=turn[name]: mean * (1 + half / mean) ** np.roll(unit, by)
        for name, (mean, half) in three.items()
    }
    found = mapped(cost, cost, n=5, in_turns=False)
    best = found.labels.index("sdpa")
    assert (found.cheapest[2] == best).all() and found.open[2].all()
    assert found.tied[found.labels.index("lsh"), 2].all() and not found.tied[found.labels.index("linear"), 2].any()
    two = {name: cost[name] for name in ("sdpa", "linear")}
    assert not mapped(two, two, n=5, in_turns=False).open.any()
    table = growth_tables.map_table(both(cost, cost, n=5, in_turns=False), found)
    assert table.loc[0, "cheapest"] == "sdpa or lsh (tied)" and table.loc[0, "next"] == "linear"
    assert table.loc[0, "behind the cheapest"].startswith("x 1.20 [") and table["of the map"].iloc[0] == "100%"


def test_a_region_says_the_least_the_middle_and_the_most_that_the_next_is_behind():
    over = np.array([[[1.0, 1.0, 1.0]], [[1.1, 1.2, 9.0]]])
    found = crossovers.Map(["sdpa", "mla"], np.array([256, 512, 1024]), np.array([0.0]), np.zeros((1, 3), int),
                           np.zeros((2, 1, 3), bool), over, 3)  # fmt: skip
    (row,) = crossovers.regions(found).to_dict("records")
    assert row == {"labels": ["sdpa"], "share": 1, "next": "mla", "low": 1.1, "middle": 1.2, "high": 9.0}


def test_two_that_are_alike_tie_and_the_map_leaves_out_what_ran_out():
    early = polynomial(1e-6)
    read = {"sdpa": polynomial(0.1, 1), "flash": polynomial(0.1, 1.001), "lsh": polynomial(1, 10)}
    write = {"sdpa": polynomial(1, 1), "flash": polynomial(1, 1), "lsh": polynomial(10, 10)}
    gone = {"mla": lambda t: early(t) if t < 4096 else None}
    found = mapped(read | gone, write | gone, lengths=101, shares=21, n=3, noise=0.05)
    short, long = found.contexts < 2040, found.contexts > 2060
    assert (np.array(found.labels)[found.cheapest[:, short]] == "mla").all() and not found.open[:, short].any()
    assert "mla" not in np.array(found.labels)[found.cheapest[:, long]]
    assert found.open[:, long].mean() > 0.8 and not found.tied[found.labels.index("mla"), :, long].any()
    regions = crossovers.regions(found)
    assert regions["share"].sum() == pytest.approx(1) and regions.loc[0, "labels"] == ["mla"]
    tied = regions[regions["labels"].map(len) == 2].iloc[0]
    assert tied["labels"] == ["sdpa", "flash"] and tied["next"] == "lsh" and 8 < tied["low"] <= tied["high"] < 13


def test_a_map_of_one_variant_of_one_process_and_of_none():
    one = {"sdpa": polynomial(1, 1)}
    alone = mapped(one, one, n=3)
    assert not alone.open.any() and (alone.over == 1).all()
    (row,) = crossovers.regions(alone).to_dict("records")
    assert (row["labels"], row["share"], row["next"]) == (["sdpa"], 1.0, None) and np.isnan(row["low"])
    assert growth_tables.map_table(both(one, one, n=3), alone).iloc[0].tolist() == ["sdpa", "100%", "–", "–"]
    two = one | {"linear": polynomial(0.01, 0.01)}
    assert mapped(two, two, n=1).open.all()  # a hundredfold difference, but nobody knows how much it scatters
    nobody = {"sdpa": lambda t: 1.0 if t == 256 else None}
    with pytest.raises(UsageError, match="needs a variant that prefills and decodes at two lengths"):
        mapped(nobody, nobody)


# Figures.


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


COSTS = {"sdpa": polynomial(1, 0, 1), "linear": polynomial(2, 1), "mine": lambda t: t / 1e3 if t < 4096 else None}


def every(costs=COSTS, n=3, **words):
    return pd.concat([points(costs, metric, n=n, **words) for metric in METRICS], ignore_index=True)


FIGURES = {
    "time": lambda made: growth_figures.ratio_figure(made, ["forward_backward_s"]),
    "growth": lambda made: growth_figures.growth_figure(made, "forward_backward_s", 1024),
    "cache": growth_figures.cache_and_decode_figure,
    "map": growth_figures.decision_map_figure,
}


def test_ratio_lines_bands_and_names_are_those_of_the_ratios():
    made = every(noise=0.02)
    (axes,), (curves, slopes) = FIGURES["time"](made).axes, FIGURES["growth"](made).axes
    found = growth.ratios(made, "forward_backward_s", "sdpa")
    lines = {tuple(line.get_ydata()) for line in axes.lines}
    bands = [band.get_paths()[0].vertices[:, 1] for band in axes.collections]
    for _, own in found.groupby("label"):
        assert tuple(own["ratio"]) in lines
        assert any(
            b.min() == pytest.approx(own["low"].min()) and b.max() == pytest.approx(own["high"].max()) for b in bands
        )
    assert len(bands) == 2 and (1, 1) in lines and "n = 3 processes" in axes.get_title(loc="left")
    names = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert list(names) == ["linear", "mine", "sdpa"]  # from below, at each line's end
    assert (np.diff(list(names.values())) >= growth_figures.GAP - 1e-9).all()
    measured = {tuple(np.round(line.get_ydata(), 6)) for line in curves.lines}
    values = growth.measured(made, "forward_backward_s", "linear")["value"] / 1e-3
    assert tuple(np.round(values, 6)) in measured
    assert {line.get_xdata()[0] for line in slopes.lines if line.get_linestyle() == "--"} == {1, 2}
    exponents = growth.exponents(made, "forward_backward_s", 1024).set_index("label")
    spans = [tuple(line.get_xdata()) for line in slopes.lines]
    assert tuple(exponents.loc["linear", ["low", "high"]]) in spans and "over processes" in slopes.get_title(loc="left")
    (legend,) = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == "out of memory"


def test_names_of_lines_that_end_together_stand_apart_and_inside_the_panel():
    made = every({f"v{index}": polynomial(1, 1) for index in range(12)} | {"sdpa": polynomial(1, 1)})
    (axes,) = FIGURES["time"](made).axes
    heights = np.array([text.xyann[1] for text in axes.texts])
    assert len(heights) == 13 and (np.diff(heights) >= growth_figures.GAP - 1e-9).all() and heights.max() <= 1 + 1e-9


def test_without_the_reference_or_an_interval_the_figure_says_so():
    made = every(n=1)
    assert "n = 1: no interval" in FIGURES["time"](made).axes[0].get_title(loc="left")
    without = made[made["label"] != "sdpa"]
    said = [text.get_text() for text in FIGURES["time"](without).axes[0].texts]
    assert said == ["Forward and backward of one layer: no ratios,\nsdpa is not among the variants"]
    assert FIGURES["map"](without).axes[0].get_title(loc="left").startswith("The best variant")


def test_the_map_shows_the_reference_s_cost_over_the_best_and_names_all_that_tie():
    read, write = ({name: COSTS[name] for name in ("sdpa", "linear")} for _ in "ab")
    made = pd.concat([both(read, write, n=3, noise=1e-6), points(read, n=3)])
    found = crossovers.decision_map(made, "prefill_s", "decode_s_per_token")
    axes = growth_figures.decision_map_figure(made).axes[0]
    heat = np.asarray(axes.collections[0].get_array()).reshape(found.over.shape[1:])
    assert heat == pytest.approx(found.over[found.labels.index("sdpa")]) and heat.max() > 6
    assert {text.get_text() for text in axes.texts} == {"sdpa", "linear"}
    assert "not told apart" not in axes.get_title(loc="left")
    alike = {"sdpa": polynomial(1, 1), "flash": polynomial(1, 1)}
    tied = growth_figures.decision_map_figure(pd.concat([both(alike, alike, n=3, noise=0.1), points(alike, n=3)]))
    assert "sdpa or\nflash" in [text.get_text() for text in tied.axes[0].texts]
    assert "or: not told apart" in tied.axes[0].get_title(loc="left")
    many = {name: polynomial(1, 1) for name in ("sdpa", "flash", "gqa", "mla")}
    crowd = growth_figures.decision_map_figure(pd.concat([both(many, many, n=3, noise=0.1), points(many, n=3)]))
    assert "more than 3\nare not told apart" in [text.get_text() for text in crowd.axes[0].texts]


@pytest.mark.parametrize("name", ["time", "growth", "map"])
def test_figures_are_drawn_byte_identical(name, tmp_path, monkeypatch):
    made = every(noise=0.01)
    monkeypatch.setattr(style, "picture", plt.close)  # for a page, which is not asked here
    for turn in ("one", "two"):
        style.save(FIGURES[name](made), tmp_path / turn, name)
    for kind in ("svg", "png"):
        one, two = ((tmp_path / turn / f"{name}.{kind}").read_bytes() for turn in ("one", "two"))
        assert one == two
