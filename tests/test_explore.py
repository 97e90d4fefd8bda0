"""What bench.ipynb shows is what the modules compute: maps, costs, options, models trained and written with."""

import asyncio
import shutil
from itertools import pairwise
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from make import NINTH, make_record

from lib import attention, paths, record
from lib.analysis import figures, growth
from lib.data import corpus
from lib.errors import UsageError
from lib.explore import bench, budget, records, weights
from lib.explore.widgets import Choice, Picker, Screen
from lib.measure import assemble, flops
from lib.model import build_model, gpt2_config, meta_model

HEADS, WIDTH, TOKENS = 4, 32, 11


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def layer_and_input(name, **options):
    torch.manual_seed(0)
    layer = build_model(name, gpt2_config(1, WIDTH, HEADS, 64, 2), **options).double().eval().transformer.h[0].attn
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return layer, torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)


def map_of(name, **options):
    return weights.of_layer(*layer_and_input(name, **options), HEADS)


WITHOUT_WEIGHTS = {  # not one per head
    "differential",  # two of opposite signs share their values, and a norm stands behind
    "gated",  # a gate stands behind, another for each channel
    "retention",  # a norm stands behind
    "mamba2",  # a gate and a norm over all heads stand behind
    "kda",  # as gated_deltanet
    "gated_deltanet",  # what it writes for a token depends on the others' keys, and a norm stands behind
}

WITH_A_SINK = {"sinks"}  # which has the rest


@pytest.mark.parametrize("name", attention.variants())
def test_weights_are_found_where_there_are_such_sum_to_one_and_look_back_only(name):
    found = map_of(name)
    kind, heads = ("influence", 1) if name in WITHOUT_WEIGHTS else ("weights", HEADS)
    assert found.kind == kind and found.values.shape == (heads, TOKENS, TOKENS)
    assert not found.values.triu(1).any() and (found.values >= 0).all()
    if name not in WITHOUT_WEIGHTS:
        total = found.values.sum(-1)  # (H, T)
        if name in WITH_A_SINK:
            assert ((total > 0) & (total < 1)).all()
        else:
            torch.testing.assert_close(total, torch.ones(HEADS, TOKENS, dtype=torch.float64))


def test_the_baseline_s_weights_are_its_softmax():
    layer, x = layer_and_input("baseline")
    q, k, _ = layer.c_attn(x).view(TOKENS, 3, HEADS, -1).permute(1, 2, 0, 3)
    scores = (q @ k.mT / (WIDTH / HEADS) ** 0.5).masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(weights.of_layer(layer, x, HEADS).values, scores.softmax(-1).detach())


def test_linear_attention_s_weights_are_its_features_products():
    layer, x = layer_and_input("linear")
    q, k, _ = layer.c_attn(x).view(TOKENS, 3, HEADS, -1).permute(1, 2, 0, 3)
    products = ((torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).mT).tril()
    expected = products / products.sum(-1, keepdim=True)
    torch.testing.assert_close(weights.of_layer(layer, x, HEADS).values, expected.detach())


def test_a_window_s_weights_are_zero_outside_it_alone():
    seen = map_of("sliding_window", window=3).values != 0
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    assert (seen == ((distance >= 0) & (distance < 3))).all()


def test_lsh_gives_a_token_itself_weight_only_where_it_is_alone():
    values = map_of("lsh", n_hashes=1, chunk_length=4, buckets=2).values
    own = values.diagonal(dim1=1, dim2=2)
    assert ((own < 1e-9) | (own > 1 - 1e-9)).all() and (values > 0).sum(-1).max() <= 4


@pytest.mark.parametrize("name", attention.STUDY_ORDER)
def test_a_file_has_a_map_too_and_what_has_no_weights_is_not_called_so(name):
    found = map_of(f"lib/published/{name}.py")
    if found.kind == "weights":
        assert found.values.shape == (HEADS, TOKENS, TOKENS)
    else:
        assert found.kind == "influence" and found.values.shape == (1, TOKENS, TOKENS)
    assert found.values.isfinite().all() and found.values.any()


def test_influence_is_the_norm_of_the_jacobian():
    layer, x = layer_and_input("sdpa")
    jacobian = torch.autograd.functional.jacobian(lambda given: layer(given)[0], x)[0, :, :, 0]  # (T, C, T, C)
    expected = jacobian.square().sum((1, 3)).sqrt()
    torch.testing.assert_close(weights.influence(lambda given: layer(given)[0], x), expected)


