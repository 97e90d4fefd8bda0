"""Training steps that take turns in one process: order, whole rounds, resuming, memory that runs out, ratios."""

import itertools
import json

import pytest
import torch

from lib import record
from lib.analysis import compare
from lib.analysis import steps as tables
from lib.attention import CONTROL, STUDY_ORDER
from lib.errors import OutOfMemory, UsageError
from lib.paths import ROOT
from lib.record import steps
from lib.study import steps as study

VARIANTS = ["sdpa", "linear", {"attention": "sdpa", "label": CONTROL}]
TINY = {
    "variants": VARIANTS, "layers": 1, "width": 16, "heads": 2, "vocabulary": 30, "rounds": 2, "window_s": 0.002,
    "sizes": [{"context": 8, "batch_size": 2}, {"context": 16, "batch_size": 1}], "device": "cpu",
}  # fmt: skip


@pytest.fixture(autouse=True)
def certified(monkeypatch):
    """Certificates have tests of their own."""
    monkeypatch.setattr(
        study.certificate, "certify", lambda attention, options, setting: {"passed": attention != "linear"}
    )


def measure(path, say=lambda line: None, within_s=float("inf"), **changes):
    return study.measure(study.Plan(**TINY | changes), path, within_s, say)


def test_the_order_of_rounds_is_balanced_and_the_control_wanders():
    labels = [*STUDY_ORDER, CONTROL]
    orders = [study.order(labels, number) for number in range(8)]
    assert all(sorted(order) == sorted(labels) for order in orders)
    assert [order.index(CONTROL) for order in orders] == list(range(8))
    found = made_record({label: [1.0] * 8 for label in labels})
    assert compare.balanced(tables.runs(found, 512))


def test_a_round_is_every_variant_once_at_every_length_and_the_file_holds_whole_rounds(tmp_path, monkeypatch):
    path, files = tmp_path / "steps.json", []
    taken = study.Session.turn

    def turn(*words):
        files.append(path.exists() and len(steps.load(path).rounds))
        return taken(*words)

    monkeypatch.setattr(study.Session, "turn", turn)
    found = measure(path)
    assert files == [False] * 6 + [1] * 6  # written when a round is whole, and not before
    assert found == steps.load(path).model_copy(update={"content_sha256": ""})
    cells = set(itertools.product((8, 16), ("sdpa", "linear", CONTROL)))
    for one in found.rounds:
        assert {(turn.context, turn.label) for turn in one.turns} == cells and len(one.turns) == 6
        assert [turn.position for turn in one.turns] == [0, 1, 2] * 2
        assert all(turn.energy_j is None and turn.energy_null_reason == "no_gpu" for turn in one.turns)
    assert {entry.label: entry.certified for entry in found.entries} == {"sdpa": True, "linear": False, CONTROL: True}
    assert (found.setting.device, found.setting.precision, found.provenance) == ("cpu", "fp32", "measured")


def test_a_turn_is_whole_training_steps_of_its_own_model(tmp_path, monkeypatch):
    """Forward, backward, clipping and optimizer, through the trainer of every run; the others' weights stay."""
    counted, took = [], study.training.Trainer.take_step
    monkeypatch.setattr(
        study.training.Trainer, "take_step", lambda self, step: counted.append(self) or took(self, step)
    )
    found = measure(tmp_path / "steps.json", rounds=1)
    in_turns = sum(study.BEFORE_STEPS + turn.steps for turn in found.rounds[0].turns)
    assert len(counted) == in_turns + 6 * (study.FIRST_STEPS + study.TIMED_STEPS)
    session = study.Session(study.Plan(**TINY))
    session.new_record()
    weights = {name: bench.model.transformer.wte.weight for name, bench in session.benches.items()}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    session.benches["sdpa"].run(8, 1)
    session.benches["sdpa"].run(16, 1)
    changed = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
    assert changed == {"sdpa"}
    assert {state["step"].item() for state in session.benches["sdpa"].optimizer.state.values()} == {2}  # one for both


def test_what_is_there_is_not_measured_again_and_nothing_is_mixed(tmp_path):
    path = tmp_path / "steps.json"
    first = measure(path, rounds=1)
    both = measure(path)
    assert both.rounds[0] == first.rounds[0] and len(both.rounds) == 2
    assert both.rounds[0].session != both.rounds[1].session
    with pytest.raises(UsageError, match=r"steps\.json holds rounds of another setting, machine or definition; name"):
        measure(path, rounds=3, window_s=0.003)
    assert steps.load(path).rounds == both.rounds


def test_a_round_that_would_end_too_late_does_not_begin(tmp_path):
    said = []
    found = measure(tmp_path / "steps.json", said.append, within_s=0.0)
    assert not found.rounds and said[-1].startswith("no time for round 1 of 2")


