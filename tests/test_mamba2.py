"""Mamba-2: transformers' mixer with its weights, with a convolution and without, whatever the chunk and the step."""

import types

import pytest
import torch
from transformers import Mamba2Config
from transformers.cache_utils import Cache
from transformers.models.mamba2 import modeling_mamba2

from lib import attention
from lib.model import gpt2_config

KINDS = [{"state": 8}, {"state": 8, "conv": 0}]


def make_layer(dtype=torch.float64, width=32, heads=4, **options):
    torch.manual_seed(0)
    layer = attention.load("mamba2")(gpt2_config(2, width, heads, 256, 2), 0, **options).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return layer.to(dtype)


def mixer(layer, monkeypatch):
    """transformers' with our weights, one group, as wide inside as outside; what it computes in float32 in float64."""
    monkeypatch.setattr(modeling_mamba2, "torch", types.SimpleNamespace(**vars(torch) | {"float32": torch.float64}))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    C, H, N, D = layer.width, layer.heads, layer.state, layer.head_width
    config = Mamba2Config(
        hidden_size=C, expand=1, num_heads=H, head_dim=D, state_size=N, n_groups=1, chunk_size=16, num_hidden_layers=1,
        layer_norm_epsilon=1e-5, conv_kernel=layer.conv or 4,
    )  # fmt: skip
    theirs = modeling_mamba2.Mamba2Mixer(config, 0).double().eval()
    with torch.no_grad():
        for projection in (layer.c_attn, layer.c_rates, layer.c_proj):
            torch.nn.init.zeros_(projection.bias)
        mixed, z = layer.c_attn.weight.T.split([C + 2 * N, C])
        theirs.in_proj.weight.copy_(torch.cat([z, mixed, layer.c_rates.weight.T]))
        theirs.out_proj.weight.copy_(layer.c_proj.weight.T)
        if layer.conv:
            theirs.conv1d.weight.copy_(layer.taps.view(layer.conv, -1).T[:, None])
            theirs.conv1d.bias.copy_(layer.taps_bias)
        else:
            theirs.conv1d.weight.zero_()[:, :, -1] = 1.0
            theirs.conv1d.bias.zero_()
        ours = (layer.A, layer.dt, layer.skip, layer.norm)
        for mine, its in zip(ours, (theirs.A_log, theirs.dt_bias, theirs.D, theirs.norm.weight), strict=True):
            its.copy_(mine)
    return theirs


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 200])
def test_it_is_transformers_mixer_with_the_same_weights(length, options, monkeypatch):
    """To 1e-9 of the largest, outputs and gradients: both compute in float64 throughout."""
    layer = make_layer(**options)
    theirs = mixer(layer, monkeypatch)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, length, 32, dtype=torch.float64)
    out, expected = layer(x)[0], theirs(x)
    mine = [x, layer.A, layer.dt, layer.skip, layer.norm, *([layer.taps, layer.taps_bias] if layer.conv else [])]
    its = [x, theirs.A_log, theirs.dt_bias, theirs.D, theirs.norm.weight]
    its += [theirs.conv1d.weight, theirs.conv1d.bias] if layer.conv else []
    got = torch.autograd.grad((out * weight).sum(), [*mine, layer.c_attn.weight])
    wanted = list(torch.autograd.grad((expected * weight).sum(), [*its, theirs.in_proj.weight]))
    z, mixed, _ = wanted.pop().split([32, 48, 4])
    wanted.append(torch.cat([mixed, z]).T)
    if layer.conv:
        wanted[5] = wanted[5][:, 0].T.flatten()
    for ours, theirs_ in zip([out, *got], [expected, *wanted], strict=True):
        torch.testing.assert_close(ours, theirs_, rtol=0, atol=1e-9 * theirs_.abs().max().item())


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
def test_outputs_and_gradients_are_finite_at_every_step(rates, volume, options, dtype):
    """No step at all, usual ones and such that all decays at once; inputs of zero, usual and long ones."""
    layer = make_layer(dtype, **options)
    with torch.no_grad():
        layer.c_rates.bias.fill_(rates)
        layer.A.fill_(3.0)
    x = (volume * torch.randn(1, 300, 32)).to(dtype).requires_grad_()
    out = layer(x)[0]
    gradients = torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])
    assert all(torch.isfinite(found).all() for found in (out, *gradients))


@pytest.mark.parametrize("chunk", [2, 64])
def test_what_is_written_is_halved_by_the_token_and_read_by_what_all_heads_share(chunk):
    layer = make_layer(width=16, heads=2, state=3, chunk=chunk)
    one = torch.eye(3, dtype=torch.float64)
    k, v = torch.zeros(1, 5, 3).double(), torch.zeros(1, 5, 2, 8).double()
    k[0, 0], v[0, 0] = one[1], torch.randn(2, 8, dtype=torch.float64)
    g = torch.log(torch.tensor([0.5, 0.25], dtype=torch.float64)).expand(1, 5, 2)
    y, state = layer._chunked(one[[1, 1, 0, 1, 1]][None], k, v, g, torch.zeros(1, 3, 16).double())
    kept = torch.tensor([0.5, 0.25], dtype=torch.float64) ** torch.arange(5)[:, None]
    kept[2] = 0.0  # which asks for what was never written
    torch.testing.assert_close(y[0], kept[..., None] * v[0, 0])
    torch.testing.assert_close(state[0, 1], (kept[4, :, None] * v[0, 0]).flatten())
    assert not state[0, [0, 2]].any()