def test_a_module_that_multiplies_two_linear_parts_has_no_weights():
    """Each factor alone is linear; only together they are seen not to be values."""

    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.both = torch.nn.Linear(WIDTH, 2 * WIDTH)

        def forward(self, x):
            a, b = self.both(x).chunk(2, dim=-1)
            return (a * b).cumsum(1), None

    found = weights.of_layer(Gated().double(), torch.randn(1, TOKENS, WIDTH, dtype=torch.float64), HEADS)
    assert found.kind == "influence" and not found.values.triu(1).any() and found.values.tril().any()


def test_the_receptive_field_grows_with_the_layers():
    model = bench.small_model(Choice("sliding_window", {"window": 3}))
    tokens, found, seen = bench.attention_map(model, "one two three four five six seven eight", 1)
    places = np.arange(len(tokens))
    assert ((found.values != 0).any(0).sum(1).numpy() == np.minimum(places + 1, 3)).all()
    assert (seen.sum(1).numpy() == np.minimum(places + 1, 5)).all()  # 2 layers: 2 (W - 1) + 1


@pytest.mark.parametrize("sentence", ["", "a", "word " * 80])
def test_a_sentence_without_a_legible_map_is_one_sentence(sentence):
    with pytest.raises(UsageError, match=r"^a map needs 2 to 40 tokens, and these are \d+; write another sentence$"):
        bench.attention_map(bench.small_model(Choice("sdpa")), sentence, 1)


