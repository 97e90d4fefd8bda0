"""GPT-2's own attention: out = softmax(Q Kᵀ / √D + causal) V with the scores written to memory.

O(T² C) time and O(H T²) memory. What every other variant is compared with: the same formula as `sdpa` without a fused
kernel, so the difference between the two is the price of the score traffic alone.
"""

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.cache_utils import DynamicLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D


class Attention(nn.Module):
    title = "Eager"
    paper = "Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.3 (GPT-2)"

    def __init__(self, config, layer_idx):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"heads must divide width: {config.n_head} heads do not divide {config.n_embd}")
        self.config = config
        self.layer_idx = layer_idx
        self.heads = config.n_head  # H
        self.width = config.n_embd  # C
        self.c_attn = Conv1D(3 * self.width, self.width)
        self.c_proj = Conv1D(self.width, self.width)
        self.attention_dropout = nn.Dropout(config.attn_pdrop)
        self.residual_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, hidden_states, past_key_values=None, padding_mask=None, seq_idx=None, position_embeddings=None, **_
    ):
        B, T, C = hidden_states.shape
        q, k, v = self.c_attn(hidden_states).split(C, dim=2)
        q, k, v = (x.view(B, T, self.heads, -1).transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        if position_embeddings is not None:
            q, k = (x.type_as(v) for x in apply_rotary_pos_emb(q, k, *position_embeddings))
        if past_key_values is not None:
            k, v = past_key_values.layers[self.layer_idx].update(k, v)  # (B, H, S, D)

        S = k.shape[2]
        visible = torch.ones(T, S, dtype=torch.bool, device=k.device).tril(S - T)
        if padding_mask is not None:
            visible = visible & padding_mask[:, None, None, :]  # (B, 1, T, S)
        if seq_idx is not None:  # a packed row has no cache: T is S
            visible = visible & (seq_idx[:, None, :, None] == seq_idx[:, None, None, :])
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # (B, H, T, S)
        # The lowest finite number, not -inf: a row of left padding alone stays finite. Added as GPT-2 does, which the
        # backward pass need not know of, and in place.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.add_(torch.zeros_like(visible, dtype=scores.dtype).masked_fill_(~visible, lowest))
        weights = self.attention_dropout(scores.softmax(-1).type(v.dtype))
        out = (weights @ v).transpose(1, 2).reshape(B, T, C).contiguous()  # Conv1D views it
        return self.residual_dropout(self.c_proj(out)), None

    def new_cache(self):
        return DynamicLayer()

    def core_flops(self, context, dense=False):
        # Two products (scores, mixing), a multiply and an add each: 4 C per pair of query and key.
        pairs = context**2 if dense else context * (context + 1) // 2
        return 4 * self.width * pairs

    def cache_bytes(self, context, element_bytes):
        return 2 * self.width * context * element_bytes

    def reference(self, hidden_states, position_embeddings=None):
        """transformers' GPT-2 attention, or Llama's, eager, on the same weights and a mask of its own."""
        T = hidden_states.shape[1]
        future = torch.full((T, T), torch.finfo(hidden_states.dtype).min, dtype=hidden_states.dtype).triu(1)
        future = future[None, None].to(hidden_states.device)
        if position_embeddings is not None:
            return self._llama_s(hidden_states, position_embeddings, future)
        config = type(self.config)(**self.config.to_dict())
        config._attn_implementation = "eager"
        theirs = GPT2Attention(config, layer_idx=self.layer_idx).to(hidden_states).train(self.training)
        theirs.c_attn, theirs.c_proj = self.c_attn, self.c_proj
        return theirs(hidden_states, attention_mask=future)[0]

    def _llama_s(self, hidden_states, position_embeddings, future):
        config = LlamaConfig(hidden_size=self.width, num_attention_heads=self.heads, attention_bias=True)
        config._attn_implementation = "eager"
        weights = [*self.c_attn.weight.split(self.width, dim=1), self.c_proj.weight]
        biases = [*self.c_attn.bias.split(self.width), self.c_proj.bias]
        named = {}
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj", "o_proj"), weights, biases, strict=True):
            named |= {f"{name}.weight": weight.T, f"{name}.bias": bias}
        theirs = LlamaAttention(config, layer_idx=self.layer_idx).to(hidden_states).eval()
        return torch.func.functional_call(theirs, named, (hidden_states, position_embeddings, future))[0]
