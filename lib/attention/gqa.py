"""Grouped-query attention: out = softmax(Q Kᵀ / √D + causal) V, H / G query heads sharing each of G key/value heads.

The same O(T² C) time as full heads, but keys, values and cache shrink by H / G. G = H is GPT-2's own attention, G = 1
multi-query attention (Shazeer 2019, arXiv 1911.02150).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D


class Attention(nn.Module):
    paper = "Ainslie et al. 2023, GQA, section 2.2 (arXiv 2305.13245)"

    def __init__(self, config, layer_idx, kv_heads=None):
        super().__init__()
        heads = config.n_head
        if config.n_embd % heads:
            raise ValueError(f"heads must divide width: {heads} heads do not divide {config.n_embd}")
        if kv_heads is None:  # a quarter of the heads, or the nearest smaller number that divides them
            kv_heads = max(g for g in range(1, max(1, heads // 4) + 1) if heads % g == 0)
        if type(kv_heads) is not int or kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads: {kv_heads!r} key/value heads do not divide {heads}")
        self.layer_idx = layer_idx
        self.heads, self.kv_heads = heads, kv_heads  # H, G
        self.width = config.n_embd  # C
        self.head_width = config.n_embd // heads  # D
        self.kv_width = kv_heads * self.head_width  # G D
        self.c_attn = Conv1D(self.width + 2 * self.kv_width, self.width)
        self.c_proj = Conv1D(self.width, self.width)
        self.attention_dropout = config.attn_pdrop
        self.residual_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, hidden_states, past_key_values=None, padding_mask=None, seq_idx=None, position_embeddings=None, **_
    ):
        B, T, C = hidden_states.shape
        q, k, v = self._heads(hidden_states, position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.layers[self.layer_idx].update(k, v)  # (B, G, S, D)

        # `is_causal=True` aligns the mask at the upper left: with fewer queries than keys it hides what was cached.
        S = k.shape[2]
        mask = None if T in (1, S) else causal_lower_right(T, S)
        if padding_mask is not None or seq_idx is not None:
            mask = visible_keys(T, S, padding_mask, seq_idx, k.device)
        out = F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=mask,
            is_causal=T > 1 and mask is None,  # in this order: a bool under torch.compile too
            dropout_p=self.attention_dropout if self.training else 0.0,
            enable_gqa=self.kv_heads < self.heads,
        )  # fmt: skip
        out = out.transpose(1, 2).reshape(B, T, C).contiguous()  # of narrow heads a view, which Conv1D refuses
        return self.residual_dropout(self.c_proj(out)), None

    def _heads(self, hidden_states, position_embeddings=None):
        """(B, T, C) -> queries (B, H, T, D), keys and values (B, G, T, D) each."""
        B, T, _ = hidden_states.shape
        parts = self.c_attn(hidden_states).split([self.width, self.kv_width, self.kv_width], dim=2)
        q, k, v = (x.view(B, T, -1, self.head_width).transpose(1, 2) for x in parts)
        if position_embeddings is not None:
            q, k = (x.type_as(v) for x in apply_rotary_pos_emb(q, k, *position_embeddings))
        return q, k, v

    @staticmethod
    def as_gpt2(config):
        return {"kv_heads": config.n_head}

    @staticmethod
    def sized(config, context, numbers):
        fits = [heads for heads in range(1, config.n_head + 1) if config.n_head % heads == 0]
        per_head = 2 * context * config.n_embd / config.n_head
        return {"kv_heads": min(fits, key=lambda heads: abs(heads * per_head - numbers))}

    def new_cache(self):
        return DynamicLayer()

    @property
    def title(self):
        return f"GQA {self.heads // self.kv_heads}:1"

    def core_flops(self, context, dense=False):
        # Sharing keys spares memory, not arithmetic: every query head still meets every key, 4 C per pair.
        pairs = context**2 if dense else context * (context + 1) // 2
        return 4 * self.width * pairs

    def cache_bytes(self, context, element_bytes):
        return 2 * self.kv_width * context * element_bytes

    def reference(self, hidden_states, position_embeddings=None):
        """Query head by query head, each with the keys and values of its own group; scores in full."""
        T = hidden_states.shape[1]
        q, k, v = self._heads(hidden_states, position_embeddings)
        past = torch.ones(T, T, device=q.device).tril()
        rows = []
        for head in range(self.heads):
            group = head * self.kv_heads // self.heads
            weights = torch.einsum("btd,bsd->bts", q[:, head], k[:, group]).div(self.head_width**0.5).exp() * past
            rows.append(torch.einsum("bts,bsd->btd", weights / weights.sum(-1, keepdim=True), v[:, group]))
        return self.c_proj(torch.cat(rows, dim=-1))


def visible_keys(T, S, padding_mask, seq_idx, device):
    """(B, 1, T, S) bool: keys that a query sees, always its own, so that no row is empty. T is S with `seq_idx`."""
    visible = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]
    if seq_idx is not None:
        visible = visible & (seq_idx[:, None, :, None] == seq_idx[:, None, None, :])
    if padding_mask is not None:
        own = torch.eye(T, S, dtype=torch.bool, device=device).roll(S - T, dims=1)
        visible = (visible & padding_mask[:, None, None, :]) | own
    return visible
