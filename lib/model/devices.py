"""Where a model computes and how precisely."""

import contextlib

import torch


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


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
