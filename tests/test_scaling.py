"""Each point comes from a process of its own or says what ran out; fits find what points were made of."""

import json

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from scipy import stats

from lib import paths, record
from lib.analysis import growth, style
from lib.attention import STUDY_ORDER
from lib.errors import UsageError
from lib.record import scaling as stored
from lib.study import plan, scaling

CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)
DEFAULTS = {name: line.default for name, line in plan.known_parameters("scaling.ipynb").items()}
SMALL = DEFAULTS | {"width": 32, "contexts": [16, 24], "new_tokens": 2, "repeats": 2, "device": "cpu"}


def points(costs, metric="forward_backward_s", contexts=CONTEXTS):
    """A frame as `lib.record.scaling.frame` gives it: `costs` is label to function of T; None where memory ran out."""
    rows = []
    for label, cost in costs.items():
        for context in contexts:
            value = cost(context)
            row = {"label": label, "title": label, "metric": metric, "context": context, "outcome": "measured"}
            row |= {"says": "", "reason": None, "samples": [value], "median": value, "minimum": value, "n": 1}
            if value is None:
                row |= {"outcome": "out_of_memory", "says": "made up", "samples": []}
                row |= {"median": np.nan, "minimum": np.nan, "n": 0}
            rows.append(row)
    return pd.DataFrame(rows)


def polynomial(*coefficients, noise=0.0, generator=None):
    def cost(context):
        value = sum(c * (context / growth.UNIT) ** power for power, c in enumerate(coefficients))
        return value * (1 + noise * generator.standard_normal()) if noise else value

    return cost


def test_fits_recover_known_coefficients_and_their_intervals_cover():
    generator, true = np.random.default_rng(0), np.array([0.02, 0.03, 0.01])
    covered = []
    for _ in range(300):
        made = points({"sdpa": polynomial(*true, noise=0.03, generator=generator)})
        low, high = growth.fits(made, "forward_backward_s")["sdpa"].intervals().T
        covered.append((low <= true) & (true <= high))
    lowest, highest = stats.binom.interval(0.999, 300, 0.95)
    assert all(lowest <= count <= highest for count in np.sum(covered, axis=0))
    exact = growth.fits(points({"sdpa": polynomial(*true)}), "forward_backward_s")["sdpa"]
    assert exact.coefficients == pytest.approx(true) and exact.at([2048])[0] == pytest.approx(0.12)
    assert (exact.first, exact.last) == (256, 8192)


def test_exponents_and_their_intervals():
    generator = np.random.default_rng(1)
    exact = growth.exponents(points({"sdpa": lambda t: 3e-9 * t**1.7}), "forward_backward_s", 256).iloc[0]
    assert exact["exponent"] == pytest.approx(1.7) and exact["n"] == 6
    covered = 0
    for _ in range(300):
        made = points({"sdpa": lambda t: t**1.7 * np.exp(0.05 * generator.standard_normal())})
        found = growth.exponents(made, "forward_backward_s", 1024).iloc[0]
        covered += found["low"] <= 1.7 <= found["high"]
        assert found["n"] == 4
    assert stats.binom.interval(0.999, 300, 0.95)[0] <= covered <= stats.binom.interval(0.999, 300, 0.95)[1]


def test_too_few_lengths_give_no_interval_and_no_fit():
    made = points({"sdpa": lambda t: float(t) if t < 1024 else None, "mla": lambda t: 1.0 if t < 512 else None})
    found = growth.exponents(made, "forward_backward_s", 256).set_index("label")
    assert found.loc["sdpa", "exponent"] == pytest.approx(1) and np.isnan(found.loc["sdpa", "low"])
    assert np.isnan(found.loc["mla", "exponent"])
    assert growth.fits(made, "forward_backward_s") == {}
    table = growth.fits_table(made, "forward_backward_s")
    assert set(table.drop(columns="variant").to_numpy().ravel()) == {"too few lengths measured"}


def test_a_crossover_by_hand():
    """1 + K² and 2.5 + K/2 meet where K² - K/2 - 3/2 = 0: at K = 3/2, 1,536 tokens."""
    generator = np.random.default_rng(2)
    costs = {
        "sdpa": polynomial(1, 0, 1, noise=0.005, generator=generator),
        "linear": polynomial(2.5, 0.5, noise=0.005, generator=generator),
        "lsh": polynomial(200.0, 30.0, noise=0.005, generator=generator),
        "flash": lambda t: polynomial(1, 0, 1)(t),
    }
    found = growth.crossovers(growth.fits(points(costs), "forward_backward_s"), ["sdpa"]).set_index("label")
    assert found.loc["linear", "becomes"] == "cheaper"
    assert found.loc["linear", "low"] < 1536 < found.loc["linear", "high"]
    assert found.loc["linear", "context"] == pytest.approx(1536, rel=0.05)
    assert found.loc["lsh", "becomes"] == "more expensive throughout"
    assert found.loc["flash", "becomes"] == "inconclusive"
    assert "sdpa" not in found.index


