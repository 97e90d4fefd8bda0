"""What all tests share."""

import subprocess
import sys

import pytest
import torch

torch.set_num_threads(1)  # the tests' tensors are tiny: a second thread only waits


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode
    if mounted != 0:
        pytest.skip("this user may mount no file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


# What takes minutes begins first, so that of two workers (`--dist loadfile`) none ends alone with one of these.
LONG = (
    "test_study.py", "test_figures.py", "test_faults.py", "test_lab_explore.py", "test_cluster.py", "test_lab.py",
    "test_probes.py", "capability.ipynb", "test_growth.py", "test_house.py", "train.ipynb", "explore.ipynb",
    "test_standin.py", "test_attention.py", "scaling.ipynb", "test_scaling.py", "replication.ipynb", "summary.ipynb",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def no_open_figures():
    """A figure that one test leaves open is none of the next one's, in whatever order they run."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
