"""An attention's weights before training: GPT-2's, which transformers gives only to its own attention class."""

import hashlib
import math

import torch
from transformers import GPT2Config


def initialise(attention: torch.nn.Module, layer: int, config: GPT2Config, seed: int) -> None:
    """GPT-2's initialisation of the attention of block `layer`, in place, unless it says that it brings its own."""
    if not getattr(attention, "own_initialisation", False):
        for name, parameter in attention.named_parameters():
            _draw(f"transformer.h.{layer}.attn.{name}", parameter, config, seed)


@torch.no_grad()
def _draw(name: str, parameter: torch.nn.Parameter, config: GPT2Config, seed: int):
    """Each parameter draws from a generator of its own, so that a variant's extra weights do not shift shared ones."""
    if name.rsplit(".", 1)[-1] == "bias":
        parameter.zero_()
    elif parameter.dim() >= 2:
        std = config.initializer_range
        if name.endswith("c_proj.weight"):
            std /= math.sqrt(2 * config.n_layer)  # two residual branches a block (GPT-2, section 2.3)
        own_seed = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1
        parameter.normal_(0.0, std, generator=torch.Generator(parameter.device).manual_seed(own_seed))
