"""Multi-head latent attention (MLA): a token is remembered as one latent vector, from which all heads' keys and values
are rebuilt.

c = RMSNorm(W_DKV h), [k; v] = W_UKV c, and a rotary key r = RoPE(W_KR h) that all heads share:
out = softmax((Qn Kᵀ + RoPE(Qr) Rᵀ) / √(D + D_R) + causal) V, head by head; a token's position is the number of real
tokens before it. Decoding never rebuilds: W_UK moves to the query's side and W_UV behind the mixing, so that all heads
read the same L + D_R numbers per token, and only those are cached. L is `kv_lora_rank`, D_R `qk_rope_head_dim`, where 0
means no rotary part.
O(T² H (2 D + D_R)) time, O(T H (D + D_R)) memory; a decoded token costs O(S H (2 L + D_R)) over S cached ones.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

THETA, EPS = 1e4, 1e-6


class Attention(nn.Module):
    title = "MLA"
    paper = "DeepSeek-AI 2024, DeepSeek-V2, section 2.1 (arXiv 2405.04434)"

    def __init__(self, config, layer_idx, kv_lora_rank=None, qk_rope_head_dim=None, q_lora_rank=None):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"heads must divide width: {config.n_head} heads do not divide {config.n_embd}")
        self.layer_idx = layer_idx
        self.heads = config.n_head  # H
        self.width = config.n_embd  # C
        self.head_width = D = config.n_embd // config.n_head
        self.kv_lora_rank = 4 * D if kv_lora_rank is None else kv_lora_rank  # L
        self.qk_rope_head_dim = half_and_even(D) if qk_rope_head_dim is None else qk_rope_head_dim  # R
        if type(self.kv_lora_rank) is not int or self.kv_lora_rank < 1:
            raise ValueError(
                f"kv_lora_rank must be a whole number from 1 up, not {kv_lora_rank!r}; leave it out for 4 D = {4 * D}"
            )
        R = self.qk_rope_head_dim
        if type(R) is not int or R < 0 or R % 2:
            raise ValueError(f"qk_rope_head_dim must be 0 or an even whole number, not {R!r}: rotation turns pairs")
        if q_lora_rank is not None and (type(q_lora_rank) is not int or q_lora_rank < 1):
            raise ValueError(f"q_lora_rank must be a whole number from 1 up, not {q_lora_rank!r}; None goes without")

        # DeepSeek's names: `a` down to a latent, `b` up from it, `with_mqa` the shared rotary key in the same product.
        query_width = self.heads * (D + self.qk_rope_head_dim)
        if q_lora_rank is None:
            self.q_proj = nn.Linear(self.width, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(self.width, q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(q_lora_rank, eps=EPS)
            self.q_b_proj = nn.Linear(q_lora_rank, query_width, bias=False)
        self.q_lora_rank = q_lora_rank
        self.kv_a_proj_with_mqa = nn.Linear(self.width, self.kv_lora_rank + self.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, eps=EPS)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, self.heads * 2 * D, bias=False)
        self.c_proj = Conv1D(self.width, self.width)
        self.attention_dropout = config.attn_pdrop
        self.residual_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states, past_key_values=None, padding_mask=None, seq_idx=None, position_ids=None, **_):
        B, T, C = hidden_states.shape
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = self._positions(hidden_states, past, padding_mask)
        q, latent, shared_key = self._project(hidden_states, position_ids)
        if cache is not None:
            latent, shared_key = cache.update(latent, shared_key)  # (B, S, L), (B, S, R)

        # `is_causal=True` aligns the mask at the upper left: with fewer queries than keys it hides what was cached.
        S = latent.shape[1]
        mask = None if T in (1, S) else causal_lower_right(T, S)
        if padding_mask is not None or seq_idx is not None:
            mask = visible_keys(T, S, padding_mask, seq_idx, latent.device)
        attend = self._decode if T == 1 < S else self._rebuild
        out = attend(q, latent, shared_key, mask).reshape(B, T, C).contiguous()  # Conv1D views it
        return self.residual_dropout(self.c_proj(out)), None

    @staticmethod
    def _positions(hidden_states, past, padding_mask):
        """(1 or B, T): the real tokens before each, of which `past` are cached."""
        T = hidden_states.shape[1]
        if padding_mask is None:
            return torch.arange(past, past + T, device=hidden_states.device)[None]
        return (padding_mask.cumsum(1) - 1).clamp(min=0)[:, -T:]

    def _project(self, hidden_states, position_ids):
        """(B, T, C) -> queries (B, T, H, D + R), normalised latents (B, T, L), rotated shared keys (B, T, R)."""
        D = self.head_width
        if self.q_lora_rank is None:
            q = self.q_proj(hidden_states)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        q = q.unflatten(2, (self.heads, D + self.qk_rope_head_dim))  # (B, T, H, D + R)
        widths = [self.kv_lora_rank, self.qk_rope_head_dim]
        latent, shared_key = self.kv_a_proj_with_mqa(hidden_states).split(widths, dim=2)
        latent = self.kv_a_layernorm(latent)

        # Computed anew: a buffer would be cast to bf16 with the weights, or come back empty from a checkpoint.
        dtype, device = torch.promote_types(q.dtype, torch.float32), q.device
        speeds = THETA ** (
            -torch.arange(0, self.qk_rope_head_dim, 2, dtype=dtype, device=device) / self.qk_rope_head_dim
        )
        angles = (position_ids[..., None] * speeds)[..., None, :]  # (1 or B, T, 1, R/2)
        cos, sin = angles.cos(), angles.sin()
        q = torch.cat([q[..., :D], _rotate(q[..., D:], cos, sin)], dim=3)
        return q, latent, _rotate(shared_key.unsqueeze(2), cos, sin).squeeze(2)

    def _rebuild(self, q, latent, shared_key, mask):
        """Attention with each head's keys and values rebuilt from the latents: (B, T, H, D)."""
        B, S, _ = latent.shape
        D, R = self.head_width, self.qk_rope_head_dim
        k, v = self.kv_b_proj(latent).view(B, S, self.heads, 2 * D).split(D, dim=3)
        k = torch.cat([k, shared_key.unsqueeze(2).expand(B, S, self.heads, R)], dim=3)  # (B, S, H, D + R)
        if v.device.type == "cpu":
            # PyTorch's CPU flash kernel wants values as wide as keys, or a fallback writes T x T scores. Forward and
            # backward at T = 256 (fp32, one core), zeros added against the fallback: 27 against 42 ms at the quick
            # profile's size, level at GPT-2 small's. CUDA's memory-efficient and cuDNN kernels take v as it is.
            v = F.pad(v, (0, R))
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            attn_mask=mask,
            is_causal=S > 1 and mask is None,  # in this order: a bool under torch.compile too
            dropout_p=self.attention_dropout if self.training else 0.0,
        )  # fmt: skip
        return out[..., :D].transpose(1, 2)  # the call's own scale is that of the queries' width, 1/√(D + R)

    def _decode(self, q, latent, shared_key, mask):
        """One query over the cache with absorbed projections, no key or value rebuilt: (B, 1, H, D)."""
        D = self.head_width
        w_uk, w_uv = self.kv_b_proj.weight.view(self.heads, 2 * D, self.kv_lora_rank).split(D, dim=1)  # (H, D, L) each
        q_nope, q_rope = (
            (q * q.shape[-1] ** -0.5).squeeze(1).split([D, self.qk_rope_head_dim], dim=2)
        )  # (B, H, D), (B, H, R)
        q_latent = torch.einsum("bhd,hdl->bhl", q_nope, w_uk)
        scores = q_latent @ latent.transpose(1, 2) + q_rope @ shared_key.transpose(1, 2)  # (B, H, S)
        if mask is not None:
            scores = scores.masked_fill(~mask.squeeze(1), -torch.inf)  # (B, 1, S), true for the query's own key
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).type_as(latent)
        mixed = F.dropout(weights, self.attention_dropout, self.training) @ latent  # (B, H, L)
        return torch.einsum("bhl,hdl->bhd", mixed, w_uv).unsqueeze(1)

    @staticmethod
    def sized(config, context, numbers):
        rotary = half_and_even(config.n_embd // config.n_head)
        return {"kv_lora_rank": max(1, round(numbers / context) - rotary), "qk_rope_head_dim": rotary}

    def new_cache(self):
        return DynamicLayer()  # its keys are our latents, its values our shared rotary keys

    def core_flops(self, context, dense=False):
        # Scores over D + R numbers, mixing over D; the zeros that the CPU's kernel wants are no useful work.
        pairs = context**2 if dense else context * (context + 1) // 2
        return 2 * self.heads * (2 * self.head_width + self.qk_rope_head_dim) * pairs

    def cache_bytes(self, context, element_bytes):
        return (self.kv_lora_rank + self.qk_rope_head_dim) * context * element_bytes

    def reference(self, hidden_states):
        """Query by query over the keys up to it; a rotation by the distance of the two, in complex numbers."""
        (B, T, _), D, R = hidden_states.shape, self.head_width, self.qk_rope_head_dim

        def normalised(x, norm):
            return norm.weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()

        if self.q_lora_rank is None:
            q = hidden_states @ self.q_proj.weight.T
        else:
            q = normalised(hidden_states @ self.q_a_proj.weight.T, self.q_a_layernorm) @ self.q_b_proj.weight.T
        q = q.view(B, T, self.heads, D + R)
        down = hidden_states @ self.kv_a_proj_with_mqa.weight.T
        latent = normalised(down[..., : self.kv_lora_rank], self.kv_a_layernorm)
        kv = (latent @ self.kv_b_proj.weight.T).view(B, T, self.heads, 2 * D)
        q_pairs = torch.complex(q[..., D::2], q[..., D + 1 :: 2])  # (B, T, H, R/2)
        k_pairs = torch.complex(down[..., self.kv_lora_rank :: 2], down[..., self.kv_lora_rank + 1 :: 2])  # (B, T, R/2)
        speeds = hidden_states.new_tensor([THETA ** (-2 * i / R) for i in range(R // 2)])
        rows = []
        for t in range(T):
            distances = torch.arange(t, -1, -1).to(hidden_states)[:, None]  # (t+1, 1)
            turned = k_pairs[:, : t + 1].conj() * torch.exp(1j * distances * speeds)  # (B, t+1, R/2)
            scores = torch.einsum("bhd,bshd->bhs", q[:, t, :, :D], kv[:, : t + 1, :, :D])
            scores = scores + torch.einsum("bhi,bsi->bhs", q_pairs[:, t], turned).real
            weights = (scores / (D + R) ** 0.5).softmax(-1)  # (B, H, t+1)
            rows.append(torch.einsum("bhs,bshd->bhd", weights, kv[:, : t + 1, :, D:]).flatten(1))  # (B, C)
        return self.c_proj(torch.stack(rows, dim=1))


def half_and_even(head_width):
    """Half of D, or one more where that is odd: rotation turns pairs."""
    half = head_width // 2
    return half + half % 2


def visible_keys(T, S, padding_mask, seq_idx, device):
    """(B, 1, T, S) bool: keys that a query sees, always its own, so that no row is empty. T is S with `seq_idx`."""
    visible = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]
    if seq_idx is not None:
        visible = visible & (seq_idx[:, None, :, None] == seq_idx[:, None, None, :])
    if padding_mask is not None:
        own = torch.eye(T, S, dtype=torch.bool, device=device).roll(S - T, dims=1)
        visible = (visible & padding_mask[:, None, None, :]) | own
    return visible


class RMSNorm(nn.RMSNorm):
    """In float32 at least, whatever autocast or the weights' type say; given back in the type of x."""

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, self.normalized_shape, self.weight.type_as(wide), self.eps).type_as(x)


def _rotate(x, cos, sin):
    """(B, T, H, R): neighbours (x0, x1), (x2, x3)... turned by their angles, in the angles' type; given back in x's."""
    even, odd = x.unflatten(3, (x.shape[3] // 2, 2)).unbind(4)  # (B, T, H, R/2) each
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=4).flatten(3).type_as(x)