def test_what_runs_out_of_memory_beside_the_others_is_measured_alone(tmp_path, monkeypatch):
    moved, prepare = [], study.Bench.prepare

    def short_of_memory(bench, context, window_s):
        label = bench.entry.label
        if context == 16 and (label == "sdpa" or (label == "linear" and not moved)):
            raise OutOfMemory("out of memory (no GiB left); lower batch_size")
        prepare(bench, context, window_s)

    def move(bench, away):
        moved.append(bench.entry.label) if bench.entry.label not in moved else moved.remove(bench.entry.label)

    monkeypatch.setattr(study.Bench, "prepare", short_of_memory)
    monkeypatch.setattr(study.Bench, "move", move)
    found = measure(tmp_path / "steps.json", rounds=1)
    assert moved == []  # all are back
    assert list(found.failed) == ["sdpa"] and found.failed["sdpa"][16].startswith("out of memory")
    turns = found.rounds[0].turns
    assert len(turns) == 5 and [(turn.label, turn.context) for turn in turns if turn.alone] == [("linear", 16)]
    row = tables.table(found).set_index(["context", "variant"]).loc[("16", "SDPA")]
    assert row["ms a step"].startswith("out of memory")
    assert tables.table(found).set_index(["context", "variant"]).loc[("16", "Linear (elu+1)"), "÷ SDPA"] == "–"


def test_what_fails_only_now_ends_in_a_sentence_before_a_round_is_lost(tmp_path, monkeypatch):
    before = measure(tmp_path / "steps.json", rounds=1)
    prepare = study.Bench.prepare

    def broken(bench, context, window_s):
        if bench.entry.label == "linear":
            raise RuntimeError("shape mismatch")
        prepare(bench, context, window_s)

    monkeypatch.setattr(study.Bench, "prepare", broken)
    with pytest.raises(UsageError, match="has rounds in which linear did not fail, as it does now; name another file"):
        measure(tmp_path / "steps.json", rounds=2)
    assert steps.load(tmp_path / "steps.json").rounds == before.rounds


