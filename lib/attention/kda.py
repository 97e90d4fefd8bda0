"""Kimi Delta Attention (Kimi Linear): the gated delta rule with a rate of decay for each channel.

By head, with q and k of length 1: S_t = Λ_t S_{t-1} + β_t k_t (v_t - (Λ_t S_{t-1})ᵀ k_t)ᵀ, o_t = S_tᵀ q_t / √D, then a
norm and a sigmoid gate. Λ_t = diag(e^{g_t}), g_t = -e^A softplus(x_t W_down W_up + dt) in D channels, where
`gated_deltanet` has one number a head; β_t = σ(x_t W_b) is the rate of writing. Inside a chunk of c tokens i meets
j < i by Σ_d k_id k_jd e^{g_{j+1,d} + ... + g_{i,d}}: where they lie on two sides of a middle that is a product of what
decays up to it and from it on, both at most 1, so that nothing overflows however strong the decay; and the halves are
halved again. O(T C (c + D)) time, O(T C (log c + c / D + D / c)) memory; decoding costs O(C D) a token from a cache
that does not grow.
"""

import math
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import CacheLayerMixin
from transformers.pytorch_utils import Conv1D

EPSILON = 1e-6  # of the lengths of q and k
NORM_EPSILON = 1e-5  # both as transformers' Kimi Linear has them


