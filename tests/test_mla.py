"""Multi-head latent attention against transformers' DeepSeek-V2, its options, its cache, and faults planted in it."""

import pytest
import torch
from make import fails
from test_attention import Shapes, decode, lively_model, tiny_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV2Config
from transformers.cache_utils import Cache
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding

from lib import attention, certificate
from lib.measure import flops, inference
from lib.model import build_model, gpt2_config, meta_model

KNOBS = [
    {},
    {"q_lora_rank": 12},
    {"kv_lora_rank": 1},
    {"kv_lora_rank": 100, "qk_rope_head_dim": 16},
    {"qk_rope_head_dim": 0},
]


def make_layer(width=32, **options):
    torch.manual_seed(0)
    layer = attention.load("mla")(gpt2_config(2, width, 4, 256, 2), 0, **options).double().eval()
    for key, parameter in layer.named_parameters():
        nn.init.normal_(parameter, float(key.endswith("norm.weight")), 0.3)
    return layer


class DeepSeek(nn.Module):
    """transformers' attention of DeepSeek-V2, eager, with a layer's weights."""

    def __init__(self, layer):
        super().__init__()
        D = layer.head_width
        config = DeepseekV2Config(
            hidden_size=layer.width, num_attention_heads=layer.heads, num_key_value_heads=layer.heads,
            kv_lora_rank=layer.kv_lora_rank, q_lora_rank=layer.q_lora_rank, qk_nope_head_dim=D, v_head_dim=D,
            qk_rope_head_dim=layer.qk_rope_head_dim, attention_bias=False, max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )  # fmt: skip
        config._attn_implementation = "eager"
        self.attention = DeepseekV2Attention(config, 0)
        self.rotary = DeepseekV2RotaryEmbedding(config)
        own = dict(layer.state_dict())
        own["o_proj.weight"] = own.pop("c_proj.weight").T
        self.bias = own.pop("c_proj.bias")
        self.attention.load_state_dict(own)
        self.attention.to(layer.c_proj.weight.dtype)

    def forward(self, x):
        T = x.shape[1]
        future = torch.full((T, T), -torch.inf, dtype=x.dtype).triu(1)[None, None]
        turns = self.rotary(x, torch.arange(T)[None])
        return self.attention(x, attention_mask=future, position_embeddings=turns)[0] + self.bias


@pytest.mark.parametrize("options", [{}, {"q_lora_rank": 12}, {"kv_lora_rank": 100, "qk_rope_head_dim": 16}])
@pytest.mark.parametrize("length", [1, 2, 33])
def test_it_is_deepseek_v2_s_in_output_and_gradients(options, length):
    layer = make_layer(**options)
    theirs = DeepSeek(layer)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, length, 32, dtype=torch.float64)
    ours, others = layer(x)[0], theirs(x)
    names, others_names = dict(layer.named_parameters()), dict(theirs.attention.named_parameters())
    del names["c_proj.bias"]
    expected = torch.autograd.grad((others * weight).sum(), [x, *others_names.values()])
    expected = dict(zip(["x", *others_names], expected, strict=True)) | {"output": others}
    expected["c_proj.weight"] = expected.pop("o_proj.weight").T  # Conv1D keeps the transpose
    got = torch.autograd.grad((ours * weight).sum(), [x, *names.values()])
    got = dict(zip(["x", *names], got, strict=True)) | {"output": ours}
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert (got[key] - value).abs().max() <= 1e-6 * value.abs().max() + 1e-12, key


@pytest.mark.parametrize("options", KNOBS[1:])  # the defaults: test_certificate.py
def test_every_option_passes_the_certificate(options):
    certified = certificate.certify("mla", options)
    assert certified["passed"] and certified["reference_difference"] < 1e-12, certified


