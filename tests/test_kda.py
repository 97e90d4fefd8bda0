"""KDA: transformers' Kimi Linear layer with its weights, whatever the chunk, finite where a naive form is not."""

import types

import pytest
import torch
from transformers import KimiLinearConfig
from transformers.cache_utils import Cache
from transformers.models.kimi_linear import modeling_kimi_linear

from lib import attention
from lib.model import gpt2_config


def make_layer(dtype=torch.float64, width=32, heads=4, **options):
    torch.manual_seed(0)
    layer = attention.load("kda")(gpt2_config(2, width, heads, 256, 2), 0, **options).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return layer.to(dtype)


def kimi(layer, monkeypatch):
    """transformers' layer with our weights, without its convolution and the activation behind it, which ours lacks;
    what it computes in float32 in float64."""
    in_64 = types.SimpleNamespace(**vars(torch) | {"float32": torch.float64})
    monkeypatch.setattr(modeling_kimi_linear, "torch", in_64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    H, D = layer.heads, layer.head_width
    config = KimiLinearConfig(
        hidden_size=layer.width, linear_num_heads=H, linear_head_dim=D, linear_conv_kernel_dim=4, num_hidden_layers=1,
        layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = modeling_kimi_linear.KimiLinearDeltaAttention(config, 0).double().eval()
    theirs.activation = None
    with torch.no_grad():
        for projection in (layer.c_attn, layer.c_down, layer.c_decay, layer.c_gate, layer.c_proj):
            torch.nn.init.zeros_(projection.bias)
        theirs.conv1d.weight.zero_()[:, :, -1] = 1.0
        for mine, its in pairs(layer, theirs).values():
            its.copy_(mine)
    return theirs


def pairs(layer, theirs):
    """Their weights, and what of ours stands there."""
    qkv, down = layer.c_attn.weight.T.chunk(3), layer.c_down.weight.T.split([8, 8, 4])
    forget = theirs.forget_gate
    return {
        "q": (qkv[0], theirs.q_proj.weight), "k": (qkv[1], theirs.k_proj.weight), "v": (qkv[2], theirs.v_proj.weight),
        "decay, down": (down[0], forget.f_a_proj.weight), "decay": (layer.c_decay.weight.T, forget.f_b_proj.weight),
        "gate, down": (down[1], theirs.g_a_proj.weight), "gate": (layer.c_gate.weight.T, theirs.g_b_proj.weight),
        "beta": (down[2], theirs.b_proj.weight), "out": (layer.c_proj.weight.T, theirs.o_proj.weight),
        "dt": (layer.dt, forget.dt_bias), "A": (layer.A[None, None, :, None], forget.A_log),
        "norm": (layer.norm, theirs.o_norm.weight),
    }  # fmt: skip


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 200])
def test_it_is_transformers_kimi_linear_with_the_same_weights(length, monkeypatch):
    """To 1e-9 of the largest, outputs and the gradients of all weights: both compute in float64 throughout."""
    layer = make_layer()
    theirs = kimi(layer, monkeypatch)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, length, 32, dtype=torch.float64)
    out, expected = layer(x)[0], theirs(x)
    (mine,) = torch.autograd.grad((out * weight).sum(), x, retain_graph=True)
    (its,) = torch.autograd.grad((expected * weight).sum(), x, retain_graph=True)
    both = [(out, expected), (mine, its)]
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for parameter in (*layer.parameters(), *theirs.parameters()):
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    both += pairs(layer, theirs).values()  # now of gradients
    for ours, wanted in both:
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-9 * wanted.abs().max().item())


