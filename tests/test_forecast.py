"""Hours and joules of a plan come from earlier records on the same device, or are said to be unknown."""

from datetime import timedelta

import pytest
from make import TINY, record_of

from lib import paths, record
from lib.measure import flops
from lib.model import gpt2_config, meta_model
from lib.study import forecast, plan
from lib.study.__main__ import main

VOCABULARY = 300
BEGUN = record.now()


def measured(run, seconds=0, **changes):
    """A record of a planned run, finished so many seconds after the first."""
    values = run["values"]
    sizes = (values[name] for name in ("layers", "width", "heads", "positions"))
    model = meta_model(values["attention"], gpt2_config(*sizes, VOCABULARY), **values["options"])
    forward = flops.analytic(model, values["context"])["forward_flops_causal"]
    changes = {"time_s": 20.0, "energy_j": 4e3, "causal_flops_per_s": 3 * forward * 12 / 20.0} | changes
    place = {"session": "s", "block": run["block"], "position": run["position"]}
    told = {"study": place, "finished_at": BEGUN + timedelta(seconds=seconds), "forward_flops_causal": forward}
    one = record_of(run, **told | changes)
    size = sum(weight.numel() for weight in model.parameters())
    return one.model_copy(update={"metrics": one.metrics.model_copy(update={"parameters": size})})


def runs_of(*variants, blocks=1, **overrides):
    return plan.runs_of(TINY | overrides, list(variants), blocks)


def test_the_same_settings_on_the_same_device_are_expected_again():
    runs = runs_of("sdpa", "gqa", blocks=2)
    earlier = [measured(runs[0]), measured(runs[1], seconds=35)]
    assert forecast.lines(runs, earlier) == [
        "to be expected on a GPU:",
        "  4 windows as measured with these settings: 80 s, 4 Wh for 4 of them",
        "  beside its window such a run took 15 s more (median)",
    ]


def test_other_settings_are_scaled_by_flops_and_that_is_said():
    """Four times the steps of the same rows take four times as long; a wider model as much more as it has FLOPs."""
    (run,) = runs_of("sdpa")
    (longer,) = runs_of("sdpa", steps_per_epoch=12)
    found = forecast.expect(longer["values"], [measured(run)])
    assert found == forecast.Expected(pytest.approx(80), pytest.approx(16e3), forecast.SCALED)
    (wider,) = runs_of("sdpa", width=64)
    found = forecast.expect(wider["values"], [measured(run), measured(longer)])
    more = measured(wider).metrics.forward_flops_causal / measured(run).metrics.forward_flops_causal
    assert more > 2 and found.time_s == pytest.approx(20 * more)
    (nearer,) = runs_of("sdpa", width=64, learning_rate=0.5)  # another setting of the same size
    for records in ([measured(run), measured(nearer)], [measured(nearer), measured(run)]):
        assert forecast.expect(wider["values"], records).time_s == pytest.approx(20)
    assert forecast.lines([wider], [measured(run)])[1].startswith("  1 windows scaled by FLOPs from other settings: ")


def test_of_unequal_runs_the_mean_is_expected_and_not_the_best():
    runs = runs_of("sdpa", blocks=3)
    costs = ((20.0, 4e3), (50.0, 9e3), (26.0, 5e3))
    earlier = [measured(run, time_s=time_s, energy_j=j) for run, (time_s, j) in zip(runs, costs, strict=True)]
    assert forecast.expect(runs[0]["values"], earlier) == forecast.Expected(32.0, 6e3, forecast.SAME)


@pytest.mark.parametrize(("changes", "times"), [({"epochs": 6}, 3), ({"accumulation": 5}, 5), ({"batch_size": 4}, 2)])
def test_a_run_takes_as_many_times_as_long_as_it_has_rows(changes, times):
    (run,), (longer,) = runs_of("sdpa"), runs_of("sdpa", **changes)
    found = forecast.expect(longer["values"], [measured(run)])
    assert found == forecast.Expected(pytest.approx(20 * times), pytest.approx(4e3 * times), forecast.SCALED)


def test_what_lies_beside_a_window_is_the_median_gap_without_the_window():
    """Runs of 20 s that end 35, 30 and 90 s after each other, and the first of another block."""
    runs = runs_of("sdpa", "gqa", "mla", "lsh", blocks=1)
    ends = (0, 35, 65, 155)
    seated = [
        measured(run, seconds, study={"session": "s", "block": 0, "position": place})
        for place, (run, seconds) in enumerate(zip(runs, ends, strict=True))
    ]
    other = measured(runs[0], 999, study={"session": "s", "block": 1, "position": 0})
    assert forecast.beside_window([*seated, other], seated[0].setting) == 15.0
    assert forecast.beside_window(seated[:1], seated[0].setting) is None


def test_synthetic_records_tell_nothing(tmp_path):
    (run,) = runs_of("sdpa")
    record.write(measured(run, provenance="synthetic"), tmp_path)
    assert forecast.earlier([tmp_path]) == []
    record.write(measured(run), tmp_path)
    assert len(forecast.earlier([tmp_path])) == 1


def test_times_and_joules_are_said_in_units_that_fit():
    assert [forecast._time(seconds) for seconds in (89, 90, 5399, 5400)] == ["89 s", "2 min", "90 min", "1.5 h"]
    assert [forecast._energy(joules) for joules in (3.6e5, 3.5e6, 9e6)] == ["100 Wh", "972 Wh", "2.5 kWh"]


@pytest.mark.parametrize("changes", [{"tokenizer": "gpt2"}, {"precision": "bf16"}, {"compile": True}])
def test_nothing_is_scaled_from_what_computes_otherwise(changes):
    assert forecast.expect(runs_of("sdpa", **changes)[0]["values"], [measured(runs_of("sdpa")[0])]) is None


def test_what_was_never_run_there_is_said_and_never_guessed():
    runs = runs_of("sdpa", "gqa")
    sdpa = measured(next(run for run in runs if run["values"]["attention"] == "sdpa"), energy_j=None)
    assert forecast.lines(runs, [sdpa]) == [
        "to be expected on a GPU:",
        "  1 windows as measured with these settings: 20 s, energy never measured",
        "  unknown, never run there: gqa",
    ]
    assert forecast.lines(runs, []) == ["to be expected: unknown, there is no earlier record of these variants"]
    assert forecast.lines([], [sdpa]) == ["nothing is left to run"]


def test_the_published_records_tell_what_the_quick_study_takes(capsys):
    assert main(["--plan", "--records", str(paths.ROOT / "records" / "quick-cpu")]) == 0
    said = capsys.readouterr().out
    assert "to be expected on " in said and "windows as measured with these settings" in said
    assert "never run there" not in said and "energy never measured" in said


def test_a_folder_of_earlier_records_that_is_not_there_is_one_sentence(capsys):
    assert main(["--plan", "--records", "nowhere"]) == 2
    assert capsys.readouterr().err == "python -m lib.study: there is no folder nowhere with earlier records\n"