@pytest.mark.parametrize("name", attention.variants())
def test_the_cost_table_says_what_measure_counts(name):
    size = "the quick profile (4 layers of 128)"
    (table,) = bench.cost_table(Choice(name), size, 256)
    model = meta_model(name, gpt2_config(4, 128, 8, 256, corpus.BUILTIN_VOCABULARY))
    counted = flops.analytic(model, 256)
    shown = dict(zip(table.iloc[:, 0], table[Choice(name).label], strict=True))
    assert shown["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert shown["forward GFLOPs, causal"] == f"{counted['forward_flops_causal'] / 1e9:,.3f}"
    assert shown["forward GFLOPs, full T x T"] == f"{counted['forward_flops_full'] / 1e9:,.3f}"
    assert shown["cache in bf16, KiB"] == f"{4 * model.transformer.h[0].attn.cache_bytes(256, 2) / 1024:,.0f}"
    assert list(table)[2] == "GPT-2's own"


def test_the_cost_table_follows_the_options():
    tables_of = [bench.cost_table(Choice("gqa", {"kv_heads": g}), bench.GPT2_SMALL, 512)[0] for g in (12, 3)]
    held = [
        float(table.set_index(table.columns[0]).loc["cache in bf16, KiB"].iloc[0].replace(",", ""))
        for table in tables_of
    ]
    assert held[0] == 4 * held[1]


@pytest.mark.parametrize("raises", ["ValueError('few')", "RuntimeError('few')", "OSError('few')"])
def test_a_file_that_refuses_few_positions_is_one_sentence(raises, tmp_path):
    begin = "        self.layer_idx, self.weight"
    few = f"        if config.n_positions < 1000:\n            raise {raises}\n{begin}"
    (tmp_path / "long_ones.py").write_text(NINTH.replace(begin, few, 1))
    with pytest.raises(UsageError, match=r"^[^\n]*few$"):
        bench.by_context(Choice(str(tmp_path / "long_ones.py")), bench.GPT2_SMALL)


def test_costs_by_context_are_each_variant_s_own_and_a_refused_option_is_one_sentence():
    costs = bench.by_context(Choice("sliding_window", {"window": 4}), bench.GPT2_SMALL)
    assert set(costs["label"]) == {*(Choice(name).label for name in attention.variants()), "Window 4"}
    own = costs[costs["label"] == "Window 4"].set_index("context")
    assert (own["cache_bytes"] == 12 * 2 * 768 * 3 * 2).all()
    baseline = costs[costs["label"] == "Eager"].set_index("context")
    assert baseline["core_flops_per_token"][64] == 12 * 4 * 768 * 65 / 2
    with pytest.raises(UsageError, match=r"^kv_heads must divide heads"):
        bench.by_context(Choice("gqa", {"kv_heads": 5}), bench.GPT2_SMALL)


def test_a_picker_has_the_options_of_the_variant_s_signature_and_tells_those_that_are_turned():
    picker = Picker("sliding_window", window=7)
    assert picker.choice == Choice("sliding_window", {"window": 7})
    assert picker.choice.label == "Window 7"
    picker.variant.value = "mla"
    assert [option.description for option in picker.options.children] == [
        "kv_lora_rank",
        "qk_rope_head_dim",
        "q_lora_rank",
    ]
    assert picker.choice == Choice("mla")
    picker.options.children[0].value = "16"
    assert picker.choice.options == {"kv_lora_rank": 16}
    picker.path.value = "lib/published/linear.py"
    assert picker.choice.attention == "lib/published/linear.py"
    picker.path.value = "nowhere.py"
    assert "there is no attention file" in picker.message.value
    assert picker.choice.attention == "lib/published/linear.py"  # the screens keep what they show


def test_a_screen_says_what_was_wrong_in_one_line_and_goes_on():
    def show(choice):
        bench.check(choice, bench.SIZE)
        return ["fine"]

    picker = Picker("gqa", kv_heads="3")
    shown = Screen("", show, {}, picker)
    assert 'role="alert"' in shown.page.value and "kv_heads must divide heads" in shown.page.value
    picker.options.children[0].value = "2"
    assert "<p>fine</p>" in shown.page.value


def test_work_shows_each_page_and_ends_when_it_is_stopped():
    seen, closed = [], []

    def show():
        try:
            for number in range(1000):
                yield lambda number=number: seen.append(number) or [str(number)]
        finally:
            closed.append(True)

    async def stop_at_three(screen):
        work = asyncio.ensure_future(screen.work())
        while len(seen) < 3:
            await asyncio.sleep(0)
        assert screen.button.description == "Stop"
        screen.pressed()
        await work

    shown = Screen("", show, {}, button="Go", at_first="not yet")
    asyncio.run(stop_at_three(shown))
    assert seen[:3] == [0, 1, 2] and len(seen) < 1000 and closed == [True]
    assert f"<p>{seen[-1]}</p>" in shown.page.value and shown.button.description == "Go" and not shown.working


def test_a_saved_screen_keeps_its_page():
    bundle = Screen("a title", lambda: ["a sentence"], {})._repr_mimebundle_()
    assert "<p>a sentence</p>" in bundle["text/html"] and bundle["text/plain"] == "a title"


def test_models_trained_on_the_page_are_those_that_its_screens_then_use(monkeypatch):
    monkeypatch.setitem(bench.LESSON, "steps_per_epoch", 3)
    shared = bench.Bench("sliding_window", window=4)
    assert "not trained" in shared.model(shared.picker.choice)[1]
    _, table = list(shared.training_pages(Picker("linear"), shared.picker.choice, 1e9))[-1]()
    assert list(table["variant"]) == ["Window 4", "Linear (elu+1)"] and set(table["steps"]) == {"3"}
    model, said = shared.model(shared.picker.choice)
    assert said.startswith("after 3 steps")
    start = bench.small_model(shared.picker.choice)
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)


def test_training_leaves_what_was_measured_and_examined_and_draws_anew_what_shows_a_model(monkeypatch):
    monkeypatch.setitem(bench.LESSON, "steps_per_epoch", 2)
    shared = bench.Bench("sliding_window", window=4)
    screens = {
        "map": shared.attention("a b c d"), "certificate": shared.certificate(), "costs": shared.costs(),
        "measured": shared.measured(), "generation": shared.generation("Return the"),
    }  # fmt: skip
    for name in ("certificate", "measured", "generation"):
        screens[name].page.value = f"<p>what {name} had shown</p>"
    training = shared.training("linear")
    training.controls["seconds"].value = 120
    before = {name: screen.page.value for name, screen in screens.items()}
    asyncio.run(training.work())
    kept = {name for name, screen in screens.items() if screen.page.value == before[name]}
    assert kept == {"certificate", "costs", "measured"} and "steps of training" in screens["map"].page.value


