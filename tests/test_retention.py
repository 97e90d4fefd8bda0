"""Retention: transformers' MiniMax layer with its weights, whatever the chunk, and a decay that can be told by hand."""

import pytest
import torch
from transformers import MiniMaxConfig
from transformers.cache_utils import Cache
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from lib import attention
from lib.model import gpt2_config


def make_layer(dtype=torch.float64, width=32, heads=4, **options):
    torch.manual_seed(0)
    layer = attention.load("retention")(gpt2_config(2, width, heads, 256, 2), 0, **options).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return layer.to(dtype)


class ByHead(torch.nn.Module):
    """RetNet's norm in the place of MiniMax', which is over all heads at once."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach().clone())

    def forward(self, x):
        heads = x.unflatten(-1, (-1, len(self.weight)))
        return torch.nn.functional.rms_norm(heads, self.weight.shape, self.weight, 1e-6).flatten(-2)


def minimax(layer):
    """transformers' layer with our weights: without its activation, and with our decay and norm.

    It gates by a sigmoid and we by x times that, so its gate is shut to 1/2, ours to silu(1) by a bias, and its output
    matrix makes up for it.
    """
    C, H, D = layer.width, layer.heads, layer.head_width
    config = MiniMaxConfig(
        hidden_size=C, num_attention_heads=H, num_key_value_heads=H, head_dim=D, block_size=16, hidden_act="linear",
        num_hidden_layers=2, layer_types=["linear_attention"] * 2,
    )  # fmt: skip
    theirs = MiniMaxLightningAttention(config, 0).double()
    theirs.norm = ByHead(layer.norm)
    theirs.slope_rate = -torch.tensor([1 - 2.0 ** -(5 + h) for h in range(H)]).double().log()[:, None, None]
    theirs.query_decay, theirs.key_decay, theirs.diagonal_decay = theirs.decay_factors(theirs.slope_rate)
    with torch.no_grad():
        torch.nn.init.zeros_(layer.c_attn.bias)[3 * C :] = 1.0
        layer.c_attn.weight[:, 3 * C :] = 0.0
        torch.nn.init.zeros_(layer.c_proj.bias)
        q, k, v, _ = layer.c_attn.weight.T.unflatten(0, (4, H, D))  # theirs: side by side for each head
        theirs.qkv_proj.weight.copy_(torch.stack([q / D**0.5, k, v], dim=1).flatten(0, 2))
        theirs.output_gate.weight.zero_()
        theirs.out_proj.weight.copy_(layer.c_proj.weight.T * torch.nn.functional.silu(torch.ones(()).double()) * 2)
    return theirs


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 200])
def test_it_is_transformers_minimax_with_the_same_weights_and_decay(length):
    """To 1e-9 of the largest: with this norm both compute in float64 throughout."""
    layer = make_layer()
    theirs = minimax(layer)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, length, 32, dtype=torch.float64)
    out, expected = layer(x)[0], theirs(x, None, None)[0]
    got = torch.autograd.grad((out * weight).sum(), [x, layer.norm, layer.c_attn.weight])
    wanted = torch.autograd.grad((expected * weight).sum(), [x, theirs.norm.weight, theirs.qkv_proj.weight])
    q, k, v, _ = got[2].T.unflatten(0, (4, 4, 8))
    mine = [out, *got[:2], torch.stack([q * 8**0.5, k, v], dim=1).flatten(0, 2)]
    for ours, its in zip(mine, [expected, *wanted], strict=True):
        torch.testing.assert_close(ours, its, rtol=0, atol=1e-9 * its.abs().max().item())


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("length", [1, 7, 64, 130])
def test_the_chunk_changes_neither_output_nor_gradients(chunk, length):
    layer = make_layer(chunk=chunk)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)

    def outcome(output):
        return [output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])]

    for ours, theirs in zip(outcome(layer(x)[0]), outcome(layer.reference(x)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [2, 64])
def test_a_value_decays_by_a_thirty_second_in_the_first_head_and_by_half_as_much_in_each_next(chunk):
    layer = make_layer(width=24, heads=3, chunk=chunk)
    one, value = torch.eye(8, dtype=torch.float64)[0], torch.randn(8, dtype=torch.float64)
    q = one.expand(1, 3, 5, 8)
    k, v = torch.zeros(2, 1, 3, 5, 8, dtype=torch.float64)
    k[:, :, 0], v[:, :, 0] = one, value
    out, state = layer._chunked(q, k, v, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    kept = torch.tensor([31 / 32, 63 / 64, 127 / 128], dtype=torch.float64)[:, None] ** torch.arange(5)
    torch.testing.assert_close(out[0], kept[..., None] * value)
    torch.testing.assert_close(state[0, :, 0], kept[:, 4:] * value)  # and nothing more for what fills a chunk up


@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("rows", [1, 2])
def test_nothing_decays_where_there_is_padding_in_one_pass_and_through_a_cache(rows, chunk):
    layer, x = make_layer(chunk=chunk), torch.randn(rows, 20, 32, dtype=torch.float64)
    real = torch.ones(rows, 20, dtype=torch.bool)
    real[0, [0, 1, 2, 9, 10, 17]] = False
    cache = Cache(layers=[layer.new_cache()])
    parts = [
        layer(x[:, a:b].contiguous(), past_key_values=cache, padding_mask=real[:, :b])[0]
        for a, b in [(0, 4), (4, 5), (5, 12), (12, 13), (13, 20)]
    ]
    for out in (layer(x, padding_mask=real)[0], torch.cat(parts, dim=1)):
        for row in range(rows):
            alone = layer(x[row : row + 1, real[row]])[0]
            torch.testing.assert_close(out[row, real[row]], alone[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("volume", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("length", [1, 2000])
def test_outputs_and_gradients_are_finite_whatever_the_input(length, volume, dtype):
    layer = make_layer(dtype)
    x = (volume * torch.randn(1, length, 32)).to(dtype).requires_grad_()
    out = layer(x)[0]
    gradients = torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])
    assert all(torch.isfinite(found).all() for found in (out, *gradients))


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
    layer, D = make_layer(), 8
    assert layer.core_flops(100) == 100 * 4 * (2 * D * D + 2 * D * D + D * D)
    assert layer.core_flops(100, dense=True) == 128 * 4 * (5 * D * D + 2 * 64 * D + 2 * 64 * D)


@pytest.mark.parametrize("chunk", [0, 64.0, None])
def test_a_bad_chunk_is_said_in_one_sentence(chunk):
    with pytest.raises(ValueError, match="chunk must be a whole number of tokens, at least 1") as error:
        make_layer(chunk=chunk)
    assert "\n" not in str(error.value)