def test_the_decision_map_of_a_constructed_case():
    """Reading costs sdpa K² and linear K, so 2 and 1 a token at T = 2,048 and alike at 1,024; writing is sdpa's."""
    read = {"sdpa": polynomial(0, 0, 1), "linear": polynomial(0, 1)}
    write = {"sdpa": polynomial(0.0001), "linear": polynomial(0.01)}
    prefill = growth.fits(points(read, "prefill_s"), "prefill_s")
    decode = growth.fits(points(write, "decode_s_per_token"), "decode_s_per_token")
    found = growth.decision_map(prefill, decode, lengths=6, shares=3)
    assert found.contexts == pytest.approx(CONTEXTS) and list(found.shares) == [0, 0.5, 1]
    cheapest = np.array(found.labels)[found.cheapest]
    assert list(cheapest[0]) == ["sdpa", "sdpa", cheapest[0, 2], "linear", "linear", "linear"]
    assert list(cheapest[2]) == ["sdpa"] * 6
    # Half and half at 8,192: sdpa (8/1024 + 0.0001) / 2, linear (1/1024 + 0.01) / 2.
    assert cheapest[1, 5] == "sdpa" and not found.overlaps[0, 3:].any() and not found.overlaps[2].any()


def test_the_map_is_hatched_where_the_cheapest_two_overlap_and_leaves_out_what_ran_out():
    def noisy(a, b, seed):
        return polynomial(a, b, noise=0.05, generator=np.random.default_rng(seed))

    read = {"sdpa": noisy(0.1, 1, 0), "flash": noisy(0.1, 1.001, 1), "mla": lambda t: 1e-6 if t < 4096 else None}
    write = {"sdpa": noisy(1, 1, 2), "flash": noisy(1, 1, 3), "mla": lambda t: 1e-6 if t < 4096 else None}
    made = pd.concat([points(read, "prefill_s"), points(write, "decode_s_per_token")])
    found = growth.decision_map(*(growth.fits(made, metric) for metric in ("prefill_s", "decode_s_per_token")))
    short, long = found.contexts < 2040, found.contexts > 2060
    assert (np.array(found.labels)[found.cheapest[:, short]] == "mla").all() and not found.overlaps[:, short].any()
    assert "mla" not in np.array(found.labels)[found.cheapest[:, long]]
    assert found.overlaps[:, long].mean() > 0.9


def test_a_map_of_one_variant_overlaps_nothing_and_of_none_is_refused():
    prefill = growth.fits(points({"sdpa": polynomial(1, 1)}, "prefill_s"), "prefill_s")
    decode = growth.fits(points({"sdpa": polynomial(1, 1)}, "decode_s_per_token"), "decode_s_per_token")
    assert not growth.decision_map(prefill, decode).overlaps.any()
    with pytest.raises(UsageError, match="at least four measured lengths"):
        growth.decision_map({}, decode)


GREEDY = """
import torch
from lib.attention.sdpa import Attention as Sdpa


class Attention(Sdpa):
    def forward(self, hidden_states, **words):
        if hidden_states.shape[1] >= 24:
            torch.empty(2**60, dtype=torch.uint8)
        return super().forward(hidden_states, **words)
"""
SLOW = GREEDY.replace("torch.empty(2**60, dtype=torch.uint8)", "__import__('time').sleep(60)")
DYING = GREEDY.replace("torch.empty(2**60, dtype=torch.uint8)", "__import__('os')._exit(3)")


def measured(folder, **changes):
    said = []
    failed = scaling.measure_all(scaling.checked(SMALL | changes), folder, said.append)
    return failed, said


def test_what_runs_out_of_memory_is_a_point_and_everything_else_is_measured(tmp_path):
    (tmp_path / "greedy.py").write_text(GREEDY)
    failed, _ = measured(tmp_path / "out", variants=["sdpa", str(tmp_path / "greedy.py")], rounds=2)
    assert failed == []
    found = stored.load_all(tmp_path / "out")
    greedy, sdpa = found
    assert (greedy.label, sdpa.label) == ("greedy", "sdpa") and sdpa.attention == "sdpa"
    for part in stored.METRICS:
        lost = greedy.point(part, 24)
        assert lost.outcome == "out_of_memory" and "can't allocate memory" in lost.says and not lost.samples
        assert greedy.point(part, 16).outcome == sdpa.point(part, 24).outcome == "measured"
    layer, model = sdpa.point("layer", 24), sdpa.point("model", 24)
    assert layer.rounds == 2 and len(layer.samples["forward_backward_s"]) == 4
    assert model.samples["cache_bytes"] == [2 * 32 * 26 * 4] * 2  # keys and values, C, T and what was decoded, fp32
    assert model.null_reasons == dict.fromkeys(("prefill_energy_j", "decode_energy_j_per_token"), "no_gpu")
    table = growth.unmeasured(stored.frame(found))
    assert set(table[table["variant"] == "greedy"]["what"]) == {"layer", "model"}
    assert "out of memory" in set(growth.points_table(stored.frame(found)).iloc[3])


