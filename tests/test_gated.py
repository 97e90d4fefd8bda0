"""Gated attention: transformers' Qwen3-Next attention with its weights, and what a gate does."""

import pytest
import torch
from transformers import Qwen3NextConfig
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention

from lib import attention
from lib.model import gpt2_config


def make_layer(dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = attention.load("gated")(gpt2_config(2, 32, 4, 256, 2), 0, **options).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    return layer.to(dtype)


def qwen3_next(layer, implementation):
    """transformers' layer with our weights, without a rotation."""
    C, H, D = layer.width, layer.heads, layer.head_width
    config = Qwen3NextConfig(
        hidden_size=C, num_attention_heads=H, num_key_value_heads=H, head_dim=D, attention_bias=True, rms_norm_eps=1e-6,
        num_hidden_layers=1, layer_types=["full_attention"],
    )  # fmt: skip
    config._attn_implementation = implementation
    theirs = Qwen3NextAttention(config, 0).double()
    with torch.no_grad():
        for ours, its in ((layer.c_attn.weight.T, "weight"), (layer.c_attn.bias, "bias")):
            q, k, v, z = ours.unflatten(0, (4, H, D))  # theirs: each head's query beside its gate
            getattr(theirs.q_proj, its).copy_(torch.stack([q, z], dim=1).flatten(0, 2))
            getattr(theirs.k_proj, its).copy_(k.flatten(0, 1))
            getattr(theirs.v_proj, its).copy_(v.flatten(0, 1))
        theirs.o_proj.weight.copy_(layer.c_proj.weight.T)
        theirs.o_proj.bias.copy_(layer.c_proj.bias)
        if layer.qk_norm:  # theirs is 1 at weight 0
            theirs.q_norm.weight.copy_(layer.q_norm - 1)
            theirs.k_norm.weight.copy_(layer.k_norm - 1)
        else:
            theirs.q_norm = theirs.k_norm = torch.nn.Identity()

    def forward(x):
        B, T, _ = x.shape
        mask = create_causal_mask(config, x, torch.ones(B, T), None, torch.arange(T)[None])
        cos, sin = torch.ones(B, T, D, dtype=x.dtype), torch.zeros(B, T, D, dtype=x.dtype)
        return theirs(x, (cos, sin), mask)[0]

    return theirs, forward


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_it_is_transformers_qwen3_next_with_the_same_weights(length, qk_norm, implementation):
    """To 1e-9 of the largest in float64, or 1e-5: their norm and eager softmax are in float32, whatever comes."""
    layer = make_layer(qk_norm=qk_norm)
    theirs, forward = qwen3_next(layer, implementation)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, length, 32, dtype=torch.float64)
    out, expected = layer(x)[0], forward(x)
    got = torch.autograd.grad((out * weight).sum(), [x, layer.c_attn.weight])
    wanted = torch.autograd.grad((expected * weight).sum(), [x, theirs.q_proj.weight, theirs.v_proj.weight])
    q, _, v, z = got[1].T.unflatten(0, (4, 4, 8))
    mine = [out, got[0], torch.stack([q, z], dim=1).flatten(0, 2), v.flatten(0, 1)]
    for ours, its in zip(mine, [expected, *wanted], strict=True):
        within = (1e-5 if qk_norm or implementation == "eager" else 1e-9) * its.abs().max().item()
        torch.testing.assert_close(ours, its, rtol=0, atol=within)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("length", [1, 65])
def test_both_forms_are_one_with_gradients_by_every_weight(length, qk_norm):
    layer = make_layer(qk_norm=qk_norm)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)

    def outcome(output):
        return [output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])]

    for ours, theirs in zip(outcome(layer(x)[0]), outcome(layer.reference(x)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gate", [-1e4, 0.0, 1e4])
def test_a_gate_that_is_shut_leaves_nothing_and_one_that_is_open_is_sdpa(gate):
    layer, x = make_layer(), torch.randn(2, 40, 32, dtype=torch.float64)
    plain = attention.load("sdpa")(gpt2_config(2, 32, 4, 256, 2), 0).double()
    with torch.no_grad():
        layer.c_attn.weight[:, 96:] = 0.0
        layer.c_attn.bias[96:] = gate
        plain.c_attn.weight.copy_(layer.c_attn.weight[:, :96])
        plain.c_attn.bias.copy_(layer.c_attn.bias[:96])
        plain.c_proj.load_state_dict(layer.c_proj.state_dict())
    share = {-1e4: 0.0, 0.0: 0.5, 1e4: 1.0}[gate]
    bias = layer.c_proj.bias
    torch.testing.assert_close(layer(x)[0] - bias, share * (plain(x)[0] - bias), rtol=1e-9, atol=1e-9)


def test_normed_queries_and_keys_make_no_score_larger_than_their_scales():
    layer = make_layer(qk_norm=True)
    torch.nn.init.ones_(layer.q_norm)
    torch.nn.init.ones_(layer.k_norm)
    x = torch.randn(1, 30, 32, dtype=torch.float64)
    torch.nn.init.zeros_(layer.c_attn.bias)
    with torch.no_grad():
        louder = layer.c_attn.weight.clone()
        louder[:, :64] *= 100
        before = layer(x)[0]
        layer.c_attn.weight.copy_(louder)
    torch.testing.assert_close(layer(x)[0], before, rtol=0, atol=1e-4)  # the norm's epsilon is all that it changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("volume", [0.0, 1.0, 1e3])
def test_outputs_and_gradients_are_finite_whatever_the_input(volume, qk_norm, dtype):
    layer = make_layer(dtype, qk_norm=qk_norm)
    x = (volume * torch.randn(1, 300, 32)).to(dtype).requires_grad_()
    out = layer(x)[0]
    gradients = torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])
    assert all(torch.isfinite(found).all() for found in (out, *gradients))


def test_flops_and_cache_are_sdpa_s():
    ours, theirs = make_layer(), attention.load("sdpa")(gpt2_config(2, 32, 4, 256, 2), 0)
    for context in (1, 20, 200):
        assert ours.core_flops(context) == theirs.core_flops(context) == 4 * 32 * context * (context + 1) // 2
        assert ours.cache_bytes(context, 2) == theirs.cache_bytes(context, 2) == 2 * 32 * context * 2


def test_a_bad_option_is_said_in_one_sentence_and_it_is_called_by_what_it_does():
    with pytest.raises(ValueError, match=r"^qk_norm must be true .* or false, not 1$"):
        make_layer(qk_norm=1)
    assert [make_layer(qk_norm=on).title for on in (False, True)] == ["Gated SDPA", "Gated SDPA, QK norm"]