def test_a_task_is_learnt_by_the_choice_with_its_options_beside_gpt2_s_own():
    shared = bench.Bench("sliding_window", window=4)
    *_, last = shared.task_pages(shared.picker.choice, "recall_rewritten", 0.05)
    asked, figure = last()
    assert asked == "It has to recall the last of two values that were written under a key."
    said = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [text.split(":")[0] for text in said] == ["Window 4", "Eager"] and all("accuracy" in text for text in said)


class Clock:
    """A clock that a layer's forward moves on by what it is to take, in seconds; notes who was timed."""

    def __init__(self, monkeypatch, takes_s):
        self.now_s, self.turns, self.takes_s = 0.0, [], takes_s
        monkeypatch.setattr(bench.time, "perf_counter", lambda: self.now_s)
        monkeypatch.setattr(bench, "_forward_backward_s", self.run)

    def run(self, layers, hidden):
        kind = type(layers[0]).__module__.rpartition(".")[2]
        self.turns.append(kind)
        return self.takes_s(kind, len(self.turns))


def test_what_is_measured_here_warms_up_takes_turns_and_shows_its_spread(monkeypatch):
    monkeypatch.setattr(bench, "MEASURED_CONTEXTS", (64, 128))
    slow = {1: 100.0, 2: 100.0, 3: 50.0}  # the first passes, which are not to count
    clock = Clock(monkeypatch, lambda kind, turn: slow.get(turn, (2.0 if kind == "mla" else 1.0) * (1 + turn % 3 / 10)))
    *_, last = bench.measured_pages(Choice("mla"), Choice("baseline"))
    length = 2 * (bench.WARM_UPS + bench.ROUNDS)
    assert len(clock.turns) == 2 * length
    rounds = [tuple(clock.turns[at : at + 2]) for at in range(0, length, 2)]
    assert set(rounds) == {("mla", "baseline"), ("baseline", "mla")} and bench.ROUNDS % 2 == 0
    assert all(one != other for one, other in pairwise(rounds))
    figure, said, table = last()
    assert "Medians of 8 rounds in turns, after 2 to warm up" in said
    row = table[(table["context"] == "64") & (table["variant"] == "Eager")].iloc[0]
    median, low, high = (float(part) for part in row["ms"].replace("[", "").replace("]", "").replace("to", "").split())
    assert low == 1000 and high == 1200 and low < median < high  # none of the first passes
    ratio = row["MLA takes of it, by round"]
    assert ratio.startswith("2.") or ratio.startswith("1.9") or ratio.startswith("1.8")
    assert len(figure.axes[0].collections) == 2  # the two bands


def test_one_variant_beside_itself_is_measured_once(monkeypatch):
    monkeypatch.setattr(bench, "MEASURED_CONTEXTS", (64,))
    clock = Clock(monkeypatch, lambda kind, turn: 1.0)
    *_, last = bench.measured_pages(Choice("baseline"), Choice("baseline"))
    assert len(clock.turns) == bench.WARM_UPS + bench.ROUNDS and list(last()[2]["variant"]) == ["Eager"]


def of_committed_files():
    """The cells of explore.ipynb that committed files alone decide: what they show, and what is stored."""
    shared = bench.Bench("sliding_window")
    budgeted = 'shared = bench.Bench("sliding_window")\nshared.budget()'
    screens = {
        budgeted: shared.budget,
        "shared.costs()": shared.costs,
        "shared.cost_by_context()": shared.cost_by_context,
    }
    screens |= {"records.records()": records.records, "records.lengths()": records.lengths}
    cells = nbformat.read(paths.ROOT / "notebooks" / "explore.ipynb", as_version=4).cells
    stored = {cell.source: cell for cell in cells if cell.source in screens}
    return [(stored[source], screens[source]) for source in screens]


@pytest.mark.parametrize("which", range(5), ids=["budget", "costs", "costs by context", "records", "lengths"])
def test_the_stored_pages_of_explore_are_those_of_the_committed_files(which):
    """`make refresh` stores them anew: their cells have no tag that keeps what was once stored."""
    cell, screen = of_committed_files()[which]
    assert not cell.metadata.get("tags")
    (output,) = cell.outputs
    stored = output.data["text/html"]
    assert ("".join(stored) if isinstance(stored, list) else stored) == screen().page.value


def test_both_sides_are_trained_on_the_same_rows_from_the_same_weights(monkeypatch):
    monkeypatch.setitem(bench.LESSON, "steps_per_epoch", 2)
    runs = [bench.Lesson(Choice(name)) for name in ("baseline", "sdpa")]
    for run in runs:
        run.step()
        run.step()
    np.testing.assert_allclose(runs[0].losses, runs[1].losses, rtol=1e-5)


