"""Retention (RetNet): a state that decays at one fixed rate per head, and adds up what is written.

S_t = γ_h S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t / √D, then a norm by head and an output gate. γ_h = 1 - 2^{-5-h} for head
h = 0, 1, ...: half-lives of 22, 44, 88, ... tokens. The control between `linear`, which forgets nothing, and
`gated_deltanet`, whose decay and rate of writing are learned. RetNet's rotation of q and k is there in Llama's layers;
GPT-2's have learned positions. Training goes in chunks of c tokens, decayed scores inside one, the state between them:
O(T C (c + D)) time, O(T C (1 + c / D + D / c)) memory; decoding costs O(C D) a token from a cache that does not grow.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import CacheLayerMixin
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D

EPSILON = 1e-6  # of the norm


class Attention(nn.Module):
    paper = (
        "Sun et al. 2023, Retentive Network, sections 2.1 to 2.3 (arXiv 2307.08621); at scale: MiniMax 2025, "
        "MiniMax-01, section 2.2 (arXiv 2501.08313)"
    )

    def __init__(self, config, layer_idx, chunk=64, heads=0, kernels="torch"):
        super().__init__()
        if type(heads) is not int or heads < 0:
            raise ValueError(f"heads must be a whole number that divides width, or 0 for the model's, not {heads!r}")
        heads = heads or config.n_head
        if config.n_embd % heads:
            raise ValueError(f"heads must divide width: {heads} heads do not divide {config.n_embd}")
        if heads != config.n_head and getattr(config, "architecture", "gpt2") == "llama":
            raise ValueError("heads of its own are not as wide as Llama's rotary positions; leave heads out")
        if type(chunk) is not int or chunk < 1:
            raise ValueError(f"chunk must be a whole number of tokens, at least 1 (64 is usual), not {chunk!r}")
        if kernels not in ("torch", "fla"):
            raise ValueError(f"kernels must be 'torch', or 'fla' for fla-core's on CUDA, not {kernels!r}")
        self.layer_idx = layer_idx
        self.chunk, self.kernels = chunk, kernels  # chunk: c
        self.heads = heads  # H
        self.width = config.n_embd  # C
        self.head_width = config.n_embd // heads  # D
        self.c_attn = Conv1D(4 * self.width, self.width)  # query, key, value, output gate
        self.c_proj = Conv1D(self.width, self.width)
        self.norm = nn.Parameter(torch.ones(self.head_width))
        # `attn_pdrop` has nothing to act on: the weights of a query never exist, only the state does.
        self.residual_dropout = nn.Dropout(config.resid_pdrop)

    @property
    def title(self):
        return "RetNet" + (", fla kernels" if self.kernels == "fla" else "")

    def forward(
        self, hidden_states, past_key_values=None, padding_mask=None, seq_idx=None, position_embeddings=None, **_
    ):
        B, T, C = hidden_states.shape
        qkv, z = self.c_attn(hidden_states).split([3 * C, C], dim=2)
        # Sums over thousands of terms: in bf16 one under 1/256 of the sum would vanish.
        with torch.autocast(hidden_states.device.type, enabled=False):
            q, k, v = (x.view(B, T, self.heads, -1).transpose(1, 2) for x in at_least_fp32(qkv).split(C, dim=2))
            q = q * self.head_width**-0.5  # (B, H, T, D)
            if position_embeddings is not None:
                q, k = (x.type_as(v) for x in apply_rotary_pos_emb(q, k, *position_embeddings))
            real = None if padding_mask is None else padding_mask[:, None, -T:]  # (B, 1, T)
            if real is not None:  # padding writes nothing, and nothing decays meanwhile
                k = k.where(real[..., None], 0.0)

            layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
            state = None if layer is None or not layer.is_initialized else layer.state  # (B, H, D, D)
            state = zero_state(k, v) if state is None else state
            if T == 1:
                state = state * self._log_decay(q, real).exp()[..., None] + k.mT @ v
                out = q @ state
            elif self.kernels == "fla" and takes_kernels(q, seq_idx):
                out, state = self._fused(q, k, v, state, real, qkv.dtype)
            else:
                out, state = self._chunked(q, k, v, state, real, seq_idx)
            if layer is not None:
                layer.update(state, tokens=T)
            out = out * (out.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * self.norm  # (B, H, T, D)
        out = out.transpose(1, 2).reshape(B, T, C).contiguous().to(z.dtype) * F.silu(z)
        return self.residual_dropout(self.c_proj(out)), None

    def _log_decay(self, q, real=None):
        """Logs of the decay, a token of q (B, H, T, D) each, 0 where it is not `real` (B, 1, T): (1 or B, H, T)."""
        kept = torch.log1p(-torch.exp2(-5.0 - torch.arange(self.heads, dtype=q.dtype, device=q.device)))
        kept = kept[None, :, None].expand(1, -1, q.shape[2])
        return kept if real is None else kept.where(real, 0.0)

    def _chunked(self, q, k, v, state, real=None, seq_idx=None):
        """(B, H, T, D) each -> out (B, H, T, D) and the state behind the last token.

        With `seq_idx` (B, T) each document starts from nothing. `real` (B, 1, T): False where a token is padding.
        """
        T = q.shape[2]
        c = self.chunk
        N = -(-T // c)  # chunks; the last one is filled up with zeros, which neither write nor decay
        since = F.pad(self._log_decay(q, real), (0, N * c - T)).unflatten(2, (N, c)).cumsum(-1)[..., None]
        within = since[:, :, :1] if real is None else since  # (1 or B, H, 1 or N, c, 1): without padding all are alike
        q, k, v = (F.pad(x, (0, 0, 0, N * c - T)).unflatten(2, (N, c)) for x in (q, k, v))  # (B, H, N, c, D)
        later = torch.ones(c, c, dtype=torch.bool, device=q.device).triu(1)
        decay = (within - within.mT).masked_fill(later, -torch.inf).exp()  # (1 or B, H, 1 or N, c, c)
        last = since[..., -1:, :]
        until, last, since = (last - since).exp(), last.exp(), since.exp()  # of a token, of all of a chunk, to a token
        if seq_idx is not None:
            same, begins, ends, goes_through = documents(seq_idx, N, c)
            decay, since, until, last = decay * same, since * begins, until * ends, last * goes_through
        written = (k * until).mT @ v  # (B, H, N, D, D)
        before = []  # unbound at once: the backward pass of x[:, :, n] writes a tensor of the size of x, for each n
        for new, kept in zip(written.unbind(2), last.unbind(2), strict=True):
            before.append(state)
            state = torch.addcmul(new, state, kept)
        out = ((q @ k.mT) * decay) @ v + (q * since) @ torch.stack(before, dim=2)
        return out.flatten(2, 3)[:, :, :T], state

    def _fused(self, q, k, v, state, real, dtype):
        """As `_chunked`, by fla-core's kernels (github.com/fla-org/flash-linear-attention) on q, k, v of `dtype`."""
        from fla.ops.simple_gla import chunk_simple_gla  # on CUDA alone

        g = self._log_decay(q, real).expand(q.shape[:3]).mT  # (B, T, H)
        q, k, v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))  # theirs has time before heads
        out, state = chunk_simple_gla(q, k, v, g, scale=1.0, initial_state=state, output_final_state=True)
        return at_least_fp32(out).transpose(1, 2), state

    @staticmethod
    def sized(config, context, numbers):
        """Fewer heads are wider, and a state has a number per pair of a head's channels."""
        if getattr(config, "architecture", "gpt2") == "llama":
            return {}  # its rotary positions are as wide as its own heads
        fits = [heads for heads in range(1, config.n_embd + 1) if config.n_embd % heads == 0]
        return {"heads": min(fits, key=lambda heads: abs(config.n_embd**2 / heads - numbers))}

    def new_cache(self):
        return StateLayer()

    def core_flops(self, context, dense=False):
        # Per token and head, a multiply and an add per term: D² to write, D² to answer; and D² products of decay.
        per_token = 5 * self.width * self.head_width
        if not dense or context == 1:
            return context * per_token
        # What the chunked form computes beside: c scores and c values per token, masked ones included.
        return -(-context // self.chunk) * self.chunk * (per_token + 4 * self.width * self.chunk)

    def cache_bytes(self, context, element_bytes):
        return self.width * self.head_width * max(element_bytes, 4)  # in float32 at least, at any context

    def reference(self, hidden_states, position_embeddings=None):
        """All T x T weights γ^{t-s} q_t·k_s / √D for s ≤ t, no state; the norm and the gate written out."""
        B, T, _ = hidden_states.shape
        q, k, v, z = self.c_attn(hidden_states).view(B, T, 4, self.heads, -1).unbind(2)  # (B, T, H, D)
        if position_embeddings is not None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        gamma = torch.tensor([1 - 2.0 ** -(5 + head) for head in range(self.heads)], dtype=torch.float64).to(q)
        distance = (torch.arange(T)[:, None] - torch.arange(T)).to(q.device)
        kept = (gamma[:, None, None] ** distance.clamp(min=0)).where(distance >= 0, 0.0)  # (H, T, T)
        weights = torch.einsum("bthd,bshd->bhts", q, k) * kept / self.head_width**0.5
        out = torch.einsum("bhts,bshd->bthd", weights, v)
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
                "a retention cache is a state, from which no token can be taken back; read the shorter text anew"
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
