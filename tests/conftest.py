"""What all tests share."""

import subprocess

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