def test_writing_is_transformers_greedy_generation_and_the_cache_is_counted():
    model = bench.small_model(Choice("sliding_window", {"window": 6})).eval()
    ids = [bench.tokenizer().encode("Return the number of")]
    steps = bench.generate(model, ids)
    found = [next(steps) for _ in range(8)]
    expected = model.generate(torch.tensor(ids), max_new_tokens=8, do_sample=False)[0]
    assert found[-1][0] == bench.tokenizer().decode(expected)
    assert [cached for _, cached, _ in found] == list(range(len(ids[0]), len(ids[0]) + 8))
    assert found[-1][2] == found[-2][2] == 2 * 2 * 64 * 5 * 4  # layers, keys and values, width, W - 1, fp32


def test_a_record_s_facts_hold_its_numbers_and_why_one_is_missing():
    path = next((paths.ROOT / "records" / "quick-cpu").glob("mla-*.json"))
    one = record.load(path)
    parts = {part.title: part.table for part in records.facts(one)}
    shown = {title: dict(zip(table.iloc[:, 0], table.iloc[:, 1], strict=True)) for title, table in parts.items()}
    assert shown["metrics"]["time_s"] == f"{one.metrics.time_s:,.4g}"
    assert shown["metrics"]["energy_j"] == f"not measured: {record.REASONS['no_gpu']}"
    assert shown["metrics"]["forward_flops_causal"] == f"{one.metrics.forward_flops_causal:,.0f}"
    assert shown["parameters"]["width"] == "128" and shown["certificate"]["causal"] == "yes"
    assert shown["environment"]["packages: torch"] == one.environment["packages"]["torch"]
    assert shown["self-check"] == {check.check: check.verdict for check in one.checks}
    assert shown["who and when"]["name"] == one.name and shown["who and when"]["flags"] == "–"
    told = {name.partition(":")[0] for name in set().union(*shown.values())}  # of a part with parts, the part
    assert told.issuperset(record.Metrics.model_fields) and told.issuperset(record.Certificate.model_fields)


def test_published_records_can_be_browsed():
    screen = records.records()
    assert 'alt="Validation loss at the end, nats: Eager 6.019' in screen.page.value
    screen.controls["figure"].value = figures.training_time
    assert 'alt="Training time, seconds per epoch: GQA 4:1 1.59' in screen.page.value
    screen.controls["figure"].value = figures.gpu_energy
    assert ": not measured: the run used no GPU.</p>" in screen.page.value
    screen.controls["variants"].value = ()
    assert "pick at least one variant" in screen.page.value


def test_gathered_records_are_browsed_and_notes_of_failures_are_not_in_the_way(tmp_path):
    gathered = tmp_path / "many" / f"{record.DEVICE_FOLDER}1"
    record.write(make_record(), gathered)
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / f"sdpa.{record.FAILED}").write_text("{}")
    (offered,) = records.records(str(tmp_path)).controls["group"].options
    assert offered.startswith(f"many/{gathered.name}: a GPU, ")


def test_records_of_who_contributed_are_browsed_by_that_name(tmp_path):
    for below in ("by-ann/paper-h100", f"by-bob/many/{record.DEVICE_FOLDER}1"):
        record.write(make_record(), tmp_path / below)
    shutil.copytree(paths.ROOT / "records" / "scaling-cpu", tmp_path / "by-ann" / "scaling-cpu")
    offered = records.records(str(tmp_path)).controls["group"].options
    assert [one.partition(":")[0] for one in offered] == [
        "by-ann/paper-h100", f"by-bob/many/{record.DEVICE_FOLDER}1",
    ]  # fmt: skip
    (offered,) = records.lengths(str(tmp_path)).controls["group"].options
    assert offered.startswith("by-ann/scaling-cpu: ")


def test_cost_by_length_can_be_browsed():
    screen = records.lengths()
    assert 'alt="SDPA&#x27;s cost over the best' in screen.page.value
    screen.controls["variants"].value = ("sdpa", "mla")
    assert "Linear" not in screen.page.value and "MLA" in screen.page.value
    screen.controls["figure"].value = records.LENGTH_FIGURES["peak memory"]
    assert 'alt="Activation memory of one layer' in screen.page.value
    screen.controls["variants"].value = ()
    assert "pick at least one variant" in screen.page.value


