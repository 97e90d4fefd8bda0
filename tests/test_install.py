"""Installed elsewhere than in a clone, and beside a folder `lib/` of somebody else's: it works, or says why."""

import subprocess
import sys

import pytest

from lib import paths
from lib.study import cluster, plan
from lib.study.__main__ import main

ALONE = {
    "attention",
    "markup",
    "paths",
    "progress",
    "startup",
}  # they are of one piece: nothing of theirs asks for any `lib`
ROOMS = sorted({path.stem for path in (paths.ROOT / "lib").iterdir() if path.name[0] not in "_."} - ALONE)
# As the finder of an editable installation: behind Python's own, it gives our rooms to whatever `lib` is there.
EDITABLE = """
import importlib.machinery, importlib.util, os, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        parts = name.split(".")
        if parts[0] == "lib":
            return importlib.machinery.PathFinder.find_spec(name, [os.path.join(OURS, *parts[:-1])])
sys.meta_path[:] = [*(one for one in sys.meta_path if "editable" not in one.__module__), Finder]
import lib
for room in ROOMS:
    try:
        importlib.import_module(f"lib.{room}")
        print(room, "came in")
    except ImportError as error:
        print(room, error)
"""


def beside(folder, rooms):
    code = f"OURS, ROOMS = {str(paths.ROOT)!r}, {rooms}\n{EDITABLE}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env={}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("is_package", [True, False], ids=["a package", "a folder"])
def test_beside_a_lib_of_one_s_own_no_room_of_ours_comes_in(is_package, tmp_path):
    (tmp_path / "lib").mkdir()
    if is_package:
        (tmp_path / "lib" / "__init__.py").write_text("")
    else:
        (tmp_path / "lib" / "mine.py").write_text("")
    for room, said in beside(tmp_path, ROOMS if is_package else ["errors", "analysis", "record"]).items():
        assert said.startswith(f"Python's `lib` is {tmp_path}/lib, not this project's {paths.ROOT}/lib"), (room, said)
        assert "\n" not in said and said.endswith("put this project's first in PYTHONPATH")


def test_without_such_a_folder_ours_comes_in(tmp_path):
    assert set(beside(tmp_path, ["errors", "paths"]).values()) == {"came in"}


def test_a_study_without_its_notebooks_says_where_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "NOTEBOOKS", tmp_path)
    for words in (["--plan"], ["params/paper.yaml", "--plan"], ["--variants", "sdpa"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "a study runs from a clone of the project" in said and "train.ipynb" in said
    assert cluster.main([]) == 1 and "summary.ipynb is not there: a study runs from" in capsys.readouterr().err