@pytest.mark.parametrize("options", KNOBS)
def test_every_option_gives_the_reference_s_gradients(options):
    layer = make_layer(**options)
    x = torch.randn(2, 19, 32, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(layer(x)[0].square().sum(), wanted),
        torch.autograd.grad(layer.reference(x).square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank must be a whole number from 1 up, not 0; leave it out for 4 D = 32"),
        ({"kv_lora_rank": 2.5}, "kv_lora_rank must be"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim must be 0 or an even whole number, not 3"),
        ({"qk_rope_head_dim": -2}, "qk_rope_head_dim must be"),
        ({"q_lora_rank": 0}, "q_lora_rank must be a whole number from 1 up, not 0; None goes without"),
    ],
)
def test_a_bad_option_is_said_in_one_sentence(options, said):
    with pytest.raises(ValueError) as error:
        make_layer(**options)
    assert said in str(error.value)


def test_the_defaults_are_the_design_s():
    layer = meta_model("mla", gpt2_config(12, 768, 12, 1024, 50257)).transformer.h[0].attn
    assert (layer.kv_lora_rank, layer.qk_rope_head_dim, layer.q_lora_rank) == (256, 32, None)
    assert 12 * layer.cache_bytes(1, 2) == 6912


@pytest.mark.parametrize("options", KNOBS)
def test_the_cache_holds_the_latent_and_the_rotary_key_and_nothing_else(options):
    layer = make_layer(**options)
    cache = Cache(layers=[layer.new_cache()])
    x = torch.randn(3, 9, 32, dtype=torch.float64)
    for piece in x.split([5, 1, 3], dim=1):
        layer(piece, past_key_values=cache)
    tensors = [value for value in vars(cache.layers[0]).values() if isinstance(value, torch.Tensor)]
    assert sum(t.numel() * t.element_size() for t in tensors) == 3 * layer.cache_bytes(9, 8)
    latent = cache.layers[0].keys / layer.kv_a_layernorm.weight
    size = latent.square().mean(-1)  # below 1 by the epsilon alone
    assert ((size > 0.9) & (size <= 1)).all() or layer.kv_lora_rank == 1


def test_the_cache_of_a_bf16_run_is_bf16():
    model = build_model("mla", tiny_config())
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    (row,) = inference.measured(model, [8], new_tokens=3, repeats=1, autocast=autocast)
    assert row["cache_bytes"] == row["cache_bytes_analytic"] == 2 * (32 + 4) * 11 * 2


def test_decoding_rebuilds_no_key_and_no_value():
    layer = make_layer(width=48)  # D 12, L 48, R 6
    cache = Cache(layers=[layer.new_cache()])
    x = torch.randn(1, 30, 48, dtype=torch.float64)
    layer(x[:, :29], past_key_values=cache)
    with Shapes() as shapes:
        layer(x[:, 29:], past_key_values=cache)
    cached = {shape for shape in shapes.seen if 30 in shape}
    assert all({48, 6} & set(shape) or shape == (1, 4, 30) for shape in cached), cached
    assert not any(len(shape) > 2 and {12, 18, 24} & set(shape) for shape in cached), cached


def test_a_rotary_score_depends_on_the_distance_alone():
    """Left padding moves no position, so the shared keys of a padded row are the unpadded row's own."""
    layer = make_layer()
    x = torch.randn(1, 12, 32, dtype=torch.float64)
    padded = torch.cat([torch.randn(1, 4, 32, dtype=torch.float64), x], dim=1)
    keys = []
    for rows, mask in ((x, None), (padded, (torch.arange(16) >= 4)[None])):
        cache = Cache(layers=[layer.new_cache()])
        layer(rows, past_key_values=cache, padding_mask=mask)
        keys.append(cache.layers[0].values[:, -12:])
    assert torch.equal(*keys)


@pytest.mark.parametrize("pieces", [[16], [1] * 16, [3, 1, 7, 5]])
def test_padding_is_honoured_in_any_pieces(pieces):
    layer, pad = make_layer(), 4
    x = torch.randn(1, 12, 32, dtype=torch.float64)
    padded = torch.cat([torch.randn(1, pad, 32, dtype=torch.float64), x], dim=1)
    mask, cache = (torch.arange(16) >= pad)[None], Cache(layers=[layer.new_cache()])
    parts, seen = [], 0
    for piece in padded.split(pieces, dim=1):
        seen += piece.shape[1]
        parts.append(layer(piece, past_key_values=cache, padding_mask=mask[:, :seen])[0])
    out = torch.cat(parts, dim=1)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, pad:], layer(x)[0], rtol=1e-9, atol=1e-9)


def test_without_rotation_the_order_of_earlier_tokens_is_not_seen():
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    swapped = x[:, [1, 0, *range(2, 9)]]
    for rope, same in ((0, True), (4, False)):
        layer = make_layer(qk_rope_head_dim=rope)
        assert torch.allclose(layer(x)[0][:, 2:], layer(swapped)[0][:, 2:]) == same


