"""A model's cache: a layer of the variant's own kind per block, under transformers' whole contract for caches."""

import contextlib
import copy

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lib.model import convolution
from lib.model.arguments import Unsupported

MADE_HERE = (None, "dynamic", "dynamic_full", "offloaded")  # of transformers' `cache_implementation`


class VariantCache(DynamicCache):
    """`offloading`: a layer lies in the host's memory except while its block computes (`offloaded`).

    `read` (B, tokens) is the padding mask under which the cached tokens were read, None where none was padding.
    """

    read = None

    def __init__(self, layers, offloading=False):
        Cache.__init__(self, layers=layers)
        self.offloading, self.only_non_sliding = offloading, False

    def reset(self):
        for layer in self.layers:
            layer.reset()
            if isinstance(layer, DynamicLayer):  # transformers' own zeroes what it holds, and goes on behind it
                layer.keys = layer.values = None
                layer.is_initialized = False
        self.read = None

    def crop(self, tokens_to_remove):
        """Of all layers, or, where one refuses, of none: layers of different lengths would go on without a word."""
        before = [{name: copy.copy(value) for name, value in vars(layer).items()} for layer in self.layers]
        try:
            super().crop(tokens_to_remove)
        except Exception:
            for layer, held in zip(self.layers, before, strict=True):
                vars(layer).clear()
                vars(layer).update(held)
            raise
        length = self.get_seq_length()
        if not length:
            self.reset()  # or an empty tensor would remember how many rows there were
        elif self.read is not None:
            self.read = self.read[:, :length]

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._each_row(lambda read: read.index_select(0, beam_idx.to(read.device)))

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self._each_row(lambda read: read.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._each_row(lambda read: read[indices])

    def _each_row(self, change):
        if self.read is not None:
            self.read = change(self.read)

    def note(self, padding_mask, shape, past):
        """Keeps the mask under which `shape` (B, T) more tokens are read; None is one without padding. Raises
        Unsupported where it says of cached tokens what was not said when they were read: a state cannot forget them."""
        if padding_mask is None and self.read is None:
            return
        B, T = shape
        if padding_mask is None:
            padding_mask = torch.ones(B, past + T, dtype=torch.bool, device=self.read.device)
        before = padding_mask.new_ones(B, past) if self.read is None else self.read
        if not torch.equal(padding_mask[:, :past], before):
            raise Unsupported(
                "attention_mask says of cached tokens that they are padding, or are not, unlike when they were read; "
                "give the mask of all tokens with each call, or start from a new cache"
            )
        self.read = padding_mask


def own(cache, kinds, new_layers):
    """A cache that a caller gives, fit to be filled: an empty DynamicCache becomes a VariantCache where it stands,
    since the caller goes on with it.

    `kinds` are the class names of these layers, `new_layers()` makes empty ones. A layer of another class that keeps
    the same may say so: `stands_for`, a class name. Raises Unsupported for other kinds.
    """
    if not isinstance(cache, Cache):
        raise Unsupported(f"past_key_values must be a cache, such as model.new_cache(), not {type(cache).__name__}")
    if type(cache) is DynamicCache and cache.get_seq_length() == 0:
        cache.__class__, cache.layers, cache.layer_class_to_replicate = VariantCache, new_layers(), None
        return cache
    given = list(map(kind, cache.layers))
    if given != kinds:
        held, wanted = (f"{len(names)} x {' and '.join(sorted(set(names)))}" for names in (given, kinds))
        raise Unsupported(
            f"this {type(cache).__name__} holds {held}, not {wanted}; use model.new_cache(), or an empty DynamicCache"
        )
    return cache


def kind(layer) -> str:
    """What a layer of a cache keeps: the name of its class, or of that which it stands for."""
    return getattr(layer, "stands_for", type(layer).__name__)


def keeps_every_key(layer) -> bool:
    """Whether a cached token can still be hidden by the mask of a later call; a window or a state has let it go."""
    lets_go = layer.is_sliding or convolution.remembers(layer)
    return isinstance(layer, DynamicLayer) and not lets_go


@contextlib.contextmanager
def offloaded(cache, blocks):
    """Inside, each layer of the cache comes to its device before its block computes, and leaves it after."""
    hooks = []
    for layer, block in zip(cache.layers, blocks, strict=True):
        if not (cache.only_non_sliding and getattr(layer, "is_sliding", False)):
            hooks.append(block.register_forward_pre_hook(lambda *_, layer=layer: layer.prefetch()))
            hooks.append(block.register_forward_hook(lambda *_, layer=layer: layer.offload()))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def roomy_cache(model, tokens: int) -> Cache:
    """An empty cache of the model that moves nothing until it holds `tokens` tokens: transformers' growing layers with
    room, a variant's own after `reserve`, and those that do not grow as they are."""
    cache = model.new_cache()
    for place, layer in enumerate(cache.layers):
        behind = convolution.remembers(layer)
        if type(layer).__mro__[behind] is DynamicLayer:
            cache.layers[place] = (
                convolution.remembering(Roomy(tokens), layer.convolution_tokens) if behind else Roomy(tokens)
            )
        elif hasattr(layer, "reserve"):
            layer.reserve(tokens)
    return cache


def branched(cache: Cache) -> Cache:
    """A cache that begins with what `cache` holds and leaves that as it is."""
    return Cache(layers=[copy.copy(x) if hasattr(x, "reserve") else copy.deepcopy(x) for x in cache.layers])


class Roomy(DynamicLayer):
    """transformers' growing layer with room for `reserved` tokens; beyond them it grows as that does."""

    stands_for = DynamicLayer.__name__  # to `lib.model.caches.own`

    def __init__(self, reserved: int):
        super().__init__()
        self.room = ()
        self.reserve(reserved)

    def reserve(self, tokens: int) -> None:
        self.reserved = tokens

    def update(self, key_states, value_states, *_, **__):
        past, taken = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        elsewhere = past and self.keys.data_ptr() != self.room[0].data_ptr()  # reordered, say
        if taken > self.reserved or elsewhere:
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = [x.new_empty((*x.shape[:-2], self.reserved, x.shape[-1])) for x in (key_states, value_states)]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[..., past:taken, :] = new
        self.keys, self.values = (room[..., :taken, :] for room in self.room)
        return self.keys, self.values
