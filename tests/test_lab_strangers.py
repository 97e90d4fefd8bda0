"""What strangers send, in a real JupyterLab: shown as text; nothing of it runs, and nobody is asked for anything."""

from pathlib import Path

import lab
import nbformat
import pytest
from make import make_record
from playwright.sync_api import expect

from lib import record

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(lab.CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium"),
]

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
# As an attacker would: the script writes a file on the server's disk, by Lab's own interface.
WRITES = (
    "window.pwned = 1; fetch('/api/contents/pwned.txt', {method: 'PUT', body: JSON.stringify({type: 'file', "
    "format: 'text', content: 'x'}), headers: {'X-XSRFToken': document.cookie.split('_xsrf=')[1]}})"
)
TAG = f'<img src="pwned-image" onerror="{WRITES}">'
SHORT_TAG = '<img src="pwned-short" onerror="window.pwned = 1">'
FORMULA = r"\(\href{javascript:window.pwned=1}{here}\) $\frac{formula}{here}$ \[\unicode{x41}\]"
HERE = "<class 'mine.Big'>"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("strangers")


@pytest.fixture(scope="module")
def opened(here):
    """Opens a notebook of the folder; every page's requests are kept."""
    (here / "notebooks").mkdir()
    environment = {"ATTENTION_STUDY_OUT": str(here / "out")}
    with lab.server(here / "notebooks", here / "state", environment) as url, lab.browser() as browser:

        def open_notebook(name: str, asked: list) -> lab.Notebook:
            notebook = lab.Notebook(browser, url, name)
            notebook.page.on("request", lambda request: asked.append(request.url))
            return notebook

        yield open_notebook


def poisoned(folder: Path) -> None:
    """Records with a valid checksum that hold markup and formulas wherever a text may stand, and an honest failure."""
    series = make_record().series.model_dump()
    check = {"check": TAG, "value": 1.0, "limit": 1.0, "verdict": "flagged", "says": f"{TAG} {FORMULA}"}
    texts = {
        "title": SHORT_TAG, "paper": f"{TAG} {FORMULA}", "checks": [check], "flags": [TAG],
        "kernels": {TAG: [TAG]}, "data": {TAG: TAG}, "series": series,
        "environment": {"device": "cpu", "device_name": SHORT_TAG, "gpu": None, TAG: FORMULA},
    }  # fmt: skip
    for label in ("sdpa", "a<b>&lt;" + SHORT_TAG):
        record.write(make_record(label, **texts), folder)
    failed = record.Failure(
        name="big", label=SHORT_TAG, setting="", study={}, finished_at=record.now(), reason="error",
        says=f"TypeError: not {HERE} {TAG} {FORMULA}",
    )  # fmt: skip
    record.write_failure(failed, folder)


def ran(notebook, here) -> list[str]:
    """What a script leaves behind."""
    marks = ["window.pwned"] if notebook.page.evaluate("window.pwned") else []
    return marks + [str(path) for path in here.rglob("pwned*")]


def test_a_page_shows_a_record_s_markup_as_text(opened, here):
    """summary.ipynb's tables and explore's records, run in one notebook."""
    poisoned(here / "records" / "poisoned")
    notebook = nbformat.read(NOTEBOOKS / "summary.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.outputs = []
        if "parameters" in cell.metadata.get("tags", []):
            folders = {"records_folder": str(here / "records" / "poisoned"), "figures_folder": str(here / "figures")}
            cell.source = lab.set_parameters(cell.source, folders)
    drawn = [cell for cell in notebook.cells if cell.cell_type == "code" and "figures." not in cell.source]
    explored = f"from lib.explore import records\n\nrecords.records({str(here / 'records')!r})"
    notebook.cells = [*drawn, nbformat.v4.new_code_cell(explored)]
    nbformat.write(notebook, here / "notebooks" / "poisoned.ipynb")
    asked = []
    page = opened("poisoned.ipynb", asked)
    page.page.set_viewport_size({"width": 1280, "height": 8000})  # Lab draws only what is near the window
    page.run_all()
    assert page.outputs("error") == []
    shown = page.seen("td").filter(has_text=HERE)
    expect(shown.first).to_contain_text(f"TypeError: not {HERE} {TAG} {FORMULA}", timeout=lab.PATIENCE * 1000)
    folded = page.seen("details")
    expect(folded.first).to_be_attached()
    for details in folded.all():
        details.evaluate("details => { details.open = true }")
    both = f"{TAG} {FORMULA}"  # its `paper`, and what its check says
    expect(page.seen("details td").filter(has_text=both).first).to_contain_text(both)
    page.page.wait_for_timeout(1000)  # for what would be fetched, and for MathJax
    assert ran(page, here) == []
    assert [url for url in asked if "pwned" in url] == []
    live = page.page.locator("img[src*=pwned], a[href^=javascript], mjx-container, .MathJax")
    assert live.count() == 0
    page.close()


def test_a_stranger_s_executed_notebook_runs_nothing_when_it_is_opened(opened, here):
    script = f"<script>{WRITES}</script>{TAG}<a href='javascript:window.pwned = 1'>a link</a><b>its own text</b>"
    data = {"text/html": script, "image/svg+xml": f"<svg onload='{WRITES.replace(chr(39), chr(34))}'></svg>"}
    outputs = [nbformat.v4.new_output("display_data", {kind: text}) for kind, text in data.items()] + [
        nbformat.v4.new_output("display_data", {"application/javascript": WRITES})
    ]
    cells = [nbformat.v4.new_code_cell("1", outputs=outputs, execution_count=1), nbformat.v4.new_markdown_cell(script)]
    kernel = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), here / "notebooks" / "sent.ipynb")
    asked = []
    page = opened("sent.ipynb", asked)
    expect(page.seen("b")).to_have_text("its own text")
    page.page.wait_for_timeout(1000)
    assert ran(page, here) == []
    page.close()
