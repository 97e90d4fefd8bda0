"""MoBA: all scores and a mask in its place, blocks chosen by a fixed rule, alone and beside padding and documents."""

import math

import pytest
import torch
from transformers.cache_utils import Cache

from lib import attention
from lib.model import gpt2_config

KINDS = [
    {"block_length": 4},
    {"block_length": 7, "top_k": 2},
    {"block_length": 16, "top_k": 1},
    {"block_length": 3, "top_k": 40},
]


def make_layer(dtype=torch.float64, width=32, heads=4, **options):
    torch.manual_seed(0)
    layer = attention.load("moba")(gpt2_config(2, width, heads, 256, 2), 0, **options).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return layer.to(dtype)


def heads_of(layer, x):
    return (part.unflatten(2, (layer.heads, -1)).transpose(1, 2) for part in layer.c_attn(x).chunk(3, dim=2))


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("length", [1, 4, 63, 64, 65, 130])
def test_output_and_gradients_are_those_of_all_scores_under_a_mask(length, options):
    layer = make_layer(**options)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)

    def outcome(output):
        return [output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])]

    for ours, theirs in zip(outcome(layer(x)[0]), outcome(layer.reference(x)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_with_as_many_blocks_as_there_are_it_is_sdpa():
    layer, x = make_layer(block_length=8, top_k=9), torch.randn(2, 70, 32, dtype=torch.float64)
    sdpa = attention.load("sdpa")(gpt2_config(2, 32, 4, 256, 2), 0).double().eval()
    sdpa.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x)[0], sdpa(x)[0])


