"""scripts/benchmark_attention.py: ratios and exponents by hand, and that all take turns or are named."""

import importlib.util
import math

import pytest
import torch

from lib import attention, paths, record
from lib.analysis import benchmarks
from lib.errors import OutOfMemory, UsageError
from lib.model import build_model, gpt2_config
from lib.record.benchmark import Benchmark


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "benchmark_attention", paths.ROOT / "scripts" / "benchmark_attention.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ratios_are_to_the_best_other_and_none_without_one():
    times_ms = {"mine": [4.0, 6.0, 20.0], "quick": [8.0, 9.0, 10.0], "steady": [9.0, 8.5, 8.6], "alone": [1.0]}
    found = benchmarks.ratios(times_ms, {"mine": ["quick", "steady", "absent"], "alone": [], "failed": ["quick"]})
    assert found["mine"]["minimum_ratio"] == 0.5 and found["mine"]["minimum_best_other"] == "quick"
    assert found["mine"]["median_ratio"] == pytest.approx(6 / 8.6) and found["mine"]["median_best_other"] == "steady"
    assert found["alone"]["minimum_ratio"] is None and "failed" not in found


@pytest.fixture
def benchmark():
    times_ms = {T: {"mine": [ms, 2 * ms], "theirs": [8.0, 8.0]} for T, ms in ((512, 7.0), (2048, 3.0), (8192, 48.0))}
    times_ms[8192]["short"] = [1.0]
    failed = {512: {"short": "no room"}, 2048: {"short": "no room"}}
    where = {"device": "cpu", "device_name": "a machine"}
    return Benchmark(
        finished_at=record.now(), what="layer", batch=1, compiled=False, vocabulary=1, threads=1, environment=where,
        versions={}, reference_implementations={"mine": ["theirs", "absent"], "short": []}, times_ms=times_ms,
        out_of_memory=failed, absent={},
    )  # fmt: skip


def test_the_exponent_is_between_the_two_longest_lengths(benchmark):
    assert benchmarks.exponents(benchmark) == {"mine": pytest.approx(2.0)}


def test_both_ratios_of_a_row_are_to_the_implementation_that_it_names(benchmark):
    times_ms = {512: {"mine": [6.0, 9.0, 9.0], "quick": [3.0, 9.0, 9.0], "steady": [4.0, 4.5, 5.0]}}
    both = {"mine": ["quick", "steady"]}
    row = benchmarks.table(benchmark.model_copy(update={"times_ms": times_ms, "reference_implementations": both}))
    assert row.loc[0, ["best reference implementation", "ratio of minima", "of medians"]].tolist() == [
        "quick", "2.00", "1.00",
    ]  # fmt: skip


def test_the_table_and_the_record_say_what_was_measured(benchmark, tmp_path):
    table = benchmarks.table(record.read_checked(Benchmark, record.write_checked(benchmark, tmp_path / "layer.json")))
    assert list(table["context"]) == ["512", "512", "2,048", "2,048", "8,192", "8,192"]
    assert list(table["ratio of minima"]) == ["0.88", "–", "0.38", "–", "6.00", "–"]
    assert list(table["best reference implementation"]) == ["theirs", "–", "theirs", "–", "theirs", "none ran"]


def test_beside_the_ratios_stands_how_many_rounds_they_rest_on_and_what_no_difference_looked_like(benchmark):
    assert benchmarks.caution(benchmark).startswith("n = 1 to 2 rounds, each ratio by itself: no correction")
    assert benchmarks.caution(benchmark).endswith("no A/A control: noise unknown")
    del benchmark.times_ms[8192]["short"]
    benchmark.times_ms[512]["mine, again (A/A)"] = [8.4, 12.6]  # medians 10.5 and 10.5
    benchmark.times_ms[8192]["mine, again (A/A)"] = [48.0 * 1.02, 96.0 * 1.02]
    assert benchmarks.caution(benchmark).startswith("n = 2 rounds")
    assert benchmarks.caution(benchmark).endswith("a variant beside itself: 1.000 to 1.020")
    assert "mine, again (A/A)" in list(benchmarks.times(benchmark)["turn"])
    benchmark.out_of_memory[2048]["mine, again (A/A)"] = "no room"  # a control is no reference implementation
    assert list(benchmarks.missing(benchmark)["implementation"]) == []