def test_what_takes_too_long_is_a_point_and_longer_ones_are_not_tried(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    changes = {"variants": [str(tmp_path / "slow.py")], "contexts": [24, 32], "time_limit_s": 1.0}
    assert measured(tmp_path / "out", **changes)[0] == []
    (slow,) = stored.load_all(tmp_path / "out")
    assert [point.outcome for point in slow.points] == ["over_time"] * 4
    assert slow.point("layer", 24).says == "not done within 1 s"
    assert slow.point("layer", 32).says == "not tried: 24 tokens were over the time limit"


def test_a_process_that_dies_is_said_and_leaves_no_point(tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    failed, said = measured(tmp_path / "out", variants=[{"attention": str(tmp_path / "dying.py"), "label": "d"}])
    assert failed == ["d, layer, 24 tokens", "d, model, 24 tokens"]
    assert "FAILED d, layer, 24 tokens: its process ended with 3" in said
    (dying,) = stored.load_all(tmp_path / "out")
    assert [point.context for point in dying.points] == [16, 16]


def test_what_is_there_is_not_measured_again(tmp_path):
    one = {"variants": ["sdpa"], "contexts": [16]}
    assert len(measured(tmp_path, **one)[1]) == 2
    before = (tmp_path / "sdpa.json").read_bytes()
    assert measured(tmp_path, **one)[1] == [] and (tmp_path / "sdpa.json").read_bytes() == before
    said = measured(tmp_path, **one, rounds=2)[1]
    assert [line.split(":")[0] for line in said] == ["round 2"] * 2
    old = json.loads(before)["points"][0]["samples"]["forward_backward_s"]
    assert stored.load(tmp_path / "sdpa.json").point("layer", 16).samples["forward_backward_s"][:2] == old
    with pytest.raises(UsageError, match="another setting, machine or definition; name another folder"):
        measured(tmp_path, **one, layers=2)


POINT = {
    "part": "model", "context": 16, "outcome": "measured", "rounds": 1,
    "samples": {"prefill_s": [1.0], "decode_s_per_token": [1.0], "cache_bytes": [64.0]},
    "null_reasons": {"prefill_energy_j": "no_gpu", "decode_energy_j_per_token": "no_gpu"},
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"outcome": "fine"},
        {"outcome": "out_of_memory"},
        {"outcome": "out_of_memory", "says": "no room"},
        {"outcome": "over_time", "samples": {}, "null_reasons": {}, "rounds": 0},
        {"samples": POINT["samples"] | {"prefill_s": [0.0]}},
        {"samples": POINT["samples"] | {"prefill_s": [float("nan")]}},
        {"samples": POINT["samples"] | {"prefill_s": []}},
        {"samples": POINT["samples"] | {"forward_backward_s": [1.0]}},
        {"null_reasons": {"prefill_energy_j": "no_gpu"}},
        {"null_reasons": POINT["null_reasons"] | {"prefill_energy_j": "tired"}},
        {"rounds": 0},
        {"context": 1},
        {"extra": 1},
    ],
)
def test_the_schema_refuses_nonsense(change):
    stored.Point(**POINT)
    with pytest.raises(ValidationError):
        stored.Point(**POINT | change)


def made(label="sdpa", **changes):
    values = {
        "provenance": "measured", "finished_at": record.now(), "label": label, "title": label,
        "attention": "sdpa",
        "attention_sha256": "0" * 64, "options": {}, "points": [POINT],
        "setting": {name: SMALL[name] for name in stored.Setting.model_fields},
        "environment": {"device_name": "a machine", "torch_threads": 1, "device": "cpu"},
    }  # fmt: skip
    return stored.Scaling(**values | changes)


def test_a_record_comes_back_as_it_was_and_a_changed_one_does_not(tmp_path):
    path = stored.write(made(), tmp_path)
    assert stored.load(path).points == made().points
    assert stored.frame(stored.load_all(tmp_path)).set_index("metric").loc["cache_bytes", "minimum"] == 64
    assert set(growth.unmeasured(stored.frame([made()]))["why"]) == {"the run used no GPU"}
    path.write_text(path.read_text().replace("64.0", "65.0"))
    with pytest.raises(UsageError, match="its checksum does not fit"):
        stored.load(path)
    path.write_text("{")
    with pytest.raises(UsageError, match=r"sdpa\.json cannot be read"):
        stored.load(path)
    with pytest.raises(ValueError, match="each once"):
        made(points=[POINT, POINT])


