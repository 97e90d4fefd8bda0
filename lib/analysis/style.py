"""The one style of all figures: a colour and a marker per variant, sizes, and the same bytes for the same records."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import Markdown
from matplotlib.figure import Figure

from lib import attention
from lib.attention import STUDY_ORDER

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">")
STYLE = {
    "figure.dpi": 110,
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
GIB, MIB = 2**30, 2**20
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "frameon": False}  # a legend over no line


def use_style() -> None:
    """Sets the one style of all figures."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", rc=STYLE)


def save(figure: Figure | str, folder: Path, name: str) -> Figure | Markdown:
    """Writes `name`.svg and `name`.png, byte-identical for the same records; returns the figure, for the notebook.

    A sentence that stands for a figure is returned as text, and what older records had drawn under its name goes.
    """
    if isinstance(figure, str):
        for ending in ("svg", "png"):
            (folder / f"{name}.{ending}").unlink(missing_ok=True)
        return Markdown(figure)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    figure.savefig(folder / f"{name}.png", metadata={"Software": None}, bbox_inches="tight")
    plt.close(figure)
    return figure


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


def titles(found: pd.DataFrame) -> dict[str, str]:
    """What figures and tables call each label. Two that call themselves alike are told apart by their labels."""
    called = found.drop_duplicates("label").set_index("label")["title"]
    return {label: title if (called == title).sum() == 1 else f"{title} ({label})" for label, title in called.items()}


def colours(names: list[str]) -> dict[str, tuple]:
    """A colour per label: fixed for the paper's eight, the next free ones for others, by name."""
    palette = sns.color_palette("colorblind", 10) + sns.color_palette("dark", 10)
    found = dict(zip(_places(names), palette, strict=False))
    reference = found[attention.REFERENCE]
    return found | {attention.CONTROL: tuple(0.5 + 0.5 * part for part in reference)}  # the same variant, paler


def markers(names: list[str]) -> dict[str, str]:
    found = {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(_places(names))}
    return found | {attention.CONTROL: found[attention.REFERENCE]}


def _places(names: list[str]) -> tuple[str, ...]:
    return (*STUDY_ORDER, *sorted(set(names) - set(STUDY_ORDER) - {attention.CONTROL}))