def test_what_has_no_number_is_in_the_tables_with_its_reason(benchmark):
    benchmark.out_of_memory[512]["theirs"] = "no room either"
    found = benchmark.model_copy(update={"absent": {"absent": "no wheel"}})
    assert benchmarks.table(found).iloc[1].tolist() == ["512", "short", "no room", *["–"] * 5]
    assert benchmarks.missing(found).to_numpy().tolist() == [
        ["absent", "all", "no wheel"],
        ["theirs", "512", "no room either"],
    ]


def test_turns_are_paired_by_their_round():
    """7 and 14 of 8 and 8: 0.875 and 1.75, 1.24 in the geometric mean; Student's t at one degree of freedom, 12.706."""
    middle, half = math.sqrt(0.875 * 1.75), math.exp(math.log(2) / 2 * 12.7062)
    assert benchmarks.paired([7.0, 14.0], [8.0, 8.0]) == f"{middle:.2f} [{middle / half:.2f}, {middle * half:.2f}]"
    assert benchmarks.paired([7.0], [8.0]) == "0.88"
    assert benchmarks.paired([7.0, 14.0], [8.0, 16.0]) == "0.88 [0.88, 0.88]"


def test_a_step_s_table_begins_with_the_quickest(benchmark):
    whole = benchmark.model_copy(
        update={"reference_implementations": {"mine": ["theirs"]}, "times_ms": {512: benchmark.times_ms[512]}}
    )
    table = benchmarks.times(whole)
    assert table["turn"].tolist() == ["mine", "theirs"] and table["minimum, ms"].tolist() == ["7.0", "8.0"]
    assert table["mine takes of it"].tolist()[0] == "–" and table["mine takes of it"].tolist()[1].startswith("1.24 [")


@pytest.mark.parametrize(
    "edit, says",
    [
        (lambda text: text.replace("48.0", "47.0"), "changed after it was written"),
        (lambda text: text.replace('"layer"', '"whole"'), "layer.json is no Benchmark record: what"),
        (lambda text: text[:-9], "cannot be read"),
        (lambda text: text.replace("no room", "").replace('"short": ""', ""), "no time and no reason for short at 512"),
    ],
)
def test_a_damaged_record_is_one_sentence(benchmark, tmp_path, edit, says):
    path = record.write_checked(benchmark, tmp_path / "layer.json")
    path.write_text(edit(path.read_text()))
    with pytest.raises(UsageError, match=says):
        record.read_checked(Benchmark, path)


def test_all_take_turns_and_one_without_memory_is_named(script):
    taken = []

    def hungry():
        raise OutOfMemory("no memory")

    turns = {"a": lambda: taken.append("a"), "b": lambda: taken.append("b"), "hungry": hungry}
    times_ms, failed = script.interleave(turns, 3, torch.device("cpu"))
    assert {name: len(ms) for name, ms in times_ms.items()} == {"a": 3, "b": 3} and failed == {"hungry": "no memory"}
    assert all(set(taken[at : at + 2]) == {"a", "b"} for at in range(0, 8, 2))


def test_the_pinned_peers_run_and_what_is_not_installed_is_named(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "bound_memory", lambda: None)  # it would hold for the other tests as well
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    script.IMPLEMENTATIONS["sdpa"]["nowhere"] = lambda T: importlib.import_module("no_such_peer")
    out = tmp_path / "found.json"
    words = ["layer", "--lengths", "128", "--rounds", "1", "--threads", "1", "--out", str(out)]
    assert script.main([*words, "--variants", "sdpa", "gqa", "lsh", "mla"]) == 0
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    found = record.read_checked(Benchmark, out)
    assert "1 thread, fp32; transformers 5" in benchmarks.title(found)
    assert all(f"{name}, again (A/A)" in found.times_ms[128] for name in ("sdpa", "gqa", "lsh", "mla"))
    assert "a variant beside itself:" in benchmarks.title(found)
    assert "no_such_peer" in found.absent["nowhere"] and "transformers" in found.versions
    best = dict(
        zip(*(benchmarks.table(found)[column] for column in ("variant", "best reference implementation")), strict=True)
    )
    for name, peer in {"sdpa": "GPT-2", "gqa": "Llama", "lsh": "Reformer", "mla": "DeepSeek-V2"}.items():
        assert peer in best[name]
    assert "T = 128, 128 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("variant", attention.variants())
