"""Figures come from records alone, the same bytes each time, and hide nothing."""

import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
from make import make_record, write_blocks

from lib import compare, figures, record
from lib.errors import UsageError


def drawn(tmp_path, **changes):
    write_blocks(tmp_path / "records", **changes)
    return compare.groups(record.read(tmp_path / "records"))[0].runs


def texts(figure):
    figure.canvas.draw()
    return " ".join(text.get_text() for text in figure.findobj(plt.Text))


@pytest.mark.parametrize("draw", figures.FIGURES, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("blocks", [1, 5])
def test_each_figure_is_drawn_and_byte_identical_when_redrawn(draw, blocks, tmp_path):
    runs = drawn(tmp_path, blocks=blocks)
    for folder in ("first", "second"):
        figures.save(draw(runs), tmp_path / folder, "figure")
    for suffix in ("svg", "png"):
        first, second = ((tmp_path / folder / f"figure.{suffix}").read_bytes() for folder in ("first", "second"))
        assert first == second and len(first) > 1000
    assert not plt.get_fignums()


def test_an_unmeasured_metric_keeps_its_row_and_says_why(tmp_path):
    runs = drawn(tmp_path, energy_j=None, energy_per_useful_token_j=None, mean_power_w=None)
    for draw in (figures.gpu_energy, figures.gpu_power):
        said = texts(draw(runs))
        assert said.count("not measured: the run used no GPU") >= 3 and "baseline" in said
    table = figures.unmeasured(runs).set_index("metric")
    assert (
        table.loc["energy_j", "not measured, because"] == "the run used no GPU" and table.loc["energy_j", "runs"] == 3
    )
    assert (figures.ranking(runs)["mJ per token"] == "–").all()


def test_a_bar_says_how_many_runs_it_stands_for(tmp_path):
    assert "(n = 1)" in texts(figures.training_time(drawn(tmp_path / "one")))
    five = texts(figures.training_time(drawn(tmp_path / "five", blocks=5)))
    assert "±" in five and "(n = 5)" in five


def test_the_null_variant_s_difference_stands_on_every_figure(tmp_path):
    runs = drawn(tmp_path)
    for draw in figures.FIGURES:
        assert "sdpa_again is sdpa run a second time" in texts(draw(runs)), draw.__name__


def test_what_fails_its_certificate_is_drawn_apart_and_never_ranked(tmp_path):
    write_blocks(tmp_path / "records")
    record.write(make_record("aleak", certified=False, time_s=1.0, time_per_epoch_s=0.5), tmp_path / "records")
    runs = record.read(tmp_path / "records")
    assert figures.labels(runs)[-1] == "aleak"
    assert "aleak\n(not certified)" in texts(figures.training_time(runs))
    table = figures.ranking(runs)
    assert list(table["variant"])[-1] == "aleak" and list(table["rank"]) == [1, 2, 3, "–"]
    assert table["verdict"].iloc[-1] == "fails its certificate"


def test_a_variant_has_one_colour_everywhere_and_strangers_get_their_own():
    alone, together = figures.colours(["sdpa"]), figures.colours(["baseline", "sdpa", "mine", "yours"])
    assert alone["sdpa"] == together["sdpa"]
    assert len({tuple(colour) for colour in together.values()}) == len(together)


def test_ranking_by_what_is_not_a_metric_is_said(tmp_path):
    with pytest.raises(UsageError, match="rank by one of"):
        figures.ranking(drawn(tmp_path), by="beauty")


def test_the_published_numbers_are_all_eight():
    import pandas as pd

    published = pd.read_csv(figures.PUBLISHED)
    assert list(published["variant"]) == list(figures.STUDY_ORDER)
    assert published.drop(columns=["variant", "source"]).notna().all().all()


def test_what_summarizes_needs_no_torch():
    code = "import sys; from lib import compare, figures, record; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_certificates_stand_in_a_row_per_variant_and_the_worst_run_counts(tmp_path):
    write_blocks(tmp_path, ("sdpa", "gqa"), blocks=2)
    record.write(make_record("gqa", 2, certified=False), tmp_path)
    table = figures.certificates(compare.groups(record.read(tmp_path))[0].runs).set_index("variant")
    assert list(table.index) == ["sdpa", "gqa"]
    assert list(table["passed"]) == ["yes", "NO"] == list(table["causal"])
    assert set(table["prefix-equal"]) == {"yes"}
