"""Locality-sensitive hashing attention, made causal: each query sees the newest keys of its own bucket, in R rounds.

One vector is query and key: score = q·k / ‖k‖, softmax over the K = `chunk_length` newest members of its bucket, itself
counted but at -1e5, so that it matters only when alone. A round's buckets are argmax [x M; -x M] of its random
rotation M; the R = `n_hashes` rounds are joined by their log-sum-exp, so a key met in n rounds counts n times.
O(R T (K + buckets) C) time and O(R T (K + C)) memory: sorted by bucket, a query's keys lie in its own block of K places
or the one before.

The paper's rule, chunk_boundaries="reformer", sees all of these two blocks up to its own time. A later token moves the
blocks' boundaries, so it is not causal: it is here to be compared, fails the certificate, and is not what `reference`
computes.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D

ALONE = -1e5  # score of a token with itself: as transformers' Reformer has it
LOG2_E = math.log2(math.e)


class Attention(nn.Module):
    title = "LSH (Reformer)"
    by_content = True
    paper = "Kitaev et al. 2020, Reformer, section 2 (arXiv 2001.04451), with causal chunk boundaries"

    def __init__(self, config, layer_idx, n_hashes=4, chunk_length=64, buckets=None, chunk_boundaries="causal"):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"heads must divide width: {config.n_head} heads do not divide {config.n_embd}")
        if type(n_hashes) is not int or n_hashes < 1:
            raise ValueError(f"n_hashes must be at least 1 and whole, not {n_hashes!r}")
        if type(chunk_length) is not int or chunk_length < 2:
            raise ValueError(
                f"chunk_length must be at least 2 and whole (a query counts itself among its keys), not "
                f"{chunk_length!r}"
            )
        if buckets is None:  # from the positions: a number taken from the length at hand would leak it
            buckets = 2 * max(1, config.n_positions // (2 * chunk_length))
        if type(buckets) is not int or buckets % 2 or not 2 <= buckets < 2**15:
            raise ValueError(f"buckets must be even (directions and their opposites) and 2 to 32766, not {buckets!r}")
        if chunk_boundaries not in ("causal", "reformer"):
            raise ValueError(
                f"chunk_boundaries must be 'causal' or 'reformer' (the paper's, which leaks), not {chunk_boundaries!r}"
            )
        self.layer_idx = layer_idx
        self.n_hashes, self.chunk_length, self.buckets, self.chunk_boundaries = (
            n_hashes,
            chunk_length,
            buckets,
            chunk_boundaries,
        )  # R, K
        self.heads = config.n_head  # H
        self.width = config.n_embd  # C
        self.c_attn = Conv1D(2 * self.width, self.width)  # shared query and key, value
        self.c_proj = Conv1D(self.width, self.width)
        # A buffer, saved with the weights: other rotations would be other attention.
        self.register_buffer("rotations", torch.randn(self.heads, self.width // self.heads, n_hashes * buckets // 2))
        self.attention_dropout = nn.Dropout(config.attn_pdrop)
        self.residual_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, hidden_states, past_key_values=None, padding_mask=None, seq_idx=None, position_embeddings=None, **_
    ):
        B, T, C = hidden_states.shape
        qk, v = (x.view(B, T, self.heads, -1).transpose(1, 2) for x in self.c_attn(hidden_states).split(C, dim=2))
        buckets = self.hash(qk)  # (B, H, R, T); qk, v: (B, H, T, D)
        if position_embeddings is not None:  # behind the hash: tokens meet by content, wherever they stand
            qk = apply_rotary_pos_emb(qk, qk, *position_embeddings)[0].type_as(v)
        if past_key_values is not None:
            qk, v, buckets = past_key_values.layers[self.layer_idx].update(qk, v, buckets)  # T -> S
        span = self.buckets + 1  # labels of a round: its buckets, and one for padding
        if (padding_mask is not None or seq_idx is not None) and self.chunk_boundaries == "reformer":
            raise ValueError("chunk_boundaries='reformer' takes no padding and one document a row; both move them")
        if padding_mask is not None:
            buckets = buckets.masked_fill(~padding_mask[:, None, None], self.buckets)
        if seq_idx is not None:  # each document has buckets of its own
            buckets = buckets + span * seq_idx[:, None, None]
            span = span * (seq_idx.max() + 1)
        if T == 1 and self.chunk_boundaries == "causal":
            out = self._newest(qk, v, buckets)
        else:
            # What is cached are queries too: they are asked again, and only the new answers kept. On a CPU head by
            # head: the scores of all do not fit its caches (at 8,192 tokens 1.5 times the time).
            heads = 1 if v.device.type == "cpu" else self.heads
            parts = zip(qk.split(heads, 1), v.split(heads, 1), buckets.split(heads, 1), strict=True)
            out = torch.cat([self._sorted(*part, span) for part in parts], dim=1)[:, :, -T:]
        out = out.transpose(1, 2).reshape(B, T, C).contiguous()  # of narrow heads a view, which Conv1D refuses
        return self.residual_dropout(self.c_proj(out)), None

    @torch.no_grad()
    def hash(self, qk):
        """(B, H, T, D) -> (B, H, R, T): the bucket in each round, in float32 whatever the precision around it."""
        with torch.autocast(qk.device.type, enabled=False):
            rotated = qk.float() @ self.rotations.float()  # (B, H, T, R buckets/2)
        rotated = rotated.unflatten(-1, (self.n_hashes, self.buckets // 2))
        # argmax [x R; -x R] without writing both: the longest component, and its sign. int16, since the cache keeps it.
        longest = rotated.abs().argmax(-1, keepdim=True)
        opposite = rotated.gather(-1, longest) < 0
        return (longest + opposite * (self.buckets // 2)).squeeze(-1).transpose(2, 3).to(torch.int16)

    def _sorted(self, qk, v, buckets, span):
        """All S queries, (B, H, S, D): each round sorted by bucket, rounds end to end, in N blocks of K places.

        A round's buckets are below `span`.
        """
        R, S = buckets.shape[2:]
        K, D = self.chunk_length, qk.shape[-1]
        fill = -R * S % K
        buckets, time = buckets.sort(dim=-1, stable=True)  # (B, H, R, S): a bucket's members together, oldest first
        place = torch.empty_like(time).scatter_(-1, time, torch.arange(S, device=time.device).expand_as(time))

        def blocks(x, value):  # (B, H, R, S) -> (B, H, N, K)
            return F.pad(x.flatten(2), (0, fill), value=value).unflatten(2, (-1, K))

        index = blocks(time, value=0)  # what fills up is some token, seen by none
        q = rows(qk, index)  # (B, H, N, K, D)
        k, v = rows(torch.cat([unit(qk), v], dim=-1), beside_block_before(index)).split(D, dim=-1)  # (B, H, N, 2 K, D)
        if self.chunk_boundaries == "causal":
            label = buckets + torch.arange(R, device=time.device)[:, None] * span  # others in each round
            label = blocks(label, value=-1)  # (B, H, N, K)
            labels = beside_block_before(label)  # (B, H, N, 2 K)
            labels[:, :, 0, :K] = -2  # what wrapped around
            i = torch.arange(2 * K, device=time.device)
            distance = i[K:, None] - i  # (K, 2 K), in places
            visible = (distance >= 0) & (distance < K) & (label[..., None] == labels[..., None, :])
            own = distance == 0
        else:
            t = blocks(time, value=S)  # (B, H, N, K): what fills up comes after all
            distance = t[..., None] - beside_block_before(t)[..., None, :]  # (B, H, N, K, 2 K), here in time
            visible, own = distance >= 0, distance == 0

        scores = at_least_fp32(q @ k.transpose(-1, -2))  # (B, H, N, K, 2 K)
        # In place, since these are by far the largest tensors here; divided by their sum only where rounds are joined.
        # Added, not filled in: that costs the backward pass nothing, and -1e5 added is as far away as -1e5.
        bias = torch.where(own, ALONE, 0.0).to(scores.dtype).masked_fill(~visible, torch.finfo(scores.dtype).min)
        scores = scores.add_(bias)
        top = scores.detach().amax(-1, keepdim=True)
        weights = scores.sub_(top).mul_(LOG2_E).exp2_()  # MKL's exp is ten times slower where it underflows
        mass = weights.sum(-1, keepdim=True)
        out = self.attention_dropout(weights).type(v.dtype) @ v  # (B, H, N, K, D)

        place = place + torch.arange(R, device=time.device)[:, None] * S  # rounds end to end

        def unsorted(x):  # (B, H, N, K, *) -> (B, H, R, S, *)
            return rows(x.flatten(2, 3), place)

        top, mass = unsorted(top), unsorted(mass)
        share = (top + mass.log()).softmax(2)  # (B, H, R, S, 1): by the log-sum-exp of each round's scores
        return (unsorted(out) * (share / mass)).sum(2).type(v.dtype)

    def _newest(self, qk, v, buckets):
        """The last query alone, (B, H, 1, D), over the K newest keys of its bucket in each round."""
        S, D = qk.shape[2:]
        time = torch.arange(S, device=qk.device)
        time = (
            torch.where(buckets == buckets[..., -1:], time, -1).topk(min(self.chunk_length, S)).values
        )  # (B, H, R, K)
        time = time.flatten(2)[:, :, None]  # (B, H, 1, R K); -1 where the bucket has no more
        index = time.clamp(min=0).transpose(2, 3).expand(-1, -1, -1, D)  # (B, H, R K, D)
        scores = at_least_fp32(qk[:, :, -1:] @ unit(qk.gather(2, index)).transpose(2, 3))  # (B, H, 1, R K)
        scores = scores.masked_fill_(time == S - 1, ALONE).masked_fill_(time < 0, torch.finfo(scores.dtype).min)
        return self.attention_dropout(scores.softmax(-1)).type(v.dtype) @ v.gather(2, index)

    def new_cache(self):
        return BucketLayer()

    def core_flops(self, context, dense=False):
        # 4 C per pair of query and key and round, as if the buckets filled evenly (which keys meet is in the data);
        # "reformer": half of two chunks comes no later. Hashing: 2 C per token and direction of a rotation.
        if dense:
            pairs = context**2
        elif self.chunk_boundaries == "reformer":
            pairs = context * (min(2 * self.chunk_length, context) + 1) // 2
        else:
            pairs = sum(min(self.chunk_length, t // self.buckets + 1) for t in range(context))
        return self.n_hashes * self.width * (4 * pairs + self.buckets * context)

    def cache_bytes(self, context, element_bytes):
        return context * (2 * self.width * element_bytes + 2 * self.heads * self.n_hashes)

    def reference(self, hidden_states, position_embeddings=None):
        """All T x T scores, and for each pair the number of rounds in which they meet: nothing is sorted."""
        B, T, C = hidden_states.shape
        qk, v = (x.view(B, T, self.heads, -1) for x in self.c_attn(hidden_states).split(C, dim=2))
        rotated = torch.einsum("bthd,hdm->bhtm", qk.detach().float(), self.rotations.float())
        rotated = rotated.unflatten(-1, (self.n_hashes, -1))  # (B, H, T, R, buckets/2)
        high, low = rotated.max(-1), rotated.min(-1)
        bucket = torch.where(high.values >= -low.values, high.indices, low.indices + self.buckets // 2)
        same = (bucket[:, :, :, None] == bucket[:, :, None]).movedim(-1, 2).tril()  # (B, H, R, T, T)
        since = same.flip(-1).cumsum(-1).flip(-1)  # members from this key to the query
        met = (same & (since <= self.chunk_length)).sum(2)  # (B, H, T, T)
        if position_embeddings is not None:
            qk, _ = apply_rotary_pos_emb(qk, qk, *position_embeddings, unsqueeze_dim=2)
        length = (qk.square().sum(-1, keepdim=True) + 1e-6 * qk.shape[-1]).sqrt()
        scores = torch.einsum("bthd,bshd->bhts", qk, qk / length)
        scores = torch.where(torch.eye(T, dtype=torch.bool, device=qk.device), ALONE, scores) + met.type_as(qk).log()
        return self.c_proj(torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2).contiguous())


def unit(x):
    """To length 1 over the last dimension, a vanishing x to 0: transformers' Reformer adds the same 1e-6."""
    x32 = at_least_fp32(x)
    return (x32 * (x32.square().sum(-1, keepdim=True) + 1e-6 * x.shape[-1]).rsqrt()).type_as(x)


