"""The study through Snakemake on this machine: the same records, a GPU for each block, no block ever patched."""

import json
import os
import re
import subprocess
import sys

import pytest
from make import TINY, record_of

from lib import attention, parameters, paths, record
from lib.errors import UsageError
from lib.study import cluster, runner

ROOT = paths.ROOT
# In the processes of the workflow's runs the notebook is left out: what is seen is who runs when, where and after whom.
RUNS_NOTHING = """
import sys

if "lib.study.cluster" in sys.orig_argv:
    import json, os, pathlib
    from lib import record
    from lib.study import runner

    def execute(notebook, output, given, context):
        if not context:
            return None if output.write_text("a summary") else None
        event = [os.environ["CUDA_VISIBLE_DEVICES"], context["block"], context["position"]]
        for when in ("begins", "ends"):
            with open(os.environ["SEEN"], "a") as file:
                print(json.dumps([*event, when]), file=file)
        if os.environ["FAILS"] == str(event[1:]):
            return "error", "as it was told to"
        made = record.load(pathlib.Path(os.environ["MADE"]) / f"{output.stem}.json")
        record.write(made.model_copy(update={"study": record.StudyPosition(**context)}))

    runner.execute = execute
"""


def snakemake(*words, cwd, **environment):
    pytest.importorskip("snakemake")
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflow" / "Snakefile"), *words]
    environment = os.environ | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.OUT_VARIABLE, str(tmp_path / "out"))
    return tmp_path / "out"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.json")}


def test_a_failure_ends_its_block_alone_which_is_then_run_again_whole_and_a_card_has_one_run_at_a_time(out, tmp_path):
    """Three blocks of two runs on two GPUs; the second run of block 0 fails at first."""
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    (tmp_path / "sitecustomize.py").write_text(RUNS_NOTHING)
    earlier = [str(tmp_path)]  # for what is to be expected: none, since all that are published are many
    config = {"profile": str(tmp_path / "tiny.yaml"), "variants": ["sdpa", "gqa"], "blocks": 3, "records": earlier}
    runs = cluster.planned(config)
    seated(runs, tmp_path / "made")
    names = {run["name"] for run in runs if run["block"] == 0}
    words = ["--config", *(f"{name}={json.dumps(value)}" for name, value in config.items()), "gpus=2"]
    environment = {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "SEEN": f"{tmp_path}/seen",
        "MADE": f"{tmp_path}/made",
    }

    def run(*more, fails=""):
        (tmp_path / "seen").write_text("")
        done = snakemake(*words, *more, cwd=tmp_path, FAILS=fails, **environment)
        events = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
        gpus = {gpu: [event[1:] for event in events if event[0] == gpu] for gpu in sorted({e[0] for e in events})}
        return done, gpus

    def one_by_one(*places):
        return [[*place, when] for place in places for when in ("begins", "ends")]

    done, gpus = run(fails="[0, 1]")
    assert done.returncode == 1, done.stderr
    assert "6 runs in 3 blocks" in done.stdout and "blocks to run: 0, 1, 2" in done.stdout
    assert f"FAILED {runs[1]['name']}: an error: as it was told to" in done.stderr
    assert gpus == {"0": one_by_one([0, 0], [0, 1], [2, 0], [2, 1]), "1": one_by_one([1, 0], [1, 1])}
    assert (out / "summary.ipynb").exists() and record.failures(out)["it said"].tolist() == ["as it was told to"]
    before = contents(out)

    planned, gpus = run("--dry-run")
    assert planned.returncode == 0 and not gpus and contents(out) == before, planned.stderr
    assert "blocks finished: 1, 2\nblocks incomplete, to be run again as a whole: 0\n" in planned.stdout
    assert "rule set_aside_block_0:" in planned.stdout
    assert {run["name"] for run in runs if f"rule {run['name']}:" in planned.stdout} == names

    done, gpus = run()
    assert done.returncode == 0, done.stderr
    assert gpus == {"0": one_by_one([0, 0], [0, 1])}
    (aside,) = (out / record.INCOMPLETE).iterdir()
    incomplete = {name: content for name, content in before.items() if name.partition(".")[0] in names}
    assert contents(aside) == incomplete and len(incomplete) == 2
    assert all((out / name).read_bytes() == before[name] for name in before.keys() - incomplete.keys())
    assert set(cluster.states(runs, out).values()) == {"finished"}


def seated(runs, folder, **changes):
    """Records of planned runs, as if they had been run in one session."""
    data = runner.Data()
    for run in runs:
        values, place = run["values"], {"session": "s1", "block": run["block"], "position": run["position"]} | changes
        told = {"attention_sha256": attention.source_sha256(values["attention"])}
        told["data"] = {"token_sha256": data.token_sha256(run)}
        record.write(record_of(run, study=place, **told), folder)


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    return cluster.planned({"profile": str(tmp_path / "tiny.yaml"), "variants": ["sdpa", "gqa"], "blocks": 2})


