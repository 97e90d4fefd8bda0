"""Other people's causal language models, tiny, with random weights: `python -m lib.certificate tests/others.py:NAME`.

Each is transformers' own class as it is. Weights are drawn large enough that attention is far from uniform.
"""

import torch
import transformers

COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.2,
}  # fmt: skip


def built(name: str, **values):
    """transformers' model of a kind, such as `Llama`, from its configuration."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**values)
    config._attn_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def gpt2():
    return built(
        "GPT2", vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=4096, initializer_range=0.2, attn_pdrop=0.0,
        resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip


def llama():
    return built("Llama", **COMMON)


def mistral():
    return built("Mistral", **COMMON, sliding_window=64)


def qwen3_next():
    return built(
        "Qwen3Next", **COMMON | {"num_hidden_layers": 4}, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )  # fmt: skip


def gpt_oss():
    return built("GptOss", **COMMON, head_dim=8, sliding_window=64, num_local_experts=4, num_experts_per_tok=2)


def deepseek_v2():
    return built(
        "DeepseekV2", **COMMON | {"num_key_value_heads": 4}, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        first_k_dense_replace=1, n_shared_experts=1, topk_group=1, n_group=1,
    )  # fmt: skip


def deepseek_v32():
    return built(
        "DeepseekV32", **COMMON | {"num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        first_k_dense_replace=1, n_shared_experts=1, topk_group=1, n_group=1, index_topk=16, index_n_heads=2,
        index_head_dim=8,
    )  # fmt: skip


def mamba2():
    return built(
        "Mamba2", vocab_size=97, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=16,
        n_groups=1, chunk_size=64, initializer_range=0.2,
    )  # fmt: skip


def minimax():
    return built("MiniMax", **COMMON, head_dim=8, num_local_experts=4, num_experts_per_tok=2, block_size=64)


def minimax_linear_first():
    return built(
        "MiniMax", **COMMON, head_dim=8, num_local_experts=4, num_experts_per_tok=2, block_size=64,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip


def reformer():
    return built(
        "Reformer", vocab_size=97, hidden_size=32, num_attention_heads=4, attention_head_size=8, feed_forward_size=48,
        attn_layers=["lsh", "local"], lsh_attn_chunk_length=16, local_attn_chunk_length=16, num_hashes=2, num_buckets=8,
        is_decoder=True, hash_seed=1, axial_pos_embds=False, max_position_embeddings=4096, initializer_range=0.2,
        hidden_dropout_prob=0.0, lsh_attention_probs_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
