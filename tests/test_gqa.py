"""Grouped-query attention against Llama's, and its option."""

import pytest
import torch
from test_attention import make_layer, tiny_config
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from lib import attention
from lib.model import build_model, gpt2_config


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 65])
def test_it_is_llama_s_attention_without_the_rotation(kv_heads, length):
    torch.manual_seed(0)
    ours = attention.load("gqa")(gpt2_config(2, 32, 4, 256, 2), 0, kv_heads=kv_heads).double().eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=kv_heads, attention_bias=True)
    config._attn_implementation = "sdpa"  # its eager form rounds the weights to float32
    theirs = LlamaAttention(config, 0).double().eval()
    parts = ours.c_attn.weight.T.split([32, 8 * kv_heads, 8 * kv_heads])
    biases = ours.c_attn.bias.split([32, 8 * kv_heads, 8 * kv_heads])
    with torch.no_grad():
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), parts, biases, strict=True):
            getattr(theirs, name).weight.copy_(weight)
            getattr(theirs, name).bias.copy_(bias)
        theirs.o_proj.weight.copy_(ours.c_proj.weight.T)
        theirs.o_proj.bias.copy_(ours.c_proj.bias)
    x = torch.randn(2, length, 32, dtype=torch.float64)
    no_rotation = torch.ones(1, length, 8, dtype=torch.float64), torch.zeros(1, length, 8, dtype=torch.float64)
    future = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    torch.testing.assert_close(ours(x)[0], theirs(x, no_rotation, future)[0], rtol=1e-9, atol=1e-9)


def test_with_all_heads_it_is_the_baseline_and_by_default_it_is_not():
    ids = torch.randint(0, 50, (2, 33))
    baseline = build_model("baseline", tiny_config(), seed=1).double().eval()
    full = build_model("gqa", tiny_config(), seed=1, kv_heads=4).double().eval()
    shared = build_model("gqa", tiny_config(), seed=1).double().eval()
    torch.testing.assert_close(full(ids).logits, baseline(ids).logits, rtol=1e-9, atol=1e-9)
    assert (shared(ids).logits - baseline(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize(("heads", "expected"), [(1, 1), (2, 1), (4, 1), (8, 2), (12, 3), (14, 2), (16, 4), (25, 5)])
def test_by_default_a_quarter_of_the_heads_or_the_next_divisor(heads, expected):
    assert attention.load("gqa")(gpt2_config(1, heads * 4, heads, 8, 2), 0).kv_heads == expected


@pytest.mark.parametrize("kv_heads", [0, 3, 8, -1])
def test_heads_that_do_not_share_evenly_are_refused(kv_heads):
    with pytest.raises(ValueError, match="kv_heads must divide heads"):
        attention.load("gqa")(gpt2_config(1, 32, 4, 8, 2), 0, kv_heads=kv_heads)


def test_gpt2_small_s_cache_is_a_quarter():
    layer = attention.load("gqa")(gpt2_config(12, 768, 12, 1024, 2), 0)
    assert 12 * layer.cache_bytes(1, 2) == 9_216
    assert make_layer("gqa").kv_heads == 1