def test_the_committed_records_are_whole_and_name_no_machine_path():
    for folder in (paths.ROOT / "records").glob("scaling-*"):
        found = stored.load_all(folder)
        assert {one.label for one in found} == {path.stem for path in folder.glob("*.json")} >= set(STUDY_ORDER)
        assert len({tuple((p.part, p.context) for p in one.points) for one in found}) == 1  # no gaps
        assert all(
            len(p.samples["forward_backward_s"]) >= 5
            for one in found
            for p in one.points
            if "forward_backward_s" in p.samples
        )
        text = "".join(path.read_text() for path in folder.glob("*.json"))
        assert str(paths.ROOT) not in text and "/tmp/" not in text


def test_records_of_two_machines_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no record"):
        stored.load_all(tmp_path)
    stored.write(made(), tmp_path)
    stored.write(made("b", environment={"device_name": "another", "torch_threads": 1, "device": "cpu"}), tmp_path)
    with pytest.raises(UsageError, match="differ in setting or machine"):
        stored.load_all(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"contexts": [32, 16]}, "lengths must ascend"),
        ({"contexts": []}, "contexts"),
        ({"rounds": 0}, "rounds"),
        ({"device": "tpu"}, "device"),
        ({"heads": 3}, "heads must divide width"),
        ({"variants": ["sdpa", "sdpa"]}, "two variants have the same label"),
        ({"variants": ["spda"]}, "Did you mean 'sdpa'"),
        ({"variants": [{"attention": "sdpa", "option": {}}]}, "did you mean 'options'"),
        ({"variants": [{"attention": "sliding_window", "options": {"windo": 2}}]}, "did you mean 'window'"),
    ],
)
def test_a_plan_that_cannot_be_measured_is_refused_before_anything_runs(change, says):
    with pytest.raises(UsageError, match=says):
        scaling.checked(SMALL | change)


def test_the_command_says_what_it_lacks(capsys, tmp_path):
    assert scaling.main([]) == 2 and "--write FOLDER" in capsys.readouterr().err
    (tmp_path / "odd.yaml").write_text("context: [16]\n")
    assert scaling.main([str(tmp_path / "odd.yaml"), "--write", str(tmp_path)]) == 2
    assert "did you mean 'contexts'?" in capsys.readouterr().err


def test_joules_are_fitted_only_where_every_point_has_them():
    seconds = points({"sdpa": polynomial(1, 1)})
    energies = ("forward_backward_energy_j", "prefill_energy_j", "decode_energy_j_per_token")
    joules = pd.concat([seconds, *(points({"sdpa": polynomial(1, 1)}, metric) for metric in energies)])
    assert growth.cost_metrics(joules)["prefill"] == "prefill_energy_j"
    assert growth.basis("prefill_energy_j", joules) == "joules"
    joules.loc[(joules["metric"] == energies[0]) & (joules["context"] == 256), ["minimum", "reason"]] = np.nan, "no_gpu"
    assert growth.cost_metrics(joules)["prefill"] == "prefill_s"
    assert growth.basis("prefill_s", joules) == "seconds; joules not measured: the run used no GPU"


def test_figures_are_drawn_byte_identical_and_show_what_ran_out(tmp_path):
    costs = {"sdpa": polynomial(1, 0, 1), "linear": polynomial(2, 1), "mine": lambda t: t / 1e3 if t < 4096 else None}
    metrics = ("forward_backward_s", "prefill_s", "decode_s_per_token", "cache_bytes")
    every = pd.concat([points(costs, metric) for metric in metrics], ignore_index=True)
    drawings = {
        "time": lambda: growth.growth_figure(every, "forward_backward_s", 1024),
        "cache": lambda: growth.cache_and_decode_figure(every),
        "map": lambda: growth.decision_map_figure(every),
    }
    for name, draw in drawings.items():
        first, second = (style.save(draw(), tmp_path / turn, name) for turn in ("one", "two"))
        assert first is not second
        for kind in ("svg", "png"):
            one, two = ((tmp_path / turn / f"{name}.{kind}").read_bytes() for turn in ("one", "two"))
            assert one == two
    texts = growth.growth_figure(every, "forward_backward_s", 1024).axes[0].get_legend().get_texts()
    assert [text.get_text() for text in texts] == ["sdpa", "linear", "mine", "out of memory"]
