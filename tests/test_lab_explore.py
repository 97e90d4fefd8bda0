"""explore.ipynb in a real JupyterLab: every control is used as a reader does, and what it changes is seen to change."""

import os
import re
import shutil
from pathlib import Path

import lab
import pytest
from playwright.sync_api import expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(lab.CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium"),
]

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "explore.ipynb"
PATIENCE = lab.PATIENCE * 1000
# The screens, from above; the first has the page's picker.
BUDGET, MAP, CERTIFICATE, DEVICE_FOLDER, ON_PAPER, HERE, TRAINING, TASK, GENERATION, RECORDS, LENGTHS = range(11)


@pytest.fixture(scope="module")
def explore(tmp_path_factory):
    here = tmp_path_factory.mktemp("explore")
    (here / "notebooks").mkdir()
    shutil.copy(NOTEBOOK, here / "notebooks")
    with (
        lab.server(here / "notebooks", here / "state", {"ATTENTION_STUDY_OUT": str(here / "out")}) as url,
        lab.browser() as browser,
    ):
        opened = lab.Notebook(browser, url, NOTEBOOK.name)
        opened.page.set_viewport_size({"width": 1280, "height": 12000})  # Lab draws only what is near the window
        opened.run_all()
        expect(screen(opened, LENGTHS)).to_be_visible(timeout=PATIENCE)
        opened.at_first = [len(re.findall("<img|<table", shown(opened, number))) for number in range(11)]
        opened.variant = picked(opened)
        yield opened
        opened.close()


@pytest.fixture
def notebook(explore):
    """The page with the variant that it begins with, whatever a test before has picked."""
    if picked(explore) != explore.variant:
        choose(explore, BUDGET, "variant", explore.variant)
    return explore


def picked(notebook) -> str:
    return control(notebook, BUDGET, "variant").evaluate("select => select.selectedOptions[0]?.text ?? ''")


def screen(notebook, number):
    """A screen by its place: what has a page as its child."""
    return notebook.page.locator(".jp-OutputArea-output .widget-vbox:has(> .jp-RenderedHTMLCommon)").nth(number)


def page(notebook, number):
    return screen(notebook, number).locator("> .jp-RenderedHTMLCommon")


def shown(notebook, number) -> str:
    """What a screen's page is made of, pictures included."""
    return page(notebook, number).inner_html()


def changes(notebook, number, act) -> None:
    """Waiting is the assertion: a page that never changes runs out of patience."""
    before = shown(notebook, number)
    act()
    for _ in range(10 * lab.PATIENCE):
        if shown(notebook, number) != before:
            break
        notebook.page.wait_for_timeout(100)
    assert shown(notebook, number) != before


def control(notebook, number, label):
    return screen(notebook, number).get_by_label(label, exact=True)


def choose(notebook, number, label, option) -> None:
    changes(notebook, number, lambda: control(notebook, number, label).select_option(option))


def type_in(notebook, number, label, text) -> None:
    def act():
        control(notebook, number, label).fill(text)
        control(notebook, number, label).press("Enter")

    changes(notebook, number, act)


def pick(notebook, option, value) -> None:
    """Turns an option of the picker, and sees the map follow."""

    def act():
        control(notebook, BUDGET, option).fill(value)
        control(notebook, BUDGET, option).press("Enter")

    changes(notebook, MAP, act)


def slide(notebook, number, label) -> None:
    slider = screen(notebook, number).locator(f".widget-hslider:has(label:text-is('{label}')) .noUi-handle")
    changes(notebook, number, lambda: slider.press("ArrowRight"))


def press(notebook, number, says) -> None:
    """Presses a screen's button, sees the page change, and waits until the work has ended."""
    button = screen(notebook, number).get_by_role("button", name=says, exact=True)
    changes(notebook, number, button.click)
    expect(button).to_be_visible(timeout=PATIENCE)


def test_run_all_shows_every_screen_and_no_error(notebook, tmp_path):
    assert notebook.outputs("error") == []
    assert [out["text"] for out in notebook.outputs("stream") if out["name"] == "stderr"] == []
    assert notebook.at_first == [1, 1, 1, 1, 1, 0, 0, 0, 2, 12, 2]  # what a button must begin is not there yet
    assert notebook.errors == []


