"""Scaled dot-product attention by PyTorch's fused kernel: out = softmax(Q Kᵀ / √D + causal) V, head by head.

The T x T scores never reach memory: O(T² C) time, O(T C) memory. This is a policy, not an algorithm: PyTorch picks the
kernel (flash, memory-efficient, cuDNN or plain) by device, dtype and shape; the run's record names the one that ran.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D


class Attention(nn.Module):
    title = "SDPA"
    paper = "Vaswani et al. 2017, Attention Is All You Need, section 3.2 (arXiv 1706.03762)"

    def __init__(self, config, layer_idx):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"heads must divide width: {config.n_head} heads do not divide {config.n_embd}")
        self.layer_idx = layer_idx
        self.heads = config.n_head  # H
        self.width = config.n_embd  # C
        self.c_attn = Conv1D(3 * self.width, self.width)
        self.c_proj = Conv1D(self.width, self.width)
        self.attention_dropout = config.attn_pdrop
        self.residual_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, hidden_states, past_key_values=None, padding_mask=None, seq_idx=None, position_embeddings=None, **_
    ):
        B, T, C = hidden_states.shape
        q, k, v = self._heads(hidden_states, position_embeddings)
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
        out = out.transpose(1, 2).reshape(B, T, C).contiguous()  # of narrow heads a view, which Conv1D refuses
        return self.residual_dropout(self.c_proj(out)), None

    def _heads(self, hidden_states, position_embeddings=None):
        """(B, T, C) -> queries, keys and values, (B, H, T, D) each."""
        B, T, C = hidden_states.shape
        q, k, v = self.c_attn(hidden_states).split(C, dim=2)
        q, k, v = (x.view(B, T, self.heads, C // self.heads).transpose(1, 2) for x in (q, k, v))
        if position_embeddings is not None:
            q, k = (x.type_as(v) for x in apply_rotary_pos_emb(q, k, *position_embeddings))
        return q, k, v

    @staticmethod
    def as_gpt2(config):
        return {}  # as it is; leave this out where you compute something else

    def new_cache(self):
        return DynamicLayer()

    def core_flops(self, context, dense=False):
        # Two products (scores, mixing), a multiply and an add each: 4 C per pair of query and key.
        pairs = context**2 if dense else context * (context + 1) // 2
        return 4 * self.width * pairs

    def cache_bytes(self, context, element_bytes):
        return 2 * self.width * context * element_bytes

    def reference(self, hidden_states, position_embeddings=None):
        """Query by query over the keys up to it: no mask, no fused kernel."""
        q, k, v = self._heads(hidden_states, position_embeddings)
        rows = []
        for t in range(hidden_states.shape[1]):
            scores = (q[:, :, t : t + 1] * k[:, :, : t + 1]).sum(-1) / q.shape[-1] ** 0.5  # (B, H, t+1)
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            rows.append((weights[..., None] * v[:, :, : t + 1]).sum(2).flatten(1))  # (B, C)
        return self.c_proj(torch.stack(rows, dim=1))


def visible_keys(T, S, padding_mask, seq_idx, device):
    """(B, 1, T, S) bool: keys that a query sees, always its own, so that no row is empty. T is S with `seq_idx`."""
    visible = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]
    if seq_idx is not None:
        visible = visible & (seq_idx[:, None, :, None] == seq_idx[:, None, None, :])
    if padding_mask is not None:
        own = torch.eye(T, S, dtype=torch.bool, device=device).roll(S - T, dims=1)
        visible = (visible & padding_mask[:, None, None, :]) | own
    return visible