def rows(x, index):
    """(B, H, S, *) at (B, H, ...) of its S rows. An embedding moves whole rows, where `gather` goes by element."""
    first = torch.arange(x[..., 0, 0].numel(), device=x.device).view(x.shape[:2]) * x.shape[2]
    return F.embedding(index + first[(..., *[None] * (index.dim() - 2))], x.flatten(0, 2))


def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def beside_block_before(x):
    """(B, H, N, K, *) -> (B, H, N, 2 K, *); the last block stands before the first, as in transformers."""
    return torch.cat([x.roll(1, 2), x], dim=3)


class BucketLayer(DynamicLayer):
    """What is query and key (before its norm), the value, and the bucket in each round, of every token."""

    buckets = None
    reserved = 0  # tokens that there is to be room for
    room = ()  # of keys, values and buckets, with free places behind those that are taken

    def reserve(self, tokens):
        """From its first update on the layer has room for so many tokens, and moves none of them. A shallow copy then
        is a branch: what it adds lies behind the tokens that both know."""
        self.reserved = tokens

    def update(self, key_states, value_states, buckets, *_, **__):
        past, taken = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        elsewhere = past and (not self.room or self.keys.data_ptr() != self.room[0].data_ptr())  # reordered, say
        if taken > self.reserved or elsewhere:
            keys, values = super().update(key_states, value_states)
            # (B, H, R, S)
            self.buckets = buckets if self.buckets is None else torch.cat([self.buckets, buckets], dim=-1)
            return keys, values, self.buckets
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            heads = key_states.shape[:2]
            self.room = [x.new_empty(*heads, self.reserved, x.shape[3]) for x in (key_states, value_states)]
            self.room.append(buckets.new_empty(*heads, buckets.shape[2], self.reserved))
        keys, values, known = self.room
        keys[:, :, past:taken], values[:, :, past:taken], known[..., past:taken] = key_states, value_states, buckets
        self.keys, self.values, self.buckets = keys[:, :, :taken], values[:, :, :taken], known[..., :taken]
        return self.keys, self.values, self.buckets

    def crop(self, tokens_to_remove):
        super().crop(tokens_to_remove)
        self._each(lambda buckets: buckets[..., : self.get_seq_length()])

    def reset(self):
        self.keys = self.values = self.buckets = None
        self.is_initialized = False

    def offload(self):
        super().offload()
        self._each(lambda buckets: buckets.to("cpu", non_blocking=True))

    def prefetch(self):
        super().prefetch()
        self._each(lambda buckets: buckets.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._each(lambda buckets: buckets.index_select(0, beam_idx.to(buckets.device)))

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self._each(lambda buckets: buckets.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._each(lambda buckets: buckets[indices])

    def _each(self, change):
        if self.buckets is not None:
            self.buckets = change(self.buckets)
