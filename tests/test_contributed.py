"""What is asked of contributed records: each planted fault is named, and nothing else; the committed ones pass."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make import CERTIFICATE, make_record, parameters_of, places
from test_probes import cell
from test_scaling import POINT
from test_scaling import made as made_scaling
from test_steps import made_record as made_steps

from lib import attention, record
from lib.analysis import contributed
from lib.analysis.contributed import main
from lib.attention import CONTROL
from lib.data.tasks import TASKS
from lib.paths import ROOT
from lib.record import folders, probe, scaling, steps

SHA = {name: attention.source_sha256(name) for name in ("sdpa", "baseline", "linear")} | {
    CONTROL: attention.source_sha256("sdpa")
}
WHERE = {"commit": "c" * 40, "commit_modified": False, "packages": {"torch": "2.13.0", "transformers": "5.17.0"}}
ON_GPU = {"device": "cuda", "device_name": "a GPU", "gpu": {"uuid": "GPU-1"}} | WHERE
ON_CPU = {"device": "cpu", "device_name": "a machine", "torch_threads": 1} | WHERE
MEASURE = {"check": "causal", "what": "gradients", "largest": 0.0, "allowed": 0.0, "passed": True, "says": ""}
LABELS = ("baseline", "sdpa", CONTROL)


def certificate(**changes):
    return CERTIFICATE | {"measures": [MEASURE]} | changes


def runs(folder, change=lambda label, block: {}, blocks=6, labels=LABELS):
    """Whole blocks in balanced order, measured with today's files; `change` says what is otherwise."""
    for (label, block), position in places(labels, blocks).items():
        facts = {"environment": ON_GPU, "certificate": certificate(), "attention_sha256": SHA.get(label, "0" * 64)}
        record.write(make_record(label, block, **{"position": position} | facts | change(label, block)), folder)


def of(label, **changes):
    """`changes` in the runs of one label alone."""
    return lambda name, block: changes if name == label else {}


def noise(scale):
    return [np.exp(scale * (-1) ** block) for block in range(6)]


def control(ratio, scale, metric="time_per_epoch_s"):
    """Runs of which the A/A control takes so many times what the reference takes, with noise of its own."""
    takes = [10 * ratio * one for one in noise(scale)]
    return lambda label, block: {metric: takes[block] if label == CONTROL else 10.0}


def step_file(folder, seconds=None, joules=None, name="steps.json", turn=None, **changes):
    seconds = seconds or {"sdpa": [1.0] * 6, "linear": [2.0] * 6, CONTROL: [1.0] * 6}
    content = made_steps(seconds, joules).model_dump()
    content["environment"] = ON_GPU
    for entry in content["entries"]:
        entry["attention_sha256"] = SHA[entry["label"]]
    for number, one in enumerate(content["rounds"]):
        one["turns"] = [own | (turn(own["label"], number) if turn else {}) for own in one["turns"]]
    steps.write(steps.Steps.model_validate(content | changes), folder / name)


def lengths(folder, rounds=5, **changes):
    samples = {name: [values[0]] * rounds for name, values in POINT["samples"].items()}
    for label in ("sdpa", "linear"):
        facts = {"label": label, "attention": label, "attention_sha256": SHA[label], "environment": ON_CPU}
        facts |= {"points": [POINT | {"rounds": rounds, "samples": samples}]}
        scaling.write(made_scaling(**facts | changes.get(label, {})), folder)


def probes(folder, rates=(1e-3, 3e-3, 1e-2), seeds=5, labels=("sdpa", "linear"), best=1.0, **changes):
    """Recall, solved by all at the rate of 3e-3; `changes` are of the last cell."""
    for label in labels:
        mixer = {"attention": label, "options": {}, "attention_sha256": SHA[label]}
        for rate in rates:
            for seed in range(seeds if rate == 3e-3 else 1):
                scaled = (best if rate == 3e-3 else 0.1,) * len(TASKS["recall"].tested_on)
                last = cell(label, scaled, rate=rate, seed=seed, environment=ON_CPU, pattern=[mixer])
                probe.write(last, folder)
    probe.write(probe.Probe.model_validate(last.model_dump() | changes), folder)


