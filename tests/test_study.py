"""The chain as it is used: papermill as typed, the study, a ninth variant, and every way to get it wrong."""

import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import nbformat
import pytest
from make import GREEDY, NINTH, STALLING, TINY, kernels, record_of, tiny_profile, when_it_stalls
from matplotlib.text import Text

from lib import attention, parameters, paths, record
from lib.analysis import compare, figures, ngrams, tables
from lib.study import plan, runner
from lib.study.__main__ import main

ROOT = paths.ROOT
BIN = os.path.dirname(sys.executable)


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.OUT_VARIABLE, str(tmp_path / "out"))
    return tmp_path / "out"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return tiny_profile(tmp_path_factory.mktemp("tiny"))


def papermill(*words, cwd=ROOT / "notebooks"):
    command = [os.path.join(BIN, "papermill"), "--no-progress-bar", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_literal_line_writes_a_record(out, tiny, tmp_path):
    """From the notebooks' folder; a study's runs, below, come from the repository's root."""
    done = papermill("train.ipynb", str(tmp_path / "sdpa.ipynb"), "-p", "attention", "sdpa", "-f", tiny)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.json")
    found = record.load(path)
    assert found.attention == "sdpa" and len(found.series.train_loss) == 6


def test_a_study_with_a_ninth_variant_and_others_that_fail(out, tiny, tmp_path, monkeypatch, capsys):
    """One study for all that a run can do: end well, raise, ask for too much memory, be killed."""
    boom = NINTH.replace("return self.c_proj((v", "raise RuntimeError('boom')\n        return self.c_proj((v")
    for name, source in {"ninth": NINTH, "broken": boom, "greedy": GREEDY, "stalling": STALLING}.items():
        (tmp_path / f"{name}.py").write_text(source)
    ninth, broken, greedy, stalling = (tmp_path / f"{name}.py" for name in ("ninth", "broken", "greedy", "stalling"))
    monkeypatch.setenv("STALL", str(tmp_path / "reached"))
    when_it_stalls(tmp_path / "reached", lambda: [kernel.kill() for kernel in kernels()])
    words = [tiny, "--variants", str(stalling), str(broken), "sdpa", str(ninth), str(greedy)]
    assert main(words) == 1
    said = capsys.readouterr()
    assert not kernels()

    # Each that failed is named at the end, its notebook kept, and the others ran and stand in the figures.
    assert "FAILED broken-seed0-" in said.err and "RuntimeError: boom" in said.err
    assert "FAILED stalling-seed0" in said.err and "FAILED greedy-seed0" in said.err
    assert "[5/5] ninth-seed0-" in said.out and "left" in said.out
    assert list(out.glob("broken-seed0-*.ipynb"))
    assert [path.name.partition(".")[2] for path in out.glob("broken-seed0-*.json")] == [record.FAILED]
    page = (out / "summary.ipynb").read_text()
    assert "RuntimeError: boom" in page
    # The terminal says what the page does, and where it is.
    assert f"\ntables: {out.resolve() / 'summary.ipynb'}\nfigures: {out.resolve() / 'figures'}\n" in said.out
    begins, *_, ends = runner.answer(out / "summary.ipynb")
    assert ": Which attention costs least, these runs do not say" in begins and ends.startswith("Not shown: ")
    assert begins in said.out and ends in said.out and begins in page
    for of in record.load_all(out):
        table = tables.main(compare.groups(record.read(out))[0].runs).set_index("variant")
        row, resident = table.loc[of.title], of.metrics.peak_resident_bytes
        said_of = (
            f"validation loss {row['validation loss']}, window {of.metrics.time_s:.2f} s, CPU {row['CPU s per run']} s"
        )
        said_of += "" if resident is None else f", peak resident {row['peak resident GiB']} GiB"
        assert f": {said_of}\n" in said.out
    noted = record.failures(out).set_index("variant")
    assert noted.loc["stalling", "why"] == "its process was killed"
    assert noted.loc["greedy", "why"] == "out of memory" and "lower batch_size" in noted.loc["greedy", "it said"]
    assert "out of memory" in (out / "summary.ipynb").read_text()
    runs = record.read(out)
    assert sorted(runs["label"]) == ["ninth", "sdpa"] and runs["certified"].all()
    assert set(runs["profile"]) == {"tiny"} and runs["session"].nunique() == 1
    assert "ninth" in str([cell.get("outputs") for cell in nbformat.read(out / "summary.ipynb", as_version=4).cells])
    drawn = {draw.__name__ for draw in figures.FIGURES if not isinstance(draw(runs), str)}
    assert {path.stem for path in (out / "figures").glob("*.svg")} == drawn
    labels = [text.get_text() for text in figures.training_time(runs).findobj(Text)]
    assert "ninth" in labels and ": not measured: the run used no GPU." in figures.gpu_energy(runs)
    assert ngrams.of_runs(runs).notna().all(axis=None) and runs["data"].iloc[0]["bigram_loss"] > 0
    assert (runs["started_at"] <= runs["finished_at"]).all()

    # What has a record is not run again; after an edit of a variant's file, that one is.
    ninth.write_text(NINTH.replace("weight=0.5", "weight=0.25"))
    assert main([*words, "--plan"]) == 0
    states = [line.rsplit("(")[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("block ")]
    assert states.count("finished)") == 1 and sum(one.startswith("to run") for one in states) == 4
    assert states.count("to run: its variant's file has changed since)") == 1


def test_papermill_ends_with_one_sentence_and_leaves_no_record(out, tmp_path):
    done = papermill("notebooks/train.ipynb", str(tmp_path / "out.ipynb"), "-p", "attention", "spda", cwd=ROOT)
    said = "there is no attention variant 'spda'; known: baseline, sdpa"
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("UsageError: ") and said in last
    assert not out.exists() or not list(out.glob("*.json"))


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ("epoks: 3", "there is no parameter 'epoks'; did you mean 'epochs'?"),
        ("learning_rate: 1e-4", "YAML reads 1e-4 as text, write 1.0e-04"),
        ("heads: 7", "heads must divide width"),
        ("context: 4096", "longer than the model's 512 positions"),
        ("- a list", "must be lines of `name: value`"),
        ("a: [", "cannot be read as YAML"),
        ("study: {variant: [sdpa]}", "did you mean 'variants'?"),
        ("study: {variants: [sdpa, sdpa]}", "two variants are called 'sdpa'"),
        ("study: {variants: [spda]}", "Did you mean 'sdpa'?"),
        ("study: {blocks: 0}", "blocks must be a whole number, at least 1"),
        ("seed: 3", "seed belongs to a run, not to a profile"),
    ],
)
def test_a_profile_is_checked_before_anything_runs(out, tmp_path, profile, said, capsys):
    (tmp_path / "mine.yaml").write_text(profile)
    assert main([str(tmp_path / "mine.yaml")]) == 2
    message = capsys.readouterr().err
    assert said in message and len(message.splitlines()) == 1
    assert not out.exists() or not os.listdir(out)