def test_beam_search_is_the_uncached_one():
    model, ids = lively_model("mla"), torch.randint(1, 50, (2, 5))
    options = {"num_beams": 3, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_a_prompt_fed_by_generate_in_chunks_decodes_the_same():
    model, ids = lively_model("mla"), torch.randint(1, 50, (2, 11))
    tokens, _ = decode(model, ids, max_new_tokens=8, prefill_chunk_size=4)
    assert torch.equal(tokens, decode(model, ids, max_new_tokens=8)[0])


def test_useful_flops_are_the_kernel_s_without_its_padding():
    layer, x = make_layer().float(), torch.randn(1, 33, 32)
    with FlopCounterMode(display=False, custom_mapping={flops.CPU_FLASH: flops._fused_attention_flops}) as counter:
        layer(x)
    matrices = sum(p.numel() for p in layer.parameters() if p.dim() >= 2)
    padding = 2 * layer.heads * layer.qk_rope_head_dim * 33**2
    assert counter.get_total_flops() - padding == 2 * matrices * 33 + layer.core_flops(33, dense=True)
    assert layer.core_flops(33) * 33 * 2 == layer.core_flops(33, dense=True) * 34


@pytest.mark.parametrize("options", KNOBS)
def test_memory_stays_linear_in_training_and_in_a_long_prefill(options):
    layer, x = make_layer(**options).float(), torch.randn(1, 61, 32, requires_grad=True)
    with Shapes() as shapes:
        layer.train()(x)[0].sum().backward()
        layer.eval()(x, past_key_values=Cache(layers=[layer.new_cache()]))
    assert not any(shape[-2:] == (61, 61) for shape in shapes.seen)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_norm_runs_in_float32_under_autocast_and_in_bf16_weights(autocast):
    norm = make_layer().kv_a_layernorm.to(torch.float32 if autocast else torch.bfloat16)
    x = (1e3 * torch.randn(4, 32)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = norm(x)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, exact.bfloat16(), rtol=2**-7, atol=0)  # one rounding, at most one step apart
    assert (got == exact.bfloat16()).float().mean() > 0.98


FAULTS = {  # what is planted: the right code, the wrong one, the check that is about it
    "latent not normalised": ("latent = self.kv_a_layernorm(latent)", "pass", "reference_difference"),
    "halves rotated, not neighbours": ("(x.shape[3] // 2, 2)).unbind(4)", "(2, x.shape[3] // 2)).unbind(3)", None),
    "rotation backwards in the query": ("_rotate(q[..., D:], cos, sin)", "_rotate(q[..., D:], cos, -sin)", None),
    "rotary key not rotated": ("_rotate(shared_key.unsqueeze(2), cos, sin).squeeze(2)", "shared_key", None),
    "positions start anew in decoding": ("torch.arange(past, past + T,", "torch.arange(0, T,", "cached_equal"),
    "another theta": ("speeds = THETA **", "speeds = 500.0 **", "reference_difference"),
    "scale of the no-rope width": ("S > 1 and mask is None,", "S > 1 and mask is None, scale=D**-0.5,", None),
    "scale of decoding": ("(q * q.shape[-1] ** -0.5)", "(q * D**-0.5)", "cached_equal"),
    "keys and values swapped": ("k, v = self.kv_b_proj", "v, k = self.kv_b_proj", "reference_difference"),
    "absorbed matrices swapped": ("w_uk, w_uv = self", "w_uv, w_uk = self", "cached_equal"),
    "rotary score left out in decoding": (" + q_rope @ shared_key.transpose(1, 2)", "", "cached_equal"),
    "no causality": ("is_causal=S > 1 and mask is None", "is_causal=False", "causal"),
    "positions from the end": ("angles = (position_ids", "angles = (-position_ids", None),
    "absolute length in the scale": ("S > 1 and mask is None,", "S > 1 and mask is None, scale=1 / S,", "prefix_equal"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, tmp_path):
    right, wrong, check = FAULTS[fault]
    source = attention.find("mla").read_text()
    assert right in source
    (tmp_path / "planted.py").write_text(source.replace(right, wrong))
    assert fails(tmp_path / "planted.py", {}, "reference" if check in (None, "reference_difference") else check)
