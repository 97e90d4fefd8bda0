"""Gated DeltaNet: a state that decays, forgets what a key held, and writes the new value in its place.

By head, with q and k of length 1: S_t = e^{g_t} S_{t-1} + β_t k_t (v_t - e^{g_t} S_{t-1}ᵀ k_t)ᵀ, o_t = S_tᵀ q_t / √D,
then a norm and an output gate. g_t = -e^A softplus(x_t W_a + dt) is the decay, β_t = `beta_max` σ(x_t W_b) the rate of
writing; with `gate=False` nothing decays (DeltaNet), and β up to 2 gives the transition negative eigenvalues, which
counting needs. Training goes in chunks of c tokens: inside one the T updates are a triangular system, between chunks
goes the state. O(T C (c + D)) time, O(T C c / D) memory; decoding costs O(C D) a token from a cache that does not grow.
"""

import math
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import CacheLayerMixin
from transformers.pytorch_utils import Conv1D

EPSILON = 1e-6  # of both norms: as transformers' Qwen3-Next has it


class Attention(nn.Module):
    paper = (
        "Yang et al. 2024, Gated Delta Networks, sections 3.1 to 3.3 (arXiv 2412.06464); β up to 2: Grazzi et al. "
        "2024 (arXiv 2411.12537)"
    )
    needs_no_positions = True  # a state knows what came last

    def __init__(self, config, layer_idx, gate=True, beta_max=1, chunk=64, heads=0, kernels="torch"):
        super().__init__()
        if type(heads) is not int or heads < 0:
            raise ValueError(f"heads must be a whole number that divides width, or 0 for the model's, not {heads!r}")
        heads = heads or config.n_head
        if config.n_embd % heads:
            raise ValueError(f"heads must divide width: {heads} heads do not divide {config.n_embd}")
        if type(chunk) is not int or chunk < 1:
            raise ValueError(f"chunk must be a whole number of tokens, at least 1 (64 is usual), not {chunk!r}")
        if type(beta_max) is not int or beta_max not in (1, 2):
            raise ValueError(
                f"beta_max must be 1, or 2 for negative eigenvalues (more lets states grow), not {beta_max!r}"
            )
        if not isinstance(gate, bool):
            raise ValueError(f"gate must be true (states decay) or false (DeltaNet), not {gate!r}")
        if kernels not in ("torch", "fla"):
            raise ValueError(f"kernels must be 'torch', or 'fla' for fla-core's on CUDA, not {kernels!r}")
        self.layer_idx = layer_idx
        self.gate, self.beta_max, self.chunk = gate, beta_max, chunk  # chunk: c
        self.kernels = kernels
        self.heads = heads  # H
        self.width = config.n_embd  # C
        self.head_width = config.n_embd // heads  # D
        self.c_attn = Conv1D(4 * self.width, self.width)  # query, key, value, output gate
        self.c_rates = Conv1D((1 + gate) * self.heads, self.width)  # of writing, and of decay
        self.c_proj = Conv1D(self.width, self.width)
        self.norm = nn.Parameter(torch.ones(self.head_width))
        if gate:  # as Mamba-2 draws them: half-lives from a token to some thousand
            dt = torch.empty(self.heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.dt = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
            self.A = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        # `attn_pdrop` has nothing to act on: the weights of a query never exist, only the state does.
        self.residual_dropout = nn.Dropout(config.resid_pdrop)

    @property
    def title(self):
        name = ("Gated DeltaNet" if self.gate else "DeltaNet") + (", beta 2" if self.beta_max == 2 else "")
        return name + (", fla kernels" if self.kernels == "fla" else "")

    def forward(self, hidden_states, past_key_values=None, padding_mask=None, seq_idx=None, **_):
        B, T, C = hidden_states.shape
        qkv, z = self.c_attn(hidden_states).split([3 * C, C], dim=2)
        # A sum of many updates, a system that is solved, exponents: in bf16 all would lose what they carry.
        with torch.autocast(hidden_states.device.type, enabled=False):
            x, weight, bias = map(at_least_fp32, (hidden_states, self.c_rates.weight, self.c_rates.bias))
            rates = x @ weight + bias  # (B, T, H or 2 H)
            q, k, v = (x.view(B, T, self.heads, -1).transpose(1, 2) for x in at_least_fp32(qkv).split(C, dim=2))
            q, k = unit(q) * self.head_width**-0.5, unit(k)  # (B, H, T, D)
            beta, g = self._rates(rates)  # (B, H, T)
            if padding_mask is not None:  # writes nothing, and nothing decays
                real = padding_mask[:, None, -T:]
                beta, g = beta.where(real, 0.0), g.where(real, 0.0)

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
            out = out * (out.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * self.norm  # (B, H, T, D)
        out = out.transpose(1, 2).reshape(B, T, C).contiguous().to(z.dtype) * F.silu(z)
        return self.residual_dropout(self.c_proj(out)), None

    def _rates(self, rates):
        """(B, T, H or 2 H) -> the rate of writing, in [0, beta_max], and the log of the decay: (B, H, T) each."""
        rates = rates.transpose(1, 2)
        beta = self.beta_max * rates[:, : self.heads].sigmoid()
        if not self.gate:
            return beta, torch.zeros_like(beta)
        return beta, -self.A.exp()[:, None] * F.softplus(rates[:, self.heads :] + self.dt[:, None])

    @staticmethod
    def _recurrent(q, k, v, beta, g, state):
        """One token, (B, H, 1, D) each -> out (B, H, 1, D) and the state behind it."""
        state = state * g.exp()[..., None]
        state = state + k.mT @ (beta[..., None] * (v - k @ state))  # (B, H, D, D)
        return q @ state, state

    def _chunked(self, q, k, v, beta, g, state, seq_idx=None):
        """(B, H, T, D) each -> out (B, H, T, D) and the state behind the last token.

        With Γ the decay from one token of a chunk to another, what the tokens of it write is U = (I + A)⁻¹ β V and what
        they erase of the state before it W = (I + A)⁻¹ β e^Γ K, where A = tril(β K Kᵀ Γ, -1): section 3.3 of the paper.
        With `seq_idx` (B, T) each document starts from nothing.
        """
        T, D = q.shape[2:]
        c = self.chunk
        N = -(-T // c)  # chunks; the last one is filled up with zeros, which neither write nor decay
        q, k, v = (F.pad(x, (0, 0, 0, N * c - T)).unflatten(2, (N, c)) for x in (q, k, v))  # (B, H, N, c, D)
        beta, g = (F.pad(x, (0, N * c - T)).unflatten(2, (N, c)) for x in (beta, g))  # (B, H, N, c)

        since = g.cumsum(-1)[..., None]  # (B, H, N, c, 1): log of the decay since the chunk began
        later = torch.ones(c, c, dtype=torch.bool, device=q.device).triu(1)
        # Masked before the exponential: what it would overflow to has no gradient then.
        decay = (since - since.mT).masked_fill(later, -torch.inf).exp()  # (B, H, N, c, c)
        last = since[..., -1:, :]
        until, last, since = (last - since).exp(), last.exp(), since.exp()  # of a token, of all of a chunk, to a token
        if seq_idx is not None:
            same, begins, ends, goes_through = documents(seq_idx, N, c)
            decay, since, until, last = decay * same, since * begins, until * ends, last * goes_through
        written = k * beta[..., None]
        both = torch.cat([v * beta[..., None], written * since], dim=-1)
        system = (written @ k.mT) * decay  # its diagonal is not read
        u, w = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True).split(D, dim=-1)
        scores = (q @ k.mT) * decay
        q, k = q * since, (k * until).mT  # k: (B, H, N, D, c)

        # Unbound at once: the backward pass of x[:, :, n] writes a tensor of the size of x, for each of the N chunks.
        out, chunks = [], (x.unbind(2) for x in (q, k, u, w, scores, last))
        for queries, keys, own, erased, weights, kept in zip(*chunks, strict=True):
            new = own - erased @ state  # (B, H, c, D): what each token writes
            out.append(queries @ state + weights @ new)
            state = state * kept + keys @ new
        return torch.cat(out, dim=2)[:, :, :T], state

    @staticmethod
    def _fused(q, k, v, beta, g, state, dtype):
        """As `_chunked`, by fla-core's kernels (github.com/fla-org/flash-linear-attention) on q, k, v of `dtype`."""
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # on CUDA alone

        q, k, v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))  # theirs has time before heads
        out, state = chunk_gated_delta_rule(q, k, v, g.mT, beta.mT, 1.0, state, output_final_state=True)
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
        per_token = self.width * self.head_width * (6 + self.gate)
        if not dense or context == 1:
            return context * per_token
        # What the chunked form computes beside: c scores by keys, c by queries, c values, and the system's c / 2 terms
        # for each of two right sides.
        c = self.chunk
        return -(-context // c) * c * (per_token + 8 * self.width * c)

    def cache_bytes(self, context, element_bytes):
        return self.width * self.head_width * max(element_bytes, 4)  # in float32 at least, at any context

    def reference(self, hidden_states):
        """Token by token, each update as the paper's equation 10 writes it: S (I - β k kᵀ) e^g + β v kᵀ."""
        B, T, C = hidden_states.shape
        H, D = self.heads, self.head_width
        q, k, v, z = (x.view(B, T, H, D) for x in self.c_attn(hidden_states).split(C, dim=2))
        q, k = (x / (x.square().sum(-1, keepdim=True) + EPSILON).sqrt() for x in (q, k))
        b = self.c_rates(hidden_states)  # (B, T, H or 2 H)
        beta = self.beta_max / (1 + (-b[..., :H]).exp())
        kept = torch.ones_like(beta)
        if self.gate:
            kept = (1 + (b[..., H:] + self.dt).exp()) ** -self.A.exp()
        state, identity, rows = q.new_zeros(B, H, D, D), torch.eye(D, dtype=q.dtype, device=q.device), []
        for t in range(T):
            erased = identity - beta[:, t, :, None, None] * torch.einsum("bhd,bhe->bhde", k[:, t], k[:, t])
            state = kept[:, t, :, None, None] * torch.einsum("bhvd,bhde->bhve", state, erased)
            state = state + beta[:, t, :, None, None] * torch.einsum("bhv,bhd->bhvd", v[:, t], k[:, t])
            rows.append(torch.einsum("bhvd,bhd->bhv", state, q[:, t]) / math.sqrt(D))
        out = torch.stack(rows, dim=1)  # (B, T, H, D)
        out = self.norm * out / ((out**2).mean(-1, keepdim=True) + EPSILON).sqrt() * z * z.sigmoid()
        return self.c_proj(out.flatten(2).contiguous())


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
                "a delta-rule cache is a state, from which no token can be taken back; read the shorter text anew"
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
