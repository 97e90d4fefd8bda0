"""Figures come from records alone, the same bytes each time, and hide nothing."""

import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from make import learning, make_record, places, write_blocks
from test_compare import FALLING, curve

from lib import paths, record
from lib.analysis import compare, figures, ngrams, style, tables
from lib.attention import STUDY_ORDER
from lib.errors import UsageError


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def drawn(tmp_path, **changes):
    write_blocks(tmp_path / "records", **{"validation": learning()} | changes)
    return compare.groups(record.read(tmp_path / "records"))[0].runs


def texts(figure, ticks=True):
    """All that is written in a figure; without the `ticks`, for which it must be drawn, much faster."""
    if isinstance(figure, str):
        return figure
    if ticks:
        figure.figure.canvas.draw()  # of an axes: its figure's
    return " ".join(text.get_text() for text in figure.findobj(plt.Text))


@pytest.mark.parametrize("draw", figures.FIGURES, ids=lambda draw: draw.__name__)
def test_each_figure_is_drawn_and_byte_identical_when_redrawn(draw, tmp_path, monkeypatch):
    for folder, blocks in (("one block", 1), ("first", 5), ("second", 5)):
        style.save(draw(drawn(tmp_path / folder, blocks=blocks)), tmp_path / folder, "figure")
        monkeypatch.setattr(style, "picture", plt.close)  # a page shows the first; of the others the files are asked
    assert (tmp_path / "one block" / "figure.png").stat().st_size > 1000
    for suffix in ("svg", "png"):
        first, second = ((tmp_path / folder / f"figure.{suffix}").read_bytes() for folder in ("first", "second"))
        assert first == second and len(first) > 1000
    assert not plt.get_fignums()


def test_a_metric_that_nobody_measured_is_a_sentence_and_no_drawing(tmp_path):
    runs = drawn(
        tmp_path, energy_j=None, energy_per_non_padding_token_j=None, mean_power_w=None, gpu_busy_fraction=None
    )
    said = figures.gpu_energy(runs)
    assert said == "GPU energy of the run, GPU energy per non-padding token: not measured: the run used no GPU."
    assert figures.gpu_power(runs) == "Mean GPU power: not measured: the run used no GPU."
    memory = figures.peak_memory(runs.assign(peak_memory_bytes=None, peak_resident_bytes=1e9))
    assert len(memory.axes) == 1 and "Peak GPU memory: not measured" in texts(memory)
    (tmp_path / "gpu_power.png").write_bytes(b"of older records")
    assert figures.gpu_power(runs) in style.save(figures.gpu_power(runs), tmp_path, "gpu_power").data
    assert not (tmp_path / "gpu_power.png").exists()
    table = tables.unmeasured(runs).set_index("metric")
    assert (
        table.loc["energy_j", "not measured, because"] == "the run used no GPU" and table.loc["energy_j", "runs"] == 3
    )
    assert (tables.ranking(runs)["mJ per token"] == "–").all()


def test_a_metric_that_some_lack_keeps_their_rows_and_says_why(tmp_path):
    write_blocks(tmp_path, ("sdpa", "gqa"))
    record.write(make_record("mla", energy_j=None), tmp_path)
    said = texts(figures.gpu_energy(record.read(tmp_path)))
    assert said.count("not measured: the run used no GPU") == 1 and "mla" in said


def test_a_bar_says_how_many_runs_it_stands_for_and_its_paired_ratio(tmp_path):
    assert "(n = 1)" in texts(figures.training_time(drawn(tmp_path / "one")))
    runs = drawn(tmp_path / "five", blocks=5)
    slow = (runs["block"] == 4) & (runs["label"] == "baseline")
    runs["time_per_epoch_s"] *= np.where(runs["label"] == "baseline", 1.5, 1.0) * (1 + runs["block"])
    runs.loc[slow, "time_per_epoch_s"] = np.nan
    figure = figures.training_time(runs)
    assert "(× 1.000 [1.000, 1.000], n = 5)" in texts(figure) and "(n = 4)" in texts(figure)
    sdpa, _, baseline = (bar.get_width() for bar in figure.axes[0].patches)  # the shortest first
    assert baseline == pytest.approx(1.5 * sdpa)  # though it misses the slowest block
    flagged = runs.assign(flags=[["x"] if one else [] for one in slow])
    assert "flagged in 1 of 5" in texts(figures.training_time(flagged))


