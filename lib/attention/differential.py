"""Differential attention: the difference of two softmaxes, in which the noise that both look at cancels.

Heads go in pairs, h beside h + H / 2, that share 2 D numbers of value: (softmax(Q₁K₁ᵀ/√D) - λ softmax(Q₂K₂ᵀ/√D)) V,
then a norm over the 2 D, times 1 - λ₀. λ = e^{λ_q1·λ_k1} - e^{λ_q2·λ_k2} + λ₀ is learned, one for a layer, where
λ₀ = 0.8 - 0.6 e^{-0.3 l} in layer l = 0, 1, ... PyTorch's fused kernel wants values as wide as keys, so each half of V
has a call of its own: 8 C operations for a pair of query and key, where the definition needs 6 C. O(T² C) time, O(T C)
memory.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D

EPSILON = 1e-5  # of the norm: the paper's


class Attention(nn.Module):
    title = "Differential"
    paper = "Ye et al. 2024, Differential Transformer, section 2.1 (arXiv 2410.05258)"

    def __init__(self, config, layer_idx):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"heads must divide width: {config.n_head} heads do not divide {config.n_embd}")
        if config.n_head % 2:
            raise ValueError(f"heads go in pairs, so their number must be even, not {config.n_head}")
        self.layer_idx = layer_idx
        self.heads = config.n_head  # H
        self.width = config.n_embd  # C
        self.head_width = config.n_embd // config.n_head  # D
        self.c_attn = Conv1D(3 * self.width, self.width)
        self.c_proj = Conv1D(self.width, self.width)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer_idx)  # λ₀
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            self.register_parameter(name, nn.Parameter(0.1 * torch.randn(self.head_width)))
        self.attention_dropout = config.attn_pdrop
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

        # `is_causal=True` aligns the mask at the upper left: with fewer queries than keys it hides what was cached.
        S = k.shape[2]
        mask = None if T in (1, S) else causal_lower_right(T, S)
        if padding_mask is not None or seq_idx is not None:
            mask = visible_keys(T, S, padding_mask, seq_idx, k.device)
        dropout = self.attention_dropout if self.training else 0.0
        options = {"attn_mask": mask, "is_causal": T > 1 and mask is None, "dropout_p": dropout}
        first, second = (  # (B, H / 2, T, 2 D)
            torch.cat([F.scaled_dot_product_attention(*of, half, **options) for half in v.chunk(2, dim=1)], dim=-1)
            for of in zip(q.chunk(2, dim=1), k.chunk(2, dim=1), strict=True)
        )
        with torch.autocast(hidden_states.device.type, enabled=False):
            out = at_least_fp32(first) - self._lambda() * at_least_fp32(second)
            out = out * (out.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * (1 - self.lambda_init)
        out = out.transpose(1, 2).reshape(B, T, C).to(first.dtype)
        return self.residual_dropout(self.c_proj(out)), None

    def _lambda(self):
        q1, k1, q2, k2 = map(at_least_fp32, (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2))
        return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init

    def new_cache(self):
        return DynamicLayer()

    def core_flops(self, context, dense=False):
        # Per pair of query and key, a multiply and an add each: C for the scores, and 2 C to mix values of 2 D a head.
        pairs = context**2 if dense else context * (context + 1) // 2
        return 6 * self.width * pairs

    def cache_bytes(self, context, element_bytes):
        return 2 * self.width * context * element_bytes

    def reference(self, hidden_states, position_embeddings=None):
        """Query by query over the keys up to it: the two softmaxes' difference is made first, then mixes the values."""
        B, T, C = hidden_states.shape
        H, D = self.heads // 2, self.head_width
        q, k, v = (x.view(B, T, 2 * H, D) for x in self.c_attn(hidden_states).split(C, dim=2))
        if position_embeddings is not None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        q, k, v = (x.unflatten(2, (2, H)) for x in (q, k, v))
        v = torch.cat([v[:, :, 0], v[:, :, 1]], dim=-1)  # (B, T, H, 2 D)
        first, second = torch.dot(self.lambda_q1, self.lambda_k1), torch.dot(self.lambda_q2, self.lambda_k2)
        share = first.exp() - second.exp() + self.lambda_init
        rows = []
        for t in range(T):
            scores = torch.einsum("bphd,bsphd->bphs", q[:, t], k[:, : t + 1]) / math.sqrt(D)
            each = scores.exp() / scores.exp().sum(-1, keepdim=True)  # (B, 2, H, t+1)
            rows.append(torch.einsum("bhs,bshd->bhd", each[:, 0] - share * each[:, 1], v[:, : t + 1]))
        out = torch.stack(rows, dim=1)  # (B, T, H, 2 D)
        out = (1 - self.lambda_init) * out / ((out**2).mean(-1, keepdim=True) + EPSILON).sqrt()
        return self.c_proj(out.flatten(2))


def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def visible_keys(T, S, padding_mask, seq_idx, device):
    """(B, 1, T, S) bool: keys that a query sees, always its own, so that no row is empty. T is S with `seq_idx`."""
    visible = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]
    if seq_idx is not None:
        visible = visible & (seq_idx[:, None, :, None] == seq_idx[:, None, None, :])
    if padding_mask is not None:
        own = torch.eye(T, S, dtype=torch.bool, device=device).roll(S - T, dims=1)
        visible = (visible & padding_mask[:, None, None, :]) | own
    return visible