def test_what_a_layer_keeps_for_its_backward_pass_is_counted():
    kept = bench.certificate.activation_bytes(torch.nn.Linear(8, 8), torch.randn(1, 4, 8))
    assert kept == 4 * (4 * 8 + 8 * 8)  # its input and its weights


def test_the_card_is_the_table_that_train_ipynb_shows():
    config = gpt2_config(4, 128, 8, 256, corpus.BUILTIN_VOCABULARY)
    p = SimpleNamespace(attention="lsh", label="", context=256)
    theirs = assemble.costs(meta_model("lsh", config), p)
    (ours,) = bench.cost_table(Choice("lsh"), "the quick profile (4 layers of 128)", 256)
    assert ours.iloc[:, 1:].to_numpy().tolist() == theirs.to_numpy().tolist()


# The budget.


def budgeted(choice=None, size=bench.GPT2_SMALL, context=8192, batch=8, share=0.3, memory=2):
    marked, *said = budget.table(choice or Choice("sliding_window"), size, context, batch, share, memory)
    return marked, marked.table.set_index("variant"), " ".join(said)


def test_what_a_variant_needs_is_its_weights_and_its_own_count_of_the_cache():
    sdpa = budget.need(Choice("sdpa"), bench.GPT2_SMALL, 8192)
    assert sdpa.cache_bytes == 12 * 2 * 768 * 8192 * 2  # layers, keys and values, width, tokens, bf16
    model = meta_model("sdpa", gpt2_config(12, 768, 12, 8192, 50257))
    assert sdpa.weights_bytes == 2 * sum(weight.numel() for weight in model.parameters())
    assert sdpa.flops_per_token == flops.analytic(model, 8192)["forward_flops_causal"] / 8192


def test_what_does_not_fit_is_marked_and_stands_below_and_follows_the_memory():
    marked, table, _ = budgeted(memory=2)
    assert table.loc["SDPA", "fits"] == "no" and table.loc["GQA 4:1", "fits"] == "yes"
    fits = list(table["fits"])
    assert fits == sorted(fits, reverse=True) and marked.quiet == [
        place for place, one in enumerate(fits) if one == "no"
    ]
    assert list(table.index)[marked.bold[0]] == "Window 128"
    assert set(budgeted(memory=4)[1]["fits"]) == {"yes"} and not budgeted(memory=4)[0].quiet
    assert budgeted(batch=16)[1].loc["SDPA", "cache"] == "4.5 GiB"


def test_times_are_of_the_records_at_their_lengths_and_elsewhere_a_dash():
    known = budget.known()
    time, training = f"time ÷ SDPA's, {known.where}", f"training step ÷ SDPA's, {known.steps.machine}"
    _, table, said = budgeted(share=1.0)
    decoding = growth.ratios(known.points, "decode_s_per_token", "sdpa").set_index(["label", "context"])["ratio"]
    assert table.loc["GQA 4:1", time].startswith(f"{decoding['gqa', 8192]:.2f} [")
    reading = growth.ratios(known.points, "prefill_s", "sdpa").set_index(["label", "context"])["ratio"]
    assert budgeted(share=0.0)[1].loc["MLA", time].startswith(f"{reading['mla', 8192]:.2f} [")
    pairs = [
        np.exp([growth.costs_of(known.points, metric, who).among([8192]).logs.mean() for who in ("mla", "sdpa")])
        for metric in ("prefill_s", "decode_s_per_token")
    ]
    mixed = 0.75 * pairs[0] / 8192 + 0.25 * pairs[1]  # of three tokens that are read and one that is written
    assert budget.time_ratio("mla", 8192, 0.25)[0] == pytest.approx(mixed[0] / mixed[1])
    step = known.steps.ratio("mla", 8192, "time_s_per_step").ratio
    assert table.loc["MLA", training].startswith(f"{step:.2f} [") and table.loc["SDPA"].iloc[-2] == "1.00"
    assert "writing 100% one by one" in said and known.steps.machine in said
    long = budgeted(context=65536)[1]
    assert set(long[time]) == set(long["activations ÷ SDPA's"]) == {"–"}
    assert table.loc["Window 128", "recalls"] == "0% (as Window 16)" and table.loc["SDPA", "recalls"] == "100%"
    mamba2 = known.steps.recall["mamba2"]  # of whose seeds one recalls nothing
    seeds = f"{mamba2.median:.0%} [{max(0.0, mamba2.low):.0%}, {mamba2.high:.0%}]"
    assert mamba2.low < 0.5 < mamba2.median and table.loc[mamba2.title, "recalls"] == seeds


