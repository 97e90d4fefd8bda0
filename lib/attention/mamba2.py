"""Mamba-2: a state that decays by as much as each token says, written and read by vectors that all heads share.

By head, with x_t (D) of its own and k_t, q_t (N; the paper's B and C) that all heads share: S_t = e^{g_t} S_{t-1} +
k_t (Δ_t x_t)ᵀ, o_t = S_tᵀ q_t + skip x_t, where Δ_t = softplus(h_t W + dt) is the step and g_t = -e^A Δ_t the log of
the decay. Then o ⊙ silu(z) and a norm over all channels. x, k and q come through a causal convolution over `conv`
tokens (0: none) and a SiLU. Seen as attention (the state-space dual), Δ x are the values: training goes in chunks of c
tokens, decayed scores inside one, the state between them. O(T C (c + N)) time, O(T C (1 + c / D + N / c)) memory;
decoding costs O(C N) a token from a cache that does not grow. Not attention, but what one would pick instead. It is as
wide as attention here (expand 1); in a model of Mamba-2 alone it is twice as wide, and there is no MLP.
"""

import math
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import CacheLayerMixin
from transformers.pytorch_utils import Conv1D

EPSILON = 1e-5  # of the norm: the authors'


class Attention(nn.Module):
    paper = "Dao and Gu 2024, Transformers are SSMs, sections 5 to 7 (arXiv 2405.21060)"
    needs_no_positions = True  # a state knows what came last

    def __init__(self, config, layer_idx, state=128, conv=4, chunk=64, kernels="torch"):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"heads must divide width: {config.n_head} heads do not divide {config.n_embd}")
        if type(state) is not int or state < 1:
            raise ValueError(
                f"state must be a whole number of numbers a channel, at least 1 (128 is usual), not {state!r}"
            )
        if type(conv) is not int or conv < 0 or conv == 1:
            raise ValueError(
                f"conv must be a whole number of tokens, at least 2 (4 is usual), or 0 for none, not {conv!r}"
            )
        if type(chunk) is not int or chunk < 1:
            raise ValueError(f"chunk must be a whole number of tokens, at least 1 (64 is usual), not {chunk!r}")
        if kernels not in ("torch", "fla"):
            raise ValueError(f"kernels must be 'torch', or 'fla' for fla-core's on CUDA, not {kernels!r}")
        self.layer_idx = layer_idx
        self.state, self.conv, self.chunk = state, conv, chunk  # N, K, c
        self.kernels = kernels
        self.heads = config.n_head  # H
        self.width = config.n_embd  # C
        self.head_width = config.n_embd // config.n_head  # D
        self.mixed = self.width + 2 * state  # x, k and q: what the convolution is over
        self.c_attn = Conv1D(self.mixed + self.width, self.width)  # x, k, q, output gate
        self.c_rates = Conv1D(self.heads, self.width)  # of the step
        self.c_proj = Conv1D(self.width, self.width)
        self.norm = nn.Parameter(torch.ones(self.width))
        self.skip = nn.Parameter(torch.ones(self.heads))
        dt = torch.empty(self.heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.A = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        if conv:  # a vector, not a matrix, so that it starts as PyTorch's convolutions do; tap by tap, the newest last
            self.taps = nn.Parameter(torch.empty(conv * self.mixed).uniform_(-(conv**-0.5), conv**-0.5))
            self.taps_bias = nn.Parameter(torch.zeros(self.mixed))
        # `attn_pdrop` has nothing to act on: the weights of a query never exist, only the state does.
        self.residual_dropout = nn.Dropout(config.resid_pdrop)

    @property
    def title(self):
        return "Mamba-2" + (", fla kernels" if self.kernels == "fla" else "")

    def forward(self, hidden_states, past_key_values=None, padding_mask=None, seq_idx=None, **_):
        B, T, C = hidden_states.shape
        mixed, z = self.c_attn(hidden_states).split([self.mixed, C], dim=2)
        # Sums over thousands of terms, exponents of sums: in bf16 both would lose what they carry.
        with torch.autocast(hidden_states.device.type, enabled=False):
            x, weight, bias = map(at_least_fp32, (hidden_states, self.c_rates.weight, self.c_rates.bias))
            step = F.softplus(x @ weight + bias + self.dt)  # (B, T, H)
            real = None if padding_mask is None else padding_mask[:, -T:]  # (B, T)
            if real is not None:  # padding writes nothing, and nothing decays meanwhile
                step = step.where(real[..., None], 0.0)
            layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
            if layer is None or not layer.is_initialized:
                state, inputs = zeros(B, self._shapes(), like=x)  # (B, N, C), (B, K - 1, C + 2 N)
            else:
                state, inputs = layer.state, layer.inputs
            mixed, inputs = self._convolved(at_least_fp32(mixed), inputs, real, seq_idx)
            x, k, q = F.silu(mixed).split([C, self.state, self.state], dim=2)  # (B, T, C or N)
            x = x.unflatten(2, (self.heads, -1))  # (B, T, H, D)
            value, decay = x * step[..., None], -self.A.exp() * step  # (B, T, H, D), (B, T, H)
            if T == 1:
                kept = decay.exp().repeat_interleave(self.head_width, dim=-1)  # (B, 1, C)
                state = torch.addcmul(k.mT @ value.flatten(2), state, kept)
                out = (q @ state).view_as(x)
            elif self.kernels == "fla" and takes_kernels(q, seq_idx):
                out, state = self._fused(q, k, value, decay, state, z.dtype)
            else:
                out, state = self._chunked(q, k, value, decay, state, seq_idx)
            if layer is not None:
                layer.update(state, inputs, tokens=T)
            out = out + self.skip[:, None] * x  # (B, T, H, D)
            out = out.reshape(B, T, C)
            out = out * F.silu(at_least_fp32(z))
            out = out * (out.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * self.norm
        out = out.to(z.dtype).contiguous()  # of heads one wide it is a view, which Conv1D refuses
        return self.residual_dropout(self.c_proj(out)), None

    def _shapes(self):
        """Of a row's state, and of the inputs that the next token's convolution needs."""
        return (self.state, self.width), (max(0, self.conv - 1), self.mixed)

    def _convolved(self, mixed, inputs, real=None, seq_idx=None):
        """(B, T, C + 2 N) behind the inputs (B, K - 1, C + 2 N) -> the same convolved, and the newest of the inputs.

        A token is convolved with those of its document alone, and not with padding, which is no token.
        """
        if not self.conv:
            return mixed, inputs
        T, back = mixed.shape[1], self.conv - 1
        whole, order = torch.cat([inputs, mixed], dim=1), None  # (B, K - 1 + T, C + 2 N)
        document = None if seq_idx is None else F.pad(seq_idx, (back, 0), value=-1)
        if real is not None:  # padding goes to the front, so that real tokens stand side by side
            order = F.pad(real, (back, 0), value=True).argsort(dim=1, stable=True)  # (B, K - 1 + T)
            whole = in_order(whole, order)
            document = None if seq_idx is None else document.gather(1, order)
        out = self.taps_bias
        for lag, tap in zip(range(back, -1, -1), self.taps.chunk(self.conv), strict=True):
            until = whole.shape[1] - lag
            input = whole[:, until - T : until]
            if document is not None:
                own = document[:, until - T : until] == document[:, back:]
                input = input.where(own[..., None], 0.0)
            out = torch.addcmul(out, input, tap)
        inputs = whole[:, T:].clone()  # or it would keep the whole prompt in memory
        if order is not None:
            out = in_order(torch.cat([torch.zeros_like(inputs), out], dim=1), order.argsort(1))[:, back:]
        return out, inputs

    def _chunked(self, q, k, v, g, state, seq_idx=None):
        """q and k (B, T, N), v (B, T, H, D), logs of the decay g (B, T, H) -> out (B, T, H, D), and the state behind.

        With `seq_idx` (B, T) each document starts from nothing. Heads stand side by side in the state (B, N, C): what
        they share is multiplied once.
        """
        T, D = v.shape[1], v.shape[3]
        c = self.chunk
        n = -(-T // c)  # chunks; the last one is filled up with zeros, which neither write nor decay
        q, k, g = (F.pad(x, (0, 0, 0, n * c - T)).unflatten(1, (n, c)) for x in (q, k, g))  # (B, n, c, N or H)
        v = F.pad(v, (0, 0, 0, 0, 0, n * c - T)).unflatten(1, (n, c))  # (B, n, c, H, D)
        since = g.cumsum(2)
        by_head = since.mT[..., None]  # (B, n, H, c, 1)
        later = torch.ones(c, c, dtype=torch.bool, device=q.device).triu(1)
        # Masked before the exponential: what it would overflow to has no gradient then.
        decay = (by_head - by_head.mT).masked_fill(later, -torch.inf).exp()  # (B, n, H, c, c)
        last = since[:, :, -1:]
        until, last, since = (last - since).exp(), last.exp(), since.exp()  # of a token, of all of a chunk, to a token
        if seq_idx is not None:
            same, begins, ends, goes_through = documents(seq_idx, n, c)
            decay = decay * same[:, :, None]
            since, until, last = since * begins, until * ends, last * goes_through
        out = (((q @ k.mT)[:, :, None] * decay) @ v.transpose(2, 3)).transpose(2, 3)
        written = k.mT @ (v * until[..., None]).flatten(3)  # (B, n, N, C)
        last, before = last.repeat_interleave(D, dim=-1), []  # (B, n, 1, C)
        # Unbound at once: the backward pass of x[:, i] writes a tensor of the size of x, for each of the n chunks.
        for new, kept in zip(written.unbind(1), last.unbind(1), strict=True):
            before.append(state)
            state = torch.addcmul(new, state, kept)
        out = torch.addcmul(out, (q @ torch.stack(before, dim=1)).unflatten(-1, (-1, D)), since[..., None])
        return out.flatten(1, 2)[:, :T], state

    @staticmethod
    def _fused(q, k, v, g, state, dtype):
        """As `_chunked`, by fla-core's kernels (github.com/fla-org/flash-linear-attention) on q, k, v of `dtype`."""
        from fla.ops.simple_gla import chunk_simple_gla  # on CUDA alone

        H = v.shape[2]
        q, k = (x[:, :, None].expand(-1, -1, H, -1).to(dtype) for x in (q, k))  # theirs knows no shared ones
        state = state.unflatten(2, (H, -1)).transpose(1, 2)  # (B, H, N, D)
        out, state = chunk_simple_gla(q, k, v.to(dtype), g, scale=1.0, initial_state=state, output_final_state=True)
        return at_least_fp32(out), state.transpose(1, 2).flatten(2)

    @staticmethod
    def sized(config, context, numbers):
        """The state's numbers a channel, beside what the usual convolution over four tokens keeps."""
        C = config.n_embd
        return {"state": max(1, round((numbers - 3 * C) / (C + 6)))}  # of state (N, C) and inputs (3, C + 2 N)

    def new_cache(self):
        return StateLayer(*self._shapes())

    def core_flops(self, context, dense=False):
        # Per token, a multiply and an add per term: N C to write, N C to answer, K (C + 2 N) to convolve; and N C
        # products of decay.
        per_token = 5 * self.state * self.width + 2 * self.conv * self.mixed
        if not dense or context == 1:
            return context * per_token
        # What the chunked form computes beside: c scores, which all heads share, and c values, masked ones included.
        return -(-context // self.chunk) * self.chunk * (per_token + 2 * self.chunk * (self.state + self.width))

    def cache_bytes(self, context, element_bytes):
        # In float32 at least, at any context.
        return sum(rows * columns for rows, columns in self._shapes()) * max(element_bytes, 4)

    def reference(self, hidden_states):
        """Token by token: the convolution's window, the step, the state as the paper's equation 1 has it, the norm."""
        B, T, C = hidden_states.shape
        H, D, N = self.heads, self.head_width, self.state
        mixed, z = self.c_attn(hidden_states).split([C + 2 * N, C], dim=2)
        rates = self.c_rates(hidden_states) + self.dt
        window = self.taps.view(self.conv, -1) if self.conv else None
        state, rows = mixed.new_zeros(B, H, D, N), []
        for t in range(T):
            now = mixed[:, t]
            if window is not None:
                seen = mixed[:, max(0, t + 1 - self.conv) : t + 1]
                now = self.taps_bias + torch.einsum("bkm,km->bm", seen, window[self.conv - seen.shape[1] :])
            now = now * now.sigmoid()
            x, k, q = now[:, :C].view(B, H, D), now[:, C : C + N], now[:, C + N :]
            kept = (1 + rates[:, t].exp()) ** -self.A.exp()  # e^{-e^A softplus}
            step = (1 + rates[:, t].exp()).log()
            state = kept[..., None, None] * state + torch.einsum("bh,bhd,bn->bhdn", step, x, k)
            out = torch.einsum("bhdn,bn->bhd", state, q) + self.skip[:, None] * x
            rows.append(out.flatten(1) * z[:, t] * z[:, t].sigmoid())
        out = torch.stack(rows, dim=1)
        return self.c_proj(self.norm * out / ((out**2).mean(-1, keepdim=True) + EPSILON).sqrt())


def documents(seq_idx, n, c):
    """What the tokens of a document, `seq_idx` (B, T) in n chunks of c, know of each other; as factors.

    (B, n, c, c): two of a chunk are of one. (B, n, c, 1) each: a token's is that which stands before the chunk, and
    that in which the chunk ends. (B, n, 1, 1): both are the same.
    """
    fill = seq_idx[:, -1:].expand(-1, n * c - seq_idx.shape[1])
    chunks = torch.cat([seq_idx, fill], dim=1).unflatten(1, (n, c))  # (B, n, c)
    before = torch.cat([chunks[:, :1, 0], chunks[:, :-1, -1]], dim=1)[..., None]  # (B, n, 1)
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


def in_order(x, order):
    """(B, S, *) with its S places in the `order` (B, S)."""
    return x.gather(1, order[..., None].expand_as(x))


def zeros(rows, shapes, like):
    """What stands before the first token, for each of `shapes`: (rows, *shape)."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return [like.new_zeros(rows, *shape, dtype=dtype) for shape in shapes]


class StateLayer(CacheLayerMixin):
    """One layer's state (B, N, C), and what its convolution needs, (B, K - 1, C + 2 N): of one size after any tokens.

    No token can be taken back out of it: `is_croppable` is False, the model stateful, and nothing is drafted with it.
    """

    is_sliding = False

    def __init__(self, *shapes):
        super().__init__()
        self.shapes = shapes
        self.reset()

    def lazy_initialization(self, key_states, value_states):
        self.state, self.inputs = zeros(len(key_states), self.shapes, like=key_states)
        self.device, self.is_initialized = key_states.device, True

    def update(self, state, inputs, tokens):
        self.state, self.inputs = state, inputs
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
                "a Mamba-2 cache is a state, from which no token can be taken back; read the shorter text anew"
            )

    def reset(self):
        self.state = self.inputs = None
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
            self.state, self.inputs = change(self.state), change(self.inputs)
