"""scripts/gpu_session.py with fake commands for its stages: what runs, in which order, and what is left behind."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "gpu_session.py"

# Makes runs of a block as `lib.study` does; words: profile, blocks, session, at most so many runs now, runs of a block.
FAKE_STUDY = """
import json, os, pathlib, sys
profile, block, session, most, runs = sys.argv[1], int(sys.argv[2]) - 1, sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
profile, folder = pathlib.Path(profile).stem, pathlib.Path(os.environ["ATTENTION_STUDY_OUT"])
todo = [run for run in range(runs) if not (folder / f"v{run}-seed{block}.json").exists()]
for number, run in enumerate(todo[:most]):
    path = folder / f"v{run}-seed{block}.json"
    print(f"[{number + 1}/{len(todo)}] {path.stem} ...", flush=True)
    path.write_text(json.dumps({"study": {"profile": profile, "block": block, "session": session}}))
    path.with_suffix(".ipynb").write_text("{}")
    (path.parent / "figures").mkdir(exist_ok=True)
    (path.parent / "figures" / "time.svg").write_text("<svg/>")
if len(todo) > most:
    sys.exit(3)
"""
HANG = "import time; time.sleep(600)"


@pytest.fixture
def script(monkeypatch):
    """The script as a module of its own, with one run a block of fake commands."""
    spec = importlib.util.spec_from_file_location("gpu_session_under_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BLOCK_COMMAND", study())
    monkeypatch.setattr(module, "STEPS", (module.Stage("steps_gpu", ("{python}", "-c", "print('stepped')"), 0),))
    monkeypatch.setattr(module, "gpu_list", lambda: "GPU 0: a stand-in (UUID: GPU-1)")
    return module


@pytest.fixture(autouse=True)
def same_signal_handlers():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def study(runs=1, then=""):
    return ("{python}", "-c", FAKE_STUDY + then, "{profile}", "{number}", "{session}", "{runs}", str(runs))


def python(code):
    return ("{python}", "-c", code)


def stages(folder):
    return json.loads((folder / "session.json").read_text())["stages"]


def packed(folder, name):
    with tarfile.open(folder / f"{name}.tar.gz") as tar:
        return sorted(tar.getnames())


def timed_session(script, folder, budget_s, seconds):
    """A session whose stages take `seconds`, by the first word of their name, on a fake clock."""
    clock = Clock()
    session = script.Session(folder, budget_s, clock)
    execute = session._execute

    def run(command, log, until_s, env):
        name = stages(folder)[-1]["name"].split()[0]
        code = execute(command, log, float("inf"), env)
        clock.now_s += min(seconds[name], until_s - clock.now_s)
        return None if clock.now_s >= until_s else code

    session._execute = run
    return session


def test_first_stages_run_in_order_and_a_failing_one_stops_nothing(script, tmp_path, monkeypatch):
    first = (
        script.Stage("facts", python("print('fine')"), 0),
        script.Stage("broken", python("print('no luck'); raise SystemExit(3)"), 0),
        script.Stage("absent", ("no-such-command",), 0),
    )
    monkeypatch.setattr(script, "FIRST", first)
    monkeypatch.setattr(script, "BLOCKS", (script.Blocks("gpu_512", 1, 9999),))
    monkeypatch.setattr(
        script, "BENCHMARKS", (script.Stage("bench", python("open(r'{out}/a.csv', 'w').write('1')"), 0),)
    )
    monkeypatch.setattr(script, "has_gpu", lambda: True)
    assert script.main(["--out", str(tmp_path / "out"), "--budget-s", "60"]) == 1
    found = [(stage["name"], stage["exit_code"], stage["outcome"]) for stage in stages(tmp_path / "out")]
    assert found[:2] == [("facts", 0, "fine"), ("broken", 3, "no luck")]
    assert found[2][:2] == ("absent", 127) and "cannot start" in found[2][2]
    assert found[3] == ("steps_gpu", 0, "stepped") and found[4][:2] == ("bench", 0)
    assert packed(tmp_path / "out", "benchmarks") == ["benchmarks/a.csv"]


def test_blocks_alternate_whole_for_as_long_as_the_seen_time_fits(script, tmp_path):
    session = timed_session(script, tmp_path, 20 + 700, {"short": 100, "long": 200})
    short, long = script.Blocks("short", 1, 50), script.Blocks("long", 1, 50)
    session.run_blocks({short: Path("short.yaml"), long: Path("long.yaml")})
    # 100, 200, 100, 200 seconds; of the 100 that are left, 110 are predicted for the next short one.
    assert [stage["name"] for stage in stages(tmp_path)] == [
        "short block 1",
        "long block 1",
        "short block 2",
        "long block 2",
    ]
    assert [line["name"] for line in session.report["not_started"]] == ["short block 3", "long block 3"]
    assert not session.failed


def test_a_block_that_does_not_fit_by_the_first_guess_does_not_start_and_a_shorter_one_does(script, tmp_path):
    session = timed_session(script, tmp_path, 20 + 300, {"short": 250, "long": 250})
    session.run_blocks(
        {script.Blocks("long", 1, 301): Path("long.yaml"), script.Blocks("short", 1, 300): Path("short.yaml")}
    )
    assert [stage["name"] for stage in stages(tmp_path)] == ["short block 1"]


def test_without_a_next_call_on_the_machine_only_what_fits_as_a_whole_is_begun(script, tmp_path):
    session = timed_session(script, tmp_path, 20 + 300, {"slow": 100})
    session.run_blocks({script.Blocks("slow", 9, 50): Path("slow.yaml")})
    assert not session.report["stages"] and session.report["not_started"][0]["why"] == "needs 450 s, 300 s left"


def test_on_a_machine_that_is_kept_a_block_is_begun_and_the_next_call_goes_on_with_it(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "BLOCK_COMMAND", study(runs=9))
    blocks, path = script.Blocks("slow", 9, 50, most=1), Path("slow.yaml")
    session = timed_session(script, tmp_path / "one", 20 + 230, {"slow": 200})
    session.run_blocks({blocks: path}, kept=True)
    session.pack()
    (stage,) = stages(tmp_path / "one")
    assert (stage["exit_code"], stage["runs"], stage["came_to_end"], stage["fine"]) == (3, 4, False, True)
    assert packed(tmp_path / "one", "records") == [f"open/slow/v{run}-seed0.json" for run in range(4)]
    assert not session.failed and session.run_s == {"slow": [50.0]}

    after = timed_session(script, tmp_path / "two", 20 + 600, {"slow": 300})
    assert after.take_in(tmp_path / "one") == 4
    after.run_blocks({blocks: path}, kept=True)
    after.pack()
    (stage,) = stages(tmp_path / "two")
    assert (stage["exit_code"], stage["runs"], stage["came_to_end"]) == (0, 5, True)
    assert packed(tmp_path / "two", "records") == [f"runs/slow/v{run}-seed0.json" for run in range(9)]
    with tarfile.open(tmp_path / "two" / "records.tar.gz") as tar:
        sessions = {json.load(tar.extractfile(name))["study"]["session"] for name in tar.getnames()}
    assert len(sessions) == 1  # one session, and nothing patched


@pytest.mark.parametrize("change", ["boot", "gpu", "code", "pause", "never seen"])
def test_a_block_that_was_left_open_is_not_gone_on_with_elsewhere_or_later(script, tmp_path, monkeypatch, change):
    monkeypatch.setattr(script, "BLOCK_COMMAND", study(runs=2))
    blocks, path = script.Blocks("slow", 2, 50), Path("slow.yaml")
    session = timed_session(script, tmp_path / "one", 20 + 60, {"slow": 50})
    session.run_blocks({blocks: path}, kept=True)
    session.pack()
    report = json.loads((tmp_path / "one" / "session.json").read_text())
    there = report["open"]["slow"]
    if change == "pause":
        there["seen"] = "2026-01-01T00:00:00+00:00"
    elif change == "never seen":
        del there["seen"]
    else:
        there[change] = "another"
    (tmp_path / "one" / "session.json").write_text(json.dumps(report))
    after = timed_session(script, tmp_path / "two", 20 + 300, {"slow": 100})
    after.take_in(tmp_path / "one")
    after.run_blocks({blocks: path})
    assert packed(tmp_path / "two", "records")[0] == "cut/slow/v0-seed0.json"
    assert {Path(name).name for name in packed(tmp_path / "two", "records")[1:]} >= {"v0-seed0.json", "v1-seed0.json"}
    assert after.report["stages"][0]["runs"] == 2  # from its first run on


def test_a_block_that_was_cut_keeps_the_runs_that_it_has(script, tmp_path):
    session = timed_session(script, tmp_path, 20 + 300, {"slow": 1000})
    session.run_blocks({script.Blocks("slow", 1, 100): Path("slow.yaml")})
    session.pack()
    (stage,) = stages(tmp_path)
    assert stage["exit_code"] is None and stage["outcome"].startswith("cut after 300 s: run 1 of 1")
    assert packed(tmp_path, "records") == ["open/slow/v0-seed0.json"]
    assert session.failed


def test_a_block_that_leaves_no_record_is_not_tried_again(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "BLOCK_COMMAND", python("raise SystemExit('papermill is missing')"))
    session = script.Session(tmp_path, 60)
    session.run_blocks({script.Blocks("gpu", 1, 1): Path("gpu.yaml")})
    (stage,) = stages(tmp_path)
    assert (stage["exit_code"], stage["outcome"], stage["came_to_end"]) == (1, "papermill is missing", False)


def test_a_stage_that_takes_too_long_is_ended_with_processes_of_their_own_groups(script, tmp_path):
    told = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {HANG!r}], start_new_session=True)\n"
        f"open({str(told)!r}, 'w').write(str(child.pid))\n" + HANG
    )
    session = script.Session(tmp_path / "out", 600, lambda: 1e9 if told.exists() and told.read_text() else 0.0)
    entry = session.run(script.Stage("hangs", python(code), 0))
    assert entry["exit_code"] is None
    state = Path(f"/proc/{told.read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_packs_are_left_and_the_stage_is_ended_after_sigterm(tmp_path):
    ready = tmp_path / "ready"
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("gpu_session", {str(SCRIPT)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.has_gpu = lambda: True
module.BLOCK_COMMAND = {study(then=f"open({str(ready)!r}, 'w').write('x')" + chr(10) + HANG)!r}
module.FIRST, module.BLOCKS = (), (module.Blocks("gpu_512", 1, 1), module.Blocks("gpu_4096", 1, 1))
module.STEPS = (module.Stage("steps_gpu", ("true",), 0),)
module.BENCHMARKS = (module.Stage("bench", ("true",), 0),)
sys.exit(module.main(["--out", {str(tmp_path / "out")!r}, "--budget-s", "600"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        while not ready.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    _, stage = stages(tmp_path / "out")
    assert stage["outcome"].startswith("cut by signal 15")
    assert packed(tmp_path / "out", "records") == ["open/gpu_512/v0-seed0.json"]
    assert "not started: stopped" in output


def test_records_and_report_are_on_disk_after_each_stage(script, tmp_path):
    session = script.Session(tmp_path, 60)
    session.run_block(script.Blocks("gpu_512", 1, 1), Path("gpu_512.yaml"))
    assert packed(tmp_path, "records") == ["runs/gpu_512/v0-seed0.json"]
    assert stages(tmp_path)[0]["came_to_end"]


def test_packs_are_few_flat_and_the_work_folder_is_gone(script, tmp_path):
    session = script.Session(tmp_path, 60)
    session.run(script.Stage("facts", python("print('GPU 0')"), 0, output="nvidia-smi.txt"))
    session.run_block(script.Blocks("gpu_512", 1, 1), Path("gpu_512.yaml"))
    (session.benchmarks / "latency.csv").write_text("1")
    session.pack()
    packs = [f"{name}.tar.gz" for name in ("benchmarks", "figures", "logs", "notebooks", "records")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*packs, "nvidia-smi.txt", "session.json"])
    assert packed(tmp_path, "notebooks") == ["runs/gpu_512/v0-seed0.ipynb"]
    assert packed(tmp_path, "figures") == ["runs/gpu_512/figures/time.svg"]
    assert (tmp_path / "nvidia-smi.txt").read_text() == "GPU 0\n"


def test_a_pack_too_large_leaves_out_notebooks_first_and_says_so(script, tmp_path):
    session = script.Session(tmp_path, 60)
    noise, files = random.Random(0), {}
    for name, size in {"small.json": 100, "large.json": 9000, "a.ipynb": 3000, "b.ipynb": 8000}.items():
        path = session.work / name
        path.write_bytes(noise.randbytes(size))
        files[name] = path
    assert 0 < session._pack("mixed", files, 13_500) <= 13_500
    assert packed(tmp_path, "mixed") == ["a.ipynb", "large.json", "small.json"]
    assert len(session.report["left_out"]) == 1 and session.report["left_out"][0].startswith("b.ipynb: mixed.tar.gz")
    assert 0 < session._pack("mixed", files, 2_000) <= 2_000
    assert packed(tmp_path, "mixed") == ["small.json"]
    assert session._pack("nothing", files, 10) == 0
    assert (session.folder / "mixed.tar.gz").stat().st_size <= 2_000


def test_what_did_not_fit_stays_in_the_work_folder_and_fails_the_session(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "PACK_BYTES", 600)
    session = script.Session(tmp_path, 60)
    notebook = session.runs / "gpu_512" / "v.ipynb"
    notebook.parent.mkdir()
    notebook.write_bytes(random.Random(0).randbytes(5000))
    session.pack()
    assert notebook.exists() and session.failed
    assert "LEFT OUT runs/gpu_512/v.ipynb" in session.table()


@pytest.mark.parametrize("loose", [False, True])
def test_earlier_records_are_copied_never_overwritten_and_the_next_block_follows(script, tmp_path, loose):
    earlier, profile = tmp_path / "earlier", script.Blocks("gpu_512", 1, 1)
    before = script.Session(earlier, 60)
    before.run_block(profile, Path("gpu_512.yaml"))
    if loose:
        (earlier / "records.tar.gz").unlink()
    else:
        before.pack()
    session = script.Session(tmp_path / "out", 60)
    assert session.take_in(earlier) == 1
    copied = session.runs / "gpu_512" / "v0-seed0.json"
    copied.write_text(copied.read_text() + " ")
    kept = copied.read_text()
    assert session.take_in(earlier) == 0
    assert copied.read_text() == kept
    assert session.predicted_run_s(profile) == script.MARGIN * max(before.run_s["gpu_512"])
    session.run_block(profile, Path("gpu_512.yaml"))
    assert stages(tmp_path / "out")[0]["name"] == "gpu_512 block 2"
    assert packed(tmp_path / "out", "records") == ["runs/gpu_512/v0-seed0.json", "runs/gpu_512/v0-seed1.json"]


def test_rounds_of_training_steps_come_back_and_are_gone_on_with(script, tmp_path, monkeypatch):
    """The stage's file lies among the records, and where the next session's stage looks for it."""
    code = "import json, sys; path, left = sys.argv[1:]; assert 0 < float(left) < 60; "
    code += "open(path, 'a').write(json.dumps({'kind': 'steps'}) if not open(path, 'a').tell() else ' ')"
    stage = script.Stage("steps_gpu", (*python(code), "{file}", "{within_s}"), 0, 60)
    monkeypatch.setattr(script, "STEPS", (stage,))
    monkeypatch.setattr(script, "FIRST", ())
    skipped = ["--skip", *(blocks.profile for blocks in script.BLOCKS), *(stage.name for stage in script.BENCHMARKS)]
    for folder, earlier in (("one", []), ("two", ["--from", str(tmp_path / "one")])):
        assert script.main(["--out", str(tmp_path / folder), "--budget-s", "90", *earlier, *skipped]) == 0
        with tarfile.open(tmp_path / folder / "records.tar.gz") as tar:
            content = tar.extractfile("steps/steps_gpu.json").read()
    assert content == b'{"kind": "steps"} '


def test_without_a_gpu_one_sentence_and_exit_2(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")],
        env=os.environ | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1 and "no NVIDIA GPU" in done.stdout
    assert not (tmp_path / "out").exists()


def test_an_out_folder_with_something_in_it_is_refused(script, tmp_path, capsys):
    (tmp_path / "session.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        script.main(["--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_all_well_is_exit_0_and_skipped_stages_do_not_run(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "FIRST", tuple(script.Stage(name, python("print(1)"), 0) for name in ("one", "two")))
    monkeypatch.setattr(script, "has_gpu", lambda: True)
    monkeypatch.setattr(script, "BENCHMARKS", (script.Stage("three", python("raise SystemExit(1)"), 0),))
    skipped = ["--skip", "one", "gpu_512", "gpu_4096", "gpu_phases", "three"]
    assert script.main(["--out", str(tmp_path / "out"), "--budget-s", "60", *skipped]) == 0
    assert [stage["name"] for stage in stages(tmp_path / "out")] == ["two", "steps_gpu"]


def test_a_rehearsal_is_the_real_profile_in_tiny(script):
    yaml = pytest.importorskip("yaml")
    for blocks in script.BLOCKS:
        text = (SCRIPT.parent.parent / "params" / f"{blocks.profile}.yaml").read_text()
        real, rehearsed = yaml.safe_load(text), yaml.safe_load(script.tiny(text))
        assert real.keys() == rehearsed.keys()
        assert all(str(rehearsed[name]) == value for name, value in script.TINY.items())
        assert rehearsed["packing"] == real["packing"]


# Of a step on a GPU that is the variant's alone, by the profiles' own comments: the fastest that is thought possible.
FASTEST_STEP_S = {"gpu_512": 0.0176, "gpu_4096": 0.023, "paper": 0.0176, "gpt2_medium": 0.1, "gpt2_large": 0.22}


@pytest.fixture
def profiles():
    yaml = pytest.importorskip("yaml")
    params = SCRIPT.parent.parent / "params"
    names = (*FASTEST_STEP_S, "gpu_phases")
    return {name: yaml.safe_load((params / f"{name}.yaml").read_text()) for name in names}


def test_the_profiles_have_equal_tokens_a_step_and_room_for_inference(script, profiles):
    for profile in (profiles[blocks.profile] for blocks in script.BLOCKS):
        assert profile["batch_size"] * profile["context"] == 8192
        assert max(profile["inference_contexts"]) + profile["new_tokens"] <= profile["positions"]
        assert profile["context"] in profile["inference_contexts"]


def test_the_profiles_windows_are_not_flagged_by_their_own_limits(profiles):
    from lib.measure import energy, selfcheck

    for name, step_s in FASTEST_STEP_S.items():
        assert profiles[name]["steps_per_epoch"] * step_s >= selfcheck.SHORT_WINDOW_S, name
        assert profiles[name]["epochs"] >= 8, name
        assert profiles[name].get("idle_s", energy.SHORTEST_WINDOW_S) >= energy.SHORTEST_WINDOW_S
    phases = profiles["gpu_phases"]
    assert phases["inference_window_s"] >= energy.SHORTEST_WINDOW_S
    assert phases["steps_per_epoch"] * FASTEST_STEP_S["gpu_512"] >= selfcheck.SHORT_WINDOW_S
    without_attention_s = 0.012  # forward and backward
    assert phases["phase_steps"] * without_attention_s >= energy.SHORTEST_WINDOW_S


def test_a_run_of_each_profile_fits_a_call_with_a_fifth_to_spare(script):
    for blocks in script.BLOCKS:
        assert blocks.first_guess_s <= 0.8 * 600 / 2  # two and more, so that little is lost with one that is cut
