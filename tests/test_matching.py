"""`match`: a variant with as many weights as SDPA, or as large a cache, and a table that says what is matched."""

from types import SimpleNamespace

import pytest
import torch
from make import TINY

from lib import attention, parameters
from lib.certificate import Setting
from lib.errors import UsageError
from lib.measure import assemble
from lib.model import build_model, config_of, meta_model
from lib.model.matching import options_of_state
from lib.study import plan

SIZES = {"layers": 4, "width": 128, "heads": 8, "positions": 256}
every = pytest.mark.parametrize("name", [*attention.variants(), "linear,sdpa", "mla,gated_deltanet"])


def weights(values) -> int:
    model = meta_model(values["attention"], config_of(values, 300), **values["options"])
    return sum(weight.numel() for weight in model.parameters())


@every
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_with_match_parameters_a_model_has_sdpa_s_within_a_percent(name, architecture):
    values = SIZES | {"attention": name, "options": {}, "architecture": architecture, "match": "parameters"}
    sdpa = weights(values | {"attention": "sdpa", "match": "none"})
    assert weights(values) == pytest.approx(sdpa, rel=0.01)
    assert weights(values | {"attention": "sdpa"}) == sdpa
    config = config_of(values | {"width": 256}, 300)
    assert config.n_inner % 8 == 0  # or the kernels are slow, and so is what is matched
    assert config_of(values | {"match": "none"}, 300).n_inner is None


def test_it_is_the_model_s_own_mlp_and_goes_with_the_certificate():
    values = SIZES | {"attention": "gqa", "options": {"kv_heads": 2}, "match": "parameters"}
    model = build_model("gqa", config_of(values, 300), kv_heads=2)
    spare = 2 * 128 * 96 + 2 * 96  # weights and biases of six heads' keys and values
    wider = model.transformer.h[0].mlp.c_fc.weight.shape[1] - 512
    assert wider == 8 * round(spare / (2 * 128 + 1) / 8) == 96
    (run,) = plan.runs_of(TINY | {"match": "parameters"}, ["gqa"], 1)
    p = SimpleNamespace(**run["values"])
    assert Setting.of(p).config(50).n_inner == config_of(run["values"], 50).n_inner != None  # noqa: E711


@every
@pytest.mark.parametrize("context", [16, 64, 256])
def test_with_match_state_no_other_options_come_nearer_to_sdpa_s_cache(name, context):
    config = config_of(SIZES | {"attention": name, "options": {}}, 300)
    options = options_of_state(config, context, name, {})
    with torch.device("meta"):
        for part, (variant, own) in attention.by_part(name, options).items():
            if not hasattr(variant, "sized"):
                assert not own
                continue

            def numbers(options, variant=variant):
                layer = variant(config, 0, **options)
                return layer.cache_bytes(context, 2) / 2  # of bf16; a state is kept in fp32

            target = 2 * 128 * context
            off = abs(numbers(own) - target)
            for option, value in own.items():
                most = {"heads": 128, "kv_heads": 8}.get(option)
                others = [n for n in range(1, most + 1) if most % n == 0] if most else [value]
                if option in ("kv_lora_rank", "state"):
                    others = [value + 1, max(1, value - 1)]
                assert all(off <= abs(numbers(own | {option: other}) - target) + 256 for other in others), part


@pytest.mark.parametrize(("name", "found"), [
    ("linear", {"heads": 8}), ("gqa", {"kv_heads": 8}), ("sdpa", {}), ("linear,sdpa", {"linear": {"heads": 8}}),
])  # fmt: skip
def test_a_run_has_the_options_that_state_chooses_and_its_name_goes_by_them(name, found):
    (run,) = plan.runs_of(TINY | SIZES | {"context": 16, "match": "state", "inference_contexts": []}, [name], 1)
    assert run["values"]["options"] == found
    again = parameters.matched(run["values"])  # as the notebook does with what the plan gives it
    assert parameters.run_name(again) == parameters.run_name(run["values"])


def test_what_cannot_be_matched_is_one_sentence():
    for given, says in (
        (
            {"attention": "linear", "match": "state", "options": {"heads": 2}},
            "would choose linear's heads, and options give 2",
        ),
        ({"match": "size"}, "match must be one of none, parameters, state, not 'size'"),
        (
            {"attention": "mla", "match": "parameters", "options": {"kv_lora_rank": 4096}},
            "leaves no MLP, since mla has",
        ),
        ({"attention": "linear", "architecture": "llama", "options": {"heads": 2}}, "leave heads out"),
    ):
        entry = {"attention": given.pop("attention", "sdpa"), "options": given.pop("options", {})}
        with pytest.raises(UsageError, match=says):
            plan.runs_of(TINY | SIZES | {"context": 16, "inference_contexts": []} | given, [entry], 1)


@pytest.mark.parametrize(("name", "options", "context", "said"), [
    ("sdpa", {}, 64, "parameters, cache, FLOPs"), ("linear", {}, 64, "parameters"), ("gqa", {}, 64, "nothing"),
    ("gqa", {"kv_heads": 8}, 64, "parameters, cache, FLOPs"), ("mla", {}, 256, "parameters"),
    ("mla", {"kv_lora_rank": 248, "qk_rope_head_dim": 8}, 64, "cache"),
])  # fmt: skip
def test_the_table_says_what_is_matched(name, options, context, said):
    values = SIZES | {"attention": name, "options": options}
    model = meta_model(name, config_of(values, 300), **options)
    table = assemble.costs(model, SimpleNamespace(context=context, attention=name, label="", options=options))
    assert table.loc["matched, within 1 %", name] == said
    ratio = sum(w.numel() for w in model.parameters()) / weights(values | {"attention": "baseline", "options": {}})
    assert table.loc["parameters", "ratio"] == f"{ratio:.3f}"
    wide = meta_model(name, config_of(values | {"match": "parameters"}, 300), **options)
    own = assemble.costs(wide, SimpleNamespace(context=context, attention=name, label="", options=options))
    assert own.loc["parameters", "GPT-2's own"] == table.loc["parameters", "GPT-2's own"]


@pytest.mark.parametrize("name", ["linear", "retention", "gated_deltanet"])
def test_heads_of_its_own_are_those_of_a_model_with_as_many(name):
    config = config_of(SIZES | {"attention": name, "options": {}}, 50)
    other = config_of(SIZES | {"heads": 2}, 50)
    ids = torch.randint(0, 50, (2, 70))
    mine, theirs = build_model(name, config, heads=2).eval(), build_model(name, other).eval()
    torch.testing.assert_close(mine(ids).logits, theirs(ids).logits)
    with pytest.raises(ValueError, match="heads must divide width: 3 heads do not divide 128"):
        build_model(name, config, heads=3)


def test_a_sized_that_gives_no_options_is_one_sentence(tmp_path):
    source = attention.find("gqa").read_text()
    at = source.index("    @staticmethod\n    def sized")
    for wrong in (
        "    sized = True\n\n",
        "    @staticmethod\n    def sized(config, context, numbers):\n        return None\n\n",
    ):
        path = tmp_path / "mine.py"
        path.write_text(source[:at] + wrong + source[source.index("    def new_cache", at) :])
        with pytest.raises(UsageError, match="mine's sized must give options for"):
            plan.runs_of(TINY | SIZES | {"context": 16, "inference_contexts": [], "match": "state"}, [str(path)], 1)
