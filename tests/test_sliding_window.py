"""Sliding-window attention: the window of transformers' Mistral, at every edge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make import fails
from test_attention import Shapes, tiny_config
from transformers import MistralConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_sliding_window_causal_mask

from lib import attention
from lib.model import build_model, gpt2_config


def make(window, positions=256):
    torch.manual_seed(0)
    layer = attention.load("sliding_window")(gpt2_config(2, 32, 4, positions, 2), 0, window=window).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return layer


@pytest.mark.parametrize("window", [2, 7, 64])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_the_window_is_mistral_s(window, length):
    layer, x = make(window), torch.randn(2, length, 32, dtype=torch.float64)
    config = MistralConfig(hidden_size=32, sliding_window=window)
    config._attn_implementation = "eager"
    mask = create_sliding_window_causal_mask(config, x, torch.ones(2, length), None, torch.arange(length)[None])
    q, k, v = (part.view(2, length, 4, 8).transpose(1, 2) for part in layer.c_attn(x).split(32, dim=2))
    weights = (q @ k.transpose(2, 3) / 8**0.5 + mask).softmax(-1)
    expected = layer.c_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.reference(x), expected, rtol=1e-9, atol=1e-9)


@given(window=st.integers(2, 20), pieces=st.lists(st.integers(1, 15), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_pieces_through_the_cache_are_one_pass_whatever_the_window(window, pieces):
    layer, x = make(window), torch.randn(2, sum(pieces), 32, dtype=torch.float64)
    cache = Cache(layers=[layer.new_cache()])
    parts = [layer(piece.contiguous(), past_key_values=cache)[0] for piece in x.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x)[0], rtol=1e-9, atol=1e-9)
    held = cache.layers[0].keys
    assert held.shape[2] == min(window - 1, x.shape[1]) and held.untyped_storage().nbytes() == held.numel() * 8
    assert cache.get_seq_length() == x.shape[1]


@pytest.mark.parametrize("window", [3, 8])
def test_left_padding_changes_nothing_with_a_small_window(window):
    model = build_model("sliding_window", tiny_config(), seed=1, window=window).double().eval()
    short, long = torch.randint(1, 50, (1, 15)), torch.randint(1, 50, (1, 26))
    padded = torch.cat([torch.cat([torch.zeros(1, 11, dtype=torch.long), short], dim=1), long])
    mask = torch.ones_like(padded)
    mask[0, :11] = 0
    together = model.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    for row, alone in ((0, short), (1, long)):
        expected = model.generate(alone, max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert torch.equal(together[row, -20:], expected[0, -20:])
    out = model(padded, attention_mask=mask).logits[0, 11:]
    torch.testing.assert_close(out, model(short).logits[0], rtol=1e-9, atol=1e-9)


def test_a_window_of_the_whole_sequence_is_the_baseline_and_a_smaller_one_is_not():
    ids = torch.randint(0, 50, (2, 33))
    logits = [
        build_model(name, tiny_config(), seed=1, **options).double().eval()(ids).logits
        for name, options in (("baseline", {}), ("sliding_window", {"window": 33}), ("sliding_window", {"window": 8}))
    ]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-9, atol=1e-9)
    assert (logits[0] - logits[2]).abs().max() > 1e-4


def test_no_t_by_t_tensor_in_training_beyond_the_window():
    model = build_model("sliding_window", tiny_config(), seed=1, window=8).train()
    with Shapes() as shapes:
        model(torch.zeros(2, 61, dtype=torch.long), labels=torch.zeros(2, 61, dtype=torch.long)).loss.backward()
    assert not [shape for shape in shapes.seen if shape.count(61) + shape.count(64) > 1]


def test_useful_flops_count_the_keys_that_are_seen():
    layer = make(8)
    assert layer.core_flops(20) == 4 * 32 * sum(min(t + 1, 8) for t in range(20))
    assert layer.core_flops(5) == 4 * 32 * 15 and layer.core_flops(20, dense=True) == 4 * 32 * 400


@pytest.mark.parametrize("window", [1, 0, -3])
def test_a_window_that_mixes_nothing_is_refused(window):
    with pytest.raises(ValueError, match="window must be a whole number of keys, at least 2"):
        make(window)


@pytest.mark.parametrize(
    ("right", "wrong", "check"),
    [
        ("band = (j > i) & (j <= i + W)", "band = (j > i + 1) & (j <= i + W + 1)", "causal"),
        ("band = (j > i) & (j <= i + W)", "band = (j >= i) & (j <= i + W)", "reference"),
        ("mask = (band & exists)[None]", "mask = band.expand(N, W, 2 * W)[None]", "reference"),
        (
            "start = max(0, keys.shape[2] - (self.window - 1))",
            "start = max(0, keys.shape[2] - self.window + 3)",
            "cached_equal",
        ),
    ],
)
def test_planted_faults_are_caught(right, wrong, check, tmp_path):
    source = attention.find("sliding_window").read_text()
    assert right in source
    (tmp_path / "planted.py").write_text(source.replace(right, wrong))
    assert fails(tmp_path / "planted.py", {"window": 8}, check)
