"""What a training step asks of a device, counted without one: every operator's FLOPs and bytes, on fake tensors.

Fake tensors (`torch._subclasses.fake_tensor`) have shapes and no content: a step of GPT-2 124M is counted in seconds.
"""

from collections import Counter
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lib.errors import UsageError
from lib.model import config_of, devices, meta_model

FUSED = {  # attention kernels: how often the products of queries' width and those of values' width are made
    "_scaled_dot_product_flash_attention_for_cpu": (1, 1),  # scores; their mix of values
    "_scaled_dot_product_flash_attention_for_cpu_backward": (3, 2),  # scores again, queries', keys'; weights', values'
}
LOOK_UPS = {"embedding", "gather", "index", "index_select"}  # of a table they read only what they return
# No kernel: memory is only taken.
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Operator(NamedTuple):
    """One launch: its FLOPs by the unit that does them (bf16, fp32, or attention, a fused kernel), and its bytes."""

    unit: str
    flops: float
    bytes: float


class Operators(TorchDispatchMode):
    """Collects what runs inside it, views and mere allocations left out."""

    def __init__(self):
        super().__init__()
        self.found: list[Operator] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        read = list({id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}.values())
        written = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        there = {x.untyped_storage()._cdata for x in read}
        view = all(x.untyped_storage()._cdata in there for x in written) and not func._schema.is_mutable
        if view or name in ALLOCATIONS:
            return out
        if func._schema.is_mutable and not written:  # lists that are changed in place, as an optimizer's
            written = read
        sizes = [_bytes(x) for x in read]
        if name in LOOK_UPS:
            sizes[0] = min(sizes[0], sum(map(_bytes, written)))
        self.found.append(Operator(*_flops(func, name, args, kwargs, out), sum(sizes) + sum(map(_bytes, written))))
        return out


def _bytes(x: torch.Tensor) -> int:
    """Of memory that is touched: what is expanded lies there once."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _flops(func, name: str, args, kwargs, out) -> tuple[str, float]:
    if name in FUSED:
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        query, key, value = (given[which] for which in ("query", "key", "value"))
        by_query, by_value = FUSED[name]
        pairs = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
        half = 2 if given.get("is_causal") else 1  # the kernels skip what causality hides
        return "attention", 2 * pairs * (by_query * query.shape[3] + by_value * value.shape[3]) / half
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return "fp32", 0.0
    unit = "bf16" if tree_leaves(out)[0].dtype == torch.bfloat16 else "fp32"
    return unit, float(formula(*args, **kwargs, out_val=out))


def step(values: dict, vocabulary: int, precision: str) -> list[Operator]:
    """The operators of one optimizer step of a run: forward and backward over its batches, clipping, fused AdamW.

    `values` are the parameters of train.ipynb, `precision` is bf16 or fp32. They are those of the CPU's path.
    Raises UsageError where what runs, or its shape, depends on what tensors hold: that cannot be counted beforehand.
    """
    model = meta_model(values["attention"], config_of(values, vocabulary), **values["options"]).train()
    with FakeTensorMode():
        forward_backward = _forward_backward(model, values, precision)
        trained = [weight for weight in _weights(model).values() if weight.requires_grad]
        for weight in trained:
            weight.grad = torch.empty_like(weight)
        optimizer = torch.optim.AdamW(trained, fused=True)
        with Operators() as update:
            if values["clip_norm"]:
                torch.nn.utils.clip_grad_norm_(trained, values["clip_norm"], foreach=True)
            optimizer.step()
    return values["accumulation"] * forward_backward + update.found


def _weights(model) -> dict[str, torch.Tensor]:
    held = [*model.named_parameters(), *model.named_buffers()]
    return {name: torch.empty(x.shape, dtype=x.dtype, requires_grad=x.requires_grad) for name, x in held}


def _forward_backward(model, values: dict, precision: str) -> list[Operator]:
    """The operators of one batch. Layers that are alike are counted once: as what a second one adds to the first."""
    every = list(model.transformer.h)
    kinds: dict[tuple, list] = {}
    for block in every:
        kinds.setdefault(_kind(block), []).append(block)
    once = [blocks[0] for blocks in kinds.values()]
    found = _of_layers(model, once, values, precision)
    first = Counter(found)
    for blocks in kinds.values():
        again = [Counter(_of_layers(model, [*once, block], values, precision)) for block in blocks[1:3]]
        if again and (first - again[0] or again[0] != again[-1]):  # they only look alike, as where one asks its number
            found = _of_layers(model, every, values, precision)
            break
        for more in again[:1]:
            found = found + (len(blocks) - 1) * list((more - first).elements())
    model.transformer.h = torch.nn.ModuleList(every)
    return found


def _kind(block) -> tuple:
    """Alike for layers that do the same with tensors of the same shapes: all but the weights and the layer's number."""
    modules = [(name, type(module), _plain(module)) for name, module in block.named_modules()]
    held = [*block.named_parameters(), *block.named_buffers()]
    return (*modules, *((name, x.shape, x.dtype, x.requires_grad) for name, x in held))


def _plain(module) -> tuple:
    """A module's own settings, as text; of what is no number, word or list of these, its type."""
    plain = (bool, int, float, str, type(None), list, tuple)
    found = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "layer_idx"}
    return tuple(
        sorted((name, repr(value) if isinstance(value, plain) else str(type(value))) for name, value in found.items())
    )


def _of_layers(model, blocks: list, values: dict, precision: str) -> list[Operator]:
    model.transformer.h = torch.nn.ModuleList(blocks)
    ids = torch.empty(values["batch_size"], values["context"], dtype=torch.long)
    with Operators() as found:
        try:
            with devices.autocast(precision, torch.device("cpu"))():
                loss = functional_call(model, _weights(model), (ids,), {"labels": ids, "use_cache": False}).loss
            loss.backward()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UsageError(
                f"{values['attention']} cannot be predicted: {error.func} depends on what its tensors hold; "
                "leave it out by --variants"
            ) from None
    return found.found
