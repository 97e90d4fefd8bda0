"""FlashAttention-2: out = softmax(Q Kᵀ / √D + causal) V in tiles that stay in fast memory, with a running softmax.

O(T² C) time, O(T C) memory. An algorithm, not a policy: the same function as `sdpa`, pinned to PyTorch's flash kernel
with no fallback. On CUDA that kernel takes bf16 and fp16 alone; on the CPU it is PyTorch's own flash kernel.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D


class Attention(nn.Module):
    title = "FlashAttention"
    paper = "Dao 2023, FlashAttention-2, section 3.1 (arXiv 2307.08691)"

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

        S = k.shape[2]
        mask = None if T in (1, S) else causal_lower_right(T, S)
        if padding_mask is not None or seq_idx is not None:
            if q.is_cuda:
                raise ValueError(
                    "flash takes no mask on CUDA, so neither left padding nor rows of several documents; give prompts "
                    "of one length and one document a row, or use sdpa"
                )
            mask = visible_keys(T, S, padding_mask, seq_idx, k.device)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(
                q, k, v,
                attn_mask=mask,
                is_causal=T > 1 and mask is None,  # in this order: a bool under torch.compile too
                dropout_p=self.attention_dropout if self.training else 0.0,
            )  # fmt: skip
        out = out.transpose(1, 2).reshape(B, T, C).contiguous()  # of narrow heads a view, which Conv1D refuses
        return self.residual_dropout(self.c_proj(out)), None

    def _heads(self, hidden_states, position_embeddings=None):
        """(B, T, C) -> queries, keys and values, (B, H, T, D) each; ValueError for what the kernel cannot take."""
        B, T, C = hidden_states.shape
        q, k, v = self.c_attn(hidden_states).split(C, dim=2)
        if q.is_cuda and q.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"flash runs in bf16 or fp16 on CUDA, not in {q.dtype}; use precision 'bf16'")
        if self.training and self.attention_dropout and not q.is_cuda:
            raise ValueError("PyTorch's flash kernel on the CPU has no dropout; use dropout 0")
        q, k, v = (x.view(B, T, self.heads, C // self.heads).transpose(1, 2) for x in (q, k, v))
        if position_embeddings is not None:
            q, k = (x.type_as(v) for x in apply_rotary_pos_emb(q, k, *position_embeddings))
        return q, k, v

    @staticmethod
    def as_gpt2(config):
        return {}

    def new_cache(self):
        return DynamicLayer()

    def core_flops(self, context, dense=False):
        # Two products (scores, mixing), a multiply and an add each: 4 C per pair of query and key.
        pairs = context**2 if dense else context * (context + 1) // 2
        return 4 * self.width * pairs

    def cache_bytes(self, context, element_bytes):
        return 2 * self.width * context * element_bytes

    def reference(self, hidden_states, position_embeddings=None):
        """The running softmax itself, key by key for all queries at once: no kernel, no stored scores."""
        q, k, v = self._heads(hidden_states, position_embeddings)
        top = torch.full_like(q[..., :1], -torch.inf)  # (B, H, T, 1), the largest score so far
        total, mixed = torch.zeros_like(top), torch.zeros_like(v)
        for s in range(k.shape[2]):
            score = (q * k[:, :, s : s + 1]).sum(-1, keepdim=True) / q.shape[-1] ** 0.5
            new_top = torch.maximum(top, score)
            keep, add = (top - new_top).exp(), (score - new_top).exp()
            seen = (torch.arange(q.shape[2], device=q.device) >= s)[:, None]  # queries before key s leave it out
            total = torch.where(seen, total * keep + add, total)
            mixed = torch.where(seen, mixed * keep + add * v[:, :, s : s + 1], mixed)
            top = torch.where(seen, new_top, top)
        return self.c_proj((mixed / total).transpose(1, 2).flatten(2))


def visible_keys(T, S, padding_mask, seq_idx, device):
    """(B, 1, T, S) bool: keys that a query sees, always its own, so that no row is empty. T is S with `seq_idx`."""
    visible = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]
    if seq_idx is not None:
        visible = visible & (seq_idx[:, None, :, None] == seq_idx[:, None, None, :])
    if padding_mask is not None:
        own = torch.eye(T, S, dtype=torch.bool, device=device).roll(S - T, dims=1)
        visible = (visible & padding_mask[:, None, None, :]) | own
    return visible
