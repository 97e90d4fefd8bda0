"""Sliding-window attention: each query sees the W newest keys, itself included; softmax over those alone.

O(T W C) time and O(T C) memory: queries go in blocks of W, each beside its own keys and the block before. With a window
of T or more it is GPT-2's own attention. Over L layers, information travels L (W - 1) tokens.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D


class Attention(nn.Module):
    paper = "Beltagy et al. 2020, Longformer, section 3.1 (arXiv 2004.05150); causal: Mistral 7B (arXiv 2310.06825)"

    def __init__(self, config, layer_idx, window=128):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"heads must divide width: {config.n_head} heads do not divide {config.n_embd}")
        if type(window) is not int or window < 2:
            raise ValueError(
                f"window must be a whole number of keys, at least 2 (a window of 1 sees itself alone), not {window!r}"
            )
        self.layer_idx = layer_idx
        self.window = window  # W
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
        q, k, v = self.c_attn(hidden_states).split(C, dim=2)
        q, k, v = (x.view(B, T, self.heads, -1).transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        if position_embeddings is not None:
            q, k = (x.type_as(v) for x in apply_rotary_pos_emb(q, k, *position_embeddings))
        real = None if padding_mask is None else padding_mask[:, -T:]  # (B, T)
        if past_key_values is not None:
            k, v, real = past_key_values.layers[self.layer_idx].update(k, v, real)  # (B, H, S, D), S < W + T; (B, S)
        S = k.shape[2]
        if real is None and seq_idx is None and self.window >= S and T in (1, S):
            causal = T > 1 and real is None  # `and` makes a bool of it under torch.compile too
            out = self._attend(q, k, v, is_causal=causal)
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

    def _attend(self, q, k, v, **options):
        dropout = self.attention_dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **options)

    def _blocks(self, q, k, v, real=None, seq_idx=None):
        """(B, H, S, D) each -> (B, H, S, D): blocks of W queries beside 2 W keys. `real`, `seq_idx`: (B, S)."""
        B, H, S, D = q.shape
        W = min(self.window, S)
        N = -(-S // W)  # blocks; the last one is filled up
        fill = N * W - S
        q = F.pad(q, (0, 0, 0, fill)).view(B, H, N, W, D).transpose(1, 2).flatten(0, 1)  # (B N, H, W, D)
        k, v = (self._with_block_before(x, W, N, fill) for x in (k, v))  # (B N, H, 2 W, D)

        i, j = torch.arange(W, device=q.device)[:, None], torch.arange(2 * W, device=q.device)
        band = (j > i) & (j <= i + W)  # (W, 2 W): query i is key i + W of its row
        exists = torch.arange(N, device=q.device)[:, None, None] * W + j >= W  # (N, 1, 2 W): no block before the first
        mask = (band & exists)[None]  # (1, N, W, 2 W)
        if seq_idx is not None:
            seq_idx = F.pad(seq_idx, (W, fill)).unfold(1, 2 * W, W)  # (B, N, 2 W): of the keys, then of the queries
            mask = mask & (seq_idx[:, :, None] == seq_idx[:, :, W:, None])  # (B, N, W, 2 W)
        if real is not None:
            real = F.pad(real, (W, fill)).unfold(1, 2 * W, W)  # (B, N, 2 W)
            mask = (mask & real[:, :, None]) | (j == i + W)  # itself: no row without a key
        mask = mask.expand(B, N, W, 2 * W).reshape(B * N, 1, W, 2 * W)
        out = self._attend(q, k, v, attn_mask=mask)
        return out.view(B, N, H, W, D).transpose(1, 2).reshape(B, H, N * W, D)[:, :, :S]

    @staticmethod
    def _with_block_before(x, W, N, fill):
        """(B, H, S, D) -> (B N, H, 2 W, D): each block of W keys behind the one before it, zeros before the first."""
        B, H, _, D = x.shape
        blocks = F.pad(x, (0, 0, W, fill)).view(B, H, N + 1, W, D)
        pairs = torch.cat([blocks[:, :, :-1], blocks[:, :, 1:]], dim=3)  # (B, H, N, 2 W, D)
        return pairs.transpose(1, 2).flatten(0, 1)

    @staticmethod
    def as_gpt2(config):
        return {"window": config.n_positions}

    def new_cache(self):
        return WindowLayer(self.window)

    @property
    def title(self):
        return f"Window {self.window}"

    def core_flops(self, context, dense=False):
        # 4 C per pair of query and key; query t sees min(t, W) keys.
        w = min(self.window, context)
        pairs = context**2 if dense else w * (w + 1) // 2 + (context - w) * w
        return 4 * self.width * pairs

    def cache_bytes(self, context, element_bytes):
        return 2 * self.width * min(context, self.window - 1) * element_bytes

    def reference(self, hidden_states, position_embeddings=None):
        """All T x T scores, those outside the window set to -inf."""
        B, T, C = hidden_states.shape
        q, k, v = (x.view(B, T, self.heads, -1) for x in self.c_attn(hidden_states).split(C, dim=2))
        if position_embeddings is not None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / (C // self.heads) ** 0.5
        distance = torch.arange(T)[:, None] - torch.arange(T)
        scores = scores.masked_fill(((distance < 0) | (distance >= self.window)).to(q.device), -torch.inf)
        return self.c_proj(torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2).contiguous())


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
