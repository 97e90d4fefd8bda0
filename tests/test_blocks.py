"""A study that was torn in any way, and one that grows: what the command does, what plan and page say."""

import itertools
import json
from types import SimpleNamespace

import pytest
from make import TINY, record_of
from matplotlib.text import Text

from lib import attention, parameters, paths, record
from lib.analysis import compare, figures
from lib.data import corpus
from lib.study import blocks, plan, runner
from lib.study.__main__ import main

SEEDS = itertools.count(1)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """The fingerprint of a small file's tokens, the file, and a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("talks")
    rows = [{"messages": [{"role": "user", "content": f"What is {n} and {n}? It is {2 * n}."}]} for n in range(60)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus.builtin_tokenizer().save_pretrained(folder / "tokenizer")
    values = TINY | {"dataset": str(folder / "mine.jsonl"), "tokenizer": str(folder / "tokenizer")}
    return values | {"validation_share": 0.2}


@pytest.fixture
def study(tmp_path, tokens, monkeypatch):
    """Calls the command; its runs leave records without training, and fail or stop where they are told to."""
    monkeypatch.setenv(paths.OUT_VARIABLE, str(tmp_path / "out"))
    (tmp_path / "mine.yaml").write_text(json.dumps(tokens))
    for name in ("mine", "other"):
        (tmp_path / f"{name}.py").write_text((attention.HERE / "gqa.py").read_text().replace("GQA", name))
    made = SimpleNamespace(out=tmp_path / "out", folder=tmp_path, runs=[], fails={}, stop_before=None)
    values_of = {}

    def execute(notebook, output, given, context):
        if not context:
            return None
        if made.stop_before == len(made.runs):
            raise runner.Stopped("SIGINT")
        values = values_of["known"] | given
        values = parameters.portable(parameters.check_types(values, plan.known_parameters()))
        label = parameters.display_name(values)
        made.runs.append((context["block"], label))
        if label in made.fails:
            return made.fails[label], "as it was told to"
        told = {"attention_sha256": attention.source_sha256(values["attention"]), "study": context}
        facts = corpus.load(SimpleNamespace(**values)).facts
        time_s = 20.0 * (1 + 0.01 * (next(SEEDS) % 7)) * (1 + 0.1 * (label != "sdpa"))
        one = record_of({"values": values, "block": context["block"]}, data=facts, **told)
        record.write(one.model_copy(update={"metrics": one.metrics.model_copy(update={"time_s": time_s})}))

    values_of["known"] = {name: line.default for name, line in plan.known_parameters().items()}
    monkeypatch.setattr(runner, "execute", execute)

    def call(*words, variants=("sdpa", "gqa"), count=5):
        made.runs.clear()
        variants = [str(tmp_path / f"{name}.py") if name in ("mine", "other") else name for name in variants]
        earlier = ("--records", str(tmp_path))  # none of these variants; all that are published are many
        words = (*words, *earlier) if "--plan" in words else words
        return main([str(tmp_path / "mine.yaml"), "--variants", *variants, "--blocks", str(count), *words])

    made.call = call
    return made


def whole(study):
    found = compare.whole_blocks(record.read(study.out))
    return sorted({(row.block, row.label) for row in found.itertuples()})


def state(study):
    return {path.name: path.read_bytes() for path in study.out.glob("*.json")}


ALL = [(block, label) for block in range(5) for label in ("gqa", "sdpa")]


def delete(study, path):
    path.unlink()


def cut(study, path):
    path.write_text(path.read_text()[:100])


def edit(study, path):
    path.write_text(path.read_text().replace('"time_s": 2', '"time_s": 1', 1))


def from_another_session(study, path):
    found = record.load(path)
    record.write(found.model_copy(update={"study": found.study.model_copy(update={"session": "other"})}), study.out)


def on_another_device(study, path):
    found = record.load(path)
    record.write(found.model_copy(update={"environment": found.environment | {"device_name": "another"}}), study.out)


@pytest.mark.parametrize("tear", [delete, cut, edit, from_another_session, on_another_device], ids=lambda f: f.__name__)
def test_a_torn_block_is_set_aside_and_repeated_whole_by_the_command_alone(study, tear, capsys):
    assert study.call(count=3) == 0 and whole(study) == ALL[:6]
    path = next(study.out.glob("gqa-seed1-*.json"))
    tear(study, path)
    torn = state(study)
    capsys.readouterr()

    assert study.call("--plan", count=3) == 0
    said = capsys.readouterr().out
    assert "block 1 is incomplete" in said and "nothing is left to run" not in said
    assert said.count("(to run: its record is damaged)") == (tear in (cut, edit))
    assert said.count("(finished)") == 4 and state(study) == torn and not study.runs

    assert study.call(count=3) == 0
    assert "block 1 is incomplete" in capsys.readouterr().out
    assert sorted(study.runs) == [(1, "gqa"), (1, "sdpa")] and whole(study) == ALL[:6]
    (aside,) = (study.out / record.INCOMPLETE).glob("*-block-1")
    kept = {one.name: one.read_bytes() for one in aside.glob("*.json")}
    assert kept == {name: content for name, content in torn.items() if "-seed1-" in name} and kept
    assert study.call(count=3) == 0 and not study.runs
    assert study.call("--plan", count=3) == 0 and "nothing is left to run" in capsys.readouterr().out


def test_a_study_that_was_stopped_within_a_block_begins_that_block_anew(study, capsys):
    study.stop_before = 5  # within block 2
    assert study.call() == 130
    assert "the same command" in capsys.readouterr().err
    study.stop_before = None
    assert study.call() == 0
    assert sorted(study.runs) == [(block, label) for block, label in ALL if block >= 2] and whole(study) == ALL


def test_a_changed_file_makes_every_block_anew_and_one_block_only_what_is_missing(study, capsys):
    names = ("sdpa", "mine")
    assert study.call(variants=names, count=2) == 0
    (study.folder / "mine.py").write_text((study.folder / "mine.py").read_text() + "\n# edited\n")
    assert study.call(variants=names, count=2) == 0
    assert len(study.runs) == 4 and len({block for block, _ in whole(study)}) == 2
    (study.folder / "mine.py").write_text((study.folder / "mine.py").read_text() + "\n# again\n")
    assert study.call(variants=names, count=1) == 0
    assert study.runs == [(0, "mine")]  # points alone: the reference is not made again
    assert "No block is whole" not in compare.about_blocks(record.read(study.out))
    assert study.call(variants=names, count=2) == 0
    assert len(study.runs) == 4 and len({block for block, _ in whole(study)}) == 2


def test_what_fails_for_good_repeats_no_block_and_what_was_mended_repeats_them_whole(study, capsys):
    names = ("sdpa", "gqa", "mine")
    study.fails["mine"] = "out_of_memory"
    assert study.call(variants=names, count=2) == 1
    before = state(study)
    assert study.call(variants=names, count=2) == 1
    assert study.runs == [(0, "mine"), (1, "mine")]
    assert {name: content for name, content in state(study).items() if not name.endswith(record.FAILED)} == {
        name: content for name, content in before.items() if not name.endswith(record.FAILED)
    }
    assert study.call("--plan", variants=names, count=2) == 0
    assert "block 1 is whole without mine, which failed" in capsys.readouterr().out
    assert {block for block, _ in whole(study)} == {0, 1}  # on the page too
    study.fails.clear()
    assert study.call(variants=names, count=2) == 0
    assert len(study.runs) == 8 and len(whole(study)) == 6  # each was tried once, then its block repeated
    assert not list(study.out.glob(f"*{record.FAILED}"))


def test_a_newcomer_runs_in_new_blocks_beside_reference_and_control(study, capsys):
    assert study.call(variants=("sdpa", "gqa")) == 0
    before = state(study)
    names = ("sdpa", "gqa", "mine")
    capsys.readouterr()
    assert study.call("--plan", variants=names) == 0
    said = capsys.readouterr().out
    assert (
        "blocks 0 to 4 are whole without mine, and stay: new blocks 1000 to 1004 hold it beside sdpa (10 runs)" in said
    )
    assert said.count("(to run)") == 10 and said.count("(finished)") == 10
    assert study.call(variants=names) == 0
    assert len(study.runs) == 10 and {block for block, _ in study.runs} == set(range(1000, 1005))
    assert before.items() <= state(study).items()
    assert study.call(variants=names) == 0 and not study.runs
    runs = record.read(study.out)
    found = compare.ratios(runs, "time_s").set_index("label")
    assert found["n"].to_dict() == {"gqa": 5, "mine": 5, "sdpa": 10} and found.loc[["gqa", "mine"], "low"].notna().all()
    assert found.loc["mine", "ratio"] == pytest.approx(1.1, rel=0.1)
    assert "10 whole blocks (5 of gqa, sdpa; 5 of mine, sdpa)" in compare.about_blocks(runs)

    # A torn one of the new blocks is repeated like any other; a second newcomer has new blocks of its own.
    next(study.out.glob("mine-seed1002-*.json")).unlink()
    assert study.call(variants=names) == 0 and sorted(study.runs) == [(1002, "mine"), (1002, "sdpa")]
    assert study.call(variants=(*names, "other")) == 0
    assert {block for block, _ in study.runs} == set(range(2000, 2005)) and len(study.runs) == 10
    assert {label for _, label in study.runs} == {"other", "sdpa"}


def test_the_control_comes_along_where_the_whole_blocks_had_it(study):
    overrides, _ = plan.read_profile(str(study.folder / "mine.yaml"))
    runs = plan.runs_of(overrides, ["sdpa", "gqa", plan.CONTROL_RUN], 2)
    assert not runner.run_all(runs, "mine")
    assert study.call(variants=("sdpa", "mine"), count=2) == 0
    assert sorted(study.runs) == [(block, label) for block in (1000, 1001) for label in ("mine", "sdpa", "sdpa_again")]
    assert len({block for block, _ in whole(study)}) == 4


def test_a_few_runs_at_a_time_end_with_a_block_or_in_a_named_session(study, capsys):
    assert study.call("--runs", "3") == 2
    assert "give --runs 2, or name by --session" in capsys.readouterr().err and not study.runs
    assert study.call("--runs", "2") == runner.RUNS_LEFT and len(study.runs) == 2
    assert study.call("--runs", "1", "--session", "s1") == runner.RUNS_LEFT
    assert study.call("--runs", "7", "--session", "s1") == 0 and len(study.runs) == 7
    assert whole(study) == ALL and not (study.out / record.INCOMPLETE).exists()
    with pytest.raises(SystemExit):
        study.call("--runs", "0")


def test_figures_and_tables_count_the_same_runs(study):
    assert study.call() == 0
    next(study.out.glob("gqa-seed3-*.json")).unlink()
    runs = record.read(study.out)
    found = compare.ratios(runs, "time_s").set_index("label")
    texts = [text.get_text() for text in figures.training_time(runs).findobj(Text) if "n = " in text.get_text()]
    assert found.loc["gqa", "n"] == 4 and found.loc["sdpa", "n"] == 4
    bars = [text for text in texts if "(n = " in text]
    assert len(bars) == 2 and all("n = 4" in text for text in bars)
    shown = compare.comparable(runs)["time_s"].groupby(compare.comparable(runs)["label"]).agg(lambda t: t.mean())
    assert found.loc["sdpa", "level"] > 0 and set(shown.index) == {"gqa", "sdpa"}
    assert "1 run of an incomplete block counts nowhere" in compare.about_blocks(runs)


@pytest.mark.parametrize(
    ("count", "variants", "said"),
    [
        (5, 2, "--blocks 6"),
        (5, 3, "--blocks 6"),
        (1, 8, "--blocks 8"),
        (2, 2, "--blocks 6 gives them"),
        (9, 8, "--blocks 16"),
    ],
)
def test_the_number_of_blocks_that_balances_is_proposed_beforehand(count, variants, said):
    names = attention.variants()[:variants]
    runs = plan.runs_of({}, list(names), count, check=False)
    assert said in plan.about_order(runs)
    proposed = int(said.split()[1])
    assert "not balanced" not in plan.about_order(plan.runs_of({}, list(names), proposed, check=False))


def test_numbers_of_blocks_read_as_a_sentence():
    assert blocks.numbers([0, 1, 2, 4, 7, 8]) == "0 to 2, 4, 7 to 8"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset": "nowhere.jsonl"}, "there is no data file 'nowhere.jsonl'"),
        ({"dataset": "columns.jsonl"}, "columns.jsonl, line 1 has the columns text; it needs `messages`"),
        ({"tokenizer": "./nowhere"}, "cannot load the tokenizer './nowhere'"),
        (
            {"context": 64, "positions": 64, "batch_size": 4096},
            "sequences of 64 tokens to train on, fewer than the 4096",
        ),
    ],
)
def test_a_plan_says_what_the_run_would_say_of_its_data(study, changes, said, capsys):
    (study.folder / "columns.jsonl").write_text('{"text": "a"}\n')
    if changes.get("dataset") == "columns.jsonl":
        changes = {"dataset": str(study.folder / "columns.jsonl")}
    profile = json.loads((study.folder / "mine.yaml").read_text()) | changes
    (study.folder / "mine.yaml").write_text(json.dumps(profile))
    assert study.call("--plan") == 2
    shown = capsys.readouterr()
    assert said in shown.err and len(shown.err.splitlines()) == 1 and shown.out.count("(to run)") == 10
    assert study.call() == 2 and said in capsys.readouterr().err and not study.runs
