"""Several variants over one model's layers: what holds of each holds of the pattern, and it stands where one may."""

import contextlib
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from make import TINY
from surface import CELLS, close, documented, lively, outcome
from transformers.cache_utils import DynamicLayer

from lib import attention, certificate, parameters
from lib.certificate import Setting, variant
from lib.errors import UsageError
from lib.measure import flops, kernels, phases
from lib.model import GPT2, build_model, gpt2_config
from lib.model.arguments import Unsupported
from lib.study import plan, probes, scaling

CONFIG = gpt2_config(layers=2, width=32, heads=4, positions=128, vocabulary=50)
OTHERS = [name for name in attention.variants() if name not in attention.STUDY_ORDER]
EVERY_TWO = [*itertools.combinations(attention.STUDY_ORDER, 2), *((name, "sdpa") for name in OTHERS)]
PAIRS = [pair[:: 1 if place % 2 else -1] for place, pair in enumerate(EVERY_TWO)]  # in either order
PATTERN = "sliding_window,linear"  # of two kinds of cache


@pytest.mark.parametrize(
    ("given", "parts", "label"),
    [
        ("sdpa", ["sdpa"], "sdpa"),
        ("sdpa,sdpa", ["sdpa"], "sdpa"),
        ("linear, sdpa", ["linear", "sdpa"], "linear+sdpa"),
        ("linear,sdpa,linear,sdpa", ["linear", "sdpa"], "linear+sdpa"),
        ("linear,linear,linear,sdpa", ["linear"] * 3 + ["sdpa"], "3xlinear+sdpa"),
        ("sdpa,my/mine.py,my/mine.py", ["sdpa"] + ["my/mine.py"] * 2, "sdpa+2xmine"),
    ],
)
def test_a_pattern_is_its_layers_until_it_repeats(given, parts, label):
    assert (list(attention.parts(given)), attention.label(given)) == (parts, label)


