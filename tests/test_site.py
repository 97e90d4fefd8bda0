"""The site: its pages say what files and records say, every link leads somewhere, and no network is asked for."""

import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

import lab
import pytest
from bs4 import BeautifulSoup
from PIL import Image
from playwright.sync_api import expect

from lib import attention
from lib.errors import UsageError
from lib.paths import ROOT
from lib.record import kinds, probe
from lib.site import __main__ as command
from lib.site import build, lookup

MOST_BYTES = 10e6  # of pages, pictures and the table; records are copied as they are


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build.build(tmp_path_factory.mktemp("made") / "site").parent


@pytest.fixture(scope="module")
def parsed(site):
    return {
        path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in sorted(site.rglob("*.html"))
    }


def small_root(folder: Path) -> Path:
    """A project of two pages, one notebook and the variants, whose README names what a link may."""
    shutil.copytree(ROOT / "lib" / "attention", folder / "lib" / "attention", ignore=shutil.ignore_patterns("__*__"))
    for name in ("docs", "notebooks", "records", "params"):
        (folder / name).mkdir()
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "params" / "tiny.yaml").write_text("layers: 1\n")
    cell = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# Train\n", "[up](../README.md)"]}
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "notebooks" / "train.ipynb").write_text(json.dumps(notebook))
    for name in ("numbers", "dataset", "contribute", "capability", "certificate", "variants"):
        (folder / "docs" / f"{name}.md").write_text(f"# {name}\n\n[profiles](../params/)\n")
    (folder / "README.md").write_text(
        "# Small\n\n[one](lib/attention/sdpa.py) [all](lib/attention/) [records](records/) [why](docs/numbers.md)\n"
    )
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_fetched_from_elsewhere_and_every_link_leads_somewhere(site, parsed):
    for path, page in parsed.items():
        for tag in page.find_all(["script", "link", "img", "iframe", "source"]):
            assert urlsplit(tag.get("src") or tag.get("href") or "").scheme not in ("http", "https"), path
    build._check_links(site)  # which what is planted below does not pass


def test_the_site_is_small_and_holds_every_page(site):
    pages = [path for path in site.rglob("*") if path.is_file() and not path.is_relative_to(site / "records")]
    assert sum(path.stat().st_size for path in pages) < MOST_BYTES
    for folder, ending in (("docs", "md"), ("notebooks", "ipynb")):
        assert {path.stem for path in (site / folder).glob("*.html")} == {
            path.stem for path in (ROOT / folder).glob(f"*.{ending}")
        }
    assert {path.stem for path in (site / "variants").glob("*.html")} == {"index", *attention.variants()}
    records = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("records/**/*.json")}
    assert {path.relative_to(site).as_posix() for path in site.glob("records/**/*.json")} == records


def test_pictures_are_pixel_for_pixel_those_of_the_notebooks(site, parsed):
    shown = 0
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        theirs, ours = (
            [Image.open(io.BytesIO(base64.b64decode(text))).convert("RGBA").tobytes() for text in found]
            for found in (
                re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", path.read_text(encoding="utf-8")),
                re.findall(r"base64,([A-Za-z0-9+/=]+)", " ".join(
                    image["src"] for image in parsed[site / "notebooks" / f"{path.stem}.html"].find_all("img")
                )),
            )
        )  # fmt: skip
        assert set(theirs) <= set(ours)
        shown += len(theirs)
    assert shown > 10


def test_every_icon_that_a_page_shows_is_there_and_few_others(site, parsed):
    script = (site / "_static" / "scripts" / "fontawesome.js").read_text(encoding="utf-8")
    there = {icon["name"] for icon in build.ICON.finditer(script)}
    drawn = {
        name.removeprefix("fa-")
        for page in parsed.values()
        for tag in page.find_all(class_="fa-solid")
        for name in tag["class"]
        if name.startswith("fa-") and name not in ("fa-solid", "fa-lg", "fa-fw")
    }
    assert {"magnifying-glass", "moon", "sun"} <= drawn <= there
    assert len(there) < 100


def test_pages_can_be_heard(parsed):
    for path, page in parsed.items():
        assert page.html["lang"] == "en", path
        assert all(image.get("alt") for image in page.find_all("img")), path
        if path.stem != "search":
            seen = [one for one in page.find_all("h1") if not one.find_parent(id="jb-print-docs-body")]
            assert len(seen) == 1, path
        for control in page.find_all(["select", "input"]):
            named = control.find_parent("label") or control.get("aria-label") or control.get("type") == "checkbox"
            assert named, (path, control)