def test_a_block_is_torn_unless_it_is_of_one_sitting_on_one_device(runs, out):
    first = cluster.blocks(runs)[0]
    assert [run["before"] for run in first] == [None, first[0]["name"]]
    assert cluster.states(runs, out) == {0: "to run", 1: "to run"}
    seated(first[:1], out)
    assert cluster.states(runs, out) == {0: "incomplete", 1: "to run"}
    seated(first[1:], out)
    assert cluster.states(runs, out) == {0: "finished", 1: "to run"}
    for other in ({"session": "s2"}, {"session": None}, {"block": 5}):
        seated(first[1:], out, **other)
        assert cluster.states(runs, out) == {0: "incomplete", 1: "to run"}
    moved = record.load(out / f"{first[0]['name']}.json")
    record.write(moved.model_copy(update={"environment": moved.environment | {"gpu": {"uuid": "GPU-2"}}}), out)
    seated(first[1:], out)
    assert cluster.states(runs, out) == {0: "incomplete", 1: "to run"}
    seated(first, out)
    assert cluster.states(runs, out) == {0: "finished", 1: "to run"}
    record.write(moved.model_copy(update={"data": {"token_sha256": "0" * 64}}), out)
    assert cluster.states(runs, out) == {0: "incomplete", 1: "to run"}
    (out / f"{first[0]['name']}.json").write_text("{")
    assert cluster.states(runs, out) == {0: "incomplete", 1: "to run"}


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
    assert "blocks finished: 0\nblocks incomplete, to be run again as a whole: 1\n" in said
    assert "\nto be expected on a GPU:\n" in said
    assert cluster.left(second, out) == [str(notebook), str(notebook.with_suffix(".json"))]
    assert {path: path.read_bytes() for path in out.iterdir()} == there


def test_a_run_refuses_to_patch_its_block(runs, out, capsys):
    first, second = cluster.blocks(runs)[0]
    assert cluster.refusal(first, "s1", out) is None
    assert "is not of this session; start the workflow again" in cluster.refusal(second, "s1", out)
    seated([first], out)
    assert cluster.refusal(second, "s1", out) is None
    assert cluster.main([json.dumps(second), "s2"]) == 1  # as after a job that was requeued
    assert f"FAILED {second['name']}: {first['name']}, which comes before it" in capsys.readouterr().err
    runner._note_failure(second, {"session": "s1", "block": 0, "position": 1}, "killed", "it was", out)
    assert "it failed in this session" in cluster.refusal(second, "s1", out)
    assert cluster.refusal(second | {"before": None}, "s2", out) is None


def test_a_run_sees_one_of_the_cards_that_its_process_saw(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that what is set below is undone, where it was not set before
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    cluster.use_gpu(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    with pytest.raises(UsageError, match="there is no GPU 2: CUDA_VISIBLE_DEVICES names 2"):
        cluster.use_gpu(2)
    cluster.use_gpu(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-b"


def test_a_job_of_a_large_plan_has_the_rules_of_its_own_runs_alone():
    runs = cluster.planned({"variants": ["sdpa", "gqa"], "blocks": 50}, check=False)
    words = ["snakemake", "--snakefile", "x", "--allowed-rules", *(run["name"] for run in runs[2:4]), "--cores", "1"]
    assert cluster.of_job(runs, words) == runs[2:4] and cluster.of_job(runs, ["snakemake", "--cores", "1"]) == runs
    assert cluster.of_job(runs, ["snakemake", "--allowed-rules", "summary"]) == []


@pytest.mark.parametrize("blocks", [1, 50])
def test_a_job_plans_no_more_than_its_own_block_and_that_as_the_whole_plan_does(blocks, monkeypatch):
    config = {"variants": ["sdpa", "gqa", {"attention": "gqa", "label": "gqa-seed9-00000000"}], "blocks": blocks}
    runs = cluster.planned(config, check=False)
    made, real = [], parameters.run_name
    monkeypatch.setattr(parameters, "run_name", lambda values: made.append(values) or real(values))
    for run in runs[:: 3 * 7]:
        job = cluster.planned(config, check=False, words=["snakemake", "--allowed-rules", run["name"], "--cores", "1"])
        assert job == [one for one in runs if one["block"] == run["block"]]
    assert len(made) == 3 * len(runs[:: 3 * 7])
    for rules in (["summary"], [runs[0]["name"], "set_aside_block_0"]):
        assert cluster.planned(config, check=False, words=["--allowed-rules", *rules]) == runs


def test_the_threads_of_a_run_are_those_that_snakemake_was_given_not_its_own(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    shell = f"{cluster.threads_as_given()}; echo $OMP_NUM_THREADS ${{MKL_NUM_THREADS-none}}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # as in a job
    assert subprocess.run(["sh", "-c", shell], env=environment, capture_output=True, text=True).stdout == "7 none\n"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"profil": "x"}, "did you mean 'profile'?"),
        ({"gpus": 0}, "gpus must be a number from 1 to 8, not 0"),
        ({"blocks": 0}, "blocks must be a whole number, at least 1, not 0"),
        ({"blocks": "two"}, "blocks must be int, not 'two'"),
        ({"variants": "sdpa"}, "variants must be list, not 'sdpa'; write 'variants=[sdpa]'"),
        ({"records": "out"}, "write 'records=[out]'"),
        ({"profile": 3}, "profile must be str, not 3"),
        ({"profile": "params/papr.yaml"}, "there is no profile params/papr.yaml"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(config, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        cluster.planned(config)


@pytest.mark.parametrize(
    ("blocks", "folder", "said"),
    [
        ("two", "out", "snakemake: blocks must be int, not 'two'"),
        ("1", "{ut}", "snakemake: the output folder {ut} has braces in its name, which Snakemake takes for wildcards"),
    ],
)
def test_snakemake_ends_with_that_sentence_alone(tmp_path, blocks, folder, said):
    where = {paths.OUT_VARIABLE: str(tmp_path / folder)}
    ended = snakemake("--config", f"blocks={blocks}", "--dry-run", cwd=tmp_path, **where)
    assert ended.returncode == 1 and said in ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
