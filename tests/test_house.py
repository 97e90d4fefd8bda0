"""The rules of the house: one-way flow, notebooks that narrate, one lock."""

import ast
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import yaml

from lib import attention
from lib.paths import ROOT
from lib.study import plan, steps

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@every_notebook
def test_notebooks_narrate_and_do_not_define(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    for cell in code_cells(path):
        parameters = "parameters" in cell.metadata.get("tags", [])
        assert parameters or len(cell.source.splitlines()) <= 10, cell.source
        assert not re.search(r"^\s*(def|class) ", cell.source, re.M)


@every_notebook
def test_notebooks_are_committed_executed_clean(path):
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags", "jupyter"}
        assert cell.metadata.get("jupyter", {"source_hidden": True}) == {"source_hidden": True}
    text = path.read_text()
    assert "application/vnd.jupyter.widget" not in text
    assert str(ROOT) not in text and "/tmp/" not in text


@every_notebook
def test_notebooks_are_written_as_a_refresh_writes_them(path):
    assert nbformat.writes(nbformat.read(path, as_version=4)) + "\n" == path.read_text()


def test_a_refresh_leaves_a_notebook_byte_identical(tmp_path):
    """One that draws from records, as far as its first figure, and a small one that measures and has a widget; nbval
    holds the outputs of all."""
    drawn = nbformat.read(ROOT / "notebooks" / "summary.ipynb", as_version=4)
    figure = next(number for number, cell in enumerate(drawn.cells) if "style.save" in cell.source)
    drawn.cells = drawn.cells[: figure + 1]
    before = (nbformat.writes(drawn) + "\n").encode()
    (tmp_path / "summary.ipynb").write_bytes(before)
    measured = nbformat.v4.new_code_cell("import time; time.time()", metadata={"tags": ["nbval-ignore-output"]})
    measured.outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "12.5"}, execution_count=1)]
    shown = nbformat.v4.new_code_cell("import ipywidgets; ipywidgets.HTML('a page')")
    small = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Small"), measured, shown])
    nbformat.write(small, tmp_path / "small.ipynb")
    names = [tmp_path / "summary.ipynb", tmp_path / "small.ipynb", tmp_path / "small.ipynb"]
    command = [sys.executable, str(ROOT / "scripts" / "refresh_notebooks.py"), *map(str, names)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said == "summary.ipynb: as it was\nsmall.ipynb: changed\nsmall.ipynb: as it was\n"
    assert (tmp_path / "summary.ipynb").read_bytes() == before
    _, kept, widget = nbformat.read(tmp_path / "small.ipynb", as_version=4).cells
    assert kept.outputs[0].data == {"text/plain": "12.5"} and kept.metadata == {"tags": ["nbval-ignore-output"]}
    assert set(widget.outputs[0].data) == {"text/plain"} and not widget.metadata


def test_papermill_s_help_names_every_parameter_with_its_type_and_meaning():
    papermill = shutil.which("papermill", path=f"{sys.prefix}/bin") or "papermill"
    command = [papermill, "--help-notebook", str(ROOT / "notebooks" / "train.ipynb")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name, line in plan.known_parameters().items():
        shown = re.search(rf"^\s+{name}: {line.type} \(default (.*?)\)\s+(\S.*)", said, re.M | re.S)
        assert shown, f"{name} in:\n{said}"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{name.name}" for name in node.names)


# Who may import whom: a room, and the rooms below it that it may use. docs/architecture.md draws it.
GROUND = {"errors", "paths"}
MODEL = GROUND | {"attention", "model", "record", "data"}
MAY_IMPORT = {
    "errors": set(),
    "paths": {"errors"},
    "attention": GROUND,
    "model": GROUND | {"attention"},
    "published": GROUND | {"attention"},
    "record": GROUND | {"attention"},
    "data": GROUND,
    "parameters": MODEL | {"startup"},
    "certificate": MODEL,
    "measure": MODEL | {"parameters", "certificate", "startup"},
    "progress": GROUND,
    "markup": set(),
    "startup": set(),
    "extras": set(),
    "training": MODEL | {"parameters", "certificate", "measure"},
    "analysis": MODEL | {"parameters", "certificate", "measure", "published", "markup"},
    "study": MODEL | {"parameters", "certificate", "measure", "training", "startup"},
    "explore": MODEL
    | {"parameters", "certificate", "measure", "training", "analysis", "study", "published"}
    | {"markup"},
    "site": MODEL | {"parameters", "certificate", "measure", "analysis", "published", "markup"},
}
COMMANDS = {
    "certificate/__main__.py": {"parameters", "study"}
}  # stands above its room: it reads profiles, as a study does


def rooms(path):
    """The rooms of lib/ that a file imports, wherever in it."""
    found = {name.split(".")[1] for name in imports(path) if name.startswith("lib.")}
    return found & set(MAY_IMPORT)


def trespasses(folder):
    """Files of a `lib/` that import what their room may not, with what."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        room = path.relative_to(folder).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        name = path.relative_to(folder).as_posix()
        odd = rooms(path) - MAY_IMPORT[room] - COMMANDS.get(name, set()) - {room}
        if odd:
            found[name] = odd
    return found


def test_every_room_imports_only_what_lies_below_it():
    assert not trespasses(ROOT / "lib")


@pytest.mark.parametrize(
    ("room", "line", "odd"),
    [
        ("measure", "from lib.training import Trainer", "training"),
        ("analysis", "from lib import study", "study"),
        ("record", "def f():\n    from lib.model import build_model", "model"),
        ("study", "import lib.analysis.compare", "analysis"),
        ("certificate", "from lib.study import plan", "study"),
    ],
)
def test_an_import_upwards_is_seen(room, line, odd, tmp_path):
    (tmp_path / room).mkdir()
    (tmp_path / room / "planted.py").write_text(line)
    assert trespasses(tmp_path) == {f"{room}/planted.py": {odd}}


def test_variants_import_nothing_of_the_rest():
    for path in (ROOT / "lib" / "attention").glob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] == "lib"], path.name


def test_shared_code_never_asks_which_variant_it_has():
    """A variant's name in shared code is a default, a display order or the reference of comparisons, nothing else."""
    allowed = {
        "examinations.py": {"baseline"},
        "variant.py": {"baseline"},
        "assemble.py": {"baseline"},
        "bench.py": {"baseline"},
        "figures.py": {"sdpa"},
        "capability.py": {"sdpa", "linear", "sliding_window"},  # those that a published figure shows too
    }
    shared = [path for path in (ROOT / "lib").rglob("*.py") if path.parent.name not in ("attention", "published")]
    for path in shared:
        strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert strings & set(attention.STUDY_ORDER) <= allowed.get(path.name, set()), path.name


def test_only_the_study_knows_that_notebooks_exist():
    for path in (ROOT / "lib").rglob("*.py"):
        if path.parent.name != "study":
            assert not {"nbformat", "papermill", "nbclient"} & {name.split(".")[0] for name in imports(path)}, path.name


def test_only_energy_reads_power():
    for path in (ROOT / "lib").rglob("*.py"):
        if path.name != "energy.py":
            assert "zeus" not in {name.split(".")[0] for name in imports(path)}, path.name
            assert not re.search(r"PowerUsage|TotalEnergy|power\.draw", path.read_text()), path.name


def test_profiles_hold_overrides_and_no_variants_of_their_own():
    for path in (ROOT / "params").glob("*.yaml"):
        notebook = {"scaling": "scaling.ipynb", "probes": "capability.ipynb"}.get(
            path.stem.split("_")[0], "train.ipynb"
        )
        known = steps.Plan.model_fields if path.stem.startswith("steps_") else plan.known_parameters(notebook)
        profile = yaml.safe_load(path.read_text())
        of_its_own = notebook == "capability.ipynb" or path.stem.startswith(("steps_", "scaling_newer"))
        own = set() if of_its_own else {"variants"}  # else its variants are the question
        assert set(profile) - {"study"} <= set(known) - own, path.name
        assert path.read_text().startswith("#"), f"{path.name} opens with what it is for"


def test_nothing_unpickles_runs_remote_code_or_executes_text():
    for path in (ROOT / "lib").rglob("*.py"):
        assert not {"pickle", "dill", "joblib"} & {name.split(".")[0] for name in imports(path)}, path.name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("eval", "exec", "torch.load"), path.name
                told = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert {told.get(name, "False") for name in ("trust_remote_code", "allow_pickle")} == {"False"}, (
                    path.name
                )