def test_every_control_changes_what_is_shown(notebook):
    slide(notebook, BUDGET, "context, tokens")
    slide(notebook, BUDGET, "sequences at once")
    slide(notebook, BUDGET, "share that is decoded")
    slide(notebook, BUDGET, "memory, GiB")
    type_in(notebook, MAP, "sentence", "A window sees little, and a wider one sees more.")
    pick(notebook, "window", "2")
    slide(notebook, MAP, "layer")
    choose(notebook, MAP, "head", "2")
    press(notebook, CERTIFICATE, "Examine")
    choose(notebook, DEVICE_FOLDER, "size", "GPT-2 XL (48 layers of 1,600)")
    slide(notebook, DEVICE_FOLDER, "context, tokens")
    choose(notebook, ON_PAPER, "size", "the quick profile (4 layers of 128)")
    press(notebook, GENERATION, "Generate")
    type_in(notebook, GENERATION, "prompt", "The first argument")  # what was written for another prompt goes
    press(notebook, GENERATION, "Generate")
    slide(notebook, GENERATION, "new tokens")
    assert notebook.errors == []


def test_another_variant_is_picked_on_every_screen_at_once_and_a_wrong_one_is_one_sentence(notebook):
    choose(notebook, BUDGET, "variant", "GQA 4:1")
    expect(page(notebook, DEVICE_FOLDER)).to_contain_text("GQA 4:1", timeout=PATIENCE)
    expect(page(notebook, MAP).locator("img[alt^='GQA 4:1']")).to_be_visible(timeout=PATIENCE)
    expect(screen(notebook, CERTIFICATE)).to_contain_text("GQA 4:1, as picked above")
    pick(notebook, "kv_heads", "3")
    alert = screen(notebook, MAP).get_by_role("alert")
    expect(alert).to_have_text(re.compile(r"^kv_heads must divide heads: [^\n]*$"), timeout=PATIENCE)
    pick(notebook, "kv_heads", "2")
    expect(alert).to_have_count(0, timeout=PATIENCE)
    control(notebook, BUDGET, "or a file").fill("nowhere.py")
    control(notebook, BUDGET, "or a file").press("Enter")
    expect(screen(notebook, BUDGET).get_by_role("alert")).to_have_text(re.compile("^there is no attention file"))
    changes(notebook, MAP, lambda: control(notebook, BUDGET, "variant").select_option("Linear (elu+1)"))
    assert notebook.errors == []


def test_work_is_seen_while_it_goes_on_and_can_be_stopped(notebook):
    press(notebook, HERE, "Measure here")
    button = screen(notebook, TRAINING).get_by_role("button")
    changes(notebook, TRAINING, button.click)
    expect(button).to_have_text("Stop")
    changes(notebook, TRAINING, lambda: None)  # it goes on by itself
    button.click()
    expect(button).to_have_text("Train", timeout=PATIENCE)
    learn = screen(notebook, TASK).get_by_role("button")
    changes(notebook, TASK, learn.click)
    expect(page(notebook, TASK).locator("img")).to_be_visible(timeout=PATIENCE)
    learn.click()
    expect(learn).to_have_text("Learn", timeout=PATIENCE)
    expect(screen(notebook, TRAINING)).to_contain_text("ms per step")
    expect(screen(notebook, MAP)).to_contain_text("steps of training on this page")
    assert notebook.errors == []


def test_records_follow_their_controls(notebook):
    choose(notebook, RECORDS, "figure", "training time")
    choose(notebook, RECORDS, "rank by", "cache MiB")
    choose(notebook, RECORDS, "variants", ["SDPA", "MLA"])
    choose(notebook, RECORDS, "record", "mla-seed0-644c9204")
    expect(screen(notebook, RECORDS)).to_contain_text("deepseek", ignore_case=True)
    kernels = page(notebook, RECORDS).locator("details:has(summary:text-is('kernels'))")
    expect(kernels.locator("table")).to_be_hidden()
    kernels.locator("summary").click()
    expect(kernels.locator("table")).to_be_visible()
    expect(control(notebook, RECORDS, "records")).to_contain_text("quick-cpu")  # one group so far: no other to choose
    assert notebook.errors == []


def test_cost_by_length_follows_its_controls(notebook):
    choose(notebook, LENGTHS, "figure", "peak memory")
    choose(notebook, LENGTHS, "variants", ["SDPA", "Linear (elu+1)"])
    assert notebook.errors == []


@pytest.mark.skipif(lab.SCREENSHOTS_VARIABLE not in os.environ, reason=f"{lab.SCREENSHOTS_VARIABLE} names no folder")
def test_pictures_of_every_screen_in_both_themes(notebook):
    notebook.page.set_viewport_size({"width": 1280, "height": 900})
    notebook.screenshots()
    assert notebook.errors == []
