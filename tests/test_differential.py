"""Differential attention: transformers' DiffLlama layer with its weights, and noise that cancels."""

import math

import pytest
import torch
from transformers import DiffLlamaConfig
from transformers.masking_utils import create_causal_mask
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention

from lib import attention
from lib.model import gpt2_config


def make_layer(dtype=torch.float64, index=0, heads=4):
    torch.manual_seed(0)
    layer = attention.load("differential")(gpt2_config(4, 32, heads, 256, 2), index).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    return layer.to(dtype)


def diff_llama(layer):
    """transformers' layer with our weights, without a rotation, by PyTorch's kernel: its eager form is in float32."""
    C, H, D = layer.width, layer.heads, layer.head_width
    config = DiffLlamaConfig(
        hidden_size=C, num_attention_heads=H, num_key_value_heads=H, head_dim=D, attention_bias=True, rms_norm_eps=1e-5,
        num_hidden_layers=4,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    theirs = DiffLlamaAttention(config, layer.layer_idx).double()
    with torch.no_grad():
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            part = slice(index * C, (index + 1) * C)
            getattr(theirs, name).weight.copy_(layer.c_attn.weight.T[part])
            getattr(theirs, name).bias.copy_(layer.c_attn.bias[part])
        theirs.o_proj.weight.copy_(layer.c_proj.weight.T)
        theirs.o_proj.bias.copy_(layer.c_proj.bias)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            getattr(theirs, name).copy_(getattr(layer, name))

    def forward(x):
        B, T, _ = x.shape
        mask = create_causal_mask(config, x, torch.ones(B, T), None, torch.arange(T)[None])
        cos, sin = torch.ones(B, T, D, dtype=x.dtype), torch.zeros(B, T, D, dtype=x.dtype)
        return theirs(x, (cos, sin), mask)[0]

    return theirs, forward


@pytest.mark.parametrize("index", [0, 3])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_it_is_transformers_diff_llama_with_the_same_weights(length, index):
    """λ's two exponents are made in float32 there: to 1e-4 of the largest; where both are 0, so e⁰, to 1e-9, and the
    gradients by λ's vectors, which come back through float32, to 1e-6."""
    layer = make_layer(index=index)
    if index == 0:
        torch.nn.init.zeros_(layer.lambda_q1)
        torch.nn.init.zeros_(layer.lambda_k2)
    theirs, forward = diff_llama(layer)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, length, 32, dtype=torch.float64)
    out, expected = layer(x)[0], forward(x)
    got = torch.autograd.grad((out * weight).sum(), [x, layer.lambda_q1, layer.lambda_k2, layer.c_attn.weight])
    wanted = torch.autograd.grad(
        (expected * weight).sum(), [x, theirs.lambda_q1, theirs.lambda_k2, theirs.v_proj.weight]
    )
    for ours, its in zip([out, *got[:3], got[3].T[64:]], [expected, *wanted], strict=True):
        within = 1e-4 if index else 1e-9 if its.dim() > 1 else 1e-6
        torch.testing.assert_close(ours, its, rtol=0, atol=within * its.abs().max().item())


@pytest.mark.parametrize("heads", [2, 4, 32])
@pytest.mark.parametrize("length", [1, 65])
def test_both_forms_are_one_with_gradients_by_every_weight(length, heads):
    layer = make_layer(index=1, heads=heads)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)

    def outcome(output):
        return [output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])]

    for ours, theirs in zip(outcome(layer(x)[0]), outcome(layer.reference(x)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_what_both_softmaxes_look_at_cancels():
    """With λ = 1 and the second of each pair like the first, nothing is left of any value."""
    layer, x = make_layer(), torch.randn(2, 40, 32, dtype=torch.float64)
    with torch.no_grad():
        for matrix in (layer.c_attn.weight, layer.c_attn.bias[None]):
            for begin in (0, 32):  # queries, keys: heads 0 and 1 are paired with 2 and 3
                matrix[:, begin + 16 : begin + 32] = matrix[:, begin : begin + 16]
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            torch.nn.init.zeros_(getattr(layer, name))
        layer.lambda_q1[0], layer.lambda_k1[0] = 1.0, math.log(2 - 0.2)  # e^{log 1.8} - 1 + 0.2
        torch.testing.assert_close(layer(x)[0], layer.c_proj.bias.expand_as(x), rtol=0, atol=1e-9)


def test_lambda_begins_near_its_layer_s_own():
    for index, expected in ((0, 0.2), (1, 0.8 - 0.6 * math.exp(-0.3)), (11, 0.8 - 0.6 * math.exp(-3.3))):
        layer = attention.load("differential")(gpt2_config(12, 768, 12, 256, 2), index)
        assert layer.lambda_init == pytest.approx(expected) and abs(layer._lambda().item() - expected) < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("volume", [0.0, 1.0, 1e3])
def test_outputs_and_gradients_are_finite_whatever_the_input(volume, dtype):
    layer = make_layer(dtype)
    x = (volume * torch.randn(1, 300, 32)).to(dtype).requires_grad_()
    out = layer(x)[0]
    gradients = torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])
    assert all(torch.isfinite(found).all() for found in (out, *gradients))


def test_flops_and_cache_by_hand():
    layer = make_layer()  # 4 heads of 8, each score of 8 products mixing 16 numbers
    assert layer.core_flops(20) == 210 * 4 * (2 * 8 + 2 * 16) and layer.core_flops(20, dense=True) == 400 * 4 * 48
    assert layer.cache_bytes(20, 2) == 2 * 32 * 20 * 2


def test_heads_without_a_partner_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"^heads go in pairs, so their number must be even, not 1$"):
        make_layer(heads=1)
