"""Installed elsewhere than in a clone, without extras, or beside a folder `lib/` of somebody else's: it works, or says
why; and `make` installs what the lock says."""

import ast
import functools
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from make import write_blocks
from packaging.requirements import Requirement

from lib import extras, paths, record
from lib.analysis import figures, ngrams, tables
from lib.study import cluster, plan
from lib.study.__main__ import main

ALONE = {
    "attention",
    "extras",
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


PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
ASKED = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
WITH = {name: [Requirement(one) for one in asked] for name, asked in ASKED.items()}  # by extra; "": without one


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def locked():
    lines = (paths.ROOT / "requirements.lock").read_text().splitlines()
    found = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if not line.startswith("#")]
    assert None not in found  # each exact, and of no one build
    return {plain(one[1]): one[2] for one in found}


def test_bounds_stand_in_the_project_exact_versions_in_the_lock_which_whoever_installs_a_study_goes_by():
    versions = locked()
    for one in (one for asked in WITH.values() for one in asked if one.name != PROJECT["name"]):
        assert ">=" in str(one.specifier) and "==" not in str(one.specifier), one
        assert one.specifier.contains(versions[plain(one.name)]), one
    by_lock = "--constraint requirements.lock --editable"
    conda = yaml.safe_load((paths.ROOT / "environment.yml").read_text())
    assert conda["dependencies"][-1] == {"pip": ["--constraint requirements.lock", "--editable .[test]"]}
    make = (paths.ROOT / "Makefile").read_text()
    assert "$(READY): pyproject.toml requirements.lock\n" in make and f"{by_lock} '.[test]'" in make
    for page in (paths.ROOT / "docs").glob("*.md"):
        for command in re.findall(r"pip install .*--editable.*", page.read_text()):
            assert by_lock in command, page.name


def brought(extra):
    """The distributions that an extra names, with those that it takes in by name."""
    for one in WITH[extra]:
        if one.name == PROJECT["name"]:
            yield from (name for other in one.extras for name in brought(other))
        else:
            yield plain(one.name)


def test_each_package_that_lib_imports_is_the_core_s_or_an_extra_s_that_is_named():
    of_package = distributions()
    # typing_extensions comes with torch; fla is for an option, on CUDA alone, whose sentence says how to get it
    own = {*sys.stdlib_module_names, "lib", "typing_extensions", "fla"}
    for path in (paths.ROOT / "lib").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {one.name for node in nodes if isinstance(node, ast.Import) for one in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        for package in {name.split(".")[0] for name in names} - own:
            extra = extras.BROUGHT_BY.get(package, "")
            comes_with = {"traitlets": "ipywidgets", "pydantic_core": "pydantic"}.get(package)
            theirs = of_package[package] | {comes_with}
            assert theirs & set(brought(extra)), (path.name, package)
    assert {room for room in extras.ROOMS} <= set(ROOMS) | ALONE
    assert {*extras.EXTRAS, *extras.ROOMS.values()} < set(WITH)


@functools.cache
def distributions():
    """Of each package that is installed here, those that it is from; takes seconds."""
    return {name: {*map(plain, found)} for name, found in importlib.metadata.packages_distributions().items()}


def core():
    """Every distribution that an installation without extras has here."""
    found, asked = set(), [one.name for one in WITH[""]]
    while asked:
        name = plain(asked.pop())
        if name not in found:
            found.add(name)
            needs = map(Requirement, importlib.metadata.requires(name) or ())
            asked += [one.name for one in needs if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


# Python's own finder, but blind for what an installation without extras would not have.
CORE_ALONE = """
import importlib, json, runpy, sys
from importlib.machinery import PathFinder
class Blind(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else super().find_spec(name, path, target)
sys.meta_path[:] = [Blind if one is PathFinder else one for one in sys.meta_path]
import torch
from lib import attention, certificate
from lib.data import corpus
from lib.model import build_model, gpt2_config
ids = torch.randint(0, 100, (1, 8))
model = build_model("gqa", gpt2_config(layers=1, width=16, heads=2, positions=16, vocabulary=100))
model(ids, labels=ids).loss.backward()
model.eval().generate(ids, max_new_tokens=2, do_sample=False)
said = {}
for room in ROOMS:
    try:
        importlib.import_module(f"lib.{room}")
        said[room] = "came in"
    except ImportError as error:
        said[room] = str(error)
try:
    certificate.table({})
except ImportError as error:
    said["certificate.table"] = str(error)
try:
    runpy.run_module("lib.study", run_name="__main__")
except SystemExit as ended:
    said["study.__main__"] = ended.code
said["others"] = [name for name in HIDDEN if name in sys.modules]
print(json.dumps(said))
"""


def test_without_extras_a_model_runs_and_each_other_room_says_in_a_sentence_which_to_install():
    there = core()
    of_package = distributions()
    hidden = [name for name, of in of_package.items() if not of & {*there, PROJECT["name"]}]
    with_transformers = {"pydantic", "pydantic_core", "yaml"}
    assert set(extras.BROUGHT_BY) - with_transformers <= set(hidden)
    rooms = [*ROOMS, "analysis.tables", "measure.meter", "explore.bench", "study.runner", "data.parquet", "progress"]
    code = f"HIDDEN, ROOMS = {hidden}, {rooms}\n{CORE_ALONE}"
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.pop("others") == []
    wanting = {room: words for room, words in said.items() if words != "came in"}
    wanted = {
        "record": ("pandas", "statistics"), "parameters": ("pandas", "statistics"), "training": ("pandas", "study"),
        "analysis.tables": ("pandas", "statistics"), "measure.meter": ("psutil", "energy"),
        "explore.bench": ("ipywidgets", "notebooks"), "study.runner": ("psutil", "study"),
        "data.parquet": ("pyarrow", "study"), "progress": ("IPython", "study"),
        "study.__main__": ("pandas", "study"), "certificate.table": ("pandas", "statistics"),
    }  # fmt: skip
    assert set(wanting) == set(wanted)
    for room, (package, extra) in wanted.items():
        assert re.fullmatch(
            rf"lib\.{room.split('.')[0]}[.\w]* needs {package}, which is not installed: "
            rf"pip install 'attention-study\[{extra}\]'", wanting[room],
        ), wanting[room]  # fmt: skip


def test_without_the_project_s_records_one_s_own_are_ranked_and_what_is_published_is_named(tmp_path, monkeypatch):
    for module, name in ((ngrams, "COUNTED_LATER"), (figures, "PUBLISHED")):
        monkeypatch.setattr(module, name, tmp_path / getattr(module, name).name)
    ngrams._counted_later.cache_clear()
    write_blocks(tmp_path, ("sdpa", "gqa"))
    runs = record.read(tmp_path)
    assert len(tables.ranking(runs)) == 2 and ngrams.above_bigram(runs).isna().all()
    assert "published_figures.csv of the project's clone" in figures.published_beside_ours(runs)
    ngrams._counted_later.cache_clear()