def test_beneath_each_figure_stands_the_control_s_difference_in_its_own_metric(tmp_path):
    write_blocks(tmp_path, ("sdpa", "gqa"), validation=learning())
    changes = {"time_per_epoch_s": 9.9, "decode_latency_s_per_token": 0.0015, "validation_loss": 5.25, "energy_j": 3e3}
    record.write(make_record("sdpa_again", validation=learning(5.25), **changes), tmp_path)
    runs = record.read(tmp_path)
    said = {draw.__name__: texts(draw(runs), ticks=False) for draw in figures.FIGURES}
    plt.close("all")
    assert all("A/A control, sdpa run twice" in of or "counted, the same in every run" in of for of in said.values())
    assert "Training time × 0.990, n = 1: noise unknown" in said["training_time"]
    assert "Decode latency at 16 tokens × 0.750, n = 1: noise unknown" in said["inference_latency"]
    assert "validation loss +0.250 nats, n = 1: noise unknown" in said["loss_curves"]
    assert "GPU energy × 0.750" in said["loss_against_cost"]
    assert "0.990" not in said["inference_latency"] and "A/A" not in said["flops"]
    alone = runs[runs["label"] != "sdpa_again"]
    for draw in (figures.training_time, figures.loss_curves, figures.cost_to_target):
        assert "no A/A control among these runs" in texts(draw(alone), ticks=False), draw.__name__
    eight = drawn(tmp_path / "eight", blocks=8)
    assert "Training time × 1.000 [1.000, 1.000], n = 8" in texts(figures.training_time(eight))
    assert tables.noise(eight).set_index("metric").iloc[0, 0] == "× 1.000 [1.000, 1.000], n = 8"


BIGRAM = {"unigram_loss": 6.2, "bigram_loss": 5.0, "unigram_other_loss": 6.5, "bigram_other_loss": 5.3}
BIGRAM |= {"unigram_repeated_bigram_loss": 6.0, "bigram_repeated_bigram_loss": 4.0}


@pytest.mark.parametrize("blocks", [1, 8])
def test_the_n_gram_tables_stand_in_every_loss_figure_and_a_worse_loss_is_said_to_say_nothing(blocks, tmp_path):
    where = places(("sdpa", "gqa", "sdpa_again"), blocks)
    for (label, block), position in where.items():
        loss = {"sdpa": 4.8, "sdpa_again": 4.8, "gqa": 5.4}[label] + block / 1e3
        told = {"validation_loss": loss, "validation": learning(loss), "data": BIGRAM, "position": position}
        record.write(make_record(label, block, **told), tmp_path)
    runs = record.read(tmp_path)
    said = "gqa is worse than a table of token pairs, which of the same training tokens loses 5.00 nats (of single "
    said += "tokens: 6.20): that loss says nothing about attention."
    assert ngrams.sentence(runs) == said
    for draw in (figures.loss_curves, figures.loss_by_recall, figures.loss_against_cost):
        figure = draw(runs)
        written = " ".join(texts(figure, ticks=False).split())
        assert "bigram table, " in written and "unigram table, " in written and said in written, draw.__name__
    dashed = {line.get_label(): line.get_ydata()[0] for line in figures.loss_curves(runs).axes[0].lines}
    assert dashed["bigram table, 5.00"] == 5.0 and dashed["unigram table, 6.20"] == 6.2
    assert said in " ".join(texts(figures.cost_to_target(runs), ticks=False).split())
    table = tables.ranking(runs).set_index("variant")
    assert table["loss − bigram table's"].to_dict() == pytest.approx(
        {"sdpa": "-0.20", "gqa": "+0.40", "sdpa_again": "-0.20"}
    )
    if blocks == 8:
        assert table.loc["gqa", "verdict on the loss"].startswith("significantly different (p = ")
        assert table.loc["gqa", "verdict on the loss"].endswith("), but worse than a bigram table")
        assert table.loc["sdpa_again", "verdict on the loss"].startswith("equivalent")
    below = runs.assign(validation_loss=4.5)
    assert ngrams.sentence(below).endswith("every model here is below it.")
    unknown = runs.assign(data=[{}] * len(runs))
    assert "unknown" in ngrams.sentence(unknown) and "bigram table" not in texts(figures.loss_curves(unknown))
    assert set(tables.ranking(unknown)["loss − bigram table's"]) == {"–"}


