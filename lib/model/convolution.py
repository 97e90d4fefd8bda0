"""A short convolution before an attention: x + Σ w_i ⊙ x_{t-i}, i below K, channel by channel, so causal.

Much of what newer mixers gained over older ones, they gained by one (Arora et al. 2023, arXiv 2312.04927). So it is the
run's, the same before every variant: K C weights a layer, 2 K C FLOPs a token, and K - 1 tokens more in the cache.
B rows, T tokens, C channels.
"""

import functools
import inspect

import torch
from torch import nn

STD = 0.02  # as GPT-2's matrices: next to nothing is added before training


def add(layer: nn.Module, config, index: int) -> nn.Module:
    """The layer of a variant, `index` of the model, behind a convolution over `config.convolution` tokens where that is
    not 0. Raises ValueError where the variant has what this adds."""
    tokens = getattr(config, "convolution", 0)
    if tokens:
        for name in ("short_convolution", "short_convolution_index"):
            if hasattr(layer, name):
                raise ValueError(
                    f"{name} is the run's convolution, and an attribute of this variant; call its own otherwise"
                )
        layer.short_convolution_index = index
        layer.short_convolution = nn.Parameter(torch.empty(tokens, config.n_embd).normal_(0.0, STD))
        layer.__class__ = _behind(type(layer))
    return layer


def bare(layer: nn.Module) -> nn.Module:
    """The layer alone, with the same weights, without the convolution before it."""
    if not getattr(type(layer), "is_behind_a_convolution", False):
        return layer
    alone = layer.__new__(type(layer).__mro__[1])
    alone.__dict__ = dict(layer.__dict__)
    alone._parameters = {name: weight for name, weight in layer._parameters.items() if name != "short_convolution"}
    return alone


def convolved(x, weights, cache=None, padding_mask=None, seq_idx=None):
    """(B, T, C) behind a convolution with `weights` (K, C); a layer of a cache that `remembers` gives and keeps what
    stands before."""
    (B, T, C), K = x.shape, len(weights)
    kept = x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
    place = end = None
    if padding_mask is not None:  # is passed over: what stood before it comes next
        kept, place, end, order = _without_padding(kept, padding_mask[:, -T:])
    before = getattr(cache, "convolution_tail", None)
    before = kept.new_zeros(B, K - 1, C) if before is None else before
    kept = torch.cat([before, kept], dim=1)  # (B, K - 1 + T, C)
    for i, weight in enumerate(weights):
        first = K - 1 - i
        earlier = kept[:, first : first + T] if place is None else _rows(kept, place + first)
        if seq_idx is not None and i:  # a packed row has no cache
            of = seq_idx if place is None else seq_idx.gather(1, order)
            of = nn.functional.pad(of[:, : max(0, T - i)], (min(i, T), 0), value=-1)  # of the token i before
            of = of if place is None else of.gather(1, place.clamp(min=0))
            earlier = earlier * (of == seq_idx)[..., None]
        x = torch.addcmul(x, earlier, weight)
    if cache is not None:  # a copy, or it would keep the whole prompt
        last = torch.arange(K - 1, device=x.device)
        cache.convolution_tail = kept[:, T:].clone() if end is None else _rows(kept, end + last)
    return x