@pytest.mark.parametrize("chunk", [1, 2, 16, 64])
@pytest.mark.parametrize("length", [1, 7, 64, 130])
def test_the_chunk_changes_neither_output_nor_gradients(chunk, length):
    layer = make_layer(chunk=chunk)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)

    def outcome(output):
        return [output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])]

    for ours, theirs in zip(outcome(layer(x)[0]), outcome(layer.reference(x)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decays", [0.0, 1e-3, 1.0, 30.0, 1e4])
def test_pairs_are_what_a_sum_over_channels_and_all_decays_between_says(decays):
    """Strong decay and none side by side in a chunk: exponents of ± thousands in a form that divides."""
    torch.manual_seed(0)
    layer, c, D = make_layer(chunk=16), 16, 8
    k, g = torch.randn(1, 1, 1, c, D).double(), -decays * torch.rand(1, 1, 1, c, D).double()
    g[..., ::3, :] *= 1e-3
    readers = torch.randn(2, 1, 1, 1, c, D).double()
    found, since, until = layer._pairs(readers, k, g)
    for i in range(c):
        torch.testing.assert_close(since[0, 0, 0, i], g[0, 0, 0, : i + 1].sum(0))
        torch.testing.assert_close(until[0, 0, 0, i], g[0, 0, 0, i + 1 :].sum(0))
        for j in range(c):
            expected = (readers[:, 0, 0, 0, i] * k[0, 0, 0, j] * g[0, 0, 0, j + 1 : i + 1].sum(0).exp()).sum(-1)
            torch.testing.assert_close(found[:, 0, 0, 0, i, j], expected if j <= i else torch.zeros_like(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rates", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("volume", [0.0, 1.0, 1e3])
def test_outputs_and_gradients_are_finite_at_every_rate(rates, volume, dtype):
    """Rates of writing of 0, half and all, no decay and all at once, keys of zero and long rows."""
    layer = make_layer(dtype)
    with torch.no_grad():
        layer.c_down.bias.fill_(rates)
        layer.dt.fill_(rates)
        layer.A.fill_(3.0)
    x = (volume * torch.randn(1, 300, 32)).to(dtype).requires_grad_()
    out = layer(x)[0]
    gradients = torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])
    assert all(torch.isfinite(found).all() for found in (out, *gradients))


@pytest.mark.parametrize("chunk", [2, 16])
def test_each_channel_of_a_key_decays_at_its_own_rate(chunk):
    """Written under two channels at once, a value fades as each of them does, and is found by either alone."""
    layer = make_layer(width=8, heads=1, chunk=chunk)
    eye, value = torch.eye(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    k, v = torch.zeros(2, 1, 1, 4, 8, dtype=torch.float64)
    k[..., 0, :], v[..., 0, :] = eye[0] + eye[1], value
    g = torch.log(torch.tensor([0.5, 0.1] + [1.0] * 6, dtype=torch.float64)).expand(1, 1, 4, 8)
    q = torch.stack([eye[0], eye[0], eye[1], eye[0] + eye[1]])[None, None]
    out, _ = layer._chunked(q, k, v, torch.ones(1, 1, 4).double(), g, torch.zeros(1, 1, 8, 8).double())
    torch.testing.assert_close(out[0, 0], value * torch.tensor([1, 0.5, 0.01, 0.126]).double()[:, None])


def test_with_one_rate_for_all_channels_it_is_gated_deltanet():
    delta = attention.load("gated_deltanet")(gpt2_config(2, 32, 4, 256, 2), 0).double()
    layer = make_layer()
    q, k, v = (torch.nn.functional.normalize(torch.randn(2, 4, 50, 8).double(), dim=-1) for _ in range(3))
    beta, g, state = torch.rand(2, 4, 50).double(), -torch.rand(2, 4, 50).double(), torch.randn(2, 4, 8, 8).double()
    mine = layer._chunked(q, k, v, beta, g[..., None].expand_as(k), state)
    for ours, theirs in zip(mine, delta._chunked(q, k, v, beta, g, state), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("chunk", [4, 16])
def test_padding_is_no_token_in_one_pass_and_through_a_cache(chunk):
    layer, x = make_layer(chunk=chunk), torch.randn(2, 20, 32, dtype=torch.float64)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, [0, 1, 2, 9, 10, 17]] = False
    cache = Cache(layers=[layer.new_cache()])
    parts = [
        layer(x[:, a:b].contiguous(), past_key_values=cache, padding_mask=real[:, :b])[0]
        for a, b in [(0, 4), (4, 5), (5, 12), (12, 13), (13, 20)]
    ]
    for out in (layer(x, padding_mask=real)[0], torch.cat(parts, dim=1)):
        for row in range(2):
            alone = layer(x[row : row + 1, real[row]])[0]
            torch.testing.assert_close(out[row, real[row]], alone[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_cache_is_the_state_alone_and_does_not_grow(dtype):
    layer = make_layer(dtype)
    cache = Cache(layers=[layer.new_cache()])
    for length in (200, 1, 30):
        layer(torch.randn(1, length, 32, dtype=dtype), past_key_values=cache)
        held = cache.layers[0].state.untyped_storage().nbytes()
        assert held == layer.cache_bytes(length, dtype.itemsize) == 4 * 8 * 8 * max(dtype.itemsize, 4)
    assert cache.get_seq_length() == 231


def test_flops_by_hand():
    layer, D, c = make_layer(), 8, 16
    assert layer.core_flops(100) == 100 * 4 * (3 * 2 * D * D + D * D)
    assert layer.core_flops(100, dense=True) == 112 * 4 * (7 * D * D + c * D + c * D + 2 * c * D + 2 * c * D)


@pytest.mark.parametrize("chunk", [0, 12, 16.0, None])
def test_a_bad_chunk_is_said_in_one_sentence(chunk):
    with pytest.raises(ValueError, match="it must be a power of two") as error:
        make_layer(chunk=chunk)
    assert "\n" not in str(error.value)