@pytest.mark.parametrize("who", ["linear", "sdpa"])
def test_an_error_that_is_no_lack_of_memory_is_noted_once_and_ends_all_only_where_nothing_is_left_to_compare_with(
    who, tmp_path, monkeypatch
):
    tried, prepare = [], study.Bench.prepare

    def broken(bench, context, window_s):
        if bench.entry.label == who:
            tried.append(context)
            raise RuntimeError("shape mismatch")
        prepare(bench, context, window_s)

    monkeypatch.setattr(study.Bench, "prepare", broken)
    if who == "sdpa":
        with pytest.raises(RuntimeError, match="shape mismatch"):
            measure(tmp_path / "steps.json")
        return
    found = measure(tmp_path / "steps.json", rounds=1)
    assert found.failed == {"linear": dict.fromkeys(tried, "RuntimeError: shape mismatch")} and len(tried) == 2
    assert {turn.label for turn in found.rounds[0].turns} == {entry.label for entry in found.entries} - {"linear"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rouns: 3", "there is no parameter 'rouns'; did you mean 'rounds'?"),
        ("rounds: 0", "rounds: Input should be greater than or equal to 1"),
        ("sizes: [{context: 8, batch_size: 1}, {context: 8, batch_size: 2}]", "sizes must have a context each"),
        ("heads: 3", "heads must divide width"),
        ("device: tpu", "device must be one of"),
        ("variants: [linear]", "ratios are to sdpa; put it among the variants"),
        ("variants: [{attention: sdpa, label: 3}]", "label must be str, not 3"),
        ("variants: [sdpa, sdpa]", "two variants have the same label"),
        ("variants: [spda]", "Did you mean 'sdpa'"),
        ("- 3", "must be lines of `name: value`"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(text, says, tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text(text)
    assert study.main([str(tmp_path / "wrong.yaml"), "--write", str(tmp_path / "steps.json")]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not (tmp_path / "steps.json").exists()


def made_record(seconds: dict, joules: dict | None = None, **changes) -> steps.Steps:
    """Rounds at 512 tokens in which each label takes its `seconds` a step, in the order of a study."""
    rounds = []
    for number in range(len(seconds["sdpa"])):
        turns = [
            {
                "label": label, "context": 512, "position": position, "steps": 10,
                "time_s": 10 * seconds[label][number],
                "energy_j": joules and 10 * joules[label][number], "energy_null_reason": None if joules else "no_gpu",
                "edges_j": None, "after_w": [], "peak_memory_bytes": 2.0**30, "gpu": None, "other_processes": None,
            }
            for position, label in enumerate(study.order(list(seconds), number))
        ]  # fmt: skip
        rounds.append({"session": "s", "begun_at": record.now(), "warm": None, "turns": turns})
    entries = [
        {"label": label, "title": label.upper(), "attention": "sdpa" if label in ("sdpa", CONTROL) else label,
         "attention_sha256": "0" * 64, "options": {}, "certified": True, "parameters": 9}
        for label in seconds
    ]  # fmt: skip
    fields = {
        "provenance": "measured", "finished_at": record.now(),
        "environment": {"gpu": None, "device": "cuda", "device_name": "a GPU"},
        "entries": entries, "rounds": rounds,
        "setting": {
            "layers": 1, "width": 16, "heads": 2, "vocabulary": 30, "sizes": [{"context": 512, "batch_size": 2}],
            "window_s": 1.0, "compile": False, "device": "cuda", "precision": "bf16",
        },
    }  # fmt: skip
    return steps.Steps.model_validate(fields | changes)


def test_ratios_are_taken_inside_rounds_where_drift_cancels():
    drift = [1.0, 1.1, 1.3, 1.2, 1.0]
    noise = [1.01, 0.99, 1.0, 1.01, 0.99]
    seconds = {
        "sdpa": drift,
        "half": [d * n / 2 for d, n in zip(drift, noise, strict=True)],
        CONTROL: [d * n for d, n in zip(drift, noise, strict=True)],
    }
    joules = {label: [300 * value for value in values] for label, values in seconds.items()}
    found = made_record(seconds, joules)
    rows = tables.ratios(found).set_index(["metric", "label"])
    for metric in tables.METRICS:
        half, control = rows.loc[(metric, "half")], rows.loc[(metric, CONTROL)]
        assert half["ratio"] == pytest.approx(0.5, rel=1e-3) and half["n"] == 5
        assert control["ratio"] == pytest.approx(1.0, abs=1e-3)
        assert 0.95 < control["low"] < 1 < control["high"] < 1.05  # 1 % of noise is in it, 30 % of drift is not
    assert rows.loc[("energy_j_per_step", "sdpa"), "median"] == pytest.approx(330.0)
    assert rows.loc[("time_s_per_step", "sdpa"), "median"] == pytest.approx(1.1)
    assert set(steps.frame(found)["mean_power_w"].round(6)) == {300.0}
    shown = tables.table(found)
    assert list(shown["variant"]) == ["SDPA", CONTROL.upper(), "HALF"]  # the reference, its control, the cheapest
    assert shown["peak memory, GiB"].tolist() == ["1.00"] * 3 and shown["÷ SDPA"].iloc[2].startswith("0.500 [0.4")


def test_what_has_no_joules_has_no_ratio_of_them_and_the_reason_stands_beside_the_table():
    found = made_record({"sdpa": [1.0] * 5, "half": [0.5] * 5})
    assert set(tables.table(found)["J ÷ SDPA"]) == {"–"}
    assert "No joules in 10 windows: the run used no GPU." in tables.about(found)
    assert "their order not balanced" in tables.about(found)
    assert tables.about(made_record({"sdpa": []})) == "No round is there yet."


@pytest.mark.parametrize("fault", ["lacks", "twice"])
def test_half_a_round_is_no_record(fault, tmp_path):
    content = json.loads(made_record({"sdpa": [1.0], "half": [0.5]}).model_dump_json())
    turns = content["rounds"][0]["turns"]
    turns.pop() if fault == "lacks" else turns.append(turns[0])
    with pytest.raises(ValueError, match="round 0 lacks a turn, or has one twice"):
        steps.Steps.model_validate(content)


def test_the_table_is_printed_and_a_wrong_file_is_one_sentence(tmp_path, capsys):
    path = steps.write(made_record({"sdpa": [1.0] * 2, "half": [0.5] * 2}), tmp_path / "steps.json")
    assert tables.main([str(path)]) == 0 and "0.500" in capsys.readouterr().out
    path.write_text("{}")
    assert tables.main([str(path)]) == 2 and capsys.readouterr().err.count("\n") == 1
    assert tables.main([]) == 2


def test_the_gpu_profile_is_a_whole_square_of_windows_that_the_counter_is_believed_for():
    made = study.read_plan(str(ROOT / "params" / "steps_gpu.yaml"), device="cpu")
    assert made.rounds % len(STUDY_ORDER) == 0 and made.rounds >= compare.FEWEST_BLOCKS
    assert made.window_s >= study.energy.SHORTEST_WINDOW_S and study.FIRST_MARGIN > study.MARGIN > 1
    assert [(size.context, size.batch_size) for size in made.sizes] == [(512, 16), (8192, 1)]


def test_a_long_row_alone_is_examined_at_what_a_certificate_reaches():
    made = study.read_plan(str(ROOT / "params" / "steps_gpu_long.yaml"), device="cpu")
    examined = study.examined_as(made, torch.device("cpu"), "sliding_window,sdpa")
    assert (examined.context, examined.positions, examined.batch_size) == (2048, 2048, 1)
    assert (examined.layers, examined.width, examined.precision) == (2, 768, "bf16")
    others = [entry for entry in study.entries_of(made) if entry.label != CONTROL]
    assert made.rounds % len(others) == 0  # whole Williams squares, their number being even


def test_a_session_that_is_cut_off_while_it_profiles_keeps_what_it_profiled(tmp_path, monkeypatch):
    asked, path = [], tmp_path / "steps.json"

    def share(device, run):
        asked.append(device)
        if len(asked) == 3:
            raise study.runner.Stopped("SIGTERM")
        return study.energy.Reading(0.5, None)

    monkeypatch.setattr(study.kernels, "busy_fraction", share)
    with pytest.raises(study.runner.Stopped):
        measure(path)
    found = steps.load(path)
    assert len(found.rounds) == 2 and found.busy == {"sdpa": {8: 0.5}, "linear": {8: 0.5}}
