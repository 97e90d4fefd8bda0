"""The docs, notebooks and records as a static site that opens from disk, by Sphinx with MyST-NB.

It reads the Markdown and the executed notebooks as they are, checks every link between them, and brings a search that
needs no server. What the site adds is generated beside copies of them in a folder of its own: a page per variant
(`lib.site.pages`), the table to look things up in, and lists of the folders that a link names. The records themselves,
and the data set made of them (`lib.site.data`), lie in the site as files.
"""

import base64
import contextlib
import hashlib
import io
import json
import os
import posixpath
import re
import shutil
import tempfile
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL.Image import open as open_image  # a name of its own: no text is read

from lib import attention
from lib.errors import UsageError
from lib.paths import ROOT
from lib.site import data, lookup, lookup_page, pages

STATIC = Path(__file__).parent / "static"
NOTEBOOKS = ("explore", "summary", "scaling", "capability", "replication", "train")  # in the order of a reader
DOCS = ("variants", "numbers", "measurements", "certificate", "capability", "dataset", "data", "run", "cluster",
        "failures", "transformers", "python", "contribute", "site", "security", "mutants", "architecture")  # fmt: skip
# what a page may link to
LINKED = (".github", "figures", "lib", "params", "predictions", "scripts", "tests", "workflow", "LICENSE",
          "CITATION.cff", "Makefile", "environment.yml", "pyproject.toml", "requirements.lock")  # fmt: skip
NEVER = ("__pycache__", "out", "static")  # folders that no page is about
NOT_COPIED = (".pyc", ".svg")
ANSWER_ENDS = "<!-- End of the answer -->"
# In Markdown a link's path, inline or on a line of its own as "[name]: path"; what is code is found first, and left.
CODE, PATH = r"(?P<code>^```.*?^```|`[^`\n]*`)", r"(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?"
LINK = re.compile(rf"{CODE}|(?P<before>\]\(|^\[[^\]\n]+\]: )(?!\w+:|#){PATH}", re.DOTALL | re.MULTILINE)
# Of the theme: for its developers, for other languages, icons of brands and outlines, of which no page shows any.
NEEDLESS = ("*.map", "*macros.html", "locales", "fa-brands-*.woff2", "fa-regular-*.woff2")
# An icon in Font Awesome's script, with its other names: sun:[576,512,[9728],"f185","M200 ..."],
ICON = re.compile(r'("?)(?P<name>[a-z0-9-]+)\1:\[\d+,\d+,\[(?P<others>[^\]]*)\],"[0-9a-f]+",(?:"[^"]*"|\[[^\]]*\])\],?')
MOST_PIXELS = 16_383  # of a side in WebP, of eight bits each
PNG = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")
MARK = "attention-study-site"  # a file that says that a folder was made here, so may be replaced


def build(site: Path, root: Path = ROOT, records: Path | None = None) -> Path:
    """Makes the site in the folder `site`, whole or not at all; returns the path of its first page.

    Raises UsageError, in one sentence, where there is no clone to make it of, a record cannot be read, a link leads
    nowhere, or `site` is a folder that was not made here.
    """
    records = root / "records" if records is None else records
    missing = [name for name in ("README.md", "docs", "notebooks", "records") if not (root / name).exists()]
    if missing:
        raise UsageError(f"the site is made from a clone, and here there is no {missing[0]}: clone the repository")
    if not records.is_dir():
        raise UsageError(f"there is no folder {records.name}/ of records")
    if site.exists() and any(site.iterdir() if site.is_dir() else [site]) and not (site / MARK).is_file():
        raise UsageError(f"{site.name}/ holds something that no site is: name another folder, or delete it")
    site.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".site-", dir=site.parent) as folder:
        source, made = Path(folder, "source"), Path(folder, "made")
        held = lookup.held(records)
        rows = lookup.rows(records, held)
        _stage(source, root, rows, pages.certificates(records, held))
        _sphinx(source, made, Path(folder, "trees"), root)
        _add_files(made, records, held, rows)
        _check_links(made)
        if site.exists():
            site.rename(Path(folder, "before"))
        made.rename(site)
    return site / "index.html"


def _stage(source: Path, root: Path, rows, certificates) -> None:
    """Copies what the pages are made of, relinked, and adds the pages that are generated."""
    source.mkdir()
    for name in LINKED:
        path = root / name
        if path.is_dir():
            _copy(path, source / name)
        elif path.is_file():
            shutil.copyfile(path, source / name)
    (source / "docs").mkdir()
    listed: set[str] = set()
    for path in sorted((root / "docs").glob("*.md")):
        (source / "docs" / path.name).write_text(_relinked(_text(path), "docs", root, listed), encoding="utf-8")
    (source / "notebooks").mkdir()
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        _stage_notebook(path, source / "notebooks" / path.name, root, listed)
    index = _relinked(_text(root / "README.md"), "", root, listed)
    (source / "index.md").write_text(_index(index, root), encoding="utf-8")
    (source / "variants").mkdir()
    (source / "variants" / "index.md").write_text(pages.variants(rows), encoding="utf-8")
    for name in attention.variants():
        (source / "variants" / f"{name}.md").write_text(pages.variant(name, rows, certificates), encoding="utf-8")
    (source / "lookup.md").write_text(lookup_page.page(rows), encoding="utf-8")
    for name in sorted(listed):
        (source / name / "index.md").write_text(pages.folder(source / name, name), encoding="utf-8")


