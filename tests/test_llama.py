"""Llama's layers around the same variant files: transformers' own Llama, to the digit, and every promise of GPT-2's."""

from types import SimpleNamespace

import pytest
import torch
from make import TINY
from surface import CELLS, documented, lively
from test_transformers import uninitialised_memory
from transformers import LlamaConfig, LlamaForCausalLM

from lib import attention, parameters
from lib.certificate import Setting, variant
from lib.errors import UsageError
from lib.measure import assemble, flops
from lib.model import GPT2, build_model, config_of, gpt2_config, llama_config, meta_model
from lib.model.llama import swiglu_width
from lib.study import plan

CONFIG = llama_config(layers=2, width=32, heads=4, positions=128, vocabulary=50)
IDS = torch.randint(0, 50, (2, 60), generator=torch.Generator().manual_seed(0))
every_variant = pytest.mark.parametrize("name", attention.variants())


def near(got, expected, relative):
    torch.testing.assert_close(got, expected, rtol=0, atol=relative * expected.abs().max().item())


def transformers_s(model, kv_heads: int) -> LlamaForCausalLM:
    """transformers' Llama with the weights of ours."""
    ours, config = model.transformer, model.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.n_embd, num_hidden_layers=config.n_layer,
            intermediate_size=swiglu_width(config.n_embd), num_attention_heads=config.n_head,
            num_key_value_heads=kv_heads, max_position_embeddings=config.n_positions, rms_norm_eps=1e-5,
            tie_word_embeddings=True, attn_implementation="sdpa",
        )
    )  # fmt: skip
    weights = {"model.embed_tokens.weight": ours.wte.weight, "lm_head.weight": ours.wte.weight}
    weights["model.norm.weight"] = ours.ln_f.weight
    for index, block in enumerate(ours.h):
        at, kv = f"model.layers.{index}.", kv_heads * config.n_embd // config.n_head
        for name, weight in zip("qkv", block.attn.c_attn.weight.split([config.n_embd, kv, kv], dim=1), strict=True):
            weights[f"{at}self_attn.{name}_proj.weight"] = weight.T
        weights[f"{at}self_attn.o_proj.weight"] = block.attn.c_proj.weight.T
        for name in ("gate_proj", "up_proj", "down_proj"):
            weights[f"{at}mlp.{name}.weight"] = getattr(block.mlp, name).weight
        weights[f"{at}input_layernorm.weight"] = block.ln_1.weight
        weights[f"{at}post_attention_layernorm.weight"] = block.ln_2.weight
    theirs.load_state_dict(weights)
    return theirs.to(model.dtype).eval()


@pytest.mark.parametrize(("name", "kv_heads"), [("sdpa", 4), ("gqa", 1)])
def test_it_is_transformers_llama_with_the_same_weights(name, kv_heads):
    model = lively(name, config=CONFIG)
    model.transformer.ln_f.weight.data *= torch.linspace(0.5, 2, 32)  # a norm's weights are used
    theirs = transformers_s(model, kv_heads)
    ours, expected = model(IDS), theirs(IDS)
    near(ours.logits, expected.logits, 1e-6)  # their norm computes in fp32
    new = IDS[:, :1]
    near(
        model(new, past_key_values=ours.past_key_values).logits,
        theirs(new, past_key_values=expected.past_key_values).logits,
        1e-6,
    )
    model, theirs = model.float(), theirs.float()
    near(model(IDS).logits, theirs(IDS).logits, 2e-6)


@every_variant
def test_only_the_distance_of_tokens_counts_and_it_does(name):
    model = lively(name, config=CONFIG)
    here = model(IDS).logits
    model.config.n_positions = 4096
    places = torch.arange(60)[None].expand(2, 60)
    near(model(IDS, position_ids=places + 1000).logits, here, 1e-4)  # angles of a thousand turns, in fp32
    apart = model(IDS, position_ids=2 * places, attention_mask=torch.ones(2, 60)).logits  # or they were documents
    if attention.rotates(attention.load(name)) or name == "mla":
        assert (apart - here).abs().max() > 0.05 * here.abs().max()
    else:
        assert torch.equal(apart, here)


