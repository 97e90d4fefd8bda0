"""Where a model computes and how precisely."""

import contextlib

import torch
from torch.overrides import TorchFunctionMode


def choose(name: str) -> torch.device:
    """`auto`: CUDA where there is any, else the CPU."""
    cuda = torch.cuda.is_available() if name == "auto" else name == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto`: bf16 on CUDA, fp32 on the CPU."""
    automatic = "bf16" if device.type == "cuda" else "fp32"
    return automatic if precision == "auto" else precision


def autocast(precision: str, device: torch.device):
    """A factory of contexts for `precision`: bf16 autocast or nothing."""
    if resolve_precision(precision, device) == "bf16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext


@contextlib.contextmanager
def without_weights():
    """What is built inside has shapes and no numbers, to count with: GPT-2 XL costs no memory and little time."""
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """Inside, the normal numbers that GPT-2's weights begin with are not drawn where none are held: that is most of the
    time. What is wrong with them is still said, and tensors elsewhere have theirs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.init.normal_ and not args:
            tensor = kwargs["tensor"]
            if tensor.is_meta and tensor.is_floating_point() and kwargs.get("std", 1.0) >= 0:
                return tensor
        return func(*args, **kwargs)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
