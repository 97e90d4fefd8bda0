"""Linear attention: out_t = φ(q_t)ᵀ Σ_{s≤t} φ(k_s) v_sᵀ / (φ(q_t)ᵀ Σ_{s≤t} φ(k_s)) with φ(x) = elu(x) + 1, by head.

The two sums are a state of D x D and D numbers per head, so a token costs the same wherever it stands. Training goes in
chunks of c tokens, scores inside a chunk and the state between chunks: O(T C (c + D)) time, O(T H (c + D + D²/c))
memory. Decoding costs O(C D) a token, from a cache that does not grow. No setting of it is GPT-2's own attention.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import CacheLayerMixin
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D


class Attention(nn.Module):
    title = "Linear (elu+1)"
    paper = "Katharopoulos et al. 2020, Transformers are RNNs, sections 3.2 to 3.4 (arXiv 2006.16236)"

    def __init__(self, config, layer_idx, chunk=64, heads=0):
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
        self.layer_idx = layer_idx
        self.chunk = chunk  # c
        self.heads = heads  # H
        self.width = config.n_embd  # C
        self.head_width = config.n_embd // heads  # D
        self.c_attn = Conv1D(3 * self.width, self.width)
        self.c_proj = Conv1D(self.width, self.width)
        # `attn_pdrop` has nothing to act on: the weights of a query never exist, only their sums do.
        self.residual_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, hidden_states, past_key_values=None, padding_mask=None, seq_idx=None, position_embeddings=None, **_
    ):
        B, T, C = hidden_states.shape
        qkv = self.c_attn(hidden_states)
        # Sums over thousands of positive terms: in bf16 a term under 1/256 of the sum would vanish.
        with torch.autocast(hidden_states.device.type, enabled=False):
            qk, v = qkv.to(state_dtype(qkv)).split([2 * C, C], dim=2)
            q, k = (F.elu(qk) + 1).split(C, dim=2)
            if padding_mask is not None:
                k = k.masked_fill(~padding_mask[:, -T:, None], 0.0)  # after φ, which is 1 at 0
            q, k, v = (x.view(B, T, self.heads, -1).transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
            # Behind φ, and in the numerator alone (RoFormer, section 3.3): before φ the distance would not be all that
            # counts, and below the line a turned product may be 0.
            turned = () if position_embeddings is None else apply_rotary_pos_emb(q, k, *position_embeddings)

            layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
            before = zero_state(k, v) if layer is None or not layer.is_initialized else (layer.state, layer.normalizer)
            if T == 1:
                out, *after = self._recurrent(q, k, v, turned or (q, k), *before)
            else:
                out, *after = self._chunked(q, k, v, turned, *before, seq_idx)
            if layer is not None:
                layer.update(*after, tokens=T)
        out = out.reshape(B, T, C).to(qkv.dtype).contiguous()  # Conv1D views it
        return self.residual_dropout(self.c_proj(out)), None

    def _recurrent(self, q, k, v, turned, state, normalizer):
        """One token, (B, H, 1, D) each -> out (B, 1, H, D): update the state, read it."""
        state = torch.addcmul(state, turned[1].mT, v)  # (B, H, D, D)
        normalizer = normalizer + k.squeeze(2)  # (B, H, D)
        out = divide(turned[0] @ state, q @ normalizer[..., None])  # (B, H, 1, D)
        return out.transpose(1, 2), state, normalizer

    def _chunked(self, q, k, v, turned, state, normalizer, seq_idx=None):
        """(B, H, T, D) each -> out (B, T, H, D) and the state behind the last token.

        `turned` are queries and keys of the numerator, where they are others. With `seq_idx` (B, T) each document
        starts from nothing: what it reads before a chunk is the sum over the chunks of its own before it.
        """
        B, H, T, D = q.shape
        c = self.chunk
        N = -(-T // c)  # chunks; the last one is filled up with zeros, which add nothing to a sum
        every = (F.pad(x, (0, 0, 0, N * c - T)) if T % c else x for x in (q, k, v, *turned))
        # Chunks first: they are summed over, and what stands before or behind them is then a slice without a copy.
        every = (x.unflatten(2, (N, c)).permute(2, 0, 1, 3, 4).contiguous() for x in every)
        q, k, v, *turned = every  # (N, B, H, c, D)
        tq, tk = turned or (q, k)
        scores = tq @ tk.mT  # (N, B, H, c, c)
        masses = q @ k.mT if turned else scores
        if seq_idx is None:
            states = torch.cat([state[None], tk.mT @ v]).cumsum(0)  # (N+1, B, H, D, D): entry n stands before chunk n
            normalizers = torch.cat([normalizer[None], k.sum(3)]).cumsum(0)  # (N+1, B, H, D)
        else:
            same, first, last, goes_on = documents(seq_idx, N, c)
            scores = scores * same[:, :, None]
            masses = masses * same[:, :, None] if turned else scores
            last, goes_on = last[:, :, None, :, None], goes_on.to(k.dtype)
            late = k * last  # of the document in which a chunk ends
            states = torch.einsum("nmb,mbhde->nbhde", goes_on, (tk * last if turned else late).mT @ v)
            normalizers = torch.einsum("nmb,mbhd->nbhd", goes_on, late.sum(3))  # (N+1, B, H, D)
            first = first[:, :, None, :, None]  # only the document in which a chunk begins has a state before it
            q = q * first
            tq = tq * first if turned else q
        scores = scores.tril()
        mass = (masses.tril() if turned else scores).sum(-1, keepdim=True)
        out = divide(scores @ v + tq @ states[:-1], mass + q @ normalizers[:-1, ..., None])  # (N, B, H, c, D)
        out = out.permute(1, 0, 3, 2, 4).reshape(B, N * c, H, D)[:, :T]
        return out, states[-1], normalizers[-1]

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
        # A multiply and an add per term. The definition needs the recurrent form's work, whatever the chunk: per token
        # and head D² terms to update the state, D² to read it, D to read the normalizer.
        per_token = 2 * self.width * (2 * self.head_width + 1)
        if not dense or context == 1:
            return context * per_token
        # No scores are left out between chunks; dense is what the chunked form computes: beside the above, c scores and
        # c values per token, masked ones included, the last chunk filled up.
        chunks = -(-context // self.chunk)
        return chunks * self.chunk * (per_token + 4 * self.width * self.chunk)

    def cache_bytes(self, context, element_bytes):
        return self.width * (self.head_width + 1) * max(element_bytes, 4)  # in float32 at least, at any context

    def reference(self, hidden_states, position_embeddings=None):
        """All T x T weights φ(q_t)·φ(k_s), normalised over s ≤ t; φ written out, no state."""
        B, T, C = hidden_states.shape
        q, k, v = (x.view(B, T, self.heads, -1) for x in self.c_attn(hidden_states).split(C, dim=2))
        q, k = (x.clamp(max=0).exp() + x.relu() for x in (q, k))
        past = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        weights = torch.einsum("bthd,bshd->bhts", q, k).where(past, 0)
        mass = weights.sum(-1, keepdim=True)
        if position_embeddings is not None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
            weights = torch.einsum("bthd,bshd->bhts", q, k).where(past, 0)
        weights = weights / mass
        return self.c_proj(torch.einsum("bhts,bshd->bthd", weights, v).reshape(B, T, C).contiguous())


def state_dtype(x):
    return torch.promote_types(x.dtype, torch.float32)


def zero_state(k, v):
    """State (B, H, D, D) and normalizer (B, H, D) before the first of the tokens (B, H, T, D)."""
    B, H, _, D = k.shape
    return k.new_zeros(B, H, D, v.shape[-1], dtype=state_dtype(k)), k.new_zeros(B, H, D, dtype=state_dtype(k))


def documents(seq_idx, N, c):
    """Which tokens of `seq_idx` (B, T), in N chunks of c, are of one document.

    same (N, B, c, c): two of a chunk. first and last (N, B, c): a token and the first, or the last, of its chunk.
    goes_on (N+1, N, B): the document at the end of chunk m stands at the begin of chunk n, m < n; never behind the row.
    """
    fill = seq_idx[:, -1:].expand(-1, N * c - seq_idx.shape[1])
    chunks = torch.cat([seq_idx, fill], dim=1).unflatten(1, (N, c)).transpose(0, 1)  # (N, B, c)
    begins, ends = chunks[..., 0], chunks[..., -1]  # (N, B)
    before = torch.ones(N, N, dtype=torch.bool, device=seq_idx.device).tril(-1)
    goes_on = F.pad((begins[:, None] == ends) & before[..., None], (0, 0, 0, 0, 0, 1))
    return chunks[..., None] == chunks[:, :, None], chunks == begins[..., None], chunks == ends[..., None], goes_on


def divide(numerator, denominator):
    # φ > 0, so the denominator is 0 only where there is no key at all (left padding, the last chunk's fill) or every
    # term underflowed; the numerator is 0 there too. No epsilon: it would bias every other query.
    return numerator / denominator.masked_fill(denominator == 0, 1.0)


class StateLayer(CacheLayerMixin):
    """One layer's sums: `state` (B, H, D, D) and `normalizer` (B, H, D), the same size after any number of tokens.

    transformers' own `LinearAttentionLayer` does not count tokens, and without a layer that does `generate` fails. No
    token can be taken back out of a sum: `is_croppable` is False, the model stateful, and nothing is drafted with it.
    """

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.reset()

    def lazy_initialization(self, key_states, value_states):
        self.state, self.normalizer = zero_state(key_states, value_states)
        self.device, self.is_initialized = key_states.device, True

    def update(self, state, normalizer, tokens):
        if tokens > 1:  # slices of a chunked pass, which would keep the sums before its every chunk alive
            state, normalizer = state.clone(), normalizer.clone()
        self.state, self.normalizer = state, normalizer
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
                "a linear-attention cache is a sum, from which no token can be taken back; read the shorter text anew"
            )

    def reset(self):
        self.state = self.normalizer = None
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
            self.state, self.normalizer = change(self.state), change(self.normalizer)