NEW = '''"""Attention to nothing but oneself: out = V, head by head.

O(T C²) time.
"""

from torch import nn
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D


class Attention(nn.Module):
    title = "Oneself"
    paper = "Nobody 2026, Nowhere (arXiv 0000.00000)"

    def __init__(self, config, layer_idx, strength=1.0):
        super().__init__()
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, hidden_states, past_key_values=None, padding_mask=None, **_):
        return self.c_proj(hidden_states), None

    def new_cache(self):
        return DynamicLayer()

    def core_flops(self, context, dense=False):
        return 0

    def cache_bytes(self, context, element_bytes):
        return 2**20

    def reference(self, hidden_states):
        return self.c_proj(hidden_states)
'''


def test_a_record_that_changes_or_goes_while_the_site_is_made_is_refused(tmp_path):
    (tmp_path / "records").mkdir()
    path = Path(shutil.copy(next(ROOT.glob("records/capability-cpu/recall-sdpa-*.json")), tmp_path / "records"))
    held = lookup.held(tmp_path / "records")
    path.write_text(path.read_text().replace('"time_s": ', '"time_s": 1'))
    for turn in ("changed", "gone"):
        with pytest.raises(UsageError, match=f"^{path.name} was changed while the site was made"):
            build._add_files(tmp_path / turn, tmp_path / "records", held, None)
        path.unlink(missing_ok=True)


def test_a_new_variant_and_its_records_appear_without_other_edits(tmp_path, monkeypatch):
    root = small_root(tmp_path / "project")
    (root / "lib" / "attention" / "oneself.py").write_text(NEW)
    for name in attention.variants():  # by whose modules other tests in this process go on
        attention.load(name)
        module = sys.modules[f"lib.attention.{name}"]
        monkeypatch.setitem(sys.modules, f"lib.attention.{name}", module)
        monkeypatch.setattr(attention, name, module)
    monkeypatch.setattr(attention, "HERE", root / "lib" / "attention")
    cell = probe.load(next(ROOT.glob("records/capability-cpu/recall-sdpa-*.json")))
    mixer = {"attention": "oneself", "options": {}, "attention_sha256": "0" * 64}
    changes = {"label": "oneself", "title": "Oneself", "pattern": [mixer], "name": "recall-oneself"}
    probe.write(
        probe.Probe.model_validate(cell.model_dump() | changes | {"content_sha256": ""}), root / "records" / "mine"
    )
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("TOKEN")
    for folder in ("records", "lib", "params"):
        (root / folder / "notes").symlink_to(secret)
        (root / folder / "one").symlink_to(secret / "key")
        (root / folder / "gone").symlink_to(secret / "nothing")
    first = build.build(tmp_path / "site", root).parent
    assert not [path for path, content in bytes_of(first).items() if b"TOKEN" in content]
    page = BeautifulSoup((first / "variants" / "oneself.html").read_text(encoding="utf-8"), "html.parser")
    text = page.get_text(" ", strip=True)
    for said in ("Nobody 2026", "out = V", "Recall", "strength", "12 MiB", "class Attention", "No committed record"):
        assert said in text, said
    assert "oneself.html" in (first / "variants" / "index.html").read_text(encoding="utf-8")
    assert '"oneself"' in (first / "_static" / "lookup-rows.js").read_text(encoding="utf-8")
    index = BeautifulSoup((first / "index.html").read_text(encoding="utf-8"), "html.parser")
    links = {tag.get_text(): tag["href"] for tag in index.find_all("a", href=True)}
    assert links["one"] == "variants/sdpa.html" and links["all"] == "variants/index.html"
    assert (first / "params" / "index.html").is_file()

    before = bytes_of(first)
    again = build.build(first, root).parent  # over what it made, and to the same bytes
    assert bytes_of(again) == before

    (root / "docs" / "numbers.md").write_text("# n\n\n[nowhere](nowhere.md)\n")
    with pytest.raises(UsageError, match=r"numbers.md.*nowhere"):
        build.build(first, root)
    assert bytes_of(first) == before  # what was there stands
    assert sorted(path.name for path in tmp_path.iterdir()) == ["project", "secret", "site"]


def test_what_is_no_page_is_named(tmp_path):
    page, notebook = tmp_path / "docs" / "page.html", tmp_path / "notebooks" / "one.ipynb"
    for path, content in ((page, b'<img src="none.png">'), (notebook, b'{"cells": [{')):
        path.parent.mkdir()
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"the page docs/page names 'none.png', which the site does not hold"):
        build._check_links(tmp_path)
    with pytest.raises(UsageError, match=r"notebooks/one.ipynb is no whole notebook"):
        build._stage_notebook(notebook, tmp_path / "staged", ROOT, set())
    page.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"docs/page.html is no text in UTF-8"):
        build._text(page)


def test_links_in_code_stay_and_others_lead_into_the_site():
    text = "`[a](lib/attention/)` [b](lib/attention/)\n\n[c]: records/\n\n```\n[d](figures/)\n```\n[e](../README.md#x) [f](https://a.b/c)"
    listed = set()
    assert build._relinked(text, "", ROOT, listed) == (
        "`[a](lib/attention/)` [b](variants/index.md)\n\n[c]: docs/dataset.md\n\n```\n[d](figures/)\n```\n"
        "[e](../README.md#x) [f](https://a.b/c)"
    )
    assert build._relinked("[p](../params/) [r](../README.md#x)", "docs", ROOT, listed) == (
        "[p](../params/index.md) [r](../index.md#x)"
    )
    assert listed == {"params"}


