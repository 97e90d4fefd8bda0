"""What all tests share."""

import gc
import subprocess
import sys

import pytest


def pytest_configure(config):
    if not config.getoption("numprocesses", None):  # else it only hands tests out, and needs no PyTorch
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


# The longest first, so that of two workers (`--dist loadfile`) none ends alone with one of these.
LONG = (
    "test_transformers.py", "test_certificate.py", "test_lab_explore.py", "test_certificate_faults.py", "test_site.py",
    "test_study.py", "test_lab.py", "test_faults.py", "test_cluster.py", "test_published.py", "test_strangers.py",
    "capability.ipynb", "test_figures.py", "test_standin.py", "test_lab_strangers.py", "test_answer.py",
    "test_probes.py", "test_prediction.py", "test_corpus.py", "train.ipynb", "test_compile.py", "test_explore.py",
    "test_house.py", "explore.ipynb", "test_files.py", "scaling.ipynb", "test_attention.py", "test_mla.py",
    "test_replication.py", "test_lsh.py", "replication.ipynb", "summary.ipynb",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_collection_finish():
    gc.freeze()  # what is imported by now stays: the collector need not search it again in every test
    gc.set_threshold(50_000, 20, 100)  # nor so often: tests are short


@pytest.fixture(autouse=True)
def no_open_figures():
    """A figure that one test leaves open is none of the next one's, in whatever order they run."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