def test_without_positions_nothing_is_turned():
    config = llama_config(2, 32, 4, 128, 50, position_embedding="none")
    model = lively("sdpa", config=config)
    places = torch.arange(60)[None].expand(2, 60)
    assert torch.equal(model(IDS, position_ids=places + 9).logits, model(IDS).logits)
    apart = model(IDS, position_ids=2 * places, attention_mask=torch.ones(2, 60)).logits
    assert torch.equal(apart, model(IDS).logits)


def test_lsh_meets_by_content_wherever_tokens_stand(monkeypatch):
    model, hashed = build_model("lsh", CONFIG).eval(), []
    kind = type(model.transformer.h[0].attn)
    right = kind.hash
    monkeypatch.setattr(kind, "hash", lambda self, qk: hashed.append(right(self, qk)) or hashed[-1])
    model(torch.full((1, 50), 7))
    assert (hashed[0] == hashed[0][..., :1]).all()


CHECKS = ("causal", "prefix_equal", "rows_independent", "reference", "cached_equal", "prefill_equal", "padding_equal",
          "weights_trained", "gradients", "gpt2_initialisation")  # fmt: skip


@pytest.mark.parametrize("name", [*attention.variants(), "sliding_window,linear"])
def test_every_variant_keeps_its_promises_in_llama_s_layers_behind_a_convolution(name):
    setting = Setting(architecture="llama", convolution=4, context=70, positions=140)
    found = variant.examined(name, {}, setting, checks=CHECKS)
    assert not [one for one in found if one.passed is False]
    assert {one.check for one in found if one.passed} >= set(CHECKS)


def test_a_reference_that_does_not_turn_is_caught(tmp_path):
    source = attention.find("sliding_window").read_text()
    right = "            q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)\n"
    assert right in source
    path = tmp_path / "mine.py"
    path.write_text(source.replace(right, "            pass\n"))
    found = variant.examined(str(path), {}, Setting(architecture="llama"), checks=("reference",))
    assert any(one.passed is False for one in found)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "GPT-2's own weights"])
def test_what_of_transformers_works_in_gpt2_s_layers_does_in_llama_s(cell):
    if documented()["sliding_window", cell] == "refused":
        with pytest.raises(ValueError):
            CELLS[cell](lively("sliding_window", config=CONFIG))
    else:
        CELLS[cell](lively("sliding_window", config=CONFIG))


def test_a_layer_has_gpt2_s_weights_within_a_percent():
    for width in (*range(32, 140, 4), 200, 512, 576, 768, 1024, 1600):
        llama, gpt2 = (meta_model("sdpa", of(1, width, 2, 16, 50)).transformer.h for of in (llama_config, gpt2_config))
        weights = [sum(weight.numel() for weight in of.parameters()) for of in (llama, gpt2)]
        assert weights[0] == pytest.approx(weights[1], rel=0.01), width
    assert swiglu_width(768) == 2048 and swiglu_width(576) == 1536


def test_it_has_no_biases_begins_as_gpt2_does_and_its_flops_are_its_weights():
    model = build_model("mla", llama_config(2, 64, 4, 128, 50))
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    for block in model.transformer.h:
        for weight in (block.mlp.gate_proj.weight, block.mlp.up_proj.weight, block.mlp.down_proj.weight):
            assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    counted = flops.analytic(build_model("sdpa", CONFIG), 10)["forward_flops_causal"]
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * swiglu_width(32)) + 50 * 32
    assert counted == 2 * 10 * matrices + 2 * 4 * 32 * 55


