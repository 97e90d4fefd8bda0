"""Gated attention: a sigmoid gate on each channel of softmax attention's output, from the token that asks.

out = softmax(Q Kᵀ / √D + causal) V ⊙ σ(X W_z), head by head, and then the projection: what a head has found can be let
through or dropped, so that no weight need be spent on a sink. `qk_norm` brings each q and k to root mean square 1 times
a learned scale first (Qwen3-Next). O(T² C) time, O(T C) memory by PyTorch's fused kernel, as `sdpa`; the gate adds a
fourth matrix of C x C, and nothing to the cache.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D

EPSILON = 1e-6  # of the norms: as transformers' Qwen3-Next has it


class Attention(nn.Module):
    paper = "Qiu et al. 2025, Gated Attention for Large Language Models, section 2.2, gate G1 (arXiv 2505.06708)"

    def __init__(self, config, layer_idx, qk_norm=False):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"heads must divide width: {config.n_head} heads do not divide {config.n_embd}")
        if not isinstance(qk_norm, bool):
            raise ValueError(f"qk_norm must be true (queries and keys are normed) or false, not {qk_norm!r}")
        self.layer_idx = layer_idx
        self.qk_norm = qk_norm
        self.heads = config.n_head  # H
        self.width = config.n_embd  # C
        self.head_width = config.n_embd // config.n_head  # D
        self.c_attn = Conv1D(4 * self.width, self.width)  # query, key, value, gate
        self.c_proj = Conv1D(self.width, self.width)
        if qk_norm:
            self.q_norm = nn.Parameter(torch.ones(self.head_width))
            self.k_norm = nn.Parameter(torch.ones(self.head_width))
        self.attention_dropout = config.attn_pdrop
        self.residual_dropout = nn.Dropout(config.resid_pdrop)

    @property
    def title(self):
        return "Gated SDPA, QK norm" if self.qk_norm else "Gated SDPA"

    def forward(
        self, hidden_states, past_key_values=None, padding_mask=None, seq_idx=None, position_embeddings=None, **_
    ):
        B, T, C = hidden_states.shape
        qkv, gate = self.c_attn(hidden_states).split([3 * C, C], dim=2)
        q, k, v = (x.view(B, T, self.heads, -1).transpose(1, 2) for x in qkv.split(C, dim=2))  # (B, H, T, D)
        if self.qk_norm:
            q, k = normed(q, self.q_norm), normed(k, self.k_norm)
        if position_embeddings is not None:
            q, k = (x.type_as(v) for x in apply_rotary_pos_emb(q, k, *position_embeddings))
        if past_key_values is not None:
            k, v = past_key_values.layers[self.layer_idx].update(k, v)  # (B, H, S, D)

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
        )  # fmt: skip
        out = out.transpose(1, 2).reshape(B, T, C).contiguous() * gate.sigmoid()  # Conv1D views it
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
        """Query by query over the keys up to it, the norm and the gate written out: no mask, no fused kernel."""
        B, T, _ = hidden_states.shape
        q, k, v, z = self.c_attn(hidden_states).view(B, T, 4, self.heads, -1).unbind(2)  # (B, T, H, D)
        if self.qk_norm:
            q, k = (x / ((x**2).mean(-1, keepdim=True) + EPSILON).sqrt() for x in (q, k))
            q, k = q * self.q_norm, k * self.k_norm
        if position_embeddings is not None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        rows = []
        for t in range(T):
            scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, : t + 1]) / q.shape[-1] ** 0.5
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            found = torch.einsum("bhs,bshd->bhd", weights, v[:, : t + 1])
            rows.append((found / (1 + (-z[:, t]).exp())).flatten(1))  # (B, C)
        return self.c_proj(torch.stack(rows, dim=1))


def normed(x, scale):
    """(B, H, T, D) of root mean square 1 over D, times `scale` (D,): in float32 at least, as x came."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    return (precise * (precise.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * scale).to(x.dtype)


def visible_keys(T, S, padding_mask, seq_idx, device):
    """(B, 1, T, S) bool: keys that a query sees, always its own, so that no row is empty. T is S with `seq_idx`."""
    visible = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]
    if seq_idx is not None:
        visible = visible & (seq_idx[:, None, :, None] == seq_idx[:, None, None, :])
    if padding_mask is not None:
        own = torch.eye(T, S, dtype=torch.bool, device=device).roll(S - T, dims=1)
        visible = (visible & padding_mask[:, None, None, :]) | own
    return visible
