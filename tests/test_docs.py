"""What README and docs/ say is there, is there; what they show, runs."""

import re

import cache_table
import pytest

from lib import attention
from lib.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"(?<![\w/.])(?:lib|tests|scripts|params|notebooks|records|docs|workflow)/[\w/.-]*\w")
OURS_LATER = (
    "notebooks/out", "records/mine", "records/by-ME", "lib/attention/mine.py", "params/mine.yaml",
    "params/probes_mine.yaml",
)  # fmt: skip # made by a run, or by who contributes


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def odd(page, text: str) -> list[str]:
    """Links of a page's text that lead nowhere, and files or modules that it names and that are not there."""
    found = []
    for link in LINK.findall(text):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        path = (page.parent / target) if target else page
        if not path.exists() or (anchor and anchor not in headings(text if path == page else path.read_text())):
            found.append(link)
    for name in FILE.findall(text):
        name = name.replace("\\", "")
        there = (ROOT / name).exists() or (ROOT / f"{name}.py").exists()
        if not there and not name.startswith(OURS_LATER) and name.upper() != name and "NAME" not in name:
            found.append(name)
    for module in re.findall(r"python -m (lib[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
            found.append(module)
    return found


@every_page
def test_links_and_named_files_are_there(page):
    assert not odd(page, page.read_text())


@pytest.mark.parametrize(
    "text",
    [
        "see [a](gone.md)", "see [a](numbers.md#no-such-heading)", "`lib/measure/gone.py` counts",
        "`python -m lib.gone`", "tests in `tests/test_gone.py`",
    ],
)  # fmt: skip
def test_a_planted_dead_link_is_seen(text):
    assert odd(ROOT / "docs" / "planted.md", text)


def test_every_page_is_reached_from_the_readme():
    linked = set(LINK.findall((ROOT / "README.md").read_text()))
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= linked


def test_every_test_that_a_page_names_is_there():
    there = {path.name for path in (ROOT / "tests").glob("*.py")}
    for page in PAGES:
        assert set(re.findall(r"`(test_\w+\.py)`", page.read_text())) <= there, page.name


def test_every_room_stands_on_the_page_about_architecture():
    from test_house import MAY_IMPORT

    page = (ROOT / "docs" / "architecture.md").read_text()
    assert not [room for room in MAY_IMPORT if not re.search(rf"\b{room}\b", page)]


def test_what_is_shown_from_python_runs(monkeypatch):
    shown = "".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S))
    monkeypatch.chdir(ROOT)
    found = {}
    exec(compile(shown, "docs/python.md", "exec"), found)
    assert len(found["runs"]) == len(list((ROOT / "records" / "quick-cpu").glob("*.json")))


def test_each_variant_stands_in_the_table_of_whose_code_it_is_held_against_and_its_test_takes_that():
    page = (ROOT / "docs" / "variants.md").read_text()
    rows = re.findall(
        r"^\| (.+?) \| (.+?) \| \[.+?\]\(\.\./(tests/\w+\.py)\) \|$", page.partition("## Held against")[2], re.M
    )
    told = [name for names, _, _ in rows for name in re.findall(r"`(\w+)`", names)]
    assert sorted(told) == sorted(attention.variants())
    for _, whose, path in rows:
        text = (ROOT / path).read_text()
        theirs = [] if whose.startswith("nobody") else re.findall(r"`((?:[A-Z]|create_|modeling_)\w+)`", whose)
        assert all(re.search(rf"^from transformers.*\b{name}\b", text, re.M) for name in theirs), path
    assert sum(whose.startswith("nobody") for _, whose, _ in rows) == 2  # as the README says


def test_the_table_of_caches_says_what_the_layers_keep():
    """Keys and values of all tokens; a state of 64 x 64 numbers a head in fp32; a pattern's layers added up."""
    assert cache_table.documented() == cache_table.table(), "python tests/cache_table.py --write"
    rows = dict(re.findall(r"^\| ([^|]+) \| [^|]+ \| ([\d,.]+) \|", cache_table.documented(), re.M))
    keys, state = 12 * 2 * 768 * 32_768 * 2 / cache_table.MIB, 12 * 12 * 64 * 64 * 4 / cache_table.MIB
    assert rows["SDPA"] == f"{keys:,.0f}" and rows["Gated DeltaNet"] == f"{state:.1f}"
    assert rows["3 × Gated DeltaNet + Gated SDPA"] == f"{keys / 4 + 3 * state / 4:,.0f}"
    assert len(rows) == len(attention.variants()) + len(cache_table.PATTERNS)