def test_what_it_costs_on_paper_stands_beside_llama_s_own():
    p = SimpleNamespace(context=64, attention="gqa", label="", options={})
    table = assemble.costs(build_model("gqa", CONFIG), p)
    own = sum(weight.numel() for weight in build_model("baseline", CONFIG).parameters())
    assert list(table) == ["gqa", "Llama's own", "ratio"] and table.loc["parameters", "Llama's own"] == f"{own:,}"


@pytest.mark.parametrize(
    ("profile", "label", "vocabulary", "published", "beyond"),
    [
        ("smollm_135m", "gqa", 49_152, 134_515_008, 0),
        # GaLore's head is a matrix of its own, and its SwiGLU 1,376 wide.
        ("llama_60m", "sdpa", 32_000, 58_073_600, 32_000 * 512 + 8 * 3 * 512 * (1376 - 1368)),
    ],
)
def test_the_profiles_are_the_published_models(profile, label, vocabulary, published, beyond):
    runs, _ = plan.chosen(f"params/{profile}.yaml", None, 1, check=False)
    (values,) = (run["values"] for run in runs if parameters.display_name(run["values"]) == label)
    model = meta_model(values["attention"], config_of(values, vocabulary), **values["options"])
    assert sum(weight.numel() for weight in model.parameters()) + beyond == published
    assert max(values["inference_contexts"]) + values["new_tokens"] <= values["positions"]


@pytest.mark.parametrize("name", ["sdpa", "lsh", "mla", "gated_deltanet"])
def test_a_saved_model_is_loaded_as_it_was(name, tmp_path):
    made = build_model(name, CONFIG, seed=2).eval()
    made.save_pretrained(tmp_path)
    with uninitialised_memory():
        loaded = GPT2.from_pretrained(tmp_path)
    assert loaded.config.architecture == "llama"
    torch.testing.assert_close(loaded(IDS).logits, made(IDS).logits)
    assert dict(loaded.named_parameters()).keys() == dict(made.named_parameters()).keys()


def test_runs_of_it_are_apart_from_gpt2_s_which_keep_their_names(tmp_path):
    values = {of: plan.runs_of(TINY | {"architecture": of}, ["sdpa"], 1)[0]["values"] for of in ("gpt2", "llama")}
    before = {name: value for name, value in values["gpt2"].items() if name != "architecture"}
    assert parameters.run_name(before) == parameters.run_name(values["gpt2"])
    assert len({parameters.setting(one) for one in values.values()}) == 2
    assert config_of(values["llama"], 50).architecture == "llama"
    deaf = tmp_path / "deaf.py"
    deaf.write_text(attention.find("sdpa").read_text().replace(", position_embeddings=None, **_", ", **_"))
    for wrong, says in (
        ({"architecture": "lama"}, "architecture must be one of gpt2, llama, not 'lama'"),
        ({"architecture": "llama", "attention": str(deaf)}, "deaf.py does not hear where tokens stand"),
        ({"architecture": "llama", "width": 20, "heads": 4}, "4 heads of 5 numbers must be of even width"),
    ):
        name = wrong.pop("attention", "sdpa")
        with pytest.raises(UsageError, match=says):
            plan.runs_of(TINY | wrong, [name], 1)


def test_biases_stay_away_from_a_loaded_model_whatever_a_variant_draws(tmp_path):
    source = attention.find("sdpa").read_text()
    own = source.replace("    title =", "    own_initialisation = True\n    title =").replace(
        "self.c_attn = Conv1D(3 * self.width, self.width)", "self.c_attn = nn.Linear(self.width, 3 * self.width)"
    )
    (tmp_path / "mine.py").write_text(own)
    made = build_model(str(tmp_path / "mine.py"), CONFIG).eval()
    made.save_pretrained(tmp_path / "saved")
    loaded = GPT2.from_pretrained(tmp_path / "saved", attention=str(tmp_path / "mine.py")).eval()
    assert torch.equal(loaded(IDS).logits, made(IDS).logits)