class Attention(nn.Module):
    paper = "Kimi Team 2025, Kimi Linear, sections 3 and 4 (arXiv 2510.26692)"
    needs_no_positions = True  # a state knows what came last

    def __init__(self, config, layer_idx, chunk=16, heads=0, kernels="torch"):
        super().__init__()
        if type(heads) is not int or heads < 0:
            raise ValueError(f"heads must be a whole number that divides width, or 0 for the model's, not {heads!r}")
        heads = heads or config.n_head
        if config.n_embd % heads:
            raise ValueError(f"heads must divide width: {heads} heads do not divide {config.n_embd}")
        if type(chunk) is not int or chunk < 1 or chunk & (chunk - 1):
            raise ValueError(
                f"chunk must be a power of two, since it is halved again and again (16 is usual), not {chunk!r}"
            )
        if kernels not in ("torch", "fla"):
            raise ValueError(f"kernels must be 'torch', or 'fla' for fla-core's on CUDA, not {kernels!r}")
        self.layer_idx = layer_idx
        self.chunk, self.kernels = chunk, kernels  # chunk: c
        self.heads = heads  # H
        self.width = config.n_embd  # C
        self.head_width = config.n_embd // heads  # D
        self.c_attn = Conv1D(3 * self.width, self.width)  # query, key, value
        self.c_down = Conv1D(2 * self.head_width + self.heads, self.width)  # to decay and gate, and the rate of writing
        self.c_decay = Conv1D(self.width, self.head_width)
        self.c_gate = Conv1D(self.width, self.head_width)
        self.c_proj = Conv1D(self.width, self.width)
        self.norm = nn.Parameter(torch.ones(self.head_width))
        # As Mamba-2 draws them: half-lives from a token to some thousand.
        dt = torch.empty(self.width).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.A = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        # `attn_pdrop` has nothing to act on: the weights of a query never exist, only the state does.
        self.residual_dropout = nn.Dropout(config.resid_pdrop)

    @property
    def title(self):
        return "KDA (Kimi Linear)" + (", fla kernels" if self.kernels == "fla" else "")

    def forward(self, hidden_states, past_key_values=None, padding_mask=None, seq_idx=None, **_):
        B, T, C = hidden_states.shape
        qkv = self.c_attn(hidden_states)
        # A sum of many updates, a system that is solved, exponents: in bf16 all would lose what they carry.
        with torch.autocast(hidden_states.device.type, enabled=False):
            q, k, v = (x.view(B, T, self.heads, -1).transpose(1, 2) for x in at_least_fp32(qkv).split(C, dim=2))
            q, k = unit(q) * self.head_width**-0.5, unit(k)  # (B, H, T, D)
            down = in_fp32(self.c_down, hidden_states)
            to_decay, to_gate, rates = down.split([self.head_width, self.head_width, self.heads], dim=2)
            g = F.softplus(in_fp32(self.c_decay, to_decay) + self.dt).view(B, T, self.heads, -1).transpose(1, 2)
            g, beta = -self.A.exp()[:, None, None] * g, rates.sigmoid().mT  # (B, H, T, D), (B, H, T)
            if padding_mask is not None:  # writes nothing, and nothing decays
                real = padding_mask[:, None, -T:]
                beta, g = beta.where(real, 0.0), g.where(real[..., None], 0.0)

            layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
            state = None if layer is None or not layer.is_initialized else layer.state  # (B, H, D, D)
            state = zero_state(k, v) if state is None else state
            if T == 1:
                out, state = self._recurrent(q, k, v, beta, g, state)
            elif self.kernels == "fla" and takes_kernels(q, seq_idx):
                out, state = self._fused(q, k, v, beta, g, state, qkv.dtype)
            else:
                out, state = self._chunked(q, k, v, beta, g, state, seq_idx)
            if layer is not None:
                layer.update(state, tokens=T)
            out = out * (out.square().mean(-1, keepdim=True) + NORM_EPSILON).rsqrt() * self.norm  # (B, H, T, D)
            gate = in_fp32(self.c_gate, to_gate).sigmoid()  # (B, T, C)
        out = out.transpose(1, 2).reshape(B, T, C)
        out = (out * gate).to(qkv.dtype).contiguous()  # of heads one wide it is a view, which Conv1D refuses
        return self.residual_dropout(self.c_proj(out)), None

    @staticmethod
    def _recurrent(q, k, v, beta, g, state):
        """One token, (B, H, 1, D) each -> out (B, H, 1, D) and the state behind it."""
        state = state * g.exp().mT
        state = state + k.mT @ (beta[..., None] * (v - k @ state))  # (B, H, D, D)
        return q @ state, state

    def _chunked(self, q, k, v, beta, g, state, seq_idx=None):
        """(B, H, T, D) each, beta (B, H, T) -> out (B, H, T, D) and the state behind the last token.

        What the tokens of a chunk write is U = (I + A)⁻¹ β V and what they erase of the state before it W = (I + A)⁻¹ β
        K e^{since}, where A holds what a token finds of the earlier ones of its chunk. With `seq_idx` (B, T) each
        document starts from nothing.
        """
        T, D = q.shape[2:]
        c = self.chunk
        N = -(-T // c)  # chunks; the last one is filled up with zeros, which neither write nor decay
        q, k, v, g = (F.pad(x, (0, 0, 0, N * c - T)).unflatten(2, (N, c)) for x in (q, k, v, g))  # (B, H, N, c, D)
        beta = F.pad(beta, (0, N * c - T)).unflatten(2, (N, c))[..., None]
        written = k * beta
        (system, scores), since, until = self._pairs(torch.stack([written, q]), k, g)
        last = since[..., -1:, :].exp().mT  # (B, H, N, D, 1): decay over the whole chunk
        since, until = since.exp(), until.exp()  # from the chunk's begin to a token, from a token to its end
        if seq_idx is not None:
            same, begins, ends, goes_through = documents(seq_idx, N, c)
            system, scores = system * same, scores * same
            since, until, last = since * begins, until * ends, last * goes_through
        both = torch.cat([v * beta, written * since], dim=-1)
        # Of the system the diagonal is not read.
        u, w = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True).split(D, dim=-1)
        q, k = q * since, (k * until).mT  # k: (B, H, N, D, c)

        # Unbound at once: the backward pass of x[:, :, n] writes a tensor of the size of x, for each of the N chunks.
        out, chunks = [], (x.unbind(2) for x in (q, k, u, w, scores, last))
        for queries, keys, own, erased, weights, kept in zip(*chunks, strict=True):
            new = own - erased @ state  # (B, H, c, D): what each token writes
            out.append(queries @ state + weights @ new)
            state = state * kept + keys @ new
        return torch.cat(out, dim=2)[:, :, :T], state

    @staticmethod
    def _pairs(readers, k, g):
        """readers (2, B, H, N, c, D), k and logs of the decay g (B, H, N, c, D) -> what each reader finds of each k up
        to its own, decayed on the way, (2, B, H, N, c, c), and logs of the decay since the chunk began and until it
        ends (B, H, N, c, D)."""
        # In spans of s tokens, s = 1, 2, 4, ..., c: (..., c / s, s, *), of which two and two become one.
        reads, since, until = (x.unsqueeze(-2) for x in (readers, g, torch.zeros_like(g)))
        keys = k.unsqueeze(-2)
        found = (reads * keys).sum(-1, keepdim=True)  # (2, B, H, N, c, 1, 1): each its own, which no time has passed
        while keys.shape[-3] > 1:
            (_, late), (early, _), (since_early, since_late), (until_early, until_late), (first, second) = (
                x.unflatten(-3, (-1, 2)).unbind(-3) for x in (reads, keys, since, until, found)
            )
            across = (late * since_late.exp()) @ (early * until_early.exp()).mT  # (2, B, H, N, c / 2 s, s, s)
            first, second = F.pad(first, (0, across.shape[-1])), torch.cat([across, second], dim=-1)
            found = torch.cat([first, second], dim=-2)
            since = torch.cat([since_early, since_late + since_early[..., -1:, :]], dim=-2)
            whole_late = until_late[..., :1, :] + since_late[..., :1, :]  # the decay over all of the late half
            until = torch.cat([until_early + whole_late, until_late], dim=-2)
            reads, keys = (x.flatten(-3, -2).unflatten(-2, since.shape[-3:-1]) for x in (reads, keys))
        return found.squeeze(-3), since.squeeze(-3), until.squeeze(-3)

    @staticmethod
    def _fused(q, k, v, beta, g, state, dtype):
        """As `_chunked`, by fla-core's kernels (github.com/fla-org/flash-linear-attention) on q, k, v of `dtype`."""
        from fla.ops.kda import chunk_kda  # on CUDA alone

        q, k, v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))  # theirs has time before heads
        out, state = chunk_kda(q, k, v, g.transpose(1, 2), beta.mT, 1.0, state, output_final_state=True)
        return at_least_fp32(out).transpose(1, 2), state

    @staticmethod
    def sized(config, context, numbers):
        """Fewer heads are wider, and a state has a number per pair of a head's channels."""
        fits = [heads for heads in range(1, config.n_embd + 1) if config.n_embd % heads == 0]
        return {"heads": min(fits, key=lambda heads: abs(config.n_embd**2 / heads - numbers))}

    def new_cache(self):
        return StateLayer()

    def core_flops(self, context, dense=False):
        # Per token and head, a multiply and an add per term: D² to read what the key holds, D² to write, D² to answer;
        # and D² multiplications of decay.
        per_token = 7 * self.width * self.head_width
        if not dense or context == 1:
            return context * per_token
        # What the chunked form computes beside: half of c scores by keys and of c by queries, c values, and the
        # system's c / 2 terms for each of two right sides.
        return -(-context // self.chunk) * self.chunk * (per_token + 6 * self.width * self.chunk)

    def cache_bytes(self, context, element_bytes):
        return self.width * self.head_width * max(element_bytes, 4)  # in float32 at least, at any context

    def reference(self, hidden_states):
        """Token by token, each update as the paper's equation 1 writes it: (I - β k kᵀ) Diag(α) S + β k vᵀ."""
        B, T, C = hidden_states.shape
        H, D = self.heads, self.head_width
        q, k, v = (x.view(B, T, H, D) for x in self.c_attn(hidden_states).split(C, dim=2))
        q, k = (x / (x.square().sum(-1, keepdim=True) + EPSILON).sqrt() for x in (q, k))
        down = self.c_down(hidden_states)
        beta = 1 / (1 + (-down[..., 2 * D :]).exp())  # (B, T, H)
        alpha = ((1 + (self.c_decay(down[..., :D]) + self.dt).exp()).view(B, T, H, D)) ** -self.A.exp()[:, None]
        state, identity, rows = q.new_zeros(B, H, D, D), torch.eye(D, dtype=q.dtype, device=q.device), []
        for t in range(T):
            erases = identity - beta[:, t, :, None, None] * torch.einsum("bhd,bhe->bhde", k[:, t], k[:, t])
            state = torch.einsum("bhde,bhe,bhev->bhdv", erases, alpha[:, t], state)
            state = state + beta[:, t, :, None, None] * torch.einsum("bhd,bhv->bhdv", k[:, t], v[:, t])
            rows.append(torch.einsum("bhdv,bhd->bhv", state, q[:, t]) / math.sqrt(D))
        out = torch.stack(rows, dim=1)  # (B, T, H, D)
        out = self.norm * out / ((out**2).mean(-1, keepdim=True) + NORM_EPSILON).sqrt()
        return self.c_proj(out.flatten(2) / (1 + (-self.c_gate(down[..., D : 2 * D])).exp()))


def documents(seq_idx, N, c):
    """What the tokens of a document, `seq_idx` (B, T) in N chunks of c, know of each other; as factors, for all heads.

    (B, 1, N, c, c): two of a chunk are of one. (B, 1, N, c, 1) each: a token's is that which stands before the chunk,
    and that in which the chunk ends. (B, 1, N, 1, 1): both are the same.
    """
    fill = seq_idx[:, -1:].expand(-1, N * c - seq_idx.shape[1])
    chunks = torch.cat([seq_idx, fill], dim=1).unflatten(1, (N, c))[:, None]  # (B, 1, N, c)
    before = torch.cat([chunks[:, :, :1, 0], chunks[:, :, :-1, -1]], dim=2)[..., None]  # (B, 1, N, 1)
    end = chunks[..., -1:]
    return (
        chunks[..., None] == chunks[..., None, :], (chunks == before)[..., None], (chunks == end)[..., None],
        (before == end)[..., None],
    )  # fmt: skip


def takes_kernels(x, seq_idx):
    """Whether fla-core's kernels are for these numbers; what they lack, and what only counts, has PyTorch's form.

    Raises ValueError where they cannot be had, since another form in their stead would be timed as theirs.
    """
    if x.dtype == torch.float64 or x.is_meta:
        return False
    if not x.is_cuda or find_spec("fla") is None:
        raise ValueError("kernels 'fla' need CUDA and fla-core (pip install fla-core einops); else leave kernels out")
    if seq_idx is not None:
        raise ValueError("kernels 'fla' take one document a row; leave kernels out for rows of several")
    return True


def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_fp32(projection, x):
    """A projection (B, T, *) outside autocast, in float32 at least."""
    return at_least_fp32(x) @ at_least_fp32(projection.weight) + at_least_fp32(projection.bias)


def unit(x):
    """To length 1 over the last dimension; a vanishing x stays near 0."""
    return x * (x.square().sum(-1, keepdim=True) + EPSILON).rsqrt()


def zero_state(k, v):
    """What stands before the first of the tokens (B, H, T, D): (B, H, D, D)."""
    B, H, _, D = k.shape
    return k.new_zeros(B, H, D, v.shape[-1], dtype=torch.promote_types(k.dtype, torch.float32))


class StateLayer(CacheLayerMixin):
    """One layer's state (B, H, D, D), the same size after any number of tokens.

    No token can be taken back out of it: `is_croppable` is False, the model stateful, and nothing is drafted with it.
    """

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.reset()

    def lazy_initialization(self, key_states, value_states):
        self.state = zero_state(key_states, value_states)
        self.device, self.is_initialized = key_states.device, True

    def update(self, state, tokens):
        self.state = state
        self.tokens += tokens
        self.device, self.is_initialized = state.device, True

    def get_seq_length(self):
        return self.tokens

    def get_mask_sizes(self, query_length):
        return self.tokens + query_length, 0

    def get_max_length(self):
        return -1

    def crop(self, tokens_to_remove):
        if tokens_to_remove and not tokens_to_remove >= self.tokens:
            raise ValueError(
                "a KDA cache is a state, from which no token can be taken back; read the shorter text anew"
            )

    def reset(self):
        self.state = None
        self.tokens, self.is_initialized = 0, False

    def offload(self):
        self._each(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self):
        self._each(lambda x: x.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx):
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats):
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        self._each(lambda x: x[indices])

    def _each(self, change):
        if self.is_initialized:
            self.state = change(self.state)
