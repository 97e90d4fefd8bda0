"""The one style of all figures: looks per variant, on light and dark pages, the same bytes for the same records.

Figures have no ground of their own, so that no white slab stands on a dark page. Words and rules are of one grey, marks
of colours, that contrast with white and with the dark themes of JupyterLab and GitHub. Who does not see colours apart
has a second cue: each variant has a marker and a dash of its own.
"""

import io
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib.figure import Figure

from lib import attention
from lib.attention import STUDY_ORDER
from lib.markup import image, table
from lib.record.names import looks_like

INK = "#797979"  # words and rules: contrast 4.3 with white and with the dark themes' grounds
BLUE, QUIET_BLUE, ORANGE = "#0f7ac0", "#7cb4da", "#d55e00"
# In the order of `STUDY_ORDER`. The seventh is the same function as the second by another kernel: the same colour.
COLOURS = ("#7f7f7f", BLUE, ORANGE, "#0a9a70", "#a67c00", "#d0559a", BLUE, "#8f63d8")
STRANGERS = 11  # colours of others than the paper's, before they come again
DASHES = (
    (0, (1, 1.2)), "-", (0, (7, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1.5)), (0, (3, 1.2, 1, 1.2, 1, 1.2)),
    (0, (4, 2.5)), (0, (9, 1.5, 2.5, 1.5)), (0, (2, 1, 2, 3)), (0, (5, 1, 1, 1, 1, 3)),
)  # fmt: skip
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">")
CONTROL_S = {"marker": "p", "linestyle": (0, (1, 2.5))}
STYLE = {
    "figure.dpi": 110,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
    ),
    "grid.color": INK,
    "grid.alpha": 0.3,
    "patch.edgecolor": INK,
    "patch.force_edgecolor": False,
    "xtick.labelsize": 10,
    "ytick.labelsize": 11,
    "axes.labelsize": 11,
    "legend.fontsize": 10,
    "savefig.dpi": 160,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "attention-study",  # the same records give the same bytes
}
GIB, MIB, KIB = 2**30, 2**20, 2**10
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "frameon": False}  # a legend over no line


def use_style() -> None:
    """Sets the one style of all figures."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", rc=STYLE)


def save(figure: Figure | str, folder: Path, name: str) -> HTML:
    """Writes `name`.svg and `name`.png, byte-identical for the same records; returns the figure as a notebook shows it.

    A sentence that stands for a figure is returned as text, and what older records had drawn under its name goes.
    """
    if isinstance(figure, str):
        for ending in ("svg", "png"):
            (folder / f"{name}.{ending}").unlink(missing_ok=True)
        return table(figure)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    figure.savefig(folder / f"{name}.png", metadata={"Software": None}, bbox_inches="tight")
    return picture(figure)


def picture(figure: Figure) -> HTML:
    """A figure as a notebook shows it, with its alternative text; it is closed."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return image(file.getvalue(), alternative(figure))


def tell(figure: Figure, words: str) -> Figure:
    """Gives a figure the text that stands for it where it cannot be seen."""
    figure.alternative = words
    return figure


def alternative(figure: Figure) -> str:
    """The words of `tell`, or of a figure without any the titles of its panels and the names in its legends."""
    titles = [axes.get_title(loc="left").replace("\n", " ") for axes in figure.axes]
    names = dict.fromkeys(name for axes in figure.axes for name in axes.get_legend_handles_labels()[1])
    said = "; ".join(filter(None, titles)) + (f". Drawn: {', '.join(names)}" if names else "")
    return getattr(figure, "alternative", said)


def name_rows(axes, runs: pd.DataFrame, names: list[str], certified: pd.Series) -> None:
    """Writes each variant's name beside its row, and whether it fails its certificate."""
    title = titles(runs)
    called = [title[name] if certified[name] else f"{title[name]}\n(not certified)" for name in names]
    axes.set_yticks(range(len(names)), called)


def labels(runs: pd.DataFrame) -> list[str]:
    """The variants of a group: the paper's in its order, others by name, the uncertified last."""
    found = runs.groupby("label")["certified"].all()
    place = {name: index for index, name in enumerate(STUDY_ORDER)}
    place[attention.CONTROL] = place[attention.REFERENCE] + 0.5
    return sorted(found.index, key=lambda label: (not found[label], place.get(label, len(place)), label))


MOST_VARIANTS = 24  # in one figure: of more the eye follows none


def few(names: list[str], by: pd.Series) -> list[str]:
    """Of more than `MOST_VARIANTS` the ones that matter, in their order: the reference, its control, and those lowest
    in `by` (by label), which is what the figure is about. What has no number there goes first."""
    if len(names) <= MOST_VARIANTS:
        return names
    always = [name for name in names if name in (attention.REFERENCE, attention.CONTROL)]
    others = pd.to_numeric(by).reindex([name for name in names if name not in always]).sort_values(kind="stable")
    kept = {*always, *others.index[: MOST_VARIANTS - len(always)]}
    return [name for name in names if name in kept]


def folded_away(names: list[str], kept: list[str], what: str) -> list[str]:
    """The sentence that says what `few` left out, if anything, by its `what`."""
    if len(kept) == len(names):
        return []
    left = len(names) - len(kept)
    return [f"Not drawn: {left} of {len(names)} variants, those highest in {what}; the tables have all of them."]


def titles(found: pd.DataFrame) -> dict[str, str]:
    """What figures and tables call each label. Beside its title stands the label of what calls itself like another, or
    so that it looks like the name of a variant that it is not, or in other letters than ASCII's."""
    called = found.drop_duplicates("label").set_index("label")["title"]
    looks = called.str.casefold().str.replace(" ", "")
    counts = looks.value_counts()

    def is_clear(label, title):
        passes_for = [name for name in attention.variants() if looks_like(title, name)]
        return counts[looks[label]] == 1 and title.isascii() and passes_for in ([], [label])

    return {
        label: title if title == label or is_clear(label, title) else f"{title} ({label})"
        for label, title in called.items()
    }


def looks(names: list[str]) -> dict[str, dict]:
    """`color`, `marker` and `linestyle` of each label: fixed for the paper's eight, the next free ones for others."""
    places = _places(names)
    colours = (*COLOURS, *sns.husl_palette(STRANGERS, h=0.03, s=0.8, l=0.56))
    found = {
        name: {"color": colour, "marker": marker, "linestyle": dash}
        for name, colour, marker, dash in zip(places, cycle(colours), cycle(MARKERS), cycle(DASHES), strict=False)
    }
    reference = found[attention.REFERENCE]["color"]  # the same variant, paler
    return found | {attention.CONTROL: {"color": sns.blend_palette([reference, INK], 3)[1], **CONTROL_S}}


def colours(names: list[str]) -> dict:
    return {name: look["color"] for name, look in looks(names).items()}


def markers(names: list[str]) -> dict[str, str]:
    return {name: look["marker"] for name, look in looks(names).items()}


def _places(names: list[str]) -> tuple[str, ...]:
    return (*STUDY_ORDER, *sorted(set(names) - set(STUDY_ORDER) - {attention.CONTROL}))