@pytest.mark.parametrize("options", [*KINDS, {"state": 8, "chunk": 3}], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_padding_is_no_token_in_one_pass_and_through_a_cache(rows, options):
    """It writes nothing, nothing decays meanwhile, and the convolution goes on behind it as if it were not there."""
    layer, x = make_layer(**options), torch.randn(rows, 20, 32, dtype=torch.float64)
    real = torch.ones(rows, 20, dtype=torch.bool)
    real[0, [0, 1, 2, 9, 10, 17]] = False
    cache = Cache(layers=[layer.new_cache()])
    parts = [
        layer(x[:, a:b].contiguous(), past_key_values=cache, padding_mask=real[:, :b])[0]
        for a, b in [(0, 4), (4, 5), (5, 12), (12, 13), (13, 18), (18, 19), (19, 20)]
    ]
    for out in (layer(x, padding_mask=real)[0], torch.cat(parts, dim=1)):
        for row in range(rows):
            alone = layer(x[row : row + 1, real[row]])[0]
            torch.testing.assert_close(out[row, real[row]], alone[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [5, 64])
def test_documents_beside_padding_are_as_if_alone(chunk):
    """Neither the state nor the convolution crosses a border, and documents' numbers may come in any order."""
    layer, x = make_layer(state=8, chunk=chunk), torch.randn(1, 24, 32, dtype=torch.float64)
    seq_idx = torch.repeat_interleave(torch.tensor([[7, 2, 9, 3]]), torch.tensor([6, 1, 8, 9]), dim=1)
    real = torch.ones(1, 24, dtype=torch.bool)
    real[0, [0, 5, 10, 11, 15]] = False
    for given in (torch.ones_like(real), real):
        out = layer(x, seq_idx=seq_idx, padding_mask=None if given.all() else given)[0]
        for document in (7, 2, 9, 3):
            own = (seq_idx == document)[0] & given[0]
            torch.testing.assert_close(out[:, own], layer(x[:, own])[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_cache_is_the_state_and_the_convolution_s_inputs_and_does_not_grow(options, dtype):
    layer = make_layer(dtype, **options)
    cache = Cache(layers=[layer.new_cache()])
    for length in (200, 1, 30):
        layer(torch.randn(1, length, 32, dtype=dtype), past_key_values=cache)
        held = sum(x.untyped_storage().nbytes() for x in (cache.layers[0].state, cache.layers[0].inputs))
        numbers = 8 * 32 + (3 * (32 + 2 * 8) if layer.conv else 0)
        assert held == layer.cache_bytes(length, dtype.itemsize) == numbers * max(dtype.itemsize, 4)
    assert cache.get_seq_length() == 231


def test_flops_by_hand():
    C, N, K, c = 32, 8, 4, 64
    per_token = 2 * N * C + 2 * N * C + N * C + 2 * K * (C + 2 * N)
    assert make_layer(state=N).core_flops(100) == 100 * per_token
    assert make_layer(state=N).core_flops(100, dense=True) == 128 * (per_token + 2 * c * N + 2 * c * C)
    assert make_layer(state=N, conv=0).core_flops(1) == 5 * N * C


def test_it_begins_as_its_authors_do():
    """Steps of a thousandth to a tenth, half-lives by the head; taps as PyTorch's convolutions; half of the input."""
    torch.manual_seed(0)
    layer = attention.load("mamba2")(gpt2_config(2, 256, 64, 64, 2), 0)
    step = torch.nn.functional.softplus(layer.dt)
    assert 1e-3 <= step.min() < 2e-3 and 5e-2 < step.max() <= 1e-1
    assert 1 <= layer.A.exp().min() < 2 and 14 < layer.A.exp().max() <= 16
    assert 0.49 < layer.taps.max() <= 0.5 and -0.5 <= layer.taps.min() < -0.49
    assert (layer.skip == 1).all() and not layer.taps_bias.any()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"chunk": 0}, "chunk must be a whole number"), ({"state": 0.5}, "state must be a whole number"),
        ({"conv": 1}, "conv must be a whole number of tokens, at least 2"), ({"conv": None}, "conv must be"),
        ({"conv": -4}, "conv must be"),
    ],
)  # fmt: skip
def test_a_bad_option_is_said_in_one_sentence(options, says):
    with pytest.raises(ValueError, match=says) as error:
        make_layer(**options)
    assert "\n" not in str(error.value)
