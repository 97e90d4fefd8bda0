"""What bars, lines, points and cells show, read back from them: every number is the metric that its title names."""

import csv
import itertools
import statistics

import matplotlib.pyplot as plt
import numpy as np
import pytest
from make import METRICS, learning, make_record, places
from scipy import stats
from test_compare import FALLING, curve

from lib import record
from lib.analysis import compare, figures, loss_figures, tables, target
from lib.attention import STUDY_ORDER

LABELS = ("baseline", "sdpa", "sdpa_again", "gqa")
GIB, MIB = 2**30, 2**20


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def told_apart(folder, blocks):
    """Runs of which no two have the same number in any metric, and no metric those of another."""
    random = np.random.default_rng(0)
    for (label, block), position in places(LABELS, blocks).items():
        loss = 5 + 0.1 * LABELS.index(label) + 0.01 * random.random()
        latency = {"prefill_energy_j": None, "decode_energy_j_per_token": None, "energy_null_reason": "not_asked_for"}
        inference = [
            latency
            | {"context": context, "prefill_latency_s": context * random.random(), "cache_bytes": context + block}
            | {"decode_latency_s_per_token": random.random() / 10, "cache_bytes_analytic": 7 * context + block}
            for context in (8, 16)
        ]
        series = make_record().series.model_dump()
        series |= {"train_loss": list(6 + random.random(4)), "inference": inference, "validation": learning(loss)}
        series |= {"power_time_s": [5.0, 15.0], "power_w": list(100 + 100 * random.random(2))}
        data = {"unigram_loss": 6.5, "bigram_loss": 5.9, "unigram_repeated_bigram_loss": 5.5}
        data |= {"bigram_repeated_bigram_loss": 4.5, "unigram_other_loss": 7.5, "bigram_other_loss": 6.9}
        record.write(make_record(label, block, position=position, series=series, data=data), folder)
    runs = compare.groups(record.read(folder))[0].runs
    for place, name in enumerate(METRICS):  # the ratios of two variants differ from metric to metric as well
        noise = 1.0 if name in compare.COUNTED else np.exp(0.02 * random.normal(size=len(runs)))
        runs[name] = (3.0 + place) * (1 + (0.2 + place / 100) * runs["label"].map(LABELS.index)) * noise
    return runs


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    return told_apart(tmp_path_factory.mktemp("several"), 6)


@pytest.fixture(scope="module")
def one_block(tmp_path_factory):
    return told_apart(tmp_path_factory.mktemp("one"), 1)


BARS = {
    "training_time": [("time_per_epoch_s", 1, "seconds per epoch")],
    "gpu_energy": [("energy_j", 1000, "kJ"), ("energy_per_non_padding_token_j", 1 / 1000, "mJ per token")],
    "peak_memory": [("peak_memory_bytes", GIB, "GiB allocated"), ("peak_resident_bytes", GIB, "GiB resident")],
    "flops": [
        ("forward_flops_causal", 1e9, "GFLOPs, forward, one sequence"), ("forward_flops_full", 1e9, "GFLOPs"),
        ("forward_flops_counted", 1e9, "GFLOPs"),
    ],
    "gpu_power": [("mean_power_w", 1, "W")],
    "gpu_utilization": [("gpu_utilization_percent", 1, "% of the time with a kernel running")],
    "cpu_use": [("cpu_cores_used", 1, "cores busy, mean over the window"), ("cpu_energy_j", 1000, "kJ")],
    "model_size": [("parameters", 1e6, "millions"), ("checkpoint_bytes", MIB, "MiB")],
}  # fmt: skip


def test_a_bar_of_one_block_is_its_run_s_number(one_block):
    for axes, (metric, scale, unit) in zip(figures.gpu_energy(one_block).axes, BARS["gpu_energy"], strict=True):
        expected = one_block.set_index("label").loc[list(LABELS), metric] / scale
        assert [bar.get_width() for bar in axes.patches] == pytest.approx(list(expected)), metric
        assert axes.get_xlabel() == unit
        assert [text.get_text() for text in axes.get_yticklabels()] == list(LABELS)


