"""The study on a Slurm of one node, which the test starts on loopback from Debian's packages and ends again."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import psutil
import pytest
from make import STALLING, timeless, tiny_profile, wait_for

from lib import paths, record
from lib.study import cluster, runner

pytest.importorskip("snakemake_executor_plugin_slurm")
DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES
"""


# Behind a variant: in the kernel of a run, which gpus that sees.
SEEING = """
if "CARDS" in os.environ and "ATTENTION_STUDY_POSITION" in os.environ:
    with open(os.environ["CARDS"], "a") as file:
        print(os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
"""


def free_ports(number):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment in which Slurm's commands find this one; skipped with the reason where it does not start."""
    if os.geteuid() != 0:
        pytest.skip("only root may start Slurm's daemons")
    missing = [name for name in (*DAEMONS, "sbatch") if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: Debian's slurm-wlm and munge have them")
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().partition(".")[0]
    for name in ("state", "bin"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    srun = folder / "bin" / "srun"  # inside a job the plugin drops SLURM_CONF, without which srun looks in /etc
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
    srun.chmod(0o755)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, ports=free_ports(2)))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")  # as if there were two
    environment = os.environ | {
        "SLURM_CONF": f"{folder}/slurm.conf",
        "PATH": f"{folder}/bin:{os.environ['PATH']}:/usr/sbin",
    }
    munge = [f"--{file}-file={folder}/munge.{file}" for file in ("key", "seed", "pid", "log")]
    munge += [f"--socket={folder}/munge.socket", "--foreground", "--force"]
    daemons = []
    try:
        for command in (["munged", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]):
            with open(folder / f"{command[0]}.out", "w") as file:
                daemons.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
        if not wait_until(lambda: node(environment) == "idle", 30):
            said = {name: (folder / f"{name}.out").read_text().splitlines()[-3:] for name in DAEMONS}
            pytest.skip(f"Slurm does not start here: {said}")
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root", "--signal=KILL", "--full"], env=environment, check=False)
        steps = [step for one in daemons for step in psutil.Process(one.pid).children(recursive=True)]
        for one in reversed(daemons):
            one.terminate()
            one.wait(timeout=30)
        _, left = psutil.wait_procs(steps, timeout=10)
        for one in left:
            one.kill()


def wait_until(condition, seconds):
    for _ in range(seconds * 10):
        if condition():
            return True
        time.sleep(0.1)
    return False


def node(environment):
    found = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True)
    return found.stdout.strip()


def jobs(environment):
    """Slurm's numbers and states of the jobs that are not over."""
    said = subprocess.run(["squeue", "-h", "-o", "%i %T"], env=environment, capture_output=True, text=True).stdout
    return dict(line.split() for line in said.splitlines())


def set_node(environment, state):
    host = socket.gethostname().partition(".")[0]
    command = ["scontrol", "update", f"NodeName={host}", f"State={state}", "Reason=test"]
    subprocess.run(command, env=environment, check=True)


@pytest.fixture
def started():
    """Processes that end with the test."""
    processes = []
    yield processes
    for process in processes:
        process.kill()


def snakemake(config, out, log, started, environment, *words):
    """Starts the workflow; what it says goes to `log`, in whose folder it works."""
    command = [sys.executable, "-m", "snakemake", "-s", str(paths.ROOT / "workflow" / "Snakefile"), *words]
    command += ["--config", *(f"{name}={json.dumps(value)}" for name, value in config.items())]
    environment = environment | {paths.OUT_VARIABLE: str(out)}
    log.parent.mkdir(exist_ok=True)
    with open(log, "w") as file:
        started.append(subprocess.Popen(command, cwd=log.parent, env=environment, stdout=file, stderr=file))
    return started[-1]


def test_here_and_on_slurm_the_records_are_those_of_a_study_and_a_killed_job_costs_one_block(
    slurm, tmp_path, monkeypatch, started
):
    """Two blocks of two runs. On Slurm block 0 is killed in its second run, the node drained, the workflow killed."""
    profile = tiny_profile(tmp_path)
    only_there = "if stall and '\"block\": 0' in os.environ['ATTENTION_STUDY_POSITION']:"
    (tmp_path / "stalling.py").write_text(STALLING.replace("if stall:", only_there) + SEEING)
    config = {"profile": profile, "variants": ["sdpa", str(tmp_path / "stalling.py")], "blocks": 2}
    runs = cluster.planned(config)
    (first, last), others = ([run["name"] for run in block] for block in cluster.blocks(runs).values())

    # On Slurm, until all but one run is there.
    out, here, studied = (tmp_path / name for name in ("out", "here", "studied"))
    reached, work = tmp_path / "reached", tmp_path / "slurm"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    slurm = slurm | {"OMP_NUM_THREADS": "1"}
    words = ["--executor", "slurm", "--jobs", "2", "--slurm-status-command", "squeue"]
    words += ["--slurm-init-seconds-before-status-checks", "1"]
    stall = {"STALL": str(reached), "CARDS": str(tmp_path / "gpus")}
    killed = snakemake(config, out, work / "killed.log", started, slurm | stall, *words)
    there = [out / f"{name}.json" for name in (first, *others)]
    wait_for(lambda: reached.exists() and all(path.exists() for path in there) and len(jobs(slurm)) == 1, killed)
    assert set((tmp_path / "gpus").read_text().split()) == {"0", "1"}  # each job saw one GPU, and they not the same
    set_node(slurm, "drain")
    (job,) = jobs(slurm)
    subprocess.run(["scancel", "--signal=KILL", "--full", job], env=slurm, check=True)
    killed.kill()
    killed.wait()
    assert wait_until(lambda: not jobs(slurm), 30)
    before = {path.stem: path.read_bytes() for path in there}
    assert len(record.load_all(out)) == 3

    # The same command waits for the node, then repeats that block, and only that.
    resumed = snakemake(config, out, work / "resumed.log", started, slurm, *words)
    wait_for(lambda: "PENDING" in jobs(slurm).values(), resumed)
    set_node(slurm, "resume")

    # Meanwhile by lib.study, and by Snakemake here: one block, without a summary.
    monkeypatch.setenv(paths.OUT_VARIABLE, str(studied))
    studied.mkdir()
    assert not runner.run_all(runs, "tiny")
    expected = {one.name: timeless(one) for one in record.load_all(studied)}
    assert len(expected) == 4
    local = snakemake(config | {"blocks": 1}, here, tmp_path / "work" / "here.log", started, os.environ, last)
    assert local.wait(timeout=300) == 0, (tmp_path / "work" / "here.log").read_text()
    made = {one.name: timeless(one) for one in record.load_all(here)}
    assert made == {name: expected[name] for name in (first, last)}

    assert resumed.wait(timeout=300) == 0, (work / "resumed.log").read_text()
    said = (work / "resumed.log").read_text()
    assert "blocks finished: 1\nblocks incomplete, to be run again as a whole: 0\n" in said
    assert all((out / f"{name}.json").read_bytes() == before[name] for name in others)
    (aside,) = (out / record.INCOMPLETE).iterdir()
    assert (aside / f"{first}.json").read_bytes() == before[first] and (aside / f"{last}.ipynb").exists()
    assert {one.name: timeless(one) for one in record.load_all(out)} == expected
    assert cluster.states(runs, out) == {0: "finished", 1: "finished"}
    assert (out / "summary.ipynb").exists()