def test_committed_records_have_their_tables_of_tokens():
    for folder in ("quick-cpu", "replication-cpu", "replication-as-published-cpu"):
        runs = record.read(paths.ROOT / "records" / folder)
        assert ngrams.of_runs(runs).notna().all(axis=None), folder
        assert (ngrams.of_runs(runs)["bigram"] < ngrams.of_runs(runs)["unigram"]).all()


def test_one_validation_is_no_curve_and_says_so(tmp_path):
    runs = drawn(tmp_path, validation=learning(validations=1))
    assert "One validation after training began is no curve: raise epochs." in texts(figures.loss_curves(runs))
    assert "not enough validations: raise epochs (1, at least 8 are needed)" in figures.cost_to_target(runs)


def test_what_fails_its_certificate_is_drawn_apart_and_never_ranked(tmp_path):
    write_blocks(tmp_path / "records")
    record.write(make_record("aleak", certified=False, time_s=1.0, time_per_epoch_s=0.5), tmp_path / "records")
    runs = record.read(tmp_path / "records")
    assert style.labels(runs)[-1] == "aleak"
    assert "aleak\n(not certified)" in texts(figures.training_time(runs))
    table = tables.ranking(runs)
    assert list(table["variant"])[-1] == "aleak" and list(table["rank"]) == ["–"] * 4
    assert table["verdict"].iloc[-1] == "fails its certificate"


def test_cost_to_target_shows_bounds_as_bounds_and_refuses_the_uncertified(tmp_path):
    records = [
        curve("sdpa", FALLING),
        curve("gqa", [loss - 0.1 for loss in FALLING]),
        curve("lsh", [*FALLING[:-3], 4.4, 4.35, 4.3]),
        curve("mla", [6.0, *(3.9 - n / 10 for n in range(8))]),
        curve("linear", FALLING, energy_j=None),
        curve("aleak", [6.0, *(2.0 - n / 10 for n in range(8))], certified=False),
    ]
    for one in records:
        record.write(one, tmp_path)
    figure = figures.cost_to_target(record.read(tmp_path))
    energy, time = (" ".join(text.get_text() for text in axes.texts) for axes in figure.axes)
    assert "> 3.6 (reached in 0 of 1, 0.34 nats above the target)" in energy and "> 360 (reached" in time
    assert "< 0.1 (reached in 1 of 1)" in energy and "< 10 (reached" in time
    assert "not measured: the run used no GPU" in energy and "307 (× 1.000, n = 1)" in time
    assert energy.count("fails its certificate") == time.count("fails its certificate") == 1
    assert "after two thirds of its tokens in the same block" in " ".join(texts(figure).split())
    arrows = [text.arrow_patch for text in figure.axes[1].texts if getattr(text, "arrow_patch", None)]
    assert len(arrows) == 2 and len(figure.axes[1].patches) == 5  # bars; none for what fails its certificate


POINTS = {"sdpa": (2e3, 4.5), "sdpa_again": (1.5e3, 4.4), "gqa": (1e3, 4.8), "mla": (3e3, 4.0), "lsh": (3e3, 4.9)}


def quality_and_cost(folder, blocks):
    labels = (*POINTS, "aleak", "linear")
    for (label, block), position in places(labels, blocks).items():
        energy_j, loss = POINTS.get(label, (500.0, 1.0) if label == "aleak" else (600.0, 7.0))
        told = {"energy_j": energy_j * (1 + block), "validation_loss": loss + block, "position": position}
        data = {"unigram_loss": 7.0, "bigram_loss": 6.0 + block}
        record.write(make_record(label, block, certified=label != "aleak", data=data, **told), folder)
    return record.read(folder)


def test_the_pareto_front_leaves_out_the_control_the_uncertified_and_what_a_bigram_table_beats(tmp_path):
    axes = figures.loss_against_cost(quality_and_cost(tmp_path, 5)).axes[0]
    (front,) = (line for line in axes.lines if line.get_label().startswith("Pareto front"))
    x, y = front.get_data()
    assert list(x[1:-1]) == pytest.approx([0.5, 1.0, 1.5]) and list(y[1:-1]) == pytest.approx([0.3, 0.0, -0.5])
    assert "lower left is better" in texts(axes)


def test_below_five_blocks_there_is_no_front_and_nothing_is_called_better(tmp_path):
    axes = figures.loss_against_cost(quality_and_cost(tmp_path, 4)).axes[0]
    assert not [line for line in axes.lines if "front" in str(line.get_label())]
    assert "better" not in texts(axes)