@pytest.mark.parametrize("name", BARS)
def test_over_blocks_a_bar_is_sdpa_s_mean_times_the_paired_ratio_with_its_interval(name, several):
    figure = getattr(figures, name)(several)
    for axes, (metric, scale, unit) in zip(figure.axes, BARS[name], strict=True):
        found = compare.ratios(several, metric).set_index("label").loc[list(LABELS)]
        level = stats.gmean(several.loc[several["label"] == "sdpa", metric]) / scale
        levels = [level * ratio for ratio in found["ratio"]]
        assert [bar.get_width() for bar in axes.patches] == pytest.approx(levels), metric
        points = [line.get_xdata() for line in axes.lines if line.get_marker() == "."]
        for label, shown in zip(LABELS, points, strict=True):
            assert sorted(shown) == pytest.approx(sorted(several.loc[several["label"] == label, metric] / scale))
        # Drawn from the lower end to the upper one, for all but the reference.
        bars = [path.vertices[:, 0] for bars in axes.collections for path in bars.get_paths()]
        ends = found.drop("sdpa")[["low", "high"]] * level
        assert [list(bar) for bar in bars] == [pytest.approx(list(pair)) for pair in ends.to_numpy()]
        assert axes.get_xlabel() == f"{unit} (×: ratio to SDPA's, 95 %)"
        notes = [text.get_text().rpartition(", ")[2].rpartition("(")[2] for text in axes.texts]
        assert notes == ["n = 6)"] * len(LABELS)


def test_a_bar_s_n_is_of_the_blocks_that_have_its_metric(several):
    lacks = (several["label"] == "gqa") & (several["block"] == 0)
    (axes,) = figures.gpu_power(several.assign(mean_power_w=several["mean_power_w"].mask(lacks))).axes
    counts = [text.get_text().rpartition("n = ")[2] for text in axes.texts]
    assert counts == ["6)", "6)", "6)", "5)"]


def test_without_sdpa_a_bar_is_the_mean_of_its_runs(several):
    runs = several[several["label"].isin(["baseline", "gqa"])]
    (axes,) = figures.gpu_power(runs).axes
    means = [runs.loc[runs["label"] == label, "mean_power_w"].mean() for label in ("baseline", "gqa")]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(means)


@pytest.mark.parametrize("blocks", [1, 6])
def test_what_fails_its_certificate_is_hatched_below_a_line_whatever_it_costs(blocks, one_block, several):
    runs = several if blocks > 1 else one_block
    (axes,) = figures.training_time(runs.assign(certified=runs["label"] != "baseline")).axes
    order = [text.get_text() for text in axes.get_yticklabels()]
    assert order == ["sdpa", "sdpa_again", "gqa", "baseline\n(not certified)"]  # baseline's is the shortest
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [False, False, False, True]
    (line,) = (line for line in axes.lines if line.get_linestyle() == ":")
    assert set(line.get_ydata()) == {2.5}


INFERENCE = (("prefill_latency_s", 1e-3, "ms"), ("decode_latency_s_per_token", 1e-3, "ms per token"))
INFERENCE += (("cache_bytes", MIB, "MiB"),)


def test_inference_is_the_median_over_runs_by_context(several):
    for axes, (field, scale, unit) in zip(figures.inference_latency(several).axes, INFERENCE, strict=True):
        assert axes.get_ylabel() == unit
        for label, line in zip(LABELS, axes.lines, strict=True):
            rows = list(itertools.chain(*several.loc[several["label"] == label, "series_inference"]))
            medians = [statistics.median(row[field] for row in rows if row["context"] == n) / scale for n in (8, 16)]
            assert line.get_label() == label and list(line.get_xdata()) == [8, 16]
            assert list(line.get_ydata()) == pytest.approx(medians), field


