"""Figures can be read on light and dark pages, without seeing colours apart, and without seeing."""

import itertools
import re

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from make import learning, write_blocks
from test_growth import every
from test_probes import cell, made

from lib import attention, paths, record
from lib.analysis import capability, compare, figures, growth_figures, style

# Machado, Oliveira and Fernandes 2009, severity 1: what is left of linear RGB.
SEEN = {
    "all colours": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
APART = 20  # ΔE (CIE 1976) of two colours that nobody takes for one
GROUNDS = {"white": "#ffffff", "JupyterLab, dark": "#111111", "GitHub, dark": "#0d1117"}


def linear(colour) -> np.ndarray:
    c = np.array(mpl.colors.to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb) -> np.ndarray:
    x = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    x = x / [0.9505, 1.0, 1.089]
    f = np.where(x > 0.008856, np.cbrt(np.clip(x, 0, None)), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def apart(one, other) -> float:
    """The smallest ΔE of two colours over all ways of seeing."""
    pairs = ([lab(np.clip(np.array(seen) @ linear(c), 0, 1)) for c in (one, other)] for seen in SEEN.values())
    return min(float(np.linalg.norm(a - b)) for a, b in pairs)


def contrast(one, other) -> float:
    """Of WCAG 2."""
    high, low = sorted((float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_simulation_knows_two_that_look_alike():
    assert apart("#ff0000", "#00ff00") > APART and apart("#a67c00", "#d55e00") < APART / 2
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_two_variants_differ_in_colour_and_in_a_cue_that_needs_none():
    names = [*attention.STUDY_ORDER, attention.CONTROL, "mine", "yours"]
    look = style.looks(names)
    for one, other in itertools.combinations(names, 2):
        assert look[one]["marker"] != look[other]["marker"], (one, other)
        assert look[one]["linestyle"] != look[other]["linestyle"], (one, other)


def test_a_variant_has_one_look_everywhere_and_the_same_function_one_colour():
    alone, together = style.looks(["sdpa"]), style.looks(["baseline", "sdpa", "mine", "yours"])
    assert alone["sdpa"] == together["sdpa"] and alone["sdpa"]["color"] == alone["flash"]["color"]
    colours = {tuple(mpl.colors.to_rgb(look["color"])) for look in together.values()}
    assert len(colours) == len(together) - 1  # FlashAttention is SDPA by another kernel


@pytest.mark.parametrize("ground", GROUNDS)
def test_words_and_marks_contrast_with_every_page_that_they_stand_on(ground):
    assert contrast(style.INK, GROUNDS[ground]) > 4.2
    for name, look in style.looks([*attention.STUDY_ORDER, "mine", "yours", "theirs"]).items():
        assert contrast(look["color"], GROUNDS[ground]) > 2.95, name
    for colour in (style.BLUE, style.ORANGE):
        assert contrast(colour, GROUNDS[ground]) > 3


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A figure of each kind, of made-up records."""
    folder = tmp_path_factory.mktemp("records")
    write_blocks(folder, ("sdpa", "gqa", "mla", "linear", "flash", "sdpa_again"), validation=learning())
    runs = compare.groups(record.read(folder))[0].runs
    found = {draw.__name__: draw(runs) for draw in figures.FIGURES}
    points = every({name: lambda t, by=by: t * by for by, name in enumerate(("sdpa", "gqa", "mla", "flash"), 1)})
    found["ratios"] = growth_figures.ratio_figure(points, ["forward_backward_s"])
    found["growth"] = growth_figures.growth_figure(points, "forward_backward_s", 1024)
    found["cache and decode"] = growth_figures.cache_and_decode_figure(points)
    found["map"] = growth_figures.decision_map_figure(points)
    found["recall"] = capability.recall_figure(made(cell("gqa", (1.0, 1.0, 0.9), state=500)))
    yield {name: figure for name, figure in found.items() if not isinstance(figure, str)}
    plt.close("all")


def grounds_and_words(figure) -> dict[str, set]:
    words = [text for text in figure.findobj(plt.Text) if text.get_text() and text.get_bbox_patch() is None]
    grounds = [figure.patch, *(axes.patch for axes in figure.axes)]
    grounds += [legend.get_frame() for axes in figure.axes if (legend := axes.get_legend()) and legend.get_frame_on()]
    return {
        "words": {mpl.colors.to_hex(text.get_color()) for text in words},
        "grounds": {mpl.colors.to_hex(patch.get_facecolor(), keep_alpha=True)[-2:] for patch in grounds},
    }


def test_no_figure_has_a_ground_of_its_own_or_words_that_a_page_swallows(drawn):
    for name, figure in drawn.items():
        found = grounds_and_words(figure)
        assert found["grounds"] == {"00"}, name
        for colour, ground in itertools.product(found["words"], GROUNDS.values()):
            assert contrast(colour, ground) > 2.95, (name, colour)


def looks_of(axes) -> dict[str, tuple]:
    """By name in the legend: colour, and what else tells a line or points from others."""
    found = {}
    for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
        line = handle.lines[0] if isinstance(handle, mpl.container.ErrorbarContainer) else handle
        if isinstance(line, mpl.lines.Line2D):
            cue = (str(line.get_marker()), str(line._unscaled_dash_pattern), str(line.get_markerfacecolor() == "none"))
            found[name] = line.get_color(), cue
        elif isinstance(line, mpl.collections.PathCollection):
            found[name] = line.get_edgecolor()[0][:3], (line.get_paths()[0].vertices.tobytes(),)
    return found


def test_whatever_shares_a_panel_is_told_apart_without_colours(drawn):
    compared = 0
    for figure_name, figure in drawn.items():
        for axes in figure.axes:
            for (one, of), (other, by) in itertools.combinations(looks_of(axes).items(), 2):
                compared += 1
                assert of[1] != by[1] or apart(of[0], by[0]) > APART, (figure_name, one, other)
    assert compared > 40


def test_every_figure_says_in_words_what_it_shows(drawn, tmp_path):
    for name, figure in drawn.items():
        said = style.alternative(figure)
        assert len(said) > 25 and "\n" not in said, name
    bare, axes = plt.subplots()
    axes.set_title("A <title>", loc="left")
    shown = style.save(bare, tmp_path, "x").data
    assert '<img alt="A &lt;title&gt;"' in shown and not plt.fignum_exists(bare.number)


def test_an_alternative_text_has_the_numbers_of_its_figure(drawn):
    found = {name: style.alternative(figure) for name, figure in drawn.items()}
    assert found["training_time"].startswith("Training time, seconds per epoch: sdpa 10, ")
    assert "flash 4.00 at 8,192" in found["ratios"] and "sdpa 1.00" in found["growth"]


def test_every_picture_in_a_notebook_or_page_has_an_alternative_text():
    for path in sorted((paths.ROOT / "notebooks").glob("*.ipynb")):
        for one in nbformat.read(path, as_version=4).cells:
            for output in one.get("outputs", []):
                data = output.get("data", {})
                assert "image/png" not in data or "alt" in output.metadata.get("image/png", {}), (path.name, one.id)
                html = "".join(data.get("text/html", ""))
                assert all(re.search(r'alt="[^"]{10,}"', tag) for tag in re.findall(r"<img[^>]{,2000}", html)), (
                    path.name
                )
    page = (paths.ROOT / "README.md").read_text()
    assert page.count("![") == len(re.findall(r"!\[[^\]]{25,}\]", page)) > 0