def _copy(folder: Path, to: Path, only: set[Path] | None = None) -> None:
    """The files of a folder, or `only` some: never what a link leads to, which may lie anywhere."""
    for below, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in NEVER or only is not None)
        for path in (Path(below, name) for name in sorted(names)):
            is_wanted = path.suffix not in NOT_COPIED if only is None else path in only
            if is_wanted and path.is_file() and not path.is_symlink():
                copy = to / path.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path.parent.name}/{path.name} is no text in UTF-8; save it as such") from None


def _stage_notebook(path: Path, staged: Path, root: Path, listed: set[str]) -> None:
    try:
        notebook = json.loads(_text(path))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = _relinked("".join(cell["source"]), "notebooks", root, listed)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"notebooks/{path.name} is no whole notebook; put it back as it was, or take it out") from None
    staged.write_text(json.dumps(notebook), encoding="utf-8")


def _relinked(text: str, here: str, root: Path, listed: set[str]) -> str:
    """Links as they must be in the site: README is its first page, a variant's file its page, a folder a list of its
    files (noted in `listed`), the records' folder where they lie."""

    def new(found: re.Match) -> str:
        if found["code"]:
            return found[0]
        name = posixpath.normpath(posixpath.join(here, found["path"]))
        anchor = found["anchor"] or ""
        stem = name.removeprefix("lib/attention/").removesuffix(".py")
        if name in (".", "README.md"):
            name = "index.md"
        elif name == "lib/attention":
            name = "variants/index.md"
        elif name == f"lib/attention/{stem}.py" and stem in attention.variants():
            name = f"variants/{stem}.md"
        elif name == "records" or name.startswith("records/"):
            name = "docs/dataset.md"
        elif name == "figures":
            name = "notebooks/summary.ipynb"  # which draws them
        elif (root / name).is_dir() and name.split("/")[0] in LINKED and not set(name.split("/")) & set(NEVER):
            listed.add(name)
            name = f"{name}/index.md"
        else:
            return found[0]
        return found["before"] + posixpath.relpath(name, here or ".") + anchor

    return LINK.sub(new, text)


def _index(readme: str, root: Path) -> str:
    """The README with a way into the rest behind its answer."""
    more = (
        "**[Look it up](lookup.md)**: every number, filtered, sorted and drawn, with the records behind it · "
        "[a page for each variant](variants/index.md) · [all of it to take away](docs/dataset.md) · "
        "[add yours](docs/contribute.md)"
    )
    before, mark, after = readme.partition(ANSWER_ENDS)
    text = f"{before}{mark}\n\n{more}\n{after}" if mark else f"{readme}\n\n{more}\n"
    docs = sorted((path.stem for path in (root / "docs").glob("*.md")), key=lambda name: _place(DOCS, name))
    notebooks = sorted((p.stem for p in (root / "notebooks").glob("*.ipynb")), key=lambda n: _place(NOTEBOOKS, n))
    parts = {
        "Look up": ["lookup", "variants/index"],
        "Notebooks": [f"notebooks/{name}" for name in notebooks],
        "Docs": [f"docs/{name}" for name in docs],
    }
    trees = [f"```{{toctree}}\n:hidden:\n:caption: {said}\n\n" + "\n".join(of) + "\n```" for said, of in parts.items()]
    return "\n\n".join([text, *trees]) + "\n"


def _place(order: tuple[str, ...], name: str) -> tuple[int, str]:
    return order.index(name) if name in order else len(order), name