def test_power_over_time_is_each_run_s_trace_and_the_variant_s_own_mean(several):
    for axes, label in zip(figures.power_over_time(several).axes, LABELS, strict=True):
        own = several[several["label"] == label]
        *traces, mean = axes.lines
        assert [list(line.get_ydata()) for line in traces] == own["series_power_w"].tolist()
        assert (
            list(mean.get_ydata()) == pytest.approx([own["mean_power_w"].mean()] * 2) and mean.get_linestyle() == "--"
        )


def lines(axes):
    return [line for line in axes.lines if "table" not in line.get_label()]


def levels(axes):
    found = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
    return {label.partition(" ")[0]: level for label, level in found.items() if "table" in label}


def mean_of(own, kind):
    return np.mean([[point[kind] for point in points] for points in own["series_validation"]], axis=0)


def test_loss_curves_are_the_means_of_training_and_of_validation_losses(several):
    (axes,) = loss_figures.loss_curves(several).axes
    for label, training, validation in zip(LABELS, lines(axes)[::2], lines(axes)[1::2], strict=True):
        own = several[several["label"] == label]
        assert list(training.get_xdata()) == own["series_non_padding_tokens"].iloc[0]
        assert training.get_ydata() == pytest.approx(np.mean(own["series_train_loss"].tolist(), axis=0))
        assert list(validation.get_xdata()) == [256 * place // 8 for place in range(9)]
        assert validation.get_ydata() == pytest.approx(mean_of(own, "loss"))
        assert validation.get_label() == f"{label} (n = 6)"
    assert levels(axes) == pytest.approx({"bigram": 5.9, "unigram": 6.5})


def test_losses_of_what_can_be_recalled_and_of_the_rest_have_a_panel_each(several):
    panels = {"repeated_bigram_loss": (4.5, 5.5), "other_loss": (6.9, 7.5)}
    figure = loss_figures.loss_by_recall(several)
    for axes, (kind, (bigram, unigram)) in zip(figure.axes, panels.items(), strict=True):
        for label, line in zip(LABELS, lines(axes), strict=True):
            assert line.get_ydata() == pytest.approx(mean_of(several[several["label"] == label], kind)), kind
        assert levels(axes) == pytest.approx({"bigram": bigram, "unigram": unigram})
    assert "seen earlier" in figure.axes[0].get_title(loc="left") and "other" in figure.axes[1].get_title(loc="left")


@pytest.mark.parametrize(("metric", "scale", "unit"), [("energy_j", 1e3, "kJ"), ("time_s", 1, "training time, s")])
def test_losses_against_cost_are_a_point_a_run(metric, scale, unit, one_block):
    runs = one_block if metric == "energy_j" else one_block.assign(energy_j=np.nan)
    (axes,) = loss_figures.loss_against_cost(runs).axes
    for label, points in zip(LABELS, axes.collections, strict=True):
        own = runs[runs["label"] == label].iloc[0]
        assert points.get_offsets().tolist() == [pytest.approx([own[metric] / scale, own["validation_loss"]])]
    assert unit in axes.get_xlabel()


def test_paired_losses_against_cost_have_both_intervals_and_tables_beside_sdpa(several):
    (axes,) = loss_figures.loss_against_cost(several).axes
    cost = compare.ratios(several, "energy_j").set_index("label")
    loss = compare.differences(several).set_index("label")
    drawn = dict(zip(LABELS, axes.containers, strict=True))
    for label, container in drawn.items():
        (middle, _, (x_bar, y_bar)), of, by = container.lines, cost.loc[label], loss.loc[label]
        assert middle.get_xydata().tolist() == [pytest.approx([of["ratio"], by["difference"]])]
        if label != "sdpa":
            (x_ends,), (y_ends,) = (bar.get_segments() for bar in (x_bar, y_bar))
            assert list(x_ends[:, 0]) == pytest.approx([of["low"], of["high"]])
            assert list(y_ends[:, 1]) == pytest.approx([by["low"], by["high"]])
    above = several.loc[several["label"] == "sdpa", "validation_loss"].mean()
    assert levels(axes) == pytest.approx({"bigram": 5.9 - above, "unigram": 6.5 - above})


def published():
    with open(figures.PUBLISHED, encoding="utf-8") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


PANELS = {
    "training_time_s_per_epoch": "time_per_epoch_s", "gpu_energy_mj": "energy_j", "gpu_memory_gb": "peak_memory_bytes",
    "flops_e12": "forward_flops_counted", "gpu_power_w": "mean_power_w", "model_size_mb": "checkpoint_bytes",
}  # fmt: skip


def test_published_numbers_and_ours_are_each_over_their_own_sdpa(several):
    theirs, both = published(), [name for name in STUDY_ORDER if name in LABELS]
    for axes, (column, metric) in zip(figures.published_beside_ours(several).axes, PANELS.items(), strict=True):
        circles = next(line for line in axes.lines if line.get_marker() == "o")
        expected = [float(theirs[name][column]) / float(theirs["sdpa"][column]) for name in both]
        assert list(circles.get_xdata()) == pytest.approx(expected), column
        ours = next(line for line in axes.lines if line.get_marker() == "D")
        found = compare.ratios(several, metric).set_index("label").reindex(both)
        assert list(ours.get_xdata()) == pytest.approx(list(found["ratio"].astype(float)), nan_ok=True), metric
        segments = axes.collections[0].get_segments()
        for row, label in enumerate(both):
            if label in ("baseline", "gqa"):
                assert list(segments[row][:, 0]) == pytest.approx(list(found.loc[label, ["low", "high"]])), metric


def test_a_cost_to_a_target_is_a_bar_in_its_unit_and_a_bound_points_onwards(tmp_path):
    for block in range(2):
        of = {"sdpa": FALLING, "gqa": [loss - 0.1 for loss in FALLING], "mla": [6.0, *(3.9 - n / 10 for n in range(8))]}
        of["lsh"] = [*FALLING[:-3], 4.4, 4.35, 4.3 + block / 50]
        for label, losses in of.items():
            record.write(curve(label, losses, block), tmp_path)
    runs = record.read(tmp_path)
    found = target.summary(runs).set_index("label")
    figure, names = figures.cost_to_target(runs), ["sdpa", "gqa", "lsh", "mla"]
    for axes, (cost, scale, unit) in zip(figure.axes, (("energy_j", 1e3, "kJ"), ("time_s", 1, "s")), strict=True):
        assert axes.get_xlabel().startswith(f"{unit} (")
        order = [label.get_text() for label in axes.get_yticklabels()]
        assert sorted(order) == sorted(names)
        assert [bar.get_width() for bar in axes.patches] == pytest.approx(list(found.loc[order, cost] / scale))
        bounds = [name for name in order if name in ("lsh", "mla")]
        assert [bar.get_alpha() < 0.5 for bar in axes.patches] == [name in bounds for name in order]
        arrows = [text for text in axes.texts if getattr(text, "arrow_patch", None)]
        onwards = [arrow.xy[0] - arrow.xyann[0] for arrow in arrows]  # from the bar's end to the tip
        onwards = dict(zip(bounds, onwards, strict=True))
        assert onwards["lsh"] > 0 > onwards["mla"]  # it costs more than is drawn; it costs less
    gaps = target.to_target(runs).query("label == 'lsh'")["gap_nats"]
    assert gaps.nunique() == 2
    assert f"{gaps.max():.2g} nats above" in " ".join(text.get_text() for text in figure.axes[0].texts)


CELLS = {
    "s per epoch": ("time_per_epoch_s", 1, 2), "mJ per token": ("energy_per_non_padding_token_j", 1 / 1000, 3),
    "peak GPU GiB": ("peak_memory_bytes", GIB, 2), "validation loss": ("validation_loss", 1, 3),
    "decode ms per token": ("decode_latency_s_per_token", 1 / 1000, 2), "cache MiB": ("cache_bytes", MIB, 2),
    "parameters, M": ("parameters", 1e6, 2),
}  # fmt: skip


def test_every_cell_of_the_ranking_is_its_metric_in_the_unit_above_it(one_block):
    runs = one_block.copy()
    for name in ("peak_memory_bytes", "peak_reserved_memory_bytes", "cache_bytes", "parameters"):
        runs[name] *= 1e9  # so that the digits that are shown tell them apart
    table = tables.ranking(runs).set_index("variant")
    of = runs.set_index("label")
    for unit, (metric, scale, digits) in CELLS.items():
        assert table[unit].to_dict() == {name: f"{of.loc[name, metric] / scale:,.{digits}f}" for name in LABELS}, unit
    above = of["validation_loss"] - 5.9
    assert table["loss − bigram table's"].to_dict() == {name: f"{above[name]:+.2f}" for name in LABELS}


@pytest.mark.parametrize("by", ["time_per_epoch_s", "peak_memory_bytes"])
def test_the_ranking_is_from_the_lowest_by_the_column_that_is_asked_for(by, several):
    """By memory the order is the other way round; what fails its certificate stands below, whatever it costs."""
    runs = several.copy()
    runs["peak_memory_bytes"] = 1e12 / runs["peak_memory_bytes"]
    runs.loc[runs["label"] == "baseline", "certified"] = False
    table = tables.ranking(runs, by)
    expected = ["sdpa", "gqa"] if by == "time_per_epoch_s" else ["gqa", "sdpa"]
    assert list(table["variant"]) == [*expected, "sdpa_again", "baseline"] and list(table["rank"])[:2] == ["1", "2"]
    found = compare.ratios(runs, by).set_index("label")
    rows = table.set_index("variant")
    for label in ("gqa", "sdpa_again"):
        of = found.loc[label]
        assert rows.loc[label, "ratio to SDPA"] == f"{of['ratio']:.3f} [{of['low']:.3f}, {of['high']:.3f}]"
        assert rows.loc[label, "verdict"] == f"{of['verdict']} (p = {of['p']:.2g})"
    loss = compare.differences(runs).set_index("label").loc["gqa"]
    said = f"{loss['difference']:+.3f} [{loss['low']:+.3f}, {loss['high']:+.3f}]"
    assert rows.loc["gqa", "loss − SDPA's, nats"] == said


def test_a_loss_has_no_verdict_where_sdpa_s_own_is_above_the_bigram_table(several):
    runs = several.assign(validation_loss=np.where(several["label"] == "gqa", 5.8, 6.0) + several["seed"] / 1e3)
    verdicts = tables.ranking(runs).set_index("variant")["verdict on the loss"]
    assert all(verdicts[label].endswith(", but worse than a bigram table") for label in ("gqa", "baseline"))
    below = runs.assign(validation_loss=runs["validation_loss"] - 0.5)
    said = tables.ranking(below).set_index("variant").loc["gqa", "verdict on the loss"]
    assert said.startswith("significantly") and "bigram" not in said


def test_a_certificate_s_row_is_the_worst_of_its_runs(tmp_path):
    worse = {"receptive_field": 5, "reference_difference": 3e-3, "reference_gradient_difference": 4e-2}
    worse |= {"parameters_vs_baseline": 1.25, "memory_growth": 1.5, "flops_growth": 2.5, "passed": False}
    for block, changes in enumerate(({"reference_difference": 1e-4, "reference_gradient_difference": 1e-5}, worse)):
        made = make_record("gqa", block).model_dump()
        made["certificate"] |= changes
        record.write(record.Record(**made), tmp_path)
    (row,) = tables.certificates(record.read(tmp_path)).to_dict("records")
    assert row == {
        "variant": "gqa", "passed": "NO", "failed": "–", "causal": "yes", "prefix-equal": "yes", "mixes tokens": "yes",
        "cached = uncached": "yes", "GPT-2's projection": "yes", "GPT-2's initial weights": "yes",
        "last token sees": "5", "from its reference": "3e-03", "its gradients": "4e-02", "weights / GPT-2's": "1.250",
        "memory grows as": "T^1.5", "FLOPs grow as": "T^2.5",
    }  # fmt: skip
