"""GPT-2 with its attention replaced: transformers' `GPT2LMHeadModel`, everything else as it is there."""

import hashlib
import math

import torch
from transformers import GPT2Config
from transformers.utils import logging

from lib.model.gpt2 import GPT2, VariantConfig

__all__ = ["GPT2", "VariantConfig", "build_model", "gpt2_config", "meta_model"]

logging.disable_progress_bar()  # one widget per saved checkpoint, in the notebook's page


def build_model(name: str, config: GPT2Config, seed: int = 0, **options) -> "GPT2":
    """A GPT-2 with the attention `name` (a variant, or the path of a .py file) and its options.

    The same seed gives every variant the same weights wherever names and shapes are shared. `config` is left as it is.
    Raises ValueError for an unknown variant or a option that it refuses, TypeError for a option that it does not have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2(config, name, options)
    kept = tuple(
        f"transformer.h.{layer}.attn."
        for layer, block in enumerate(model.transformer.h)
        if getattr(block.attn, "own_initialisation", False)
    )
    for parameter_name, parameter in model.named_parameters():
        if ".attn." in parameter_name and not parameter_name.startswith(kept):
            _initialise(parameter_name, parameter, config, seed)
    return model


@torch.no_grad()
def _initialise(name: str, parameter: torch.nn.Parameter, config: GPT2Config, seed: int):
    """GPT-2's initialisation, which transformers gives only to its own attention class.

    Each parameter draws from a generator of its own, so that a variant's extra weights do not shift the shared ones.
    """
    if name.endswith("bias"):
        parameter.zero_()
    elif parameter.dim() >= 2:
        std = config.initializer_range
        if name.endswith("c_proj.weight"):
            std /= math.sqrt(2 * config.n_layer)  # two residual branches a block (GPT-2, section 2.3)
        own_seed = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1
        parameter.normal_(0.0, std, generator=torch.Generator(parameter.device).manual_seed(own_seed))


def gpt2_config(
    layers: int, width: int, heads: int, positions: int, vocabulary: int, dropout: float = 0.0,
    position_embedding: str = "learned",
):  # fmt: skip
    """The `GPT2Config` of a size: `layers` blocks of `width` = heads x head width, `positions` learned positions, or as
    many without an embedding ("none"), for a variant that brings its own."""
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, n_positions=positions, vocab_size=vocabulary,
        attn_pdrop=dropout, resid_pdrop=dropout, embd_pdrop=dropout, bos_token_id=None, eos_token_id=None,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own `gelu_new` in one kernel: equal to rounding
    )  # fmt: skip
    if position_embedding != "learned":
        config.position_embedding = position_embedding
    return config


def meta_model(name: str, config: GPT2Config, **options) -> GPT2:
    """The model without its weights, to count with: parameters and FLOPs of GPT-2 XL cost no memory."""
    with torch.device("meta"):
        return GPT2(config, name, options)
