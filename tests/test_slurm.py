"""The study on a Slurm of one node, which the test starts on loopback from Debian's packages and ends again."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from make import STALLING, timeless, tiny_profile, wait_for

from lib import cluster, record, study

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
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=ALL Default=YES
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


def test_a_killed_job_and_a_drained_node_cost_one_block(slurm, tmp_path, monkeypatch, started):
    """Two blocks of two runs. Block 0 is killed in its second run; the same command then repeats it, and only it."""
    profile = tiny_profile(tmp_path)
    Path(profile).write_text(json.dumps(json.loads(Path(profile).read_text()) | {"device": "cpu"}))  # asks for no GPU
    only_there = "if stall and '\"block\": 0' in os.environ['ATTENTION_STUDY_SITTING']:"
    (tmp_path / "stalling.py").write_text(STALLING.replace("if stall:", only_there))
    variants = ["sdpa", str(tmp_path / "stalling.py")]
    out, reached = tmp_path / "out", tmp_path / "reached"
    config = {"profile": profile, "variants": variants, "blocks": 2}
    first, second = cluster.blocks(cluster.planned(config)).values()
    names = [[run["name"] for run in block] for block in (first, second)]

    def start(log, **more):
        command = [sys.executable, "-m", "snakemake", "-s", str(record.ROOT / "workflow" / "Snakefile")]
        command += ["--executor", "slurm", "--jobs", "2", "--slurm-status-command", "squeue"]
        command += ["--slurm-init-seconds-before-status-checks", "1"]
        command += ["--config", *(f"{name}={json.dumps(value)}" for name, value in config.items())]
        environment = slurm | {record.OUT_VARIABLE: str(out)} | more
        with open(tmp_path / log, "w") as file:
            started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=file, stderr=file))
        return started[-1]

    def there(name):
        return (out / f"{name}.json").exists()

    killed = start("killed.log", STALL=str(reached))
    wait_for(lambda: reached.exists() and all(map(there, names[1])) and len(jobs(slurm)) == 1, killed)
    set_node(slurm, "drain")
    (job,) = jobs(slurm)
    subprocess.run(["scancel", "--signal=KILL", "--full", job], env=slurm, check=True)
    assert killed.wait(timeout=120) == 1
    whole = {name: (out / f"{name}.json").read_bytes() for name in (names[0][0], *names[1])}
    assert len(record.load_all(out)) == 3

    resumed = start("resumed.log")
    wait_for(lambda: "PENDING" in jobs(slurm).values(), resumed)  # the node is drained: nothing begins
    set_node(slurm, "resume")
    assert resumed.wait(timeout=300) == 0, (tmp_path / "resumed.log").read_text()

    said = (tmp_path / "resumed.log").read_text()
    assert "blocks finished: 1\nblocks torn, to be run again as a whole: 0\n" in said
    assert all((out / f"{name}.json").read_bytes() == whole[name] for name in names[1])
    (aside,) = (out / record.TORN).iterdir()
    assert (aside / f"{names[0][0]}.json").read_bytes() == whole[names[0][0]]
    assert (aside / f"{names[0][1]}.ipynb").exists()
    assert cluster.states([*first, *second], out) == {0: "finished", 1: "finished"}
    assert (out / "summary.ipynb").exists()

    monkeypatch.setenv(record.OUT_VARIABLE, str(tmp_path / "study"))
    (tmp_path / "study").mkdir()
    assert not study.run_all([*first, *second], "tiny")
    ours, theirs = record.load_all(out), record.load_all(tmp_path / "study")
    assert [timeless(one) for one in ours] == [timeless(one) for one in theirs] and len(ours) == 4
