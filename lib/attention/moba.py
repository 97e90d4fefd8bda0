"""Mixture of block attention (MoBA): each query sees its own block of keys, and the past blocks that it likes best.

By head, keys lie in blocks of S = `block_length`. A query scores a past block by q · (the mean of its keys), takes the
`top_k` - 1 best, and sees by one softmax all keys of these and, causally, of its own block. Of equal scores the oldest
block is taken, whatever else there is. The choice itself trains nothing. Queries that took one block stand side by side
in tiles of S places, and a query's parts are joined by their log-sum-exp: O(T k S C + T² C / S) time, O(T (k S H + k C)
+ T² H / S) memory. Decoding reads all keys for the blocks' means, and the values of k blocks: O(T C) a token.
"""

import math

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D

LOG2_E = math.log2(math.e)


class Attention(nn.Module):
    by_content = True
    paper = "Lu et al. 2025, MoBA: Mixture of Block Attention, section 2.2 (arXiv 2502.13189)"

    def __init__(self, config, layer_idx, block_length=64, top_k=3):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"heads must divide width: {config.n_head} heads do not divide {config.n_embd}")
        if not isinstance(block_length, int) or block_length < 1:
            raise ValueError(f"block_length must be a whole number of keys, at least 1, not {block_length!r}")
        if not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k must be a whole number of blocks, at least 1 (a query's own), not {top_k!r}")
        self.layer_idx = layer_idx
        self.block_length, self.top_k = block_length, top_k  # S, k
        self.heads = config.n_head  # H
        self.width = config.n_embd  # C
        self.head_width = config.n_embd // config.n_head  # D
        self.c_attn = Conv1D(3 * self.width, self.width)
        self.c_proj = Conv1D(self.width, self.width)
        self.attention_dropout = nn.Dropout(config.attn_pdrop)
        self.residual_dropout = nn.Dropout(config.resid_pdrop)

    @property
    def title(self):
        return f"MoBA, {self.top_k} blocks of {self.block_length}"

    def forward(
        self, hidden_states, past_key_values=None, padding_mask=None, seq_idx=None, position_embeddings=None, **_
    ):
        B, T, C = hidden_states.shape
        q, k, v = self.c_attn(hidden_states).split(C, dim=2)
        q, k, v = (x.view(B, T, self.heads, -1).transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        if position_embeddings is not None:
            q, k = (x.type_as(v) for x in apply_rotary_pos_emb(q, k, *position_embeddings))
        if past_key_values is not None:
            k, v = past_key_values.layers[self.layer_idx].update(k, v)  # T -> M keys
        out = self._attended(q, k, v, padding_mask, seq_idx)
        out = out.transpose(1, 2).reshape(B, T, C).contiguous()  # of one head it is a view, which Conv1D refuses
        return self.residual_dropout(self.c_proj(out)), None

    def _attended(self, q, k, v, padding_mask=None, seq_idx=None):
        """T queries (B, H, T, D), the newest of M tokens, and M keys and values: (B, H, T, D)."""
        T, M, S = q.shape[2], k.shape[2], self.block_length
        place, first, N = None, None, -(-M // S)
        if padding_mask is not None or seq_idx is not None:
            place, first, N = places(padding_mask, seq_idx, S)
            k, v = (laid_out(x, place, N * S) for x in (k, v))
        if T == 1:
            own = torch.full((len(k),), M - 1, device=k.device) if place is None else place[:, -1]
            return self._newest(q, k, v, own)
        q = nn.functional.pad(q, (0, 0, M - T, 0))  # queries whose keys are cached: asked again, and dropped
        if place is None:
            q, k, v = (nn.functional.pad(x, (0, 0, 0, N * S - M)) for x in (q, k, v))
        else:
            q = laid_out(q, place, N * S)
        # On a CPU head by head: the scores of all do not fit its caches (at 8,192 tokens 1.5 times the time).
        heads = 1 if v.device.type == "cpu" else self.heads
        parts = zip(*(x.split(heads, 1) for x in (q, k, v)), strict=True)
        out = torch.cat([self._tiles(*part, first) for part in parts], dim=1)
        if place is not None:
            out = rows(out, place[:, None].expand(-1, self.heads, -1))
        return out[:, :, M - T : M]

    def _tiles(self, q, k, v, first=None):
        """(B, H, N S, D) each, in N blocks -> (B, H, N S, D).

        `first` (B, N): the first block of each block's document, which sees none before.
        """
        B, H, L, D = q.shape
        S, past = self.block_length, self.top_k - 1
        N = L // S
        q, k, v = (x.unflatten(2, (N, S)) for x in (q, k, v))  # (B, H, N, S, D)
        own = torch.arange(N, device=q.device).expand(B, H, N)
        block, query = own, torch.arange(L, device=q.device).expand(B, H, L)  # of each tile, and in each of its places
        chosen = self._chosen(q, k, first) if past and N > 1 else None  # (B, H, L, past); N where there are no more
        if chosen is not None:
            found, query_of, place = tiles_of(chosen, N, S)
            block, query = torch.cat([block, found], dim=2), torch.cat([query, query_of], dim=2)
        M = block.shape[2]  # tiles
        at = query.unflatten(2, (M, S))
        asked = q if chosen is None else rows(q.flatten(2, 3), at)  # (B, H, M, S, D)
        keys, values = ((rows(x.flatten(3), block)).unflatten(3, (S, D)) for x in (k, v))
        scores = at_least_fp32(asked @ keys.mT) * D**-0.5  # (B, H, M, S, S)
        later = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
        is_own = torch.arange(M, device=q.device)[:, None, None] < N
        # In place, since these are by far the largest tensors here; divided by their sum only where parts are joined.
        scores = scores.masked_fill_(later & is_own, torch.finfo(scores.dtype).min)
        top = scores.detach().amax(-1, keepdim=True)
        weights = scores.sub_(top).mul_(LOG2_E).exp2_()  # MKL's exp is ten times slower where it underflows
        mass = weights.sum(-1, keepdim=True)
        out = self.attention_dropout(weights).type(v.dtype) @ values  # (B, H, M, S, D)
        out, top, mass = out.flatten(2, 3), top.flatten(2), mass.flatten(2)  # (B, H, M S, *)
        if chosen is None:
            return (out / mass[..., None]).type(v.dtype)
        place = torch.cat([query[..., :L, None], L + place], dim=-1)  # (B, H, L, k): of each query's parts
        exists = torch.cat([torch.ones_like(chosen[..., :1], dtype=torch.bool), chosen < N], dim=-1)
        top, mass = (x.gather(2, place.flatten(2)).view_as(place) for x in (top, mass))
        share = (top + mass.log()).masked_fill(~exists, -torch.inf).softmax(-1) / mass  # (B, H, L, k)
        return (rows(out, place) * share[..., None]).sum(3).type(v.dtype)

    @torch.no_grad()
    def _chosen(self, q, k, first=None):
        """The past blocks that each query sees, best first: (B, H, N S, k - 1), N where there are no more."""
        N, S = q.shape[2:4]
        with torch.autocast(q.device.type, enabled=False):
            scores = at_least_fp32(q).flatten(2, 3) @ means(k).mT  # (B, H, N S, N)
        block = torch.arange(N, device=q.device)
        hidden = block >= block[:, None]  # (N, N): of a block's queries, the blocks that are not past
        if first is not None:
            hidden = (hidden | (block < first[..., None]))[:, None]  # (B, 1, N, N)
        return self._best(scores.masked_fill_(hidden.repeat_interleave(S, dim=-2), -torch.inf))

    def _best(self, scores):
        """The blocks of the k - 1 highest scores (*, N), of equals the oldest: (*, k - 1), N where there is no more."""
        N, found = scores.shape[-1], []
        for _ in range(self.top_k - 1):
            best, block = scores.max(-1, keepdim=True)  # of equals the first
            found.append(block.where(best > -torch.inf, N))
            scores = scores.scatter(-1, block, -torch.inf)
        return torch.cat(found, dim=-1)

    def _newest(self, q, k, v, own):
        """One query (B, H, 1, D) at the place `own` (B,) among keys and values (B, H, L, D): (B, H, 1, D)."""
        _, H, L, D = k.shape
        S, N = self.block_length, L // self.block_length  # whole blocks, which alone can be past
        block = (own // S)[:, None, None].expand(-1, H, 1)  # (B, H, 1)
        if self.top_k > 1 and N > 0:
            with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
                scores = (at_least_fp32(q) @ means(k[:, :, : N * S].unflatten(2, (N, S))).mT).squeeze(2)  # (B, H, N)
                hidden = torch.arange(N, device=q.device) >= block
                past = self._best(scores.masked_fill(hidden, -torch.inf))
            block = torch.cat([block, past.where(past < N, N + 1)], dim=2)  # (B, H, k); behind all, where none is left
        place = (block[..., None] * S + torch.arange(S, device=q.device)).flatten(2)  # (B, H, k S)
        hidden, place = place > own[:, None, None], place.clamp(max=L - 1)
        scores = at_least_fp32(q @ rows(k, place).mT) * D**-0.5  # (B, H, 1, k S)
        scores = scores.masked_fill(hidden[:, :, None], torch.finfo(scores.dtype).min)
        return self.attention_dropout(scores.softmax(-1)).type(v.dtype) @ rows(v, place)

    def new_cache(self):
        return DynamicLayer()

    def core_flops(self, context, dense=False):
        # A multiply and an add each: 4 C per pair of query and key, 2 C per query and past block; C per key for means.
        S, N = self.block_length, -(-context // self.block_length)
        asked = sum(n * min(S, context - n * S) for n in range(N)) if self.top_k > 1 else 0
        if dense:
            pairs = context**2
        else:
            sizes = [min(S, context - n * S) for n in range(N)]
            pairs = sum(m * (m + 1) // 2 + m * S * min(n, self.top_k - 1) for n, m in enumerate(sizes))
        return self.width * (4 * pairs + 2 * asked + (context if self.top_k > 1 else 0))

    def cache_bytes(self, context, element_bytes):
        return 2 * self.width * context * element_bytes

    def reference(self, hidden_states, position_embeddings=None):
        """All T x T scores, of which a query keeps those of its own block and of those that rank among its best."""
        B, T, C = hidden_states.shape
        S = self.block_length
        q, k, v = (x.view(B, T, self.heads, -1) for x in self.c_attn(hidden_states).split(C, dim=2))  # (B, T, H, D)
        if position_embeddings is not None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        seen = torch.zeros(B, self.heads, T, T, dtype=torch.bool, device=q.device)
        means = [part.mean(1) for part in k.detach().split(S, dim=1)]  # (B, H, D) each
        for t in range(T):
            own = t // S
            seen[:, :, t, own * S : t + 1] = True
            if own and self.top_k > 1:
                liking = torch.stack([(q[:, t].detach() * mean).sum(-1) for mean in means[:own]], dim=-1)  # (B, H, own)
                order = liking.argsort(dim=-1, descending=True, stable=True)[..., : self.top_k - 1]
                taken = torch.zeros_like(liking, dtype=torch.bool).scatter(-1, order, True)
                seen[:, :, t, : own * S] = taken.repeat_interleave(S, dim=-1)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(C // self.heads)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return self.c_proj(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))


def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def means(k):
    """Of keys in blocks (B, H, N, S, D): (B, H, N, D), in float32 at least."""
    return k.mean(3, dtype=torch.promote_types(k.dtype, torch.float32))


def rows(x, index):
    """x (B, H, L, *) at the index (B, H, ...): (B, H, ..., *)."""
    flat = index.flatten(2)
    return x.gather(2, flat[..., None].expand(-1, -1, -1, x.shape[-1])).view(*index.shape, x.shape[-1])


def tiles_of(chosen, N, S):
    """Queries that took one block, side by side in tiles of S places: of chosen (B, H, L, p), blocks below N.

    Gives the block of each of M tiles (B, H, M), the query in each place (B, H, M S), some query where nobody stands,
    and the place of each choice (B, H, L, p), the first where it is none. M depends on shapes alone.
    """
    B, H, L, p = chosen.shape
    M = L * p // S + N  # each block's last tile may be filled by one query
    taken, order = chosen.flatten(2).sort(dim=-1, stable=True)  # (B, H, L p): by block, none at the end
    counts = torch.zeros(B, H, N + 1, dtype=torch.long, device=chosen.device)
    counts = counts.scatter_add_(2, taken, torch.ones_like(taken))
    tiles = -(-counts // S)
    begin_tile = tiles.cumsum(2) - tiles  # (B, H, N + 1): of each block's tiles
    begin = counts.cumsum(2) - counts
    rank = torch.arange(L * p, device=chosen.device) - begin.gather(2, taken)  # among those of the block
    place = begin_tile.gather(2, taken) * S + rank
    place = place.where(taken < N, M * S)  # none: behind all tiles
    query = torch.zeros(B, H, M * S + 1, dtype=torch.long, device=chosen.device)
    query = query.scatter(2, place, order // p)[..., :-1]
    block = torch.zeros(B, H, M * S + 1, dtype=torch.long, device=chosen.device)
    block = block.scatter(2, place, taken)[..., :-1:S]
    place = torch.empty_like(place).scatter(2, order, place.where(taken < N, 0))
    return block, query, place.unflatten(2, (L, p))


def places(padding_mask, seq_idx, S):
    """Where tokens stand so that each document begins with a block of S, and padding behind all: (B, M); with the first
    block of each block's document, (B, N), and N."""
    given = seq_idx if padding_mask is None else padding_mask
    (B, M), document = given.shape, torch.zeros_like(given, dtype=torch.long)
    if seq_idx is not None:
        document[:, 1:] = (seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1)
    if padding_mask is not None:
        document = document.masked_fill(~padding_mask, M)
    document, order = document.sort(dim=1, stable=True)
    token = torch.arange(M, device=document.device).expand(B, M)
    is_new = torch.ones_like(document, dtype=torch.bool)
    is_new[:, 1:] = document[:, 1:] != document[:, :-1]
    begin = token.where(is_new, 0).cummax(1).values
    offset = token - begin  # in its document
    block = (offset % S == 0).cumsum(1) - 1
    place = torch.empty_like(token).scatter(1, order, block * S + offset % S)
    N = -(-M // S) + 1 if seq_idx is None else int(block.max()) + 1
    first = block.gather(1, begin)
    return place, place.new_zeros(B, N).scatter(1, block, first), N


def laid_out(x, place, length):
    """(B, H, M, D) with its tokens at their `place` (B, M): (B, H, length, D), zeros between."""
    index = place[:, None, :, None].expand_as(x)
    return x.new_zeros(*x.shape[:2], length, x.shape[3]).scatter(2, index, x)