def _sphinx(source: Path, made: Path, trees: Path, root: Path) -> None:
    """Runs Sphinx. Raises UsageError with its first warning: a link that leads nowhere is one."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    settings = {
        "project": "The attention study",
        "author": "the attention study's authors",
        "release": version,
        "language": "en",
        "extensions": ["myst_nb"],
        "exclude_patterns": ["scripts/**", "tests/**"],
        "nb_execution_mode": "off",  # they are committed executed
        "nb_ipywidgets_js": {},  # what explore.ipynb shows needs a kernel; its committed page says so
        "myst_heading_anchors": 6,
        "html_theme": "sphinx_book_theme",
        "html_title": "The attention study",
        "html_theme_options": {
            "show_toc_level": 2,
            "navigation_with_keys": False,
            "navbar_persistent": [],  # the sidebar has the search
            "use_download_button": False,
            "footer_start": [],
        },
        "html_static_path": [str(STATIC)],
        "html_css_files": ["site.css"],
        "html_js_files": ["site.js"],
        "html_context": {"default_mode": "auto"},
        "html_copy_source": False,
        "html_show_sourcelink": False,
        "html_show_copyright": False,
        "html_show_search_summary": False,  # it fetches pages, which a page on disk may not
        "html_use_index": False,
        "html_last_updated_fmt": None,
    }
    warnings = io.StringIO()
    with patch_docutils(str(source)), docutils_namespace(), contextlib.redirect_stdout(io.StringIO()):
        application = Sphinx(str(source), None, str(made), str(trees), "html", settings, status=None, warning=warnings)
        application.build()
    said = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in warnings.getvalue().splitlines() if line.strip()]
    if said:
        more = f" (and {len(said) - 1} more)" if len(said) > 1 else ""
        raise UsageError(f"the site has a fault: {said[0].replace(f'{source}/', '')}{more}")


def _add_files(made: Path, records: Path, held, rows) -> None:
    """The records, the data set, and what the table to look things up in is made of."""
    every = {one.path: one for kept in held.values() for one in kept}
    _copy(records, made / "records", set(every))
    for path, one in every.items():
        copy = made / "records" / path.relative_to(records)
        content = copy.read_bytes() if copy.is_file() else b""
        if hashlib.sha256(content).hexdigest() != one.sha256:
            raise UsageError(f"{path.relative_to(records)} was changed while the site was made: make it again")
        # the same, without a third of its bytes that is indentation
        copy.write_text(json.dumps(json.loads(content), separators=(",", ":")) + "\n", encoding="utf-8")
    data.write(made / "data", records)
    (made / "_static" / "lookup-rows.js").write_text(lookup_page.script(rows), encoding="utf-8")
    (made / "_static" / "vega.js").write_text(lookup_page.vega(), encoding="utf-8")
    for pattern in NEEDLESS:
        for path in sorted((made / "_static").rglob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _leave_out_icons(made)
    _pack_images(made)
    (made / ".buildinfo").unlink(missing_ok=True)
    (made / ".nojekyll").touch()  # a public host serves _static as well
    (made / MARK).write_text("Made by `python -m lib.site`; it may be replaced.\n", encoding="utf-8")


def _leave_out_icons(made: Path) -> None:
    """Takes the icons that no page and no script names out of the theme's script: 1.5 MB that every page loads."""
    script = made / "_static" / "scripts" / "fontawesome.js"
    readers = [path for kind in ("*.html", "*.js") for path in made.rglob(kind) if path != script]
    shown = {name for path in readers for name in re.findall(r"\bfa-([a-z0-9-]+)", path.read_text(encoding="utf-8"))}

    def kept(icon: re.Match) -> str:
        names = {icon["name"], *re.findall(r'"([a-z0-9-]+)"', icon["others"])}
        return icon[0] if names & shown else ""

    script.write_text(ICON.sub(kept, script.read_text(encoding="utf-8")), encoding="utf-8")


def _pack_images(made: Path) -> None:
    """Writes the pictures in the notebooks' pages as WebP, pixel for pixel the same in fewer bytes; one that WebP has
    no room for stays as it is."""

    def packed(found: re.Match) -> str:
        file = io.BytesIO()
        with open_image(io.BytesIO(base64.b64decode(found[1]))) as image:
            if max(image.size) > MOST_PIXELS or image.mode.startswith(("I", "F")):
                return found[0]
            image.save(file, "webp", lossless=True, exact=True)
        return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"

    for path in sorted((made / "notebooks").glob("*.html")):
        path.write_text(PNG.sub(packed, path.read_text(encoding="utf-8")), encoding="utf-8")


class _Page(HTMLParser):
    """What the tags of a page are called (`names`), and what they name: (tag, address)."""

    def __init__(self, text: str):
        super().__init__()
        self.names, self.named = set(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        of = {name: value or "" for name, value in attrs}
        self.names |= {of["id"]} if "id" in of else set()
        self.named += [(tag, of[name]) for name in ("href", "src") if name in of]


def _check_links(made: Path) -> None:
    """Raises UsageError for what a page names and the site does not hold: Sphinx looks at Markdown's links alone."""
    pages_of = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(made.rglob("*.html"))}
    for path, page in pages_of.items():
        for tag, address in page.named:
            parts = urlsplit(address)
            if parts.scheme and not (tag != "a" and parts.scheme in ("http", "https")):
                continue  # elsewhere, where a reader goes by a click, or a picture in the page itself
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            is_there = not parts.scheme and target.is_file() and target.is_relative_to(made.resolve())
            if is_there and parts.fragment and target in pages_of and "=" not in parts.fragment:
                is_there = unquote(parts.fragment) in pages_of[target].names
            if not is_there:
                where = path.relative_to(made).with_suffix("").as_posix()
                raise UsageError(f"the page {where} names {address[:200]!r}, which the site does not hold")