def test_a_choice_with_options_of_its_own_has_a_row_without_records_and_a_wrong_one_is_one_sentence():
    marked, table, _ = budgeted(Choice("sliding_window", {"window": 64}))
    assert list(table.loc["Window 64"])[-4:] == ["–"] * 4 and "Window 128" in table.index
    assert [marked.table["variant"][place] for place in marked.bold] == ["Window 64"]
    with pytest.raises(UsageError, match=r"^kv_heads must divide heads"):
        budgeted(Choice("gqa", {"kv_heads": 5}))


def test_a_choice_is_called_by_its_title():
    assert [Choice(name).label for name in ("sdpa", "gqa", "sliding_window")] == ["SDPA", "GQA 4:1", "Window 128"]
    assert Choice("gqa", {"kv_heads": 2}).label == "GQA (kv_heads=2)"  # of how many heads, a model says
    assert Choice("lsh", {"n_hashes": 2}).label == "LSH (Reformer) (n_hashes=2)"
    assert Choice("nowhere.py").label == "nowhere"


def test_one_picker_stands_on_the_page_and_every_screen_says_what_it_shows():
    shared = bench.Bench("sliding_window")
    screens = [shared.budget(), shared.costs(), shared.measured()]
    assert [shared.picker in screen.children for screen in screens] == [True, False, False]
    shared.picker.variant.value = "mla"
    assert all("MLA" in screen.picked.value for screen in screens) and "MLA" in screens[1].page.value


def test_the_page_s_answer_is_the_readme_s_without_its_marks():
    said = budget.conclusion()
    page = (paths.ROOT / "README.md").read_text().replace("**", "")
    first, *sessions = said.rests_on.split(" Session ")
    assert all(sentence in page for sentence in said.answer) and first in page
    assert len(sessions) == 3 and all(f"- Session {one}\n" in page for one in sessions)
    assert "**" not in " ".join(said.answer) and "](" not in said.not_shown


def test_maps_have_one_scale():
    for name in ("sdpa", "linear"):
        tokens, found, seen = bench.attention_map(bench.small_model(Choice(name)), "one two three four", 1)
        picture = bench.draw_map(name, tokens, found, seen, 1, 0).axes[0].images[0]
        assert picture.get_clim() == (0, 1)


def test_a_pattern_stands_in_every_screen():
    one = Choice("sliding_window,linear", {"window": 9})
    assert (one.label, one.name) == ("Window 9 + Linear (elu+1)", "sliding_window+linear")
    marked, *_ = budgeted(one)
    assert one.label in set(marked.table["variant"])
    halves = [bench.by_context(Choice(name, own), bench.GPT2_SMALL) for name, own in
              (("sliding_window", {"window": 9}), ("linear", {}))]  # fmt: skip
    both = bench.by_context(one, bench.GPT2_SMALL)
    for cost in ("cache_bytes", "core_flops_per_token"):
        mine, *theirs = (
            of.loc[of["label"] == label, cost].to_numpy()
            for of, label in zip([both, *halves], [one.label, "Window 9", "Linear (elu+1)"], strict=True)
        )
        assert mine == pytest.approx((theirs[0] + theirs[1]) / 2)
    (table,) = bench.cost_table(one, bench.GPT2_SMALL, 512)
    assert one.label in table.columns
    model = bench.small_model(one)
    tokens, found, _ = bench.attention_map(model, "one two three four", 1)
    assert found.values.shape[-1] == len(tokens)
    first = next(iter(bench.measured_pages(one, Choice("sdpa"), rounds=2)))()
    assert one.label in set(first[-1]["variant"])
    picker = Picker("sdpa")
    picker.path.value = "sliding_window,linear"
    assert {option.description for option in picker.options.children} == {"window", "chunk", "heads"}
    picker.path.value = "sliding_window,linea"
    assert "Did you mean" in picker.message.value and picker.choice.attention == "sliding_window,linear"
