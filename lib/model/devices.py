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
    """Inside, no weight is given its first values: where none are held, to draw them is most of the time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == torch.nn.init.__name__ or func is torch.Tensor.normal_:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