OLD = {"attention_sha256": "0" * 64}
GOOD = {"run": runs, "steps": step_file, "scaling": lengths, "probe": probes}


def found(*paths):
    return list(contributed.findings(folders.look(paths, contributed.keep)))


@pytest.mark.parametrize("kind", GOOD)
def test_of_what_is_well_nothing_is_said(kind, tmp_path, capsys):
    GOOD[kind](tmp_path)
    assert found(tmp_path) == []
    assert main([str(tmp_path)]) == 0
    number = len(list(tmp_path.glob("*.json")))
    assert capsys.readouterr().out == f"{number} file{'s' * (number > 1)}, 0 refused\n"


def tampered(folder):
    step_file(folder)
    path = folder / "steps.json"
    path.write_text(path.read_text().replace('"time_s": 10.0', '"time_s": 9.0', 1))


def foreign(folder):
    runs(folder)
    (folder / "survey.json").write_text('{"kind": "survey", "schema_version": 1}')


def twice(folder):
    step_file(folder)
    shutil.copy(folder / "steps.json", folder / "again.json")


def linked(folder):
    step_file(folder)
    (folder / "a.json").symlink_to(ROOT / "records" / "steps-gpu" / "steps.json")


def two_windows(folder):
    window = {"options": {"window": 16}}
    runs(folder, lambda label, block: (
        {"run_parameters": parameters_of(label, block) | window} if (label, block) == ("baseline", 0) else {}
    ))  # fmt: skip


def of_a_stranger(folder):
    lengths(folder, linear={"attention": "mine.py", "label": "mine"})


def of_elsewhere(folder):
    (folder / "mine.py").write_text("")
    (folder / "in").mkdir()
    lengths(folder / "in", linear={"attention": str(folder / "mine.py"), "label": "mine"})


def other_task(folder):
    probes(folder)
    content = cell("sdpa", (1.0,) * 3, environment=ON_CPU).model_dump()
    content |= {"name": "other", "setting": content["setting"] | {"task": "chess"}}
    probe.write(probe.Probe.model_validate(content), folder)


def two_definitions(folder):
    runs(folder, lambda label, block: OLD if (label, block) == ("baseline", 3) else {})


def out_of_bounds(folder):
    step_file(folder, {"sdpa": noise(0.002), "linear": noise(0.0), CONTROL: [1.1 * one for one in noise(0.001)]})


