"""The certificate pointed at other people's attention: transformers' own modules, as they are."""

import pytest
import torch
from transformers import DeepseekV2Config, GPT2Config, LlamaConfig, MistralConfig, ReformerConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from lib.certificate import examine

C, H, T = 32, 4, 70


def lively(module):
    """Weights so large that attention is far from uniform."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return module.eval()


def band(length, window=None):
    """The additive mask of causal, perhaps windowed, attention: (1, 1, T, T)."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = (distance >= 0) & (distance < (window or length))
    return torch.zeros(length, length, dtype=torch.float64).masked_fill(~visible, -torch.inf)[None, None]


def gpt2(causal=True):
    config = GPT2Config(n_embd=C, n_head=H, n_positions=T, n_layer=1)
    config._attn_implementation = "eager"
    layer = lively(GPT2Attention(config, layer_idx=0).double())
    return lambda x: layer(x, attention_mask=band(x.shape[1]) if causal else None)


def llama():
    config = LlamaConfig(hidden_size=C, num_attention_heads=H, num_key_value_heads=2, max_position_embeddings=T)
    config._attn_implementation = "eager"
    layer, rotary = lively(LlamaAttention(config, 0).double()), LlamaRotaryEmbedding(config)
    return lambda x: layer(x, rotary(x, torch.arange(x.shape[1])[None]), band(x.shape[1]))


def mistral(window=8):
    config = MistralConfig(
        hidden_size=C, num_attention_heads=H, num_key_value_heads=2, head_dim=8, sliding_window=window
    )
    config._attn_implementation = "eager"
    layer, rotary = lively(MistralAttention(config, 0).double()), LlamaRotaryEmbedding(config)
    return lambda x: layer(x, rotary(x, torch.arange(x.shape[1])[None]), band(x.shape[1], window))


def deepseek():
    config = DeepseekV2Config(
        hidden_size=C, num_attention_heads=H, num_key_value_heads=H, q_lora_rank=None, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=T,
    )  # fmt: skip
    config._attn_implementation = "eager"
    layer, rotary = lively(DeepseekV2Attention(config, 0).double()), DeepseekV2RotaryEmbedding(config)
    return lambda x: layer(
        x, attention_mask=band(x.shape[1]), position_embeddings=rotary(x, torch.arange(x.shape[1])[None])
    )


def reformer():
    config = ReformerConfig(
        hidden_size=C, num_attention_heads=H, attention_head_size=8, lsh_attn_chunk_length=16, num_hashes=2,
        num_buckets=8, is_decoder=True, hash_seed=1, attn_layers=["lsh"], max_position_embeddings=4096,
        lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = lively(LSHSelfAttention(config, 0).double())

    def run(x):
        state = torch.get_rng_state()  # a hash seed makes it reset the global random state
        padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 16))  # it takes whole chunks only
        out = layer(padded).hidden_states[:, : x.shape[1]]
        torch.set_rng_state(state)
        return out

    return run


@pytest.mark.parametrize(("make", "receptive_field"), [(gpt2, T), (llama, T), (mistral, 8), (deepseek, T)])
def test_causal_modules_pass_with_the_receptive_field_that_they_claim(make, receptive_field):
    torch.manual_seed(1)
    said = examine(make(), torch.randn(1, T, C, dtype=torch.float64))
    assert said == {"causal": True, "prefix_equal": True, "mixes": True, "receptive_field": receptive_field}


def test_reformer_s_moving_chunk_borders_are_caught():
    """A later token moves the borders of the sorted chunks, and so what earlier tokens see."""
    torch.manual_seed(1)
    said = examine(reformer(), torch.randn(1, 128, C, dtype=torch.float64))
    assert not said["causal"] or not said["prefix_equal"]


def test_attention_without_a_mask_is_caught():
    torch.manual_seed(1)
    said = examine(gpt2(causal=False), torch.randn(1, T, C, dtype=torch.float64))
    assert said["causal"] is False and said["prefix_equal"] is False


def test_a_module_that_mixes_nothing_is_caught():
    said = examine(lively(torch.nn.Linear(C, C).double()), torch.randn(1, T, C, dtype=torch.float64))
    assert said == {"causal": True, "prefix_equal": True, "mixes": False, "receptive_field": 1}