def test_what_cannot_be_made_is_one_sentence(tmp_path, capsys):
    with pytest.raises(UsageError, match=r"made from a clone.*no README.md"):
        build.build(tmp_path / "site", tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert command.main(["--to", str(tmp_path / "mine")]) == 2
    assert "mine/ holds something that no site is" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert command.main(["--to", str(tmp_path / "site"), "--records", str(tmp_path / "none")]) == 2
    assert "no folder none/" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert command.main(["--to", str(tmp_path / "file" / "site")]) == 2
    assert "name another folder" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser():
    with lab.browser() as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.browser
@pytest.mark.skipif(lab.CHROMIUM is None, reason="no Chromium here")
def test_no_page_asks_the_network_or_logs_an_error(site, parsed, browser, scheme):
    context = browser.new_context(color_scheme=scheme, offline=True)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append((page.url, message.text)) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append((page.url, str(error))))
    page.on("requestfailed", lambda request: said.append((page.url, request.url)))
    for path in parsed if scheme == "light" else [site / "index.html", site / "lookup.html"]:
        page.goto(path.as_uri())
    page.goto((site / "search.html").as_uri() + "?q=retention")
    expect(page.locator("#search-results .search li a").first).to_be_visible(timeout=20_000)
    assert not said
    context.close()


@pytest.mark.browser
@pytest.mark.skipif(lab.CHROMIUM is None, reason="no Chromium here")
def test_numbers_are_filtered_sorted_drawn_and_linked(site, browser):
    page = browser.new_page()
    page.goto((site / "lookup.html").as_uri())
    body, head = page.locator("#lookup-body tr"), page.locator("#lookup-head th")
    steps = [kinds.load(path)[1] for path in (ROOT / "records" / "steps-gpu").glob("*.json")]
    at_first = [one for one in steps if 8192 in {size.context for size in one.setting.sizes}]
    expect(body).to_have_count(sum(len(one.entries) for one in at_first))
    assert "Window 128" in body.first.inner_text()  # by ratio, the least first
    expect(page.locator("#lookup-chart svg path[aria-label*='SDPA']").first).to_be_visible()

    page.get_by_role("button", name="÷ SDPA").press("Enter")  # by keyboard
    assert "Eager" in body.first.inner_text() and head.nth(2).get_attribute("aria-sort") == "descending"
    page.get_by_label("measured by").select_option("computed")
    page.get_by_label("what").select_option("Cache, GPT-2 small, bf16")
    page.locator("#lookup-at").select_option("32,768 tokens")
    expect(body).to_have_count(len(attention.variants()) + len(lookup.PATTERNS))
    page.get_by_label("words").fill("kimi")
    expect(body).to_have_count(2)
    view = page.url
    assert "kimi" in view and page.locator("#lookup-link").get_attribute("href") in view

    other = browser.new_page()
    other.goto(view)
    expect(other.locator("#lookup-body tr")).to_have_count(2)
    assert other.get_by_label("words").input_value() == "kimi"
    other.get_by_role("button", name="show all").click()
    expect(other.locator("#lookup-count")).to_contain_text("the first 500 are shown")
    link = page.locator("#lookup-body a").first.get_attribute("href")
    assert re.fullmatch(r"variants/\w+\.html", link) and (site / link).is_file()
    tasks = "#kind=small+tasks&what=Recall+%28MQAR%29%2C+scaled+accuracy&at=32+pairs&profile=capability-cpu&show=value"
    other.goto((site / "lookup.html").as_uri() + tasks)
    expect(other.locator("#lookup-body tr").first).to_be_visible()
    rows = other.locator("#lookup-body tr").count()
    expect(other.locator("#lookup-chart .mark-symbol path")).to_have_count(rows)  # also at 0 and below
    expect(other.locator("#lookup-said")).to_have_text("")
    other.goto((site / "lookup.html").as_uri() + "#look-it-up")  # a heading's, not a view's
    assert other.url.endswith("#look-it-up") and other.locator("#lookup-body tr").count() < 50
    for odd in ("#%", "#show=bad&what=%3Cscript%3E", "#at=nowhere"):
        other.goto((site / "lookup.html").as_uri() + odd)
        expect(other.locator("#lookup-body tr").first).to_be_visible()
    page.get_by_label("words").fill("nothing is called so")
    expect(page.locator("#lookup-said")).to_contain_text("No row fits all filters")
    page.get_by_label("words").fill("kimi, mamba")  # either
    assert {"KDA", "Mamba-2"} <= {name.split(" ")[0] for name in page.locator("#lookup-body a").all_inner_texts()}
