"""One record, every number of it by hand: unequal epochs, accumulation, padding, a loss that rises at the end."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make import CERTIFICATE
from test_training import P, make_rows

from lib import record, training
from lib.data import corpus, ngrams
from lib.measure import assemble, energy, environment, flops
from lib.measure.meter import Window
from lib.model import build_model, gpt2_config
from lib.study import plan

L, C, H, WORDS, POSITIONS, T = 2, 32, 4, 30, 32, 16
GIVEN = P | {
    "context": T, "batch_size": 2, "accumulation": 2, "steps_per_epoch": 3, "epochs": 2, "warmup_steps": 9,
    "validation_sequences": 6,
}  # fmt: skip
STEPS, ROWS_PER_STEP = 6, 4
LOSSES = [9.0, 8.0, 7.0, 5.0, 4.0, 1.0]  # of the last three the mean is 10/3 and the median 4
VALIDATION = [(0, 8.0), (90, 3.0), (200, 3.5)]  # the last is not the best
LATENCY = {"energy_null_reason": None}
LATENCIES = [
    {"context": 8, "prefill_latency_s": 0.25, "decode_latency_s_per_token": 0.5, "cache_bytes": 1024,
     "cache_bytes_analytic": 2048, "prefill_energy_j": 1.0, "decode_energy_j_per_token": 2.0} | LATENCY,
    {"context": T, "prefill_latency_s": 0.75, "decode_latency_s_per_token": 0.125, "cache_bytes": 5120,
     "cache_bytes_analytic": 4096, "prefill_energy_j": 3.0, "decode_energy_j_per_token": 4.0} | LATENCY,
]  # fmt: skip
WINDOWS = [Window(0.0, 3.0, 1000.0, 1003.0), Window(5.0, 12.0, 1005.0, 1012.0)]  # 3 s and 7 s


def forward(tokens):
    """Causal FLOPs of one row by hand: 12 C² weights a block and the head, 4 C a pair of query and key it may see."""
    return 2 * tokens * (L * 12 * C * C + C * WORDS) + L * 4 * C * tokens * (tokens + 1) // 2


@pytest.fixture
def finished(monkeypatch):
    """Parameters and a trainer as a run leaves them, with readings that were made up."""
    monkeypatch.setitem(flops.PEAK_FLOPS_PER_S, environment.cpu_name(), {"fp32": 1e9, "bf16": 1e12})
    p = SimpleNamespace(**{name: line.default for name, line in plan.known_parameters().items()} | GIVEN)
    p.inference_contexts, p.layers, p.width, p.heads, p.positions = [8, T], L, C, H, POSITIONS
    model = build_model("sdpa", gpt2_config(L, C, H, POSITIONS, WORDS))
    trainer = training.Trainer(model, corpus.Corpus(make_rows(40), make_rows(9), WORDS), p)
    trainer.losses = torch.tensor(LOSSES)
    trainer.non_padding_tokens[:] = trainer.corpus.train.lengths[trainer.rows[:STEPS]].sum((1, 2))
    trainer.validation = [{"non_padding_tokens": tokens, "loss": loss} for tokens, loss in VALIDATION]
    trainer.busy = energy.Reading(0.96)
    meter = trainer.meter
    meter.windows, meter.cpu_time_s, meter.disk_bytes = list(WINDOWS), 4.0, 77
    meter._peaks = {"allocated": 11, "reserved": 22, "resident": 33}
    meter.gpu_counter = energy.Counter("gpu_energy", monitor=object())
    meter.gpu_counter.windows_j, meter.gpu_counter.edges_j = [100.0, 300.0], [1.0, 2.0]
    meter.cpu_counter = energy.Counter("cpu_energy", monitor=object())
    meter.cpu_counter.windows_j, meter.idle_power = [20.0, 30.0], energy.Reading(8.0)
    return p, trainer


def recorded(finished, latencies=LATENCIES):
    return assemble.make_record(*finished, CERTIFICATE, latencies, {"phases": [], "slope": None})


def test_every_metric_of_a_record_is_what_a_pencil_says(finished, tmp_path):
    _, trainer = finished
    made = recorded(finished)
    lengths = trainer.corpus.train.lengths[trainer.rows[:STEPS]].ravel()
    tokens = int(lengths.sum())
    assert len(trainer.rows) > STEPS and len(set(lengths)) > 3 and tokens < STEPS * ROWS_PER_STEP * T
    causal, full = forward(T), forward(T) + L * 4 * C * T * (T - 1) // 2
    trainer.model.save_pretrained(tmp_path)
    expected = {
        "time_s": 10.0, "time_per_epoch_s": 5.0, "non_padding_tokens_per_s": tokens / 10,
        "energy_j": 400.0, "energy_per_non_padding_token_j": 400 / tokens, "mean_power_w": 40.0, "idle_power_w": 8.0,
        "net_energy_j": 400.0 - 10 * 8, "gpu_utilization_percent": None, "gpu_busy_fraction": 0.96,
        "cpu_energy_j": 50.0, "cpu_time_s": 4.0, "cpu_cores_used": 0.4, "disk_bytes": 77.0,
        "peak_memory_bytes": None, "peak_reserved_memory_bytes": None, "peak_resident_bytes": 33.0,
        "forward_flops_causal": causal, "forward_flops_full": full, "forward_flops_counted": full,
        "attention_core_share": L * 2 * C * T * (T + 1) / causal,
        "causal_flops_per_s": 3 * causal * STEPS * ROWS_PER_STEP / 10,
        "mfu": 3 * sum(map(forward, lengths.tolist())) / 10 / 1e9,
        "train_loss": 10 / 3, "validation_loss": 3.5,
        "prefill_latency_s": 0.75, "decode_latency_s_per_token": 0.125, "cache_bytes": 5120.0,
        "parameters": (WORDS + POSITIONS) * C + L * (12 * C * C + 13 * C) + 2 * C,
        "checkpoint_bytes": (tmp_path / "model.safetensors").stat().st_size,
    }  # fmt: skip
    assert made.metrics.model_dump() == pytest.approx(expected)
    unmeasured = ("gpu_utilization_percent", "peak_memory_bytes", "peak_reserved_memory_bytes")
    assert made.null_reasons == dict.fromkeys(unmeasured, "no_gpu")


def test_the_series_of_a_record_are_those_of_its_steps_and_epochs(finished):
    _, trainer = finished
    made = recorded(finished)
    by_step = [int(trainer.corpus.train.lengths[rows].sum()) for rows in trainer.rows[:STEPS]]
    assert made.series.train_loss == LOSSES and made.series.non_padding_tokens == np.cumsum(by_step).tolist()
    assert [(point.non_padding_tokens, point.loss) for point in made.series.validation] == VALIDATION
    assert (made.series.epoch_time_s, made.series.epoch_energy_j, made.series.epoch_edges_j) == (
        [3.0, 7.0], [100.0, 300.0], [1.0, 2.0],
    )  # fmt: skip
    assert [row.model_dump() for row in made.series.inference] == LATENCIES
    checks = {check.check: check for check in made.checks}
    assert checks["padding"].value == pytest.approx(1 - sum(by_step) / (STEPS * ROWS_PER_STEP * T))
    green = [name for name, check in checks.items() if check.verdict == "green"]
    assert [flag for flag in made.flags if flag != "busy_neighbour"] == [
        "counter_against_power",
        "window_length",
    ] and "padding" in green
    trained = ngrams.losses(trainer.corpus, trainer.rows[:STEPS], 6)
    assert {name: made.data[name] for name in trained} == trained != ngrams.losses(trainer.corpus, trainer.rows, 6)


def test_what_a_run_has_not_is_null_with_its_reason_and_the_rest_stays(finished):
    _, trainer = finished
    trainer.meter.windows[0] = Window(0.0, 1.5, 1000.0, 1001.5)
    trainer.busy = energy.Reading(None, "no_gpu")
    made = recorded(finished, LATENCIES[:1])
    inference = ("prefill_latency_s", "decode_latency_s_per_token", "cache_bytes")
    joules = ("energy_j", "energy_per_non_padding_token_j", "mean_power_w", "net_energy_j")
    expected = dict.fromkeys(inference, "context_not_timed") | dict.fromkeys(joules, "window_too_short")
    expected |= {"gpu_busy_fraction": "no_gpu", "gpu_utilization_percent": "no_gpu"}
    assert {name: made.null_reasons.get(name) for name in expected} == expected
    assert made.series.epoch_energy_j == made.series.epoch_edges_j == []
    assert made.metrics.cpu_energy_j == 50 and made.metrics.validation_loss == 3.5
    assert recorded(finished, []).null_reasons["prefill_latency_s"] == "not_asked_for"


def test_the_notebook_s_tables_show_the_record_s_numbers_in_the_units_that_they_name(finished):
    made = recorded(finished)
    shown = assemble.measured(made)["measured"]
    assert shown["time_s"] == "10" and shown["energy_j"] == "400" and shown["validation_loss"] == "3.5"
    assert shown["peak_memory_bytes"] == f"not measured: {record.REASONS['no_gpu']}"
    assert list(shown.index) == list(assemble.SHOWN)
    first, second = assemble.inference_table(LATENCIES).to_dict("records")
    assert second == {
        "context": "16", "prefill, ms": "750.00", "ms per new token": "125.00", "cache, KiB": "5.0",
        "cache by formula, KiB": "4.0", "prefill, J": "3.000", "J per new token": "4.000",
        "without joules, because": "",
    }  # fmt: skip
    assert first["prefill, ms"] == "250.00"
    checks = assemble.self_check(made).set_index("check")
    assert checks.loc["window_length", "verdict"] == "flagged" and "3.0 s" in checks.loc["window_length", "says"]


def test_what_an_attention_costs_on_paper_stands_beside_gpt2_s_own():
    """Two layers of 64 with 8 heads, 512 tokens; gqa has a quarter of the heads of keys and values: 16 wide."""
    p = SimpleNamespace(context=512, attention="gqa", label="", options={})
    table = assemble.costs(build_model("gqa", gpt2_config(2, 64, 8, 512, 50)), p)
    core, beyond = 2 * 4 * 64 * 512 * 513 // 2, 2 * 4 * 64 * 512 * 511 // 2  # of all scores those of the future
    assert list(table) == ["gqa", "GPT-2's own", "ratio"]
    for column, keys in (("gqa", 16), ("GPT-2's own", 64)):
        matrices, biases = 64 * (64 + 2 * keys) + 64 * 64, 64 + 2 * keys + 64
        causal = 2 * 512 * (2 * (matrices + 8 * 64 * 64) + 64 * 50) + core
        vectors = biases + 5 * 64 + 4 * 64  # the MLP's biases, and two norms
        assert table[column].drop("matched, within 1 %").to_dict() == {
            "parameters": f"{(50 + 512) * 64 + 2 * (matrices + 8 * 64 * 64 + vectors) + 2 * 64:,}",
            "of these in attention": f"{2 * (matrices + biases):,}",
            "forward GFLOPs, causal": f"{causal / 1e9:,.3f}",
            "forward GFLOPs, full T x T": f"{(causal + beyond) / 1e9:,.3f}",
            "share of attention core": f"{core / causal:.1%}",
            "cache in bf16, KiB": f"{2 * 2 * keys * 512 * 2 / 1024:,.0f}",
        }
