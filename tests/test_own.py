"""Numbers of one's own: a formula over a record's metrics, with a direction, kept by the study's summary."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from make import make_record, write_blocks

from lib import record
from lib.analysis import compare, tables
from lib.errors import UsageError
from lib.study import cluster, plan, runner
from lib.study.__main__ import main

GIB = 2**30
NAME = "tokens/s per GiB"
OWN = {NAME: {"formula": "non_padding_tokens_per_s / (peak_memory_bytes / 2**30)", "better": "higher"}}
SPEED = {"sdpa": 5e3, "sdpa_again": 5e3, "gqa": 6e3, "mla": 4e3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Six blocks in which gqa makes the most tokens a second of its 2 GiB, mla the fewest; noise is a thousandth."""
    folder, random = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for block in range(6):
        for place, label in enumerate(np.roll(list(SPEED), block)):
            speed = SPEED[label] * (1 + 1e-3 * random.normal())
            made = make_record(
                str(label), block, position=place, non_padding_tokens_per_s=speed, peak_memory_bytes=2 * GIB
            )
            record.write(made, folder)
    return compare.groups(record.read(folder))[0].runs


@pytest.mark.parametrize(("better", "first"), [("higher", "gqa"), ("lower", "mla")])
def test_the_best_by_its_direction_is_rank_1(runs, better, first):
    found = tables.own(runs, {NAME: OWN[NAME] | {"better": better}})
    assert found.iloc[0]["variant"] == first and found.iloc[0]["rank"] == "1"
    last = found.iloc[[row != "sdpa_again" for row in found["variant"]]].iloc[-1]
    assert last["rank"] == "3" and last["variant"] == {"gqa": "mla", "mla": "gqa"}[first]
    assert set(found["metric"]) == {f"{NAME} ({better} is better)"}
    of = found.set_index("variant")
    assert of.loc["gqa", "ratio to SDPA"].startswith("1.2") and of.loc["mla", "ratio to SDPA"].startswith("0.8")
    assert float(of.loc["gqa", "value"].replace(",", "")) == pytest.approx(3000, rel=0.01)
    assert of.loc["gqa", "verdict"].startswith("significantly different") and of.loc["sdpa_again", "rank"] == "–"


def test_what_was_not_measured_is_said_with_its_reason_and_the_rest_is_shown(runs):
    more = {"cores": {"formula": "cpu_energy_j / time_s", "better": "lower"}}
    assert tables.own(runs, more) == "cores: not measured: no energy counter of the CPU (RAPL)."
    assert set(tables.own(runs, OWN | more)["metric"]) == {f"{NAME} (higher is better)"}
    assert tables.own(runs, {"odd": {"formula": "1 / disk_bytes", "better": "lower"}}).endswith("no finite number.")
    assert tables.own(runs, {}) == "None was asked for."


def test_below_five_blocks_it_has_values_and_no_rank(tmp_path):
    write_blocks(tmp_path, ("sdpa", "gqa"), blocks=2)
    found = tables.own(compare.groups(record.read(tmp_path))[0].runs, OWN)
    assert set(found["rank"]) == {"–"} and set(found["value"]) == {f"{5e3 / (2e9 / GIB):,.4g}"}


@given(st.floats(0.1, 1e6), st.floats(0.1, 1e6), st.integers(1, 3))
def test_a_formula_is_python_s_own_arithmetic(time, energy, power):
    (one,) = record.own_metrics({"x": {"formula": f"-(energy_j + 2) * time_s ** {power} / 3 - 1", "better": "lower"}})
    frame = pd.DataFrame({"time_s": [time, time], "energy_j": [energy, None]})
    assert one.needs == ("energy_j", "time_s")
    assert one.of(frame).tolist() == pytest.approx([-(energy + 2) * time**power / 3 - 1, float("nan")], nan_ok=True)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"x": "time_s"}, "`formula` and `better`"),
        ({"x": {"formula": "time_s", "better": "more"}}, "lower or higher, not 'more'"),
        ({"x": {"formula": "tokens_per_s", "better": "lower"}}, "there is no metric tokens_per_s; known: time_s"),
        ({"x": {"formula": "2", "better": "lower"}}, "it has no metric"),
        ({"x": {"formula": "9.0 ** 9 ** 9 * time_s", "better": "lower"}}, "cannot be worked out"),
        ({"x": {"formula": "1 / (time_s - time_s)", "better": "lower"}}, "cannot be worked out: float division"),
        ({"x": {"formula": "(-8) ** 0.5 * time_s", "better": "lower"}}, "must be made of numbers"),
        ({"x": {"formula": "time_s.real", "better": "lower"}}, "must be made of numbers"),
        ({"x": {"formula": "__import__('os').system('true')", "better": "lower"}}, "there is no metric __import__"),
        ({"x": {"formula": "time_s(1)", "better": "lower"}}, "must be made of numbers"),
        ({"x": {"formula": "time_s if 1 else 2", "better": "lower"}}, "must be made of numbers"),
        ({"x": {"formula": "(" * 250, "better": "lower"}}, "must be made of numbers"),
        ({"x": {"formula": "time_s +" * 100, "better": "lower"}}, "at most 300 characters"),
        ({"$x$": {"formula": "time_s", "better": "lower"}}, "cannot be shown as a name"),
        ({3: {"formula": "time_s", "better": "lower"}}, "cannot be shown as a name"),
        ([], "own_metrics must be"),
    ],
)
def test_what_is_no_metric_ends_in_one_sentence(asked, said):
    with pytest.raises(UsageError) as error:
        record.own_metrics(asked)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_profile_s_are_checked_before_anything_runs_and_handed_to_the_summary(tmp_path, monkeypatch, capsys):
    profile = tmp_path / "mine.yaml"
    profile.write_text(yaml.safe_dump({"study": {"own_metrics": {"x": {"formula": "tyme_s", "better": "lower"}}}}))
    assert main([str(profile), "--plan"]) == 2 and "there is no metric tyme_s" in capsys.readouterr().err
    profile.write_text(yaml.safe_dump({"study": {"own_metrics": OWN}}))
    assert plan.own_metrics(str(profile)) == OWN and plan.own_metrics(None) == {}
    given = []
    monkeypatch.setenv("ATTENTION_STUDY_OUT", str(tmp_path / "out"))
    monkeypatch.setattr(runner, "execute", lambda *words: given.append(words[2].get("own_metrics")))
    monkeypatch.setattr(runner, "load_data", lambda runs: runner.Data())
    monkeypatch.setattr(runner, "run_all", lambda *_: {})
    monkeypatch.setattr(runner.blocks, "settled", lambda runs, *_: runner.blocks.Later(runs, []))
    assert main([str(profile)]) == 0 and cluster.main([json.dumps(OWN)]) == 0 and cluster.main([]) == 0
    assert given == [OWN, OWN, None]