def test_every_layer_that_takes_turns_has_our_shape_and_sees_no_later_token(script, variant):
    for other, make in script.IMPLEMENTATIONS.get(variant, {}).items():
        torch.manual_seed(0)
        try:
            layer = make(128).double() if "DeltaNet" not in other else make(128)
        except ImportError:
            continue  # not installed, which the record names
        x = torch.randn(1, 128, script.WIDTH, dtype=next(layer.parameters()).dtype, requires_grad=True)
        out = layer.train()(x)
        assert out.shape == x.shape and out.isfinite().all(), other
        (seen,) = torch.autograd.grad(out[0, 63].sum(), x)
        assert not seen[0, 64:].any() and seen[0, 63].any() and seen[0, 0].any(), other


NANOGPT = """
from dataclasses import dataclass

import torch
from torch import nn

@dataclass
class GPTConfig:
    n_layer: int
    n_embd: int
    n_head: int
    block_size: int
    vocab_size: int
    dropout: float

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, ids, targets):
        logits = self.layer(ids)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("nanoGPT counts its tensors here")
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)
"""


def test_a_training_step_takes_turns_with_the_peers_steps(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SIZE", (1, 32, 2))
    (tmp_path / "model.py").write_text(NANOGPT)
    nanogpt = script.load_nanogpt(tmp_path / "model.py")
    turns, absent = script.step_turns(["sdpa"], 16, torch.device("cpu"), nanogpt, 2, vocabulary=64)
    assert absent == {} and set(turns) == {"sdpa", "transformers' GPT-2 eager", "transformers' GPT-2 sdpa", "nanoGPT"}
    times_ms, failed = script.interleave(turns, 1, torch.device("cpu"))
    assert failed == {} and all(len(ms) == 1 for ms in times_ms.values())
    assert script.step_turns([], 16, torch.device("cpu"), vocabulary=64)[1] == {"nanoGPT": "no --nanogpt"}


def test_a_step_of_llama_or_a_pattern_takes_turns_with_transformers_s_of_as_many_weights(script, monkeypatch):
    monkeypatch.setattr(script, "SIZE", (2, 32, 2))
    turns, absent = script.step_turns(["sdpa", "linear,sdpa"], 16, torch.device("cpu"), architecture="llama")
    assert absent == {}
    assert list(turns) == ["sdpa", "linear,sdpa", "transformers' Llama eager", "transformers' Llama sdpa"]
    times_ms, failed = script.interleave(turns, 1, torch.device("cpu"))
    assert failed == {} and all(len(ms) == 1 for ms in times_ms.values())
    for architecture in ("gpt2", "llama"):
        config = gpt2_config(2, 32, 2, 64, 50, architecture=architecture)
        kind, theirs, _ = script.transformers_s(config)
        counted = [sum(p.numel() for p in model.parameters() if p.dim() > 1) for model in
                   (kind(theirs), build_model("sdpa", config))]  # fmt: skip
        assert counted[0] - counted[1] == 0
    with pytest.raises(SystemExit):
        script.main(["step", "--architecture", "llama", "--nanogpt", "model.py"])


@pytest.mark.parametrize(
    ("what", "variants"),
    [
        ("layer", attention.variants()),
        ("step", ["sdpa"]),
        ("step_patterns", ["sdpa", "linear,sdpa", "sliding_window,sliding_window,sliding_window,sdpa"]),
        ("step_llama", ["sdpa", "linear,sdpa"]),
    ],
)
def test_the_committed_benchmarks_are_whole_and_name_no_machine_path(what, variants):
    path = paths.ROOT / "records" / "scaling-cpu" / "reference_implementations" / f"{what}.json"
    found = record.read_checked(Benchmark, path)
    assert set(found.reference_implementations) == set(variants) and found.out_of_memory == {
        T: {} for T in found.times_ms
    }
    assert str(paths.ROOT) not in path.read_text()
    assert found.architecture == ("llama" if what == "step_llama" else "gpt2")


@pytest.mark.parametrize(
    "words, says",
    [
        (["layer", "--variants", "spda"], "there is no attention variant 'spda'"),
        (["step", "--batch", "0"], "want 1 or more"),
        (["step", "--nanogpt", "nowhere.py"], "nowhere.py is no model.py of nanoGPT: FileNotFoundError"),
        (["layer", "--out", "README.md/layer.json"], "README.md cannot be made: "),
        (["step", "--nanogpt", "README.md"], "README.md is no model.py of nanoGPT: SyntaxError"),
    ],
)
def test_a_wrong_word_is_one_sentence(script, words, says, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(words)
    assert ended.value.code == 2 and says in capsys.readouterr().err