def test_a_profile_that_is_not_there_lists_those_that_are(out, capsys):
    assert main(["params/papr.yaml"]) == 2
    assert "params/paper.yaml" in capsys.readouterr().err


OTHERS = ("scaling_", "steps_", "probes")  # of other commands


def test_the_profile_of_all_trains_every_variant_once_and_the_reference_again():
    runs = [run["values"]["attention"] for run in plan.chosen(str(ROOT / "params" / "all.yaml"))[0]]
    assert sorted(runs) == sorted([*attention.variants(), attention.REFERENCE])


PROFILES = [path for path in sorted((ROOT / "params").glob("*.yaml")) if not path.stem.startswith(OTHERS)]


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_committed_profile_makes_a_plan(path, out):
    overrides, about_study = plan.read_profile(str(path))
    assert plan.runs_of(overrides, about_study.get("variants") or [*attention.STUDY_ORDER, plan.CONTROL_RUN], 1)


@pytest.mark.parametrize("variants", [2, 3, 8, 9])
def test_over_a_whole_square_positions_and_neighbours_are_balanced(variants):
    blocks = plan.orders(variants, variants * (1 + variants % 2))
    for position in range(variants):
        assert len(set(Counter(order[position] for order in blocks).values())) == 1
    followers = Counter((a, b) for order in blocks for a, b in pairwise(order))
    assert len(followers) == variants * (variants - 1) and len(set(followers.values())) == 1


def test_eight_blocks_of_the_study_are_balanced_and_the_control_wanders(out):
    variants = [*attention.STUDY_ORDER, plan.CONTROL_RUN]
    runs = plan.runs_of(TINY, variants, 8)
    for run in runs:
        place = {"session": "s", "block": run["block"], "position": run["position"]}
        record.write(record_of(run, study=place), out)
    made = record.read(out)
    assert compare.balanced(made) and not compare.balanced(made[made["block"] < 7])
    nulls = [run["position"] for run in runs if run["values"]["label"] == attention.CONTROL]
    references = [run["position"] for run in runs if parameters.display_name(run["values"]) == attention.REFERENCE]
    assert len(set(nulls)) == 8
    behind = [null - reference for null, reference in zip(nulls, references, strict=True)]
    assert min(behind) < 0 < max(behind) and len(set(behind)) > 4


def test_a_record_of_other_parameters_of_an_older_file_or_of_other_tokens_is_not_taken_for_finished(out):
    (run,) = plan.runs_of(TINY, ["sdpa"], 1)
    name, data = parameters.run_name(run["values"]), runner.Data()
    own, tokens = attention.source_sha256("sdpa"), {"token_sha256": data.token_sha256(run)}
    record.write(record_of(run, attention_sha256=own, data=tokens), out)
    assert runner.is_finished(run, out, data)
    assert not runner.is_finished(plan.runs_of(TINY | {"epochs": 3}, ["sdpa"], 1)[0], out, data)
    record.write(record_of(run, attention_sha256="0" * 64, data=tokens), out)
    assert not runner.is_finished(run, out, data)
    for other in ({"token_sha256": "0" * 64}, {}):
        record.write(record_of(run, attention_sha256=own, data=other), out)
        assert not runner.is_finished(run, out, data)
        assert runner.is_finished(run, out, None)  # for the process that has just made it
    (out / f"{name}.json").write_text("{")
    assert not runner.is_finished(run, out, data)


def test_the_sitting_is_in_the_record_and_each_run_is_known_by_it(monkeypatch):
    monkeypatch.setenv(record.POSITION_VARIABLE, '{"profile": "quick", "session": "abc", "block": 2, "position": 1}')
    assert record.study_position() == record.StudyPosition(profile="quick", session="abc", block=2, position=1)
    monkeypatch.delenv(record.POSITION_VARIABLE)
    assert record.study_position() == record.StudyPosition()
