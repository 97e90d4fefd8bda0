"""Gated DeltaNet: transformers' Qwen3-Next layer with its weights, whatever the chunk, finite where others are not."""

import pytest
import torch
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from lib import attention
from lib.model import gpt2_config

KINDS = [{}, {"gate": False}, {"beta_max": 2}]


def make_layer(dtype=torch.float64, width=32, heads=4, **options):
    torch.manual_seed(0)
    layer = attention.load("gated_deltanet")(gpt2_config(2, width, heads, 256, 2), 0, **options).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return layer.to(dtype)


def qwen3_next(layer):
    """transformers' layer with our weights: without its convolution and the activation behind it, which ours lacks."""
    C, H, D = layer.width, layer.heads, layer.head_width
    config = Qwen3NextConfig(
        hidden_size=C, linear_num_key_heads=H, linear_num_value_heads=H, linear_key_head_dim=D, linear_value_head_dim=D,
        linear_conv_kernel_dim=4, num_hidden_layers=1, layer_types=["linear_attention"], rms_norm_eps=1e-6,
    )  # fmt: skip
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    theirs.activation = None
    with torch.no_grad():
        theirs.conv1d.weight.zero_()[:, :, -1] = 1.0
        # Ours: (C, 4 C) with q, k, v, z side by side; theirs: the same, head by head, transposed.
        theirs.in_proj_qkvz.weight.copy_(layer.c_attn.weight.T.unflatten(0, (4, H, D)).transpose(0, 1).flatten(0, 2))
        theirs.in_proj_ba.weight.copy_(layer.c_rates.weight.T.unflatten(0, (2, H)).transpose(0, 1).flatten(0, 1))
        theirs.out_proj.weight.copy_(layer.c_proj.weight.T)
        for mine, its in ((layer.A, theirs.A_log), (layer.dt, theirs.dt_bias), (layer.norm, theirs.norm.weight)):
            its.copy_(mine)
    return theirs.double().eval()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_it_is_transformers_qwen3_next_with_the_same_weights(length):
    """To 1e-4 of the largest: their state is in float32 whatever it is given, and the norm makes small ones large."""
    layer = make_layer()
    for projection in (layer.c_attn, layer.c_rates, layer.c_proj):
        torch.nn.init.zeros_(projection.bias)
    theirs = qwen3_next(layer)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, length, 32, dtype=torch.float64)
    outcomes = []
    for out, net in ((layer(x)[0], layer), (theirs(x), theirs)):
        inner = (net.A, net.dt, net.norm) if net is layer else (net.A_log, net.dt_bias, net.norm.weight)
        outcomes.append([out, *torch.autograd.grad((out * weight).sum(), [x, *inner])])
    for mine, its in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-4 * its.abs().max().item())


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("length", [1, 7, 64, 130])
def test_the_chunk_changes_neither_output_nor_gradients(chunk, length, options):
    layer = make_layer(chunk=chunk, **options)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)

    def outcome(output):
        return [output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])]

    for ours, theirs in zip(outcome(layer(x)[0]), outcome(layer.reference(x)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("rates", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("volume", [0.0, 1.0, 1e3])
def test_outputs_and_gradients_are_finite_at_every_rate(rates, volume, options, dtype):
    """Rates of writing of 0, half and all, no decay and all at once, keys of zero and long rows."""
    layer = make_layer(dtype, **options)
    with torch.no_grad():
        layer.c_rates.bias.fill_(rates)
        layer.c_attn.bias.zero_()
    x = (volume * torch.randn(1, 300, 32)).to(dtype).requires_grad_()
    out = layer(x)[0]
    gradients = torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])
    assert all(torch.isfinite(found).all() for found in (out, *gradients))


def test_what_is_written_twice_under_a_key_is_the_last_value():
    """With β = 1, no decay and keys at right angles the state holds, for each key, what came last."""
    layer = make_layer(width=8, heads=1, gate=False)
    form, eye = layer._chunked, torch.eye(8, dtype=torch.float64)
    keys, values = eye[[0, 1, 0, 2, 0]], torch.randn(5, 8, dtype=torch.float64)
    beta, state = torch.ones(1, 1, 5, dtype=torch.float64), torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    queries = eye[[0, 0, 0, 1, 0]]
    out, _ = form(queries[None, None], keys[None, None], values[None, None], beta, torch.zeros_like(beta), state)
    torch.testing.assert_close(out[0, 0], values[[0, 0, 2, 1, 4]])


def test_what_decays_is_halved_by_the_token():
    layer = make_layer(width=8, heads=1)
    eye, value = torch.eye(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    q, k = eye[[0] * 4][None, None], eye[[0, 1, 2, 3]][None, None]
    v = torch.stack([value, *[torch.zeros_like(value)] * 3])[None, None]
    beta = torch.ones(1, 1, 4, dtype=torch.float64)
    out, _ = layer._chunked(q, k, v, beta, beta * torch.log(torch.tensor(0.5)), beta.new_zeros(1, 1, 8, 8))
    torch.testing.assert_close(out[0, 0], value * torch.tensor([1, 0.5, 0.25, 0.125])[:, None].double())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"chunk": 0}, "chunk must be a whole number"), ({"beta_max": 3}, "beta_max must be 1, or 2"),
        ({"gate": "yes"}, "gate must be true"),
    ],
)  # fmt: skip
def test_a_bad_option_is_said_in_one_sentence(options, says):
    with pytest.raises(ValueError, match=says) as error:
        make_layer(**options)
    assert "\n" not in str(error.value)


def test_it_is_called_by_what_it_does():
    titles = [make_layer(**options).title for options in KINDS]
    assert titles == ["Gated DeltaNet", "DeltaNet", "Gated DeltaNet, beta 2"]