def test_a_pattern_of_one_name_is_that_variant_bit_for_bit():
    ids = torch.arange(40)[None]
    one, two = (build_model(name, CONFIG, seed=3)(ids).logits for name in ("gqa", "gqa,gqa"))
    assert torch.equal(one, two)
    mixed, plain = (build_model(name, CONFIG, seed=3).double()(ids).logits for name in ("sdpa,baseline", "sdpa"))
    close(mixed, plain)


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_two_of_all_are_causal_and_decode_as_one_pass_padded_and_saved_or_not(names, tmp_path):
    model = lively(",".join(names), config=CONFIG)
    kinds = [type(attention.load(name)(CONFIG, 0).new_cache()) for name in names]
    assert [type(layer) for layer in model.new_cache().layers] == kinds
    ids = torch.randint(0, 50, (3, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        close(model(ids[:, :37], use_cache=False).logits, whole[:, :37])
        cache, pieces = model.new_cache(), []
        for piece in (ids[:, :20], *ids[:, 20:].split(1, dim=1)):
            pieces.append(model(piece, past_key_values=cache, use_cache=True).logits)
        close(torch.cat(pieces, dim=1), whole)
        padded = torch.cat([torch.zeros(3, 9, dtype=torch.long), ids[:, :30]], dim=1)
        mask = torch.arange(39)[None].expand(3, 39) >= 9
        close(model(padded, attention_mask=mask.long()).logits[:, 9:], whole[:, :30])
        model.save_pretrained(tmp_path)
        loaded = GPT2.from_pretrained(tmp_path, dtype=torch.float64)
        close(loaded(ids, use_cache=False).logits, whole)


@pytest.mark.parametrize("cell", CELLS)
def test_what_each_part_honours_the_pattern_honours_and_nothing_else(cell):
    said = {documented()[name, cell] for name in attention.parts(PATTERN)}
    assert outcome(PATTERN, cell) == ("yes" if said == {"yes"} else "refused")


def test_options_go_to_who_has_them_or_to_one_by_its_name():
    pattern = attention.load("sliding_window,gqa,linear,gated_deltanet")
    given = {"window": 9, "kv_heads": 2, "linear": {"chunk": 5}, "gated_deltanet": {"chunk": 7}}
    assert pattern.options_of(given) == {
        "sliding_window": {"window": 9}, "gqa": {"kv_heads": 2}, "linear": {"chunk": 5}, "gated_deltanet": {"chunk": 7}
    }  # fmt: skip
    assert {"window", "kv_heads", "gate", "beta_max", "kernels"} == set(attention.defaults(pattern))


WRONG = {
    "an empty name": ("linear,,sdpa", {}, "has an empty name beside a comma; join names by single commas"),
    "an unknown name": ("linear,sdqa", {}, "there is no attention variant 'sdqa'.*Did you mean 'sdpa'?"),
    "more names than layers": ("linear,gqa,sdpa", {}, "names 3 layers and the model has 2; set layers to a multiple"),
    "an option of two": ("linear,gated_deltanet", {"chunk": 3}, "have an option 'chunk' each; say whose it is"),
    "an option of none": ("linear,sliding_window", {"windw": 3}, "none of .* has .* 'windw'; did you mean 'window'?"),
    "options of another": ("linear,sdpa", {"gqa": {"kv_heads": 1}}, "options of 'gqa', which is not among linear"),
    "one's unknown option": ("linear,sdpa", {"linear": {"chunks": 1}}, "linear has no option 'chunks'; did you mean"),
    "a wrong type": ("linear,sdpa", {"linear": {"chunk": "x"}}, "linear's option chunk must be int, not 'x'"),
    "two of one name": ("a/mine.py,b/mine.py", {}, "goes by its files' names"),
    "too deep": ("linear,sdpa", {"linear": {"chunk": {"a": 1}}}, "must be a number, text, true, false, or a list"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_patterns_are_one_sentence_before_anything_runs(wrong):
    name, options, says = WRONG[wrong]
    run = {"attention": name, "options": options, "label": "mine"}
    with pytest.raises(UsageError, match=says) as error:
        plan.runs_of(TINY | {"layers": 2}, [run], 1)
    assert "\n" not in str(error.value)


def test_a_run_of_a_pattern_has_a_name_and_a_place_in_a_plan(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(attention.find("sdpa").read_text())
    names = ["sdpa", PATTERN, f"linear,{path}", "sdpa,sdpa,linear,linear"]
    runs = plan.runs_of(TINY | {"layers": 4}, names, 1)
    found = {parameters.display_name(run["values"]): run["values"] for run in runs}
    assert sorted(found) == ["2xsdpa+2xlinear", "linear+mine", "sdpa", "sliding_window+linear"]
    assert all(parameters.run_name(one).startswith(parameters.file_name(label)) for label, one in found.items())
    with pytest.raises(UsageError, match="'sdpa'"):  # no pattern passes for a variant
        plan.runs_of(TINY | {"layers": 4}, [{"attention": PATTERN, "label": "sdpa"}], 1)


def test_a_pattern_s_fingerprint_is_of_all_its_files(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(attention.find("sdpa").read_text())
    before = attention.source_sha256(f"linear,{path}")
    assert before != attention.source_sha256(f"{path},linear")
    path.write_text(path.read_text() + "\n")
    assert attention.source_sha256(f"linear,{path}") != before


def test_the_certificate_is_the_whole_pattern_s(tmp_path):
    said = certificate.certify(PATTERN, {"window": 40})
    assert said["passed"] and said["receptive_field"] == 40 and said["flops_growth"] == pytest.approx(1, abs=0.1)
    asked = {one["what"] for one in said["measures"] if one["check"] == "core_flops"}
    for names in (("linear: ", "sliding_window: "), ("layer 0: ", "layer 1: ")):
        assert all(sum(one.startswith(name) for one in asked) >= 1 for name in names)
    source = attention.find("baseline").read_text()
    for mixed in ("linear,sdpa", "gated_deltanet,gqa"):  # states in fp32, keys in bf16
        found = variant.examined(mixed, {}, Setting(precision="bf16"), checks=("cache_bytes",))
        assert all(one.passed for one in found if one.check == "cache_bytes")
    assert ".tril(S - T)" in source
    path = tmp_path / "leaks.py"
    path.write_text(source.replace(".tril(S - T)", ".tril(S - T + 1)"))
    found = variant.examined(f"linear,{path}", {}, Setting(), checks=("causal",))
    assert any(one.passed is False for one in found)


def test_counts_are_sums_over_the_layers():
    pattern, linear, window = (build_model(name, CONFIG) for name in (PATTERN, "linear", "sliding_window"))
    for of in (
        lambda model: flops.analytic(model, 100)["forward_flops_causal"],
        lambda model: sum(block.attn.cache_bytes(100, 2) for block in model.transformer.h),
        lambda model: sum(weight.numel() for weight in model.parameters()),
    ):
        assert of(pattern) == pytest.approx((of(linear) + of(window)) / 2)
    assert isinstance(window.new_cache().layers[0], DynamicLayer)


def test_kernels_are_those_of_each_variant():
    def ran(name):
        return set(kernels.names(build_model(name, CONFIG), 64, contextlib.nullcontext)["forward"])

    mla, linear, both = map(ran, ("mla", "linear", "mla,linear"))
    assert {name for name in mla & both if "scaled_dot_product" in name} and both & (linear - mla)


def test_probes_call_a_pattern_as_runs_do_and_a_repetition_by_its_depth():
    made = {"variants": ["linear,linear,linear,sdpa", "sdpa,sdpa"], "tasks": ["recall"], "rates": [1e-3]}
    cells = probes.cells(probes.Plan(**made, seeds=1, seeds_at_best=1, steps=2, processes=1))
    assert [(cell.label, len(cell.pattern)) for cell in cells] == [("3xlinear+sdpa", 4), ("sdpa+sdpa", 2)]
    assert cells[0].title == "3 × Linear (elu+1) + SDPA"


def test_a_pattern_is_saved_by_name_and_a_file_of_it_is_only_run_where_it_is_named_again(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(attention.find("sdpa").read_text())
    name = f"linear,{path}"
    build_model(name, CONFIG, seed=1).save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["attention"] == name
    with pytest.raises(Unsupported, match="pass attention=<that file>"):
        GPT2.from_pretrained(tmp_path / "model")
    assert isinstance(GPT2.from_pretrained(tmp_path / "model", attention=name), GPT2)


def test_the_slope_takes_whole_repetitions():
    assert phases.counts_of(12, 1) == [0, 3, 6, 9, 12]
    assert phases.counts_of(4, 1) == [0, 1, 2, 3, 4]
    assert phases.counts_of(12, 4) == [0, 4, 8, 12]
    assert phases.counts_of(6, 4) == [0, 4, 6]
    assert phases.counts_of(24, 2) == [0, 6, 12, 18, 24]


def counted(ran, name, forward):
    def counting(*given, **named):
        ran.append(name)
        return forward(*given, **named)

    return counting


def test_one_layer_s_cost_of_a_pattern_is_the_mean_of_its_layers(monkeypatch):
    setting = scaling.Setting.model_construct(
        layers=2, width=32, heads=4, vocabulary=50, precision="fp32", repeats=2, energy_window_s=0.0
    )
    entry, ran = SimpleNamespace(attention=PATTERN, options={}), []
    for name in attention.parts(PATTERN):
        kind = attention.load(name)
        monkeypatch.setattr(kind, "forward", counted(ran, name, kind.forward))
    found, _ = scaling._layer(setting, entry, 64, torch.device("cpu"))
    assert ran == ["sliding_window", "linear"] * 4 and len(found["forward_backward_s"]) == 2


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("retention", {"chunks": 1}, "retention has no option 'chunks'; did you mean 'chunk'?"),
        ("sdpa", {"window": 1}, "sdpa has no option 'window'; it has: none."),
        ("retention,kda", {"kda": {"foo": 1}}, "kda has no option 'foo'; it has: chunk, heads, kernels."),
        ("retention,kda", {"retentoin": {"chunk": 8}}, "options of 'retentoin', which is not among retention, kda; did "
         "you mean 'retention'?"),
        ("retention,kda", {"kda": {"chunk": 3}}, "kda: chunk must be a power of two"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_one_sentence_from_python_too(name, options, says):
    with pytest.raises(ValueError) as error:
        build_model(name, gpt2_config(2, 16, 2, 32, 9), **options)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_an_option_given_twice_is_refused_whatever_the_order():
    pattern = attention.load("linear,sdpa")
    for given in ({"linear": {"chunk": 32}, "chunk": 16}, {"chunk": 16, "linear": {"chunk": 32}}):
        with pytest.raises(ValueError, match=r"linear's chunk is given twice, as (32|16) and as (32|16); give it once"):
            pattern.options_of(given)
