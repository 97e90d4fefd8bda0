"""The notebooks in a real JupyterLab: what a reader sees who opens one and chooses Run All."""

import re
from pathlib import Path

import lab
import nbformat
import pytest
from playwright.sync_api import expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(lab.CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium"),
]

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
CURVE = "img[src^='data:image/svg']"  # as Lab shows an SVG

# What Lab shows does not depend on how long a run is, so the copies that run here train a small model a little; yet
# long enough for a curve to be seen growing.
STEPS = 24
DRAWN = 3  # figures; more of them Lab shows alike, and nbval runs all
SHORT = {
    "layers": 2,
    "width": 64,
    "heads": 4,
    "steps_per_epoch": STEPS,
    "epochs": 1,
    "validation_sequences": 8,
    "new_tokens": 4,
}


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """Opens a copy of a notebook by name, in Lab; nothing that runs there writes outside a temporary folder."""
    here = tmp_path_factory.mktemp("lab")
    files = here / "notebooks"
    files.mkdir()
    changes = {"train.ipynb": SHORT, "summary.ipynb": {"figures_folder": str(here / "figures")}}
    for path in NOTEBOOKS.glob("*.ipynb"):
        copy = nbformat.read(path, as_version=4)
        for cell in copy.cells:
            if "parameters" in cell.metadata.get("tags", []):
                cell.source = lab.set_parameters(cell.source, changes.get(path.name, {}))
        pictures = [number for number, cell in enumerate(copy.cells) if "style.save" in cell.source]
        if path.name == "summary.ipynb":
            copy.cells = copy.cells[: pictures[DRAWN]]
        nbformat.write(copy, files / path.name)
    opened: dict[str, lab.Notebook] = {}
    with lab.server(files, here / "state", {"ATTENTION_STUDY_OUT": str(here / "out")}) as url, lab.browser() as browser:

        def open_notebook(name: str) -> lab.Notebook:
            if name not in opened:
                while opened:  # one kernel at a time: each holds PyTorch
                    opened.popitem()[1].close()
                opened[name] = lab.Notebook(browser, url, name)
            return opened[name]

        yield open_notebook


# One that trains and one that draws. explore.ipynb has tests of its own; nbval runs all of them, without a browser.
@pytest.mark.parametrize("name", ["summary.ipynb", "train.ipynb"])
def test_run_all(notebook, name):
    page = notebook(name)
    page.run_all()
    assert_all_ran(page)
    page.screenshots()


def assert_all_ran(page):
    assert page.outputs("error") == []
    assert [output["text"] for output in page.outputs("stream") if output["name"] == "stderr"] == []
    assert all(cell["execution_count"] for cell in page.cells())
    assert page.errors == []


def curve_points(page) -> int:
    """How many losses the live curve shows now."""
    pictures = [output["data"].get("image/svg+xml", "") for output in page.outputs("display_data")]
    return sum(len(points.split()) for points in re.findall(r'<polyline points="([^"]*)"', "".join(pictures)))


def test_curve_is_seen_while_training_and_after(notebook):
    """What a person edits, a second time in one kernel, which still holds the old cells and names."""
    page = notebook("train.ipynb")
    if not all(cell["execution_count"] for cell in page.cells()):  # this test alone
        page.run_all()
    page.run_all(wait=False)
    # Waiting is the assertion: a curve that is shorter than the training is one that still grows.
    for _ in range(20 * lab.PATIENCE):
        if 0 < curve_points(page) < STEPS:
            break
        page.page.wait_for_timeout(50)
    assert page.is_busy()
    expect(page.seen(CURVE)).to_be_visible()
    page.wait()
    assert curve_points(page) == STEPS
    expect(page.seen(CURVE)).to_be_visible()
    assert_all_ran(page)


def test_misspelt_variant_is_one_sentence(notebook):
    page = notebook("train.ipynb")
    right = page.cells()[0]["source"]
    page.edit(0, lab.set_parameters(right, {"attention": "spda"}))
    # ipykernel gives up only the cells that have reached it when one fails. In a new kernel all have, while lib is
    # imported; in a warm one the refusal may be quicker than the messages, and later cells run all the same.
    page.restart()
    page.run_all()
    sentence = re.compile(r"^UsageError: [^\n]* Did you mean 'sdpa'\?$")
    expect(page.seen()).to_have_text([sentence], timeout=lab.PATIENCE * 1000)  # Lab draws after the kernel is idle
    (error,) = page.outputs("error")
    assert len(error["traceback"]) == 1 and sentence.match(error["traceback"][0])
    page.edit(0, right)