def by_the_paper(layer, x):
    """The paper's equations 2 to 6 for each query and head by themselves, in plain loops."""
    S, k, (queries, keys, values) = layer.block_length, layer.top_k, heads_of(layer, x)
    B, H, T, D = queries.shape
    out = torch.zeros(B, H, T, D, dtype=x.dtype)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                liked = {n: (queries[b, h, t] @ keys[b, h, n * S : (n + 1) * S].mean(0)).item() for n in range(t // S)}
                best = sorted(liked, key=lambda n: (-liked[n], n))[: k - 1]
                seen = [s for s in range(t + 1) if s // S in {*best, t // S}]
                weights = (keys[b, h, seen] @ queries[b, h, t] / math.sqrt(D)).softmax(0)
                out[b, h, t] = weights @ values[b, h, seen]
    return layer.c_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_it_is_what_the_paper_s_equations_say_query_by_query(options):
    layer, x = make_layer(width=16, heads=2, **options), torch.randn(1, 50, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], by_the_paper(layer, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("blocks", [10, 15])
def test_of_blocks_that_are_alike_the_oldest_are_seen(blocks):
    """Whatever the length, in one pass and in decoding: a choice by another's order would move earlier outputs. In
    small whole numbers, of which sums and products round nothing, so that scores are equal to the last bit."""
    layer = make_layer(block_length=4, top_k=3)
    whole = torch.Generator().manual_seed(0)
    q = torch.randint(-3, 4, (1, 4, 4 * blocks, 8), generator=whole).double()
    k = torch.randint(-3, 4, (1, 4, 4, 8), generator=whole).double().repeat(1, 1, blocks, 1)
    v = torch.randn(1, 4, 4 * blocks, 8, dtype=torch.float64)
    chosen = layer._chosen(*(part.unflatten(2, (-1, 4)) for part in (q, k)))
    assert (chosen[:, :, :4] == blocks).all()
    assert (chosen[:, :, 4:8] == torch.tensor([0, blocks])).all()  # of one there is no second
    assert (chosen[:, :, 8:] == torch.tensor([0, 1])).all()
    seen = [0, 1, 2, 3, 4, 5, 6, 7, *range(4 * blocks - 4, 4 * blocks)]
    expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, -1:], k[:, :, seen], v[:, :, seen])
    for out in (layer._tiles(q, k, v)[:, :, -1:], layer._newest(q[:, :, -1:], k, v, torch.tensor([4 * blocks - 1]))):
        torch.testing.assert_close(out, expected)


def test_its_own_block_is_seen_however_little_it_is_liked():
    """Keys of the own block that point away from all queries still count, and those of a block not taken do not."""
    layer = make_layer(width=8, heads=1, block_length=2, top_k=2)
    q = torch.ones(1, 1, 6, 8, dtype=torch.float64)
    k = torch.tensor([0.0, 0, 1, 1, -9, -9], dtype=torch.float64)[:, None].expand(6, 8)[None, None]
    v = torch.arange(6, dtype=torch.float64)[:, None].expand(6, 8)[None, None]
    weights = torch.tensor([1.0, 1, -9, -9], dtype=torch.float64).mul(8 / math.sqrt(8)).softmax(0)
    expected = (weights * torch.tensor([2.0, 3, 4, 5]).double()).sum()
    for out in (layer._tiles(q, k, v)[:, :, 5:], layer._newest(q[:, :, 5:], k, v, torch.tensor([5]))):
        torch.testing.assert_close(out, expected.expand(1, 1, 1, 8))


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_padding_is_no_key_and_moves_no_block_in_one_pass_and_through_a_cache(options):
    layer, x = make_layer(**options), torch.randn(2, 30, 32, dtype=torch.float64)
    real = torch.ones(2, 30, dtype=torch.bool)
    real[0, [0, 1, 2, 9, 10, 17, 29]] = real[1, 25:] = False
    cache = Cache(layers=[layer.new_cache()])
    parts = [
        layer(x[:, a:b].contiguous(), past_key_values=cache, padding_mask=real[:, :b])[0]
        for a, b in [(0, 4), (4, 5), (5, 12), (12, 13), (13, 20), *((t, t + 1) for t in range(20, 30))]
    ]
    for out in (layer(x, padding_mask=real)[0], torch.cat(parts, dim=1)):
        assert torch.isfinite(out).all()
        for row in range(2):
            alone = layer(x[row : row + 1, real[row]])[0]
            torch.testing.assert_close(out[row, real[row]], alone[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_documents_beside_padding_are_as_if_alone(options):
    """Each begins with a block of its own, and documents' numbers may come in any order."""
    layer, x = make_layer(**options), torch.randn(2, 45, 32, dtype=torch.float64)
    lengths = torch.tensor([[20, 1, 9, 15], [3, 30, 8, 4]])
    seq_idx = torch.stack([torch.repeat_interleave(torch.tensor([7, 2, 9, 3]), row) for row in lengths])
    real = torch.ones(2, 45, dtype=torch.bool)
    real[0, [0, 5, 10, 11, 15]] = real[1, 40:43] = False
    for given in (torch.ones_like(real), real):
        out = layer(x, seq_idx=seq_idx, padding_mask=None if given.all() else given)[0]
        for row in range(2):
            for document in (7, 2, 9, 3):
                own = (seq_idx[row] == document) & given[row]
                alone = layer(x[row : row + 1, own])[0][0]
                torch.testing.assert_close(out[row, own], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("volume", [0.0, 1.0, 1e3])
def test_outputs_and_gradients_are_finite_whatever_the_input(volume, dtype):
    layer = make_layer(dtype)
    x = (volume * torch.randn(1, 300, 32)).to(dtype).requires_grad_()
    out = layer(x)[0]
    gradients = torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])
    assert all(torch.isfinite(found).all() for found in (out, *gradients))


def test_flops_by_hand():
    """Of 10 tokens in blocks of 4 with two seen: own 10 + 10 + 3 pairs, past 4 x 4 + 2 x 4; blocks scored 4 + 2 x 2."""
    C = 32
    assert make_layer(block_length=4, top_k=2).core_flops(10) == 4 * C * (23 + 24) + 2 * C * 8 + C * 10
    assert make_layer(block_length=4, top_k=2).core_flops(10, dense=True) == 4 * C * 100 + 2 * C * 8 + C * 10
    assert make_layer(block_length=4, top_k=1).core_flops(10) == 4 * C * 23
    assert make_layer().cache_bytes(50, 2) == 2 * C * 50 * 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"block_length": 0}, "block_length must be a whole number of keys"),
        ({"block_length": 8.0}, "block_length must"),
        ({"top_k": 0}, "top_k must be a whole number of blocks, at least 1"),
        ({"top_k": None}, "top_k must be"),
    ],
)  # fmt: skip
def test_a_bad_option_is_said_in_one_sentence(options, says):
    with pytest.raises(ValueError, match=says) as error:
        make_layer(**options)
    assert "\n" not in str(error.value)


def test_it_is_called_by_what_it_sees():
    assert make_layer(block_length=16, top_k=2).title == "MoBA, 2 blocks of 16"