@functools.cache
def _behind(variant: type) -> type:
    """The variant's class with the convolution first, in every member of the contract that it changes."""

    class Behind(variant):
        is_behind_a_convolution = True

        def __reduce__(self):  # pickle finds no class that is made here
            return _empty, (_behind, variant), self.__dict__

        @functools.wraps(variant.forward)  # what it names, such as `seq_idx`, is what it can do
        def forward(self, hidden_states, past_key_values=None, padding_mask=None, **more):
            cache = None if past_key_values is None else past_key_values.layers[self.short_convolution_index]
            x = convolved(hidden_states, self.short_convolution, cache, padding_mask, more.get("seq_idx"))
            return super().forward(x, past_key_values=past_key_values, padding_mask=padding_mask, **more)

        def new_cache(self):
            return remembering(super().new_cache(), len(self.short_convolution))

        def cache_bytes(self, context, element_bytes):
            return (
                super().cache_bytes(context, element_bytes)
                + (len(self.short_convolution) - 1) * self.short_convolution.shape[1] * element_bytes
            )

        def reference(self, hidden_states, **more):
            """Token by token, each with those before it that there are; then the variant's."""
            rows = []
            for t in range(hidden_states.shape[1]):
                seen = hidden_states[:, max(0, t + 1 - len(self.short_convolution)) : t + 1].flip(1)  # itself first
                rows.append(
                    hidden_states[:, t] + torch.einsum("bkc,kc->bc", seen, self.short_convolution[: seen.shape[1]])
                )
            return super().reference(torch.stack(rows, dim=1), **more)

    if hasattr(variant, "projection_flops"):
        Behind.projection_flops = lambda self, context: (
            super(Behind, self).projection_flops(context) + 2 * context * self.short_convolution.numel()
        )
    Behind.__name__, Behind.__qualname__, Behind.__doc__ = (
        variant.__name__,
        variant.__qualname__,
        inspect.getdoc(variant),
    )
    return Behind


def _without_padding(x, real):
    """(B, T, C), of which `real` (B, T) is no padding -> that moved to the front, zeros behind it; where each token
    stands then, a padded one where the last real one before it does, (B, T); how many are real, (B, 1); the order."""
    order = real.logical_not().byte().argsort(dim=1, stable=True)
    place = real.cumsum(dim=1)
    return _rows(x * real[..., None], order), place - 1, place[:, -1:], order


def _rows(x, index):
    """Tokens of (B, N, C) by their place, (B, T): (B, T, C)."""
    return x.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))


def _empty(making, kind):
    """An instance of the class that `making` gives for a `kind`, to be filled by pickle or a copy."""
    made = making(kind)
    return made.__new__(made)


def remembering(layer, tokens: int):
    """An empty layer of a cache, of any kind, with the last inputs, one fewer than `tokens`, of a convolution over so
    many in its `convolution_tail`."""
    layer.stands_for = f"{getattr(layer, 'stands_for', type(layer).__name__)} behind a convolution over {tokens}"
    layer.convolution_tokens = tokens
    layer.convolution_tail, layer.__class__ = None, _remembering(type(layer))
    return layer


def remembers(layer) -> bool:
    """Whether a layer of a cache is one that `remembering` made."""
    return hasattr(layer, "convolution_tail")


@functools.cache
def _remembering(kind: type) -> type:
    class Remembering(kind):
        """No token can be taken back out of the tail: what stood before it is gone."""

        is_croppable = False

        def __reduce__(self):
            return _empty, (_remembering, kind), self.__dict__

        def reset(self):
            self.convolution_tail = None
            super().reset()

        def crop(self, tokens_to_remove):
            if tokens_to_remove and not tokens_to_remove >= self.get_seq_length():
                raise ValueError("a convolution's cache cannot take a token back; read the shorter text anew")

        def offload(self):
            super().offload()
            self._each_tail(lambda tail: tail.to("cpu", non_blocking=True))

        def prefetch(self):
            super().prefetch()
            self._each_tail(lambda tail: tail.to(self.device, non_blocking=True))

        def reorder_cache(self, beam_idx):
            super().reorder_cache(beam_idx)
            self._each_tail(lambda tail: tail.index_select(0, beam_idx.to(tail.device)))

        def batch_repeat_interleave(self, repeats):
            super().batch_repeat_interleave(repeats)
            self._each_tail(lambda tail: tail.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices):
            super().batch_select_indices(indices)
            self._each_tail(lambda tail: tail[indices])

        def _each_tail(self, change):
            if self.convolution_tail is not None:
                self.convolution_tail = change(self.convolution_tail)

    Remembering.__name__, Remembering.__qualname__ = kind.__name__, kind.__qualname__
    return Remembering
