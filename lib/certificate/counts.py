"""What a variant's formulas say, beside what is counted: cache bytes, FLOPs, memory of the backward pass."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import Cache

CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def held(cache) -> list[torch.Tensor]:
    """All tensors that a cache's layers hold, those in lists and dictionaries too."""
    return [tensor for layer in cache.layers for _, tensor in tensors_of(layer)]


def tensors_of(thing, name: str = ""):
    """(name, tensor) of all tensors among an object's attributes, lists and dictionaries; its modules left out."""
    if isinstance(thing, list | tuple):
        thing = dict(enumerate(thing))
    for key, value in (thing if isinstance(thing, dict) else vars(thing)).items():
        path = f"{name}.{key}" if name else str(key)
        if isinstance(value, torch.Tensor):
            yield path, value
        elif isinstance(value, list | tuple | dict) and not isinstance(value, torch.Size):
            yield from tensors_of(value, path)


def formula_bytes(layers, cache, tokens: int) -> float:
    """Bytes of a cache of one sequence of so many tokens by its layers' formulas, each at the precision of its own."""
    sizes = [max((tensor.element_size() for _, tensor in tensors_of(held)), default=1) for held in cache.layers]
    return sum(layer.cache_bytes(tokens, size) for layer, size in zip(layers, sizes, strict=True))


def bytes_of(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes kept alive: a view keeps the whole of what it is a view of."""
    kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(kept.values())


class Elementwise(TorchDispatchMode):
    """Counts one operation per element that a pointwise operator gives; two, apart, where it multiplies and adds."""

    def __init__(self):
        super().__init__()
        self.operations = self.fused = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.Tag.pointwise in getattr(func, "tags", ()) and isinstance(out, torch.Tensor):
            if func.overloadpacket is torch.ops.aten.addcmul:
                self.fused += 2 * out.numel()
            else:
                self.operations += out.numel()
        return out


def core_operations(layer, hidden_states: torch.Tensor, cache=None) -> tuple[int, int]:
    """FLOPs of a layer's forward outside its weights' products, as torch counts them, and elementwise operations.

    Fused kernels count densely. Operators that torch has no count for are nothing; `hidden_states`: (1, T, C) on a CPU.
    """
    T = hidden_states.shape[1]
    counter = FlopCounterMode(display=False, custom_mapping={CPU_FLASH: _fused_attention_flops})
    with torch.no_grad(), Elementwise() as elementwise, counter:
        layer(hidden_states, past_key_values=cache)
    projections = 2 * T * sum(weight.numel() for weight in layer.parameters() if weight.dim() >= 2)
    if cache is None and hasattr(layer, "projection_flops"):
        projections = layer.projection_flops(T)
    return counter.get_total_flops() + elementwise.fused - projections, elementwise.operations


def step_operations(layer, hidden_states: torch.Tensor) -> int:
    """`core_operations` of the last of (1, T, C) hidden states alone, behind a cache of the others: FLOPs only."""
    cache = Cache(layers=[layer.new_cache()])
    with torch.no_grad():
        layer(hidden_states[:, :-1].contiguous(), past_key_values=cache)
    return core_operations(layer, hidden_states[:, -1:].contiguous(), cache)[0]


def _fused_attention_flops(query_shape, key_shape, value_shape, *_, **__) -> int:
    """torch counts its CPU flash kernel as nothing; this is the formula that it has for the CUDA ones."""
    batch, heads, queries, width = query_shape
    return 2 * batch * heads * queries * key_shape[2] * (width + value_shape[3])


def activation_bytes(layer, hidden_states) -> int:
    """Bytes that a layer's forward over (B, T, C) keeps for its backward, weights and input included."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(hidden_states.detach().requires_grad_())  # held: a freed storage's place may be another's
    del out
    return sum(storages.values())


def exponent(first: float, second: float) -> float:
    """That of a power law over a doubling."""
    return math.log2(second / first) if first > 0 and second > 0 else math.nan
