"""Attention sinks, as in gpt-oss: each head has one learned logit that takes part in the softmax and carries no value.

out_t = Σ_s e^{q_t·k_s/√D} v_s / (e^{b} + Σ_s e^{q_t·k_s/√D}), by head, over the `window` newest keys s ≤ t, or over all
where it is 0. A query that finds nothing may look at nothing, where a plain softmax has to spend its weight somewhere.
b is the score of one key more, whose value is zero and which differs from the others in dimensions of its own: so that
PyTorch's fused kernel does it. O(T W C) time, or O(T² C) without a window, and O(T C) memory.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D


class Attention(nn.Module):
    paper = (
        "OpenAI 2025, gpt-oss-120b & gpt-oss-20b Model Card, section 2.2 (arXiv 2508.10925); sinks: Xiao et al. 2023 "
        "(arXiv 2309.17453)"
    )

    def __init__(self, config, layer_idx, window=128):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"heads must divide width: {config.n_head} heads do not divide {config.n_embd}")
        if type(window) is not int or window < 0 or window == 1:
            raise ValueError(
                "window must be a whole number of keys, at least 2 (a window of 1 sees itself alone; 128 is gpt-oss'), "
                f"or 0 for all, not {window!r}"
            )
        self.layer_idx = layer_idx
        self.window = window  # W
        self.heads = config.n_head  # H
        self.width = config.n_embd  # C
        self.head_width = config.n_embd // config.n_head  # D
        self.c_attn = Conv1D(3 * self.width, self.width)
        self.c_proj = Conv1D(self.width, self.width)
        self.sinks = nn.Parameter(torch.zeros(self.heads))  # b
        self.attention_dropout = config.attn_pdrop
        self.residual_dropout = nn.Dropout(config.resid_pdrop)

    @property
    def title(self):
        return f"Sinks (gpt-oss), window {self.window}" if self.window else "Sinks (gpt-oss)"

    def forward(
        self, hidden_states, past_key_values=None, padding_mask=None, seq_idx=None, position_embeddings=None, **_
    ):
        B, T, C = hidden_states.shape
        q, k, v = self.c_attn(hidden_states).split(C, dim=2)
        q, k, v = (x.view(B, T, self.heads, -1).transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        if position_embeddings is not None:
            q, k = (x.type_as(v) for x in apply_rotary_pos_emb(q, k, *position_embeddings))
        real = padding_mask  # (B, S)
        if past_key_values is not None:
            layer = past_key_values.layers[self.layer_idx]
            if self.window:
                k, v, real = layer.update(k, v, None if real is None else real[:, -T:])  # (B, H, S, D), S < W + T
            else:
                k, v = layer.update(k, v)
        S = k.shape[2]
        sees_all = not self.window or self.window >= S
        if T == 1 and sees_all:
            out = self._token(q, k, v, real)
        elif sees_all:
            out = self._whole(q, k, v, real, seq_idx)
        else:
            q = F.pad(q, (0, 0, S - T, 0))  # queries whose keys are cached: computed, and dropped
            if real is None:
                out = self._blocks(q, k, v, seq_idx=seq_idx)
            else:  # padding goes to the front, so that a window of W places holds W real keys
                order = real.argsort(dim=1, stable=True)  # (B, S)
                if seq_idx is not None:
                    seq_idx = seq_idx.gather(1, order)
                out = self._blocks(*(in_order(x, order) for x in (q, k, v)), real.gather(1, order), seq_idx)
                out = in_order(out, order.argsort(1))
            out = out[:, :, S - T :]
        out = out.transpose(1, 2).reshape(B, T, C).contiguous()  # of narrow heads a view, which Conv1D refuses
        return self.residual_dropout(self.c_proj(out)), None

    def _token(self, q, k, v, real=None):
        """One query (B, H, 1, D) and all S keys that it sees: a key more would be a copy of the cache."""
        scores = at_least_fp32(q @ k.mT) * self.head_width**-0.5  # (B, H, 1, S)
        if real is not None:
            scores = scores.masked_fill(~real[:, None, None], -torch.inf)
        sinks = self.sinks.to(scores.dtype)[:, None, None].expand(len(q), -1, -1, -1)
        weights = torch.cat([sinks, scores], dim=-1).softmax(-1)[..., 1:]
        return F.dropout(weights, self.attention_dropout, self.training).to(v.dtype) @ v

    def _whole(self, q, k, v, real=None, seq_idx=None):
        """T queries (B, H, T, D) and S keys, each query seeing all up to its own place."""
        T, S = q.shape[2], k.shape[2]
        q, k, v = self._with_sink(q, k, v, dim=2)  # k and v: of S + 1 keys
        if real is not None or seq_idx is not None:
            mask = visible_keys(T, S, real, seq_idx, k.device)
            return self._attend(q, k, v, attn_mask=F.pad(mask, (1, 0), value=True))
        if T < S:
            return self._attend(q, k, v, attn_mask=causal_lower_right(T, S + 1))
        q = F.pad(q, (0, 0, 1, 0))  # a query for the sink's own place, dropped: with as many the kernel needs no mask
        return self._attend(q, k, v, is_causal=True)[:, :, 1:]

    def _blocks(self, q, k, v, real=None, seq_idx=None):
        """(B, H, S, D) each -> (B, H, S, D): blocks of W queries beside 2 W keys and the sink. Others: (B, S)."""
        B, H, S, D = q.shape
        W = self.window
        N = -(-S // W)  # blocks; the last one is filled up
        fill = N * W - S
        q = F.pad(q, (0, 0, 0, fill)).view(B, H, N, W, D)
        k, v = (F.pad(x, (0, 0, W, fill)).view(B, H, N + 1, W, D) for x in (k, v))
        k, v = (torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=3) for x in (k, v))  # (B, H, N, 2 W, D): and those before
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in self._with_sink(q, k, v, dim=3))  # (B N, H, 2 W + 1, D+)

        i, j = torch.arange(W, device=q.device)[:, None], torch.arange(2 * W, device=q.device)
        band = (j > i) & (j <= i + W)  # (W, 2 W): query i is key i + W of its row
        exists = torch.arange(N, device=q.device)[:, None, None] * W + j >= W  # (N, 1, 2 W): no block before the first
        mask = (band & exists)[None]  # (1, N, W, 2 W)
        if seq_idx is not None:
            seq_idx = F.pad(seq_idx, (W, fill)).unfold(1, 2 * W, W)  # (B, N, 2 W): of the keys, then of the queries
            mask = mask & (seq_idx[:, :, None] == seq_idx[:, :, W:, None])  # (B, N, W, 2 W)
        if real is not None:
            mask = mask & F.pad(real, (W, fill)).unfold(1, 2 * W, W)[:, :, None]
        mask = F.pad(mask, (1, 0), value=True)  # the sink, so that no row is without a key
        mask = mask.expand(B, N, W, 2 * W + 1).reshape(B * N, 1, W, 2 * W + 1)
        out = self._attend(q, k, v, attn_mask=mask)
        return out.view(B, N, H, W, D).transpose(1, 2).reshape(B, H, N * W, D)[:, :, :S]

    def _with_sink(self, q, k, v, dim):
        """q, k and v in D+ dimensions, k and v with the sink as their first place along `dim`.

        In the dimensions added all queries are 1, all other keys 0 and the sink is its logit times √D, which the kernel
        divides by. In bf16 that is the sum of three numbers, so that it is not rounded to 8 bits.
        """
        low = q.dtype in (torch.bfloat16, torch.float16)
        added = 8 if low or q.is_cuda else 1  # a GPU's kernels want head widths of multiples of 8
        rest, parts = at_least_fp32(self.sinks) * self.head_width**0.5, []
        for _ in range(3 if low else 1):
            parts.append(rest.to(q.dtype))
            rest = rest - parts[-1]
        sink = F.pad(torch.stack(parts, dim=1), (self.head_width, added - len(parts)))  # (H, D+)
        shape = [1] * (k.dim() - 1) + [sink.shape[1]]
        shape[1] = self.heads
        q = F.pad(q, (0, added), value=1.0)
        k, v = (F.pad(x, (0, added)) for x in (k, v))
        first = sink.view(shape).expand(*k.shape[:dim], 1, -1)
        return q, torch.cat([first, k], dim=dim), torch.cat([torch.zeros_like(first), v], dim=dim)

    def _attend(self, q, k, v, **options):
        dropout = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.head_width**-0.5, **options)
        return out[..., : self.head_width]

    def new_cache(self):
        return WindowLayer(self.window) if self.window else DynamicLayer()

    def core_flops(self, context, dense=False):
        # 4 C per pair of query and key; query t sees min(t, W) keys. The sink's score is known, its value nothing.
        w = min(self.window or context, context)
        pairs = context**2 if dense else w * (w + 1) // 2 + (context - w) * w
        return 4 * self.width * pairs

    def cache_bytes(self, context, element_bytes):
        held = min(context, self.window - 1) if self.window else context
        return 2 * self.width * held * element_bytes

    def reference(self, hidden_states, position_embeddings=None):
        """A plain softmax over the window, and then the share that the sink leaves to it: σ(log Σ e^score - b)."""
        B, T, C = hidden_states.shape
        q, k, v = (x.view(B, T, self.heads, -1) for x in self.c_attn(hidden_states).split(C, dim=2))
        if position_embeddings is not None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / (C // self.heads) ** 0.5
        distance = torch.arange(T)[:, None] - torch.arange(T)
        unseen = (distance < 0) | (distance >= (self.window or T))
        scores = scores.masked_fill(unseen.to(q.device), -torch.inf)
        left = (scores.logsumexp(-1) - self.sinks[:, None]).sigmoid()  # (B, H, T)
        weights = scores.softmax(-1) * left[..., None]
        return self.c_proj(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2).contiguous())


def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def visible_keys(T, S, padding_mask, seq_idx, device):
    """(B or 1, 1, T, S) bool: keys that a query sees. T is S with `seq_idx`."""
    visible = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]
    if seq_idx is not None:
        visible = visible & (seq_idx[:, None, :, None] == seq_idx[:, None, None, :])
    return visible if padding_mask is None else visible & padding_mask[:, None, None, :]


def in_order(x, order):
    """(B, H, S, D) with its S places in the `order` (B, S)."""
    return x.gather(2, order[:, None, :, None].expand_as(x))


class WindowLayer(DynamicLayer):
    """Keys and values of the last W - 1 tokens: with the next token itself they are its window.

    `real` (B, held) says which of them are no padding, None where all are; padding is let go first. As in transformers'
    sliding layer, `activate_past_recording` keeps all until `crop` has said how many tokens to take back.
    """

    is_sliding = True
    real = None

    def __init__(self, window):
        super().__init__()
        self.window, self.seen, self.record_past = window, 0, False

    def activate_past_recording(self):
        self.record_past = True

    def update(self, key_states, value_states, real=None, *_, **__):
        if real is not None or self.real is not None:
            before = self.real
            if before is None:
                held = 0 if self.keys is None else self.keys.shape[2]
                before = torch.ones(real.shape[0], held, dtype=torch.bool, device=real.device)
            if real is None:
                real = torch.ones(before.shape[0], key_states.shape[2], dtype=torch.bool, device=before.device)
            self.real = torch.cat([before, real], dim=1)
        keys, values = super().update(key_states, value_states)
        real = self.real
        self.seen += key_states.shape[2]
        if not self.record_past:
            self._let_go()
        return keys, values, real

    def _let_go(self):
        keys, values = self.keys, self.values
        start = max(0, keys.shape[2] - (self.window - 1))
        if start and self.real is not None:
            order = self.real.argsort(dim=1, stable=True)  # (B, held)
            keys, values = in_order(keys, order), in_order(values, order)
            self.real = self.real.gather(1, order)[:, start:]
        if start:  # copies: a view would keep the whole prompt in memory behind a cache that looks small
            self.keys, self.values = keys[:, :, start:].clone(), values[:, :, start:].clone()

    def crop(self, tokens_to_remove):
        """As transformers': the number of tokens to take back, negative; a positive one is the length to keep."""
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        remove, held = min(remove, self.seen), 0 if self.keys is None else self.keys.shape[2]
        left = max(0, held - remove)
        if remove and left < min(self.window - 1, self.seen - remove):
            raise ValueError(
                f"the window of {self.window} has let go of keys that the shorter text needs; call "
                "cache.activate_past_recording() before the tokens that may be taken back"
            )
        if remove:
            self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]
            self._each(lambda real: real[:, :left])
            self.seen -= remove
        if held:
            self._let_go()

    def get_seq_length(self):
        return self.seen

    def get_mask_sizes(self, query_length):
        return self.seen + query_length, 0

    def reset(self):
        self.keys = self.values = self.real = None
        self.is_initialized, self.seen = False, 0

    def offload(self):
        super().offload()
        self._each(lambda real: real.to("cpu", non_blocking=True))

    def prefetch(self):
        super().prefetch()
        self._each(lambda real: real.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._each(lambda real: real.index_select(0, beam_idx.to(real.device)))

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self._each(lambda real: real.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._each(lambda real: real[indices])

    def _each(self, change):
        if self.real is not None:
            self.real = change(self.real)