FAILED = MEASURE | {"check": "reference", "passed": False}
REFUSED = {
    "changed after it was written": (tampered, "its checksum does not fit; put back"),
    "of a foreign schema": (foreign, "its kind is 'survey', this code knows"),
    "synthetic": (lambda folder: step_file(folder, provenance="synthetic"), "it is synthetic, made up for a test"),
    "the same twice": (twice, "it is the same record as "),
    "a link out": (linked, "it is a link, out of the folder"),
    "of a file that is not here": (of_a_stranger, "mine.py: this repository has no such file"),
    "of a file elsewhere": (of_elsewhere, "mine.py: this repository has no such file"),
    "of two definitions": (
        two_definitions,
        f"baseline is of 2 definitions (00000000 and {SHA['baseline'][:8]}), and one column of both would be of",
    ),
    "a certificate against itself": (
        lambda folder: runs(folder, of("baseline", certificate=certificate(causal=False))),
        "its certificate says passed, and causal is not: no run writes that; measure it again",
    ),
    "a certificate against its measures": (
        lambda folder: runs(folder, of("baseline", certificate=certificate(measures=[MEASURE, FAILED]))),
        "its certificate says passed, and reference is not",
    ),
    "control of runs": (
        lambda folder: runs(folder, control(1.05, 0.002)),
        "the A/A control is out of bounds: sdpa a second time took 5.0 % more",
    ),
    "control's joules": (
        lambda folder: runs(folder, control(0.9, 0.002, "energy_j")),
        "sdpa a second time took 10.0 % less",
    ),
    "control of steps": (out_of_bounds, "time at 512 tokens (n = 6), so differences"),
    "two machines": (
        lambda folder: lengths(folder, linear={"environment": ON_CPU | {"device_name": "another"}}),
        "differ in setting or machine, which no figure joins; a folder for each",
    ),
    "two definitions by options": (two_windows, "runs called baseline have different options: "),
    "no task of ours": (other_task, "its task 'chess' is none of this code's; they are recall"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_stand_is_refused_by_name(fault, tmp_path, capsys):
    plant, says = REFUSED[fault]
    plant(tmp_path)
    bad = [one for one in found(tmp_path) if one.is_refused]
    assert bad and all(says in one.says and "; " in one.says and one.where.startswith(str(tmp_path)) for one in bad), (
        bad
    )
    assert len(bad) == (6 if "certificate" in fault else 1)
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith(f" {len(bad)} refused")


def fails(label, block):
    return {"certificate": certificate(causal=False, passed=False)} if label == "baseline" else {}


def chosen(folder):
    runs(folder, blocks=8)
    for path in folder.glob("*-seed[23]-*.json"):
        path.unlink()


def without_one(folder):
    runs(folder, blocks=7)
    next(folder.glob("baseline-seed6-*.json")).unlink()


def with_notes(folder):
    runs(folder)
    ended = {"name": "gone", "label": "gone", "setting": "0" * 8, "study": {}, "finished_at": record.now()}
    record.write_failure(record.Failure(**ended, reason="killed", says="signal 9"), folder)
    (folder / "notes.txt").write_text("mine")


def flagged(label, block):
    flag = {"check": "clock", "value": 1.0, "limit": 0.5, "verdict": "flagged", "says": "it was held down"}
    return {"checks": [flag], "flags": ["clock"]} if label == "sdpa" and block < 2 else {}


def environment(**changes):
    return lambda label, block: {"environment": ON_GPU | changes}


def one_torch(label, block):
    return {"environment": ON_GPU | {"packages": {"torch": "2.11.0", "transformers": "5.17.0"}}} if block == 0 else {}


def two_settings(folder):
    runs(folder)
    runs(folder, lambda label, block: {"run_parameters": parameters_of(label, block, setting="other")})


def later(folder):
    """A variant that came later, in two blocks of its own beside the reference and the control."""
    runs(folder)
    for (label, block), position in places(("linear", "sdpa", CONTROL), 2).items():
        facts = {"environment": ON_GPU, "certificate": certificate(), "attention_sha256": SHA[label]}
        values = parameters_of(label, 1000 + block)
        study = {"session": "s2", "block": 1000 + block, "position": position}
        record.write(make_record(label, run_parameters=values, study=study, **facts), folder)


GPU = {"samples": 9, "sm_clock_mhz_minimum": 1, "sm_clock_mhz_median": 1.0, "sm_clock_mhz_maximum": 1,
       "temperature_c_begin": 1, "temperature_c_end": 1, "power_limit_w_minimum": 1.0, "power_limit_w_maximum": 1.0,
       "throttled_share": 0.5, "throttled_by": {}}  # fmt: skip


def turned(**changes):
    """The reference's turns of the first two rounds, changed."""
    return lambda folder: step_file(
        folder, turn=lambda label, number: changes if label == "sdpa" and number < 2 else {}
    )


def cold(folder):
    step_file(folder)
    content = steps.load(folder / "steps.json").model_dump()
    content["rounds"][0]["warm"] = False
    steps.write(steps.Steps.model_validate(content), folder / "steps.json")


def uncertified(folder):
    step_file(folder)
    content = steps.load(folder / "steps.json").model_dump()
    content["entries"][1]["certified"] = False
    steps.write(steps.Steps.model_validate(content), folder / "steps.json")


def ran_out(folder):
    step_file(folder)
    content = steps.load(folder / "steps.json").model_dump()
    for one in content["rounds"]:
        left = sorted((turn for turn in one["turns"] if turn["label"] != "linear"), key=lambda turn: turn["position"])
        one["turns"] = [turn | {"position": position} for position, turn in enumerate(left)]
    steps.write(
        steps.Steps.model_validate(content | {"failed": {"linear": {512: "out of memory"}}}), folder / "steps.json"
    )


OTHER = {"name": "recall-other", "setting": cell("sdpa", (1.0,) * 3).setting.model_dump() | {"width": 32}}
LOST = {"name": "recall-lost", "seed": 9, "outcome": "error", "says": "why", "results": []}
ROUNDS = {"sdpa": [1.0] * 3, "linear": [2.0] * 3, CONTROL: [1.0] * 3}
SAID = {
    "fails its certificate": (
        lambda folder: runs(folder, fails),
        "drawn apart and not ranked, for the certificate fails: baseline (causal)",
    ),
    "an earlier certificate": (
        lambda folder: runs(folder, of("baseline", certificate=CERTIFICATE)),
        "and 1 more): the certificate is of one before the whole model was examined",
    ),
    "another text": (
        lambda folder: runs(folder, of("baseline", **OLD)),
        "measured with another text of the file than today's: baseline; measure again for today's",
    ),
    "no commit": (lambda folder: runs(folder, environment(commit=None)), "no commit is named, so what was run is not"),
    "changes": (lambda folder: runs(folder, environment(commit_modified=True)), "with changes that the named commit"),
    "versions": (lambda folder: runs(folder, one_torch), "torch differs, 2.13.0 in 15 and 2.11.0 in 3: times"),
    "few blocks": (lambda folder: runs(folder, blocks=4), "4 whole blocks, and a verdict needs 5: points alone"),
    "a torn block": (without_one, "2 runs of no whole block, which count in no interval: sdpa-seed6-"),
    "a variant that came later": (later, "fewer than 5 whole blocks, so no verdict, of linear"),
    "order": (
        lambda folder: runs(folder, blocks=5),
        "the order over 5 blocks is not balanced, as of 2 variants it is after 2; until then",
    ),
    "no control": (
        lambda folder: runs(folder, labels=("baseline", "sdpa")),
        "no whole block has the A/A control, so the noise is not known; put {attention: sdpa, label: sdpa_again}",
    ),
    "no reference": (
        lambda folder: runs(folder, labels=("baseline", CONTROL)),
        "no block is whole (sdpa and every other once, in one session, on one device): points alone, no verdict; let",
    ),
    "flags": (lambda folder: runs(folder, flagged), "2 of 18 runs flagged: clock 2; their checks say why"),
    "a failed run": (with_notes, "1 run ended without a record: gone (its process was killed)"),
    "what is no record": (with_notes, "left aside, for it is no record: notes.txt"),
    "two settings": (two_settings, "runs of 2 settings, data or devices, in a table each; a folder for each"),
    "rounds": (lambda folder: step_file(folder, ROUNDS), "3 whole rounds, and a verdict needs 5: points alone"),
    "no round": (lambda folder: step_file(folder, rounds=[]), "it holds no round yet; the command that wrote it goes"),
    "steps uncertified": (uncertified, "not to be picked, for the certificate fails: linear"),
    "steps that ran out": (ran_out, "without a number: linear at 512 tokens (out of memory)"),
    "other processes": (turned(other_processes=1), "another process was on the GPU in 2 of 18 windows; measure again"),
    "throttled": (turned(gpu=GPU), "the clock was held down in 2 of 18 windows; measure again"),
    "no joules": (turned(energy_null_reason="foreign_process"), "no joules in 2 of 18 windows: another process ran on"),
    "cold": (cold, "the GPU had not come to its heat before 1 of 6 rounds"),
    "processes": (lambda folder: lengths(folder, rounds=2), "fewer than 5 processes (2 at least) behind 2 of 2 points"),
    "no points": (
        lambda folder: lengths(folder, sdpa={"points": []}, linear={"points": []}),
        "its records of scaling hold no point yet; the command",
    ),
    "rates": (lambda folder: probes(folder, rates=(1e-3, 3e-3)), "fewer than 3 rates in 2 of 2 entries: linear in"),
    "seeds": (
        lambda folder: probes(folder, seeds=3),
        "fewer than 5 seeds at the best rate in 2 of 2 entries: linear in recall, sdpa in recall; the command",
    ),
    "a lost probe": (lambda folder: probes(folder, **LOST), "1 probe without a result: linear, recall, rate 0.01"),
    "another setting": (lambda folder: probes(folder, **OTHER), "1 probe of another setting than most of their task"),
    "blocks chosen": (chosen, "of session s1 later blocks are here, and 2, 3 not; "),
    "unsolved": (lambda folder: probes(folder, best=0.5), "recall is not shown: its reference does not solve it"),
    "no reference tried": (lambda folder: probes(folder, labels=("linear",)), "recall is not shown: its reference"),
}  # fmt: skip
BESIDE = {"a failed run": "left aside", "what is no record": "ended without"}  # a second fault that is so too


@pytest.mark.parametrize("fault", SAID)
def test_what_a_reader_must_know_is_said_and_no_more(fault, tmp_path, capsys):
    plant, says = SAID[fault]
    plant(tmp_path)
    told = found(tmp_path)
    assert not any(one.is_refused for one in told), told
    assert [one for one in told if says in one.says], told
    rest = [one.says for one in told if says not in one.says]
    assert all(BESIDE.get(fault) and BESIDE[fault] in one for one in rest), rest
    assert main([str(tmp_path)]) == 0
    assert all(line.startswith(f"said: {tmp_path}") for line in capsys.readouterr().out.splitlines()[:-1])


@pytest.mark.parametrize(
    ("ratio", "scale", "is_refused"),
    [
        (1.0, 0.0, False), (1.015, 0.001, False), (0.985, 0.001, False), (1.05, 0.1, False), (1.03, 0.001, True),
        (0.97, 0.001, True),
    ],
)  # fmt: skip
def test_the_control_s_bounds_are_a_sure_difference_of_more_than_two_percent(ratio, scale, is_refused, tmp_path):
    runs(tmp_path, control(ratio, scale))
    assert [one.is_refused for one in found(tmp_path)] == [True] * is_refused


def test_a_control_of_one_metric_by_chance_is_judged_by_all_that_are_asked(monkeypatch):
    """Holm: p of 0.03 of one, beside others without a difference, is none."""

    def ratios(runs, metric):
        rows = [("sdpa", 1.0, np.nan), (CONTROL, 1.05, runs)]
        return pd.DataFrame(
            [{"label": a, "ratio": b, "n": 8, "p": p, "low": 1.01, "high": 1.1, "verdict": ""} for a, b, p in rows]
        )

    monkeypatch.setattr(contributed.compare, "ratios", ratios)
    assert list(contributed._control("x", [("time", 0.03, "time_s"), ("joules", 0.8, "energy_j")])) == []
    assert len(list(contributed._control("x", [("time", 0.03, "time_s"), ("joules", 0.01, "energy_j")]))) == 2


@pytest.mark.parametrize("folder", ["records", "predictions"])
def test_the_committed_records_may_stand(folder, capsys):
    """What CI asks of each pull request that brings records."""
    assert main([str(ROOT / folder)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("words", [["nowhere"], ["."]])
def test_what_is_no_folder_of_records_was_asked_wrongly(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m lib.analysis.contributed: ") and "; name " in line


JSON = (
    st.none() | st.booleans() | st.integers(-9, 2**60) | st.floats() | st.text(max_size=9) | st.just([]) | st.just({})
)


def leaves(content, path=()):
    """Where the values of a JSON content stand."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in items:
        yield from leaves(value, (*path, name))


@pytest.fixture(scope="module", params=GOOD)
def well(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    GOOD[request.param](folder)
    return folder


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_record_with_any_value_changed_and_signed_anew_ends_in_lines(well, tmp_path_factory, data, capsys):
    """The checksum keeps no stranger out: the schema, and the judgement, must take whatever fits it."""
    folder = shutil.copytree(well, tmp_path_factory.mktemp("changed") / "records")
    paths = sorted(folder.glob("*.json"))
    content = json.loads(paths[0].read_text())
    *way, last = data.draw(st.sampled_from([path for path in leaves(content) if path]))
    place = content
    for name in way:
        place = place[name]
    place[last] = data.draw(JSON)
    paths[0].write_text(json.dumps(content | {"content_sha256": record.checksum(content)}))
    capsys.readouterr()
    status = main([str(folder)])
    said = capsys.readouterr()
    *lines, end = said.out.splitlines()
    assert said.err == "" and status == any(line.startswith("refused: ") for line in lines)
    assert end.startswith(f"{len(paths)} file") and all(line.isprintable() and str(folder) in line for line in lines)