def test_power_over_time_draws_the_traces_there_are_and_says_what_is_missing(tmp_path):
    runs = drawn(tmp_path)
    runs["series_power_time_s"] = runs["series_power_w"] = [[] for _ in range(len(runs))]
    assert figures.power_over_time(runs) == "GPU power over time: not measured: no power trace in the record."
    traces = {"sdpa": ([0.0, 0.1, 0.2], [100.0, 300.0, 200.0])}
    runs["series_power_time_s"] = [traces.get(label, (None, []))[0] for label in runs["label"]]
    runs["series_power_w"] = [traces.get(label, (None, []))[1] for label in runs["label"]]
    figure = figures.power_over_time(runs)
    (sdpa,) = figure.axes
    trace, mean = sdpa.lines
    assert list(trace.get_xdata()) == [0.0, 0.1, 0.2] and list(trace.get_ydata()) == [100.0, 300.0, 200.0]
    assert set(mean.get_ydata()) == {200.0}
    assert "baseline, sdpa_again: not measured: no power trace in the record." in texts(figure)


def test_more_traces_than_can_be_told_apart_are_one_broken_line():
    traces = [([0.0, 0.1], [float(run), 2.0]) for run in range(101)]
    ((times, watts),) = figures._in_few_lines(traces)
    assert len(times) == len(watts) == 303 and times[:2] == [0.0, 0.1] and watts[300:302] == [100.0, 2.0]
    assert all(np.isnan(axis[2]) and np.isnan(axis[-1]) for axis in (times, watts))
    assert figures._in_few_lines(traces[1:]) == traces[1:]


def test_ranking_by_what_is_not_a_metric_is_said(tmp_path):
    with pytest.raises(UsageError, match="rank by one of"):
        tables.ranking(drawn(tmp_path), by="beauty")


def test_of_many_variants_each_figure_draws_those_that_matter_and_says_what_it_left_out(tmp_path):
    names = ["sdpa", "sdpa_again", *(f"v{number:02}" for number in range(62))]
    for number, name in enumerate(names):  # the later, the better
        better = {"validation_loss": 6 - number / 100, "validation": learning(6 - number / 100)}
        record.write(make_record(name, position=number, time_per_epoch_s=100.0 - number, **better), tmp_path)
    runs = compare.groups(record.read(tmp_path))[0].runs
    for draw in figures.FIGURES:
        figure = draw(runs)
        if isinstance(figure, str):
            continue
        said = " ".join(texts(figure, ticks=False).split())
        assert "Not drawn: 40 of 64 variants, those highest in" in said, draw.__name__
        assert max(figure.get_size_inches()) < 22, draw.__name__
        legends = [axes.get_legend_handles_labels()[1] for axes in figure.axes]
        assert max(map(len, legends)) <= style.MOST_VARIANTS + 3, draw.__name__  # and tables of tokens, and the front
        plt.close(figure)
    shown = [text.get_text() for text in figures.training_time(runs).axes[0].get_yticklabels()]
    assert shown == ["sdpa", "sdpa_again", *names[-22:]]
    drawn = figures.loss_curves(runs).axes[0].get_legend_handles_labels()[1]
    assert [name.split(" ")[0] for name in drawn][:24] == ["sdpa", "sdpa_again", *names[-22:]]


def test_published_numbers_stand_beside_the_paper_s_variants_alone(tmp_path):
    write_blocks(tmp_path, ("sdpa", "sdpa_again", "gqa", "differential"))
    runs = compare.groups(record.read(tmp_path))[0].runs
    first, *rest = figures.published_beside_ours(runs).axes
    assert [text.get_text() for text in first.get_yticklabels()] == ["sdpa", "gqa"]
    assert all(len(axes.get_yticks()) == 2 for axes in rest)
    for own in (["sdpa", "sdpa_again", "differential"], ["gqa", "differential"]):
        assert figures.published_beside_ours(runs[runs["label"].isin(own)]).startswith("None of these variants")


def test_what_a_run_says_on_the_terminal_is_what_its_device_measured():
    from lib.study import runner  # nothing else here is of the study

    cuda = make_record().metrics
    assert runner.told(cuda) == "validation loss 5.000, window 20.00 s, 4,000 J, peak GPU 1.86 GiB"
    none = dict.fromkeys(("energy_j", "peak_memory_bytes"))
    cpu = cuda.model_copy(update=none | {"peak_resident_bytes": 3 * 2**30})
    assert runner.told(cpu) == "validation loss 5.000, window 20.00 s, CPU 18.00 s, peak resident 3.00 GiB"


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
