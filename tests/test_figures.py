"""Figures come from records alone, the same bytes each time, and hide nothing."""

import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
from make import make_record, write_blocks
from test_compare import curve

from lib import record
from lib.analysis import compare, figures, style, tables
from lib.attention import STUDY_ORDER
from lib.errors import UsageError


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def drawn(tmp_path, **changes):
    write_blocks(tmp_path / "records", **changes)
    return compare.groups(record.read(tmp_path / "records"))[0].runs


def texts(figure):
    figure.figure.canvas.draw()  # of an axes: its figure's
    return " ".join(text.get_text() for text in figure.findobj(plt.Text))


@pytest.mark.parametrize("draw", figures.FIGURES, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("blocks", [1, 5])
def test_each_figure_is_drawn_and_byte_identical_when_redrawn(draw, blocks, tmp_path):
    runs = drawn(tmp_path, blocks=blocks)
    for folder in ("first", "second"):
        style.save(draw(runs), tmp_path / folder, "figure")
    for suffix in ("svg", "png"):
        first, second = ((tmp_path / folder / f"figure.{suffix}").read_bytes() for folder in ("first", "second"))
        assert first == second and len(first) > 1000
    assert not plt.get_fignums()


def test_an_unmeasured_metric_keeps_its_row_and_says_why(tmp_path):
    runs = drawn(tmp_path, energy_j=None, energy_per_non_padding_token_j=None, mean_power_w=None)
    for draw in (figures.gpu_energy, figures.gpu_power):
        said = texts(draw(runs))
        assert said.count("not measured: the run used no GPU") >= 3 and "baseline" in said
    table = tables.unmeasured(runs).set_index("metric")
    assert (
        table.loc["energy_j", "not measured, because"] == "the run used no GPU" and table.loc["energy_j", "runs"] == 3
    )
    assert (tables.ranking(runs)["mJ per token"] == "–").all()


def test_a_bar_says_how_many_runs_it_stands_for(tmp_path):
    assert "(n = 1)" in texts(figures.training_time(drawn(tmp_path / "one")))
    five = texts(figures.training_time(drawn(tmp_path / "five", blocks=5)))
    assert "±" in five and "(n = 5)" in five


def test_the_control_s_difference_stands_on_every_figure(tmp_path):
    runs = drawn(tmp_path)
    for draw in figures.FIGURES:
        assert "sdpa_again is the same code run a second time" in texts(draw(runs)), draw.__name__


def test_what_fails_its_certificate_is_drawn_apart_and_never_ranked(tmp_path):
    write_blocks(tmp_path / "records")
    record.write(make_record("aleak", certified=False, time_s=1.0, time_per_epoch_s=0.5), tmp_path / "records")
    runs = record.read(tmp_path / "records")
    assert style.labels(runs)[-1] == "aleak"
    assert "aleak\n(not certified)" in texts(figures.training_time(runs))
    table = tables.ranking(runs)
    assert list(table["variant"])[-1] == "aleak" and list(table["rank"]) == [1, 2, 3, "–"]
    assert table["verdict"].iloc[-1] == "fails its certificate"


def test_cost_to_target_shows_bounds_as_bounds_and_refuses_the_uncertified(tmp_path):
    records = [
        curve("sdpa", [6.0, 5.0, 4.5, 4.0]),
        curve("gqa", [6.0, 5.0, 4.5, 3.9]),
        curve("lsh", [6.0, 5.0, 4.4, 4.3]),
        curve("mla", [6.0, 3.9, 3.5, 3.2]),
        curve("linear", [6.0, 5.0, 4.0, 3.9], energy_j=None),
        curve("aleak", [6.0, 2.0, 1.0, 0.5], certified=False),
    ]
    for one in records:
        record.write(one, tmp_path)
    figure = figures.cost_to_target(record.read(tmp_path))
    energy, time = (texts(axes) for axes in figure.axes)
    assert "> 0.9 (reached in 0 of 1, 0.3 nats above the target)" in energy and "> 70 (reached" in time
    assert "< 0.1 (reached in 1 of 1)" in energy and "< 10 (reached" in time
    assert "not measured: the run used no GPU" in energy and "30 (× 0.429, n = 1)" in time
    assert energy.count("fails its certificate") == time.count("fails its certificate") == 1
    arrows = [text.arrow_patch for text in figure.axes[1].texts if getattr(text, "arrow_patch", None)]
    assert len(arrows) == 2 and len(figure.axes[1].patches) == 5  # bars; none for what fails its certificate


def test_the_pareto_front_leaves_out_the_control_and_the_uncertified(tmp_path):
    points = {"sdpa": (2e3, 5.0), "sdpa_again": (1.5e3, 4.9), "gqa": (1e3, 5.5), "mla": (3e3, 4.5), "lsh": (3e3, 6.0)}
    for label, (energy_j, loss) in points.items():
        record.write(make_record(label, energy_j=energy_j, validation_loss=loss), tmp_path)
    record.write(make_record("aleak", certified=False, energy_j=500.0, validation_loss=1.0), tmp_path)
    (front,) = figures.loss_against_cost(record.read(tmp_path)).axes[0].lines
    x, y = front.get_data()
    assert list(zip(x[1:-1], y[1:-1], strict=True)) == [(1, 5.5), (2, 5.0), (3, 4.5)]


def test_power_over_time_draws_the_traces_there_are_and_says_what_is_missing(tmp_path):
    runs = drawn(tmp_path)
    runs["series_power_time_s"] = runs["series_power_w"] = [[] for _ in range(len(runs))]
    assert texts(figures.power_over_time(runs)).count("not measured: no power trace in the record") == 3
    traces = {"sdpa": ([0.0, 0.1, 0.2], [100.0, 300.0, 200.0])}
    runs["series_power_time_s"] = [traces.get(label, (None, []))[0] for label in runs["label"]]
    runs["series_power_w"] = [traces.get(label, (None, []))[1] for label in runs["label"]]
    figure = figures.power_over_time(runs)
    baseline, sdpa, again = figure.axes
    assert not baseline.lines and not again.lines
    trace, mean = sdpa.lines
    assert list(trace.get_xdata()) == [0.0, 0.1, 0.2] and list(trace.get_ydata()) == [100.0, 300.0, 200.0]
    assert set(mean.get_ydata()) == {200.0}
    assert texts(figure).count("not measured: no power trace in the record") == 2


def test_a_variant_has_one_colour_everywhere_and_strangers_get_their_own():
    alone, together = style.colours(["sdpa"]), style.colours(["baseline", "sdpa", "mine", "yours"])
    assert alone["sdpa"] == together["sdpa"]
    assert len({tuple(colour) for colour in together.values()}) == len(together)


def test_ranking_by_what_is_not_a_metric_is_said(tmp_path):
    with pytest.raises(UsageError, match="rank by one of"):
        tables.ranking(drawn(tmp_path), by="beauty")


def test_the_published_numbers_are_all_eight():
    import pandas as pd

    published = pd.read_csv(figures.PUBLISHED)
    assert list(published["variant"]) == list(STUDY_ORDER)
    assert published.drop(columns=["variant", "source"]).notna().all().all()


def test_what_summarizes_needs_no_torch():
    code = (
        "import sys; from lib import parameters, record; from lib.analysis import figures, predictions, tables; "
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_certificates_stand_in_a_row_per_variant_and_the_worst_run_counts(tmp_path):
    write_blocks(tmp_path, ("sdpa", "gqa"), blocks=2)
    record.write(make_record("gqa", 2, certified=False), tmp_path)
    table = tables.certificates(compare.groups(record.read(tmp_path))[0].runs).set_index("variant")
    assert list(table.index) == ["sdpa", "gqa"]
    assert list(table["passed"]) == ["yes", "NO"] == list(table["causal"])
    assert set(table["prefix-equal"]) == {"yes"}


def test_checks_that_failed_are_named_and_numbers_that_could_not_be_had_are_a_dash(tmp_path):
    made = make_record("gqa").model_dump()
    measure = {"what": "w", "largest": None, "allowed": None, "says": ""}
    failed = [measure | {"check": check, "passed": passed} for check, passed in (("reach", False), ("causal", True))]
    made["certificate"] |= {"measures": failed, "receptive_field": None, "memory_growth": None, "passed": False}
    record.write(record.Record(**made), tmp_path)
    record.write(make_record("sdpa"), tmp_path)
    table = tables.certificates(compare.groups(record.read(tmp_path))[0].runs).set_index("variant")
    assert list(table["failed"]) == ["–", "reach"]
    assert list(table.loc["gqa", ["last token sees", "memory grows as"]]) == ["–"] * 2
