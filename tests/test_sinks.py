"""Sinks: transformers' gpt-oss layer with its weights, at every edge of the window, and what a sink is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import Shapes, tiny_config
from transformers import GptOssConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

from lib import attention
from lib.model import build_model, gpt2_config


def make_layer(window, dtype=torch.float64, width=32):
    torch.manual_seed(0)
    layer = attention.load("sinks")(gpt2_config(2, width, 4, 256, 2), 0, window=window).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    layer.sinks.data.mul_(5)
    return layer.to(dtype)


def gpt_oss(layer):
    """transformers' layer with our weights, and the mask that its model gives it for a length."""
    C, H, D = layer.width, layer.heads, layer.head_width
    kind = "sliding_attention" if layer.window else "full_attention"
    config = GptOssConfig(
        hidden_size=C, num_attention_heads=H, num_key_value_heads=H, head_dim=D, sliding_window=layer.window or None,
        layer_types=[kind], num_hidden_layers=1,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = GptOssAttention(config, 0).double()
    with torch.no_grad():
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            part = slice(index * C, (index + 1) * C)
            getattr(theirs, name).weight.copy_(layer.c_attn.weight.T[part])
            getattr(theirs, name).bias.copy_(layer.c_attn.bias[part])
        theirs.o_proj.weight.copy_(layer.c_proj.weight.T)
        theirs.o_proj.bias.copy_(layer.c_proj.bias)
        theirs.sinks.copy_(layer.sinks)

    def forward(x):
        B, T, _ = x.shape
        masks = create_sliding_window_causal_mask if layer.window else create_causal_mask
        mask = masks(config, x, torch.ones(B, T), None, torch.arange(T)[None])
        cos, sin = torch.ones(B, T, D // 2, dtype=x.dtype), torch.zeros(B, T, D // 2, dtype=x.dtype)  # no rotation
        return theirs(x, (cos, sin), mask)[0]

    return theirs, forward


@pytest.mark.parametrize("window", [0, 2, 7, 64])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_it_is_transformers_gpt_oss_with_the_same_weights(length, window):
    """Output and gradients to 1e-9: both compute in float64 throughout."""
    layer = make_layer(window)
    theirs, forward = gpt_oss(layer)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, length, 32, dtype=torch.float64)
    mine = [layer(x)[0], layer.reference(x)]
    expected = forward(x)
    wanted = torch.autograd.grad((expected * weight).sum(), [x, theirs.sinks, theirs.o_proj.weight])
    for out in mine:
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        got = torch.autograd.grad((out * weight).sum(), [x, layer.sinks, layer.c_proj.weight])
        for ours, its in zip(got, (*wanted[:2], wanted[2].T), strict=True):
            torch.testing.assert_close(ours, its, rtol=1e-9, atol=1e-9)


@given(window=st.sampled_from([0, *range(2, 20)]), pieces=st.lists(st.integers(1, 15), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_pieces_through_the_cache_are_one_pass_whatever_the_window(window, pieces):
    layer, x = make_layer(window), torch.randn(2, sum(pieces), 32, dtype=torch.float64)
    cache = Cache(layers=[layer.new_cache()])
    parts = [layer(piece.contiguous(), past_key_values=cache)[0] for piece in x.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x)[0], rtol=1e-9, atol=1e-9)
    held = cache.layers[0].keys  # of tokens alone: the sink is nowhere in it
    assert held.numel() * 2 * 8 == 2 * layer.cache_bytes(x.shape[1], 8) and cache.get_seq_length() == x.shape[1]


@pytest.mark.parametrize("window", [0, 3, 8])
def test_left_padding_changes_nothing_whatever_the_window(window):
    model = build_model("sinks", tiny_config(), seed=1, window=window).double().eval()
    for name, parameter in model.named_parameters():
        parameter.data.add_(name.endswith("sinks"))
    short, long = torch.randint(1, 50, (1, 15)), torch.randint(1, 50, (1, 26))
    padded = torch.cat([torch.cat([torch.zeros(1, 11, dtype=torch.long), short], dim=1), long])
    mask = torch.ones_like(padded)
    mask[0, :11] = 0
    together = model.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    for row, alone in ((0, short), (1, long)):
        expected = model.generate(alone, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert torch.equal(together[row, -12:], expected[0, -12:])
    out = model(padded, attention_mask=mask).logits[0, 11:]
    torch.testing.assert_close(out, model(short).logits[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [0, 8])
def test_no_t_by_t_tensor_in_training(window):
    model = build_model("sinks", tiny_config(), seed=1, window=window).train()
    with Shapes() as shapes:
        model(torch.zeros(2, 61, dtype=torch.long), labels=torch.zeros(2, 61, dtype=torch.long)).loss.backward()
    assert not [shape for shape in shapes.seen if sum(61 <= side <= 64 for side in shape) > 1]


@pytest.mark.parametrize("window", [0, 8])
def test_a_sink_of_no_weight_is_a_plain_softmax_and_one_of_all_weight_leaves_nothing(window):
    layer, x = make_layer(window), torch.randn(2, 40, 32, dtype=torch.float64)
    plain = attention.load("sliding_window")(gpt2_config(2, 32, 4, 256, 2), 0, window=window or 40).double()
    plain.load_state_dict({name: weight for name, weight in layer.state_dict().items() if name != "sinks"})
    layer.sinks.data.fill_(-1e4)
    torch.testing.assert_close(layer(x)[0], plain(x)[0], rtol=1e-9, atol=1e-9)
    layer.sinks.data.fill_(1e4)
    torch.testing.assert_close(layer(x)[0], layer.c_proj.bias.expand_as(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [0, 8])
def test_bf16_does_not_round_the_logit(window):
    """Queries of zero: each weight is 1 / (n + e^b), and b √D = 31.06 rounded to bf16 would be 31: 2.1 % of e^b."""
    layer = make_layer(window, torch.bfloat16)
    logit = torch.full((4,), 31.06) / 8**0.5
    layer.sinks = torch.nn.Parameter(logit)  # in fp32, as under autocast
    q, k, v = torch.zeros(1, 4, 40, 8), torch.randn(1, 4, 40, 8), torch.ones(1, 4, 40, 8)
    form = layer._blocks if window else layer._whole
    out = form(*(x.bfloat16() for x in (q, k, v))).float()
    seen = torch.arange(1.0, 41).clamp(max=window or 40)
    expected = (seen / (seen + logit[0].exp()))[:, None].expand(1, 4, 40, 8)
    assert (out / expected - 1).abs().max() < 0.008  # weights and output are rounded to 8 bits each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 8, 128])
@pytest.mark.parametrize("volume", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("logit", [-1e4, 0.0, 1e4])
def test_outputs_and_gradients_are_finite_whatever_the_input_and_the_logit(logit, volume, window, dtype):
    layer = make_layer(window, dtype)
    layer.sinks.data.fill_(logit)
    x = (volume * torch.randn(1, 300, 32)).to(dtype).requires_grad_()
    out = layer(x)[0]
    gradients = torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])
    assert all(torch.isfinite(found).all() for found in (out, *gradients))


def test_useful_flops_count_the_keys_that_are_seen_and_the_cache_the_window():
    few, every = make_layer(8), make_layer(0)
    assert few.core_flops(20) == 4 * 32 * sum(min(t + 1, 8) for t in range(20))
    assert every.core_flops(20) == 4 * 32 * 210 and every.core_flops(20, dense=True) == 4 * 32 * 400
    assert few.cache_bytes(20, 2) == 2 * 32 * 7 * 2 and every.cache_bytes(20, 2) == 2 * 32 * 20 * 2


@pytest.mark.parametrize("window", [-1, 2.0, None])
def test_a_bad_window_is_said_in_one_sentence(window):
    with pytest.raises(ValueError, match="window must be a whole number of keys") as error:
        make_layer(window)
    assert "\n" not in str(error.value)


def test_it_is_called_by_its_window():
    assert [make_layer(window).title for window in (0, 128)] == ["Sinks (gpt-oss)", "Sinks (gpt-oss), window 128"]
