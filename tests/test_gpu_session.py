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

# Writes records of a block as `lib.study` does; words: profile, blocks, runs a block, exit code.
FAKE_STUDY = """
import json, os, pathlib, sys
profile, block, runs = sys.argv[1], int(sys.argv[2]) - 1, int(sys.argv[3])
profile = pathlib.Path(profile).stem
for run in range(runs):
    path = pathlib.Path(os.environ["ATTENTION_STUDY_OUT"], f"v{run}-seed{block}.json")
    print(f"[{run + 1}/{runs}] {path.stem} ...", flush=True)
    path.write_text(json.dumps({"study": {"profile": profile, "block": block}}))
    path.with_suffix(".ipynb").write_text("{}")
    (path.parent / "figures").mkdir(exist_ok=True)
    (path.parent / "figures" / "time.svg").write_text("<svg/>")
"""
HANG = "import time; time.sleep(600)"


@pytest.fixture
def script(monkeypatch):
    """The script as a module of its own, with one run a block of fake commands."""
    spec = importlib.util.spec_from_file_location("gpu_session_under_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BLOCK_COMMAND", study())
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
    return ("{python}", "-c", FAKE_STUDY + then, "{profile}", "{number}", str(runs))


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
    monkeypatch.setattr(script, "BLOCKS", (script.Blocks("gpu_512", 9999),))
    monkeypatch.setattr(
        script, "BENCHMARKS", (script.Stage("bench", python("open(r'{out}/a.csv', 'w').write('1')"), 0),)
    )
    monkeypatch.setattr(script, "has_gpu", lambda: True)
    assert script.main(["--out", str(tmp_path / "out"), "--budget-s", "60"]) == 1
    found = [(stage["name"], stage["exit_code"], stage["outcome"]) for stage in stages(tmp_path / "out")]
    assert found[:2] == [("facts", 0, "fine"), ("broken", 3, "no luck")]
    assert found[2][:2] == ("absent", 127) and "cannot start" in found[2][2]
    assert found[3][:2] == ("bench", 0)
    assert packed(tmp_path / "out", "benchmarks") == ["benchmarks/a.csv"]


def test_blocks_alternate_whole_for_as_long_as_the_seen_time_fits(script, tmp_path):
    session = timed_session(script, tmp_path, 20 + 700, {"short": 100, "long": 200})
    short, long = script.Blocks("short", 50), script.Blocks("long", 50)
    session.run_blocks({short: Path("short.yaml"), long: Path("long.yaml")})
    # 100, 200, 100, 200 seconds; of the 100 that are left, 105 are predicted for the next short one.
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
    session.run_blocks({script.Blocks("long", 301): Path("long.yaml"), script.Blocks("short", 300): Path("short.yaml")})
    assert [stage["name"] for stage in stages(tmp_path)] == ["short block 1"]


def test_a_cut_block_is_kept_apart_and_its_profile_not_tried_again(script, tmp_path):
    session = timed_session(script, tmp_path, 20 + 300, {"slow": 1000})
    session.run_blocks({script.Blocks("slow", 100): Path("slow.yaml")})
    session.pack()
    (stage,) = stages(tmp_path)
    assert stage["exit_code"] is None and stage["outcome"].startswith("cut after 300 s: run 1 of 1")
    assert packed(tmp_path, "records") == ["cut/slow/v0-seed0.json"]
    assert session.failed


def test_a_block_that_leaves_no_record_is_not_tried_again(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "BLOCK_COMMAND", python("raise SystemExit('papermill is missing')"))
    session = script.Session(tmp_path, 60)
    session.run_blocks({script.Blocks("gpu", 1): Path("gpu.yaml")})
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
module.FIRST, module.BLOCKS = (), (module.Blocks("gpu_512", 1), module.Blocks("gpu_4096", 1))
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
    (stage,) = stages(tmp_path / "out")
    assert stage["outcome"].startswith("cut by signal 15")
    assert packed(tmp_path / "out", "records") == ["cut/gpu_512/v0-seed0.json"]
    assert "not started: stopped" in output


def test_records_and_report_are_on_disk_after_each_stage(script, tmp_path):
    session = script.Session(tmp_path, 60)
    session.run_block(script.Blocks("gpu_512", 1), Path("gpu_512.yaml"))
    assert packed(tmp_path, "records") == ["runs/gpu_512/v0-seed0.json"]
    assert stages(tmp_path)[0]["came_to_end"]


def test_packs_are_few_flat_and_the_work_folder_is_gone(script, tmp_path):
    session = script.Session(tmp_path, 60)
    session.run(script.Stage("facts", python("print('GPU 0')"), 0, output="nvidia-smi.txt"))
    session.run_block(script.Blocks("gpu_512", 1), Path("gpu_512.yaml"))
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
    earlier, profile = tmp_path / "earlier", script.Blocks("gpu_512", 1)
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
    assert session.predicted_s(profile) == script.MARGIN * max(before.block_s["gpu_512"])
    session.run_block(profile, Path("gpu_512.yaml"))
    assert stages(tmp_path / "out")[0]["name"] == "gpu_512 block 2"
    assert packed(tmp_path / "out", "records") == ["runs/gpu_512/v0-seed0.json", "runs/gpu_512/v0-seed1.json"]


def test_records_of_a_cut_block_are_not_taken_in(script, tmp_path):
    before = timed_session(script, tmp_path / "earlier", 20 + 10, {"slow": 100})
    before.run_blocks({script.Blocks("slow", 1): Path("slow.yaml")})
    before.pack()
    assert script.Session(tmp_path / "out", 60).take_in(tmp_path / "earlier") == 0


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
    skipped = ["--skip", "one", "gpu_512", "gpu_4096", "gpu_phases", "instrument_overhead"]
    assert script.main(["--out", str(tmp_path / "out"), "--budget-s", "60", *skipped]) == 0
    assert [stage["name"] for stage in stages(tmp_path / "out")] == ["two"]


def test_a_rehearsal_is_the_real_profile_in_tiny(script):
    yaml = pytest.importorskip("yaml")
    for blocks in script.BLOCKS:
        text = (SCRIPT.parent.parent / "params" / f"{blocks.profile}.yaml").read_text()
        real, rehearsed = yaml.safe_load(text), yaml.safe_load(script.tiny(text))
        assert real.keys() == rehearsed.keys()
        assert all(str(rehearsed[name]) == value for name, value in script.TINY.items())
        assert rehearsed["packing"] == real["packing"]


def test_the_profiles_have_equal_tokens_a_step_and_room_for_inference():
    yaml = pytest.importorskip("yaml")
    params = SCRIPT.parent.parent / "params"
    short, long = (yaml.safe_load((params / f"{name}.yaml").read_text()) for name in ("gpu_512", "gpu_4096"))
    assert short["batch_size"] * short["context"] == long["batch_size"] * long["context"] == 8192
    for profile in (short, long):
        assert max(profile["inference_contexts"]) + profile["new_tokens"] <= profile["positions"]
        assert profile["context"] in profile["inference_contexts"]
