"""The study through Snakemake on this machine: the same records, a card for each block, no block ever patched."""

import json
import os
import subprocess
import sys

import pytest
from make import NINTH, TINY, make_record, tiny_profile

from lib import attention, cluster, parameters, record, study
from lib.errors import UsageError

ROOT = record.ROOT
# A variant that notes which run it is in and which card it sees; and one that fails in block 1.
SEEING = (
    NINTH
    + """
import json, os

if "SEEN" in os.environ and "ATTENTION_STUDY_SITTING" in os.environ:
    with open(os.environ["SEEN"], "a") as file:
        place = json.loads(os.environ["ATTENTION_STUDY_SITTING"])
        print(json.dumps([os.environ["CUDA_VISIBLE_DEVICES"], place["block"], place["position"]]), file=file)
"""
)
FAILING = SEEING + "        assert place['block'] != 1, 'not here'\n"


def snakemake(*words, cwd, **environment):
    pytest.importorskip("snakemake")
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflow" / "Snakefile"), *words]
    environment = os.environ | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv(record.OUT_VARIABLE, str(tmp_path / "out"))
    return tmp_path / "out"


def test_the_records_are_those_of_a_study_a_failure_ends_its_block_alone_and_each_card_has_one_block_at_a_time(
    out, tmp_path, monkeypatch
):
    """Three blocks of two runs on two cards; the second run of block 1 fails."""
    profile = tiny_profile(tmp_path)
    for name, source in (("seeing", SEEING), ("failing", FAILING)):
        (tmp_path / f"{name}.py").write_text(source)
    variants = [str(tmp_path / "seeing.py"), str(tmp_path / "failing.py")]
    config = ["--config", f"profile={profile}", f"variants={json.dumps(variants)}", "blocks=3", "cards=2"]

    planned = snakemake("--dry-run", *config, cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "6 runs in 3 blocks" in planned.stdout and "blocks to run: 0, 1, 2" in planned.stdout
    assert "to be expected: unknown" in planned.stdout and not out.exists()

    done = snakemake(*config, cwd=tmp_path, SEEN=str(tmp_path / "seen"))
    assert done.returncode == 1, done.stdout + done.stderr
    print(done.stdout, done.stderr, (tmp_path / "seen").read_text())
    raise AssertionError


def seated(runs, folder, **changes):
    """Records of planned runs, as if they had been run in one sitting."""
    for run in runs:
        values, place = run["values"], {"sitting": "s1", "block": run["block"], "position": run["position"]} | changes
        one = make_record(parameters.display_name(values), run["block"], name=run["name"])
        told = {"parameters": values, "setting": parameters.setting(values), "sitting": record.Sitting(**place)}
        told["attention_sha256"] = attention.source_sha256(values["attention"])
        record.write(one.model_copy(update=told), folder)


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    return cluster.planned({"profile": str(tmp_path / "tiny.yaml"), "variants": ["sdpa", "gqa"], "blocks": 2})


def test_a_block_is_torn_unless_it_is_of_one_sitting_on_one_device(runs, out):
    first = cluster.blocks(runs)[0]
    assert [run["before"] for run in first] == [None, first[0]["name"]]
    assert cluster.states(runs, out) == {0: "to run", 1: "to run"}
    seated(first[:1], out)
    assert cluster.states(runs, out) == {0: "torn", 1: "to run"}
    seated(first[1:], out)
    assert cluster.states(runs, out) == {0: "finished", 1: "to run"}
    for other in ({"sitting": "s2"}, {"sitting": None}, {"block": 5}):
        seated(first[1:], out, **other)
        assert cluster.states(runs, out) == {0: "torn", 1: "to run"}
    moved = record.load(out / f"{first[0]['name']}.json")
    record.write(moved.model_copy(update={"environment": moved.environment | {"gpu": {"uuid": "GPU-2"}}}), out)
    seated(first[1:], out)
    assert cluster.states(runs, out) == {0: "torn", 1: "to run"}
    (out / f"{first[0]['name']}.json").write_text("{")
    assert cluster.states(runs, out) == {0: "torn", 1: "to run"}


def test_the_plan_says_what_is_there_and_changes_nothing(runs, out, capsys):
    first, second = cluster.blocks(runs).values()
    seated(first, out)
    seated(second[:1], out)
    notebook = out / f"{second[0]['name']}.ipynb"
    notebook.write_text("of a run that will be set aside")
    there = {path: path.read_bytes() for path in out.iterdir()}
    cluster.show(runs, cluster.states(runs, out), out, [str(out)])
    said = capsys.readouterr().out
    assert "4 runs in 2 blocks" in said
    assert "blocks finished: 0\nblocks torn, to be run again as a whole: 1\nto be expected on a GPU:\n" in said
    assert cluster.left(second, out) == [str(notebook), str(notebook.with_suffix(".json"))]
    assert {path: path.read_bytes() for path in out.iterdir()} == there


def test_a_run_refuses_to_patch_its_block(runs, out, capsys):
    first, second = cluster.blocks(runs)[0]
    assert cluster.refusal(first, "s1", out) is None
    assert "is not of this sitting; start the workflow again" in cluster.refusal(second, "s1", out)
    seated([first], out)
    assert cluster.refusal(second, "s1", out) is None
    assert cluster.main([json.dumps(second), "s2"]) == 1  # as after a job that was requeued
    assert f"FAILED {second['name']}: {first['name']}, which comes before it" in capsys.readouterr().err
    study._note_failure(second, {"sitting": "s1", "block": 0, "position": 1}, "killed", "it was", out)
    assert "it failed in this sitting" in cluster.refusal(second, "s1", out)
    assert cluster.refusal(second | {"before": None}, "s2", out) is None


def test_a_run_sees_one_of_the_cards_that_its_process_saw(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cluster.use_card(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    with pytest.raises(UsageError, match="there is no card 2: CUDA_VISIBLE_DEVICES names 2"):
        cluster.use_card(2)
    cluster.use_card(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-b"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"profil": "x"}, "did you mean 'profile'?"),
        ({"cards": 0}, "cards must be a number from 1 to 8, not 0"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"profile": "params/papr.yaml"}, "there is no profile params/papr.yaml"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(config, said):
    with pytest.raises(UsageError, match=said.replace("?", r"\?")):
        cluster.planned(config)
