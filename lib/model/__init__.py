"""GPT-2 with its attention replaced: transformers' `GPT2LMHeadModel`, everything else as it is there."""

import torch
from transformers import GPT2Config
from transformers.utils import logging

from lib.model.devices import without_weights
from lib.model.gpt2 import GPT2, VariantConfig
from lib.model.initial import initialise
from lib.model.matching import mlp_width

__all__ = ["GPT2", "VariantConfig", "build_model", "config_of", "gpt2_config", "llama_config", "meta_model"]

logging.disable_progress_bar()  # one widget per saved checkpoint, in the notebook's page


def build_model(name: str, config: GPT2Config, seed: int = 0, **options) -> "GPT2":
    """A GPT-2 with the attention `name` (a variant, or the path of a .py file) and its options.

    The same seed gives every variant the same weights wherever names and shapes are shared. `config` is left as it is.
    Raises ValueError, in one sentence, for an unknown variant, and for an option that it does not have or refuses.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2(config, name, options)
    for layer, block in enumerate(model.transformer.h):
        initialise(block.attn, layer, config, seed)
    return model


def gpt2_config(
    layers: int, width: int, heads: int, positions: int, vocabulary: int, dropout: float = 0.0,
    position_embedding: str = "learned", architecture: str = "gpt2", convolution: int = 0,
):  # fmt: skip
    """The `GPT2Config` of a size: `layers` blocks of `width` = heads x head width, `positions` learned positions, or as
    many without an embedding ("none"), for a variant that brings its own. `architecture`: gpt2, or llama.
    `convolution`: how many tokens a short convolution before each attention sees, 0 for none (4 is usual)."""
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, n_positions=positions, vocab_size=vocabulary,
        attn_pdrop=dropout, resid_pdrop=dropout, embd_pdrop=dropout, bos_token_id=None, eos_token_id=None,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own `gelu_new` in one kernel: equal to rounding
    )  # fmt: skip
    if position_embedding != "learned":
        config.position_embedding = position_embedding
    if architecture != "gpt2":
        config.architecture = architecture
    if convolution:
        config.convolution = convolution
    return config


def llama_config(layers: int, width: int, heads: int, positions: int, vocabulary: int, **more) -> GPT2Config:
    """The config of a model of a size with Llama's layers: RMSNorm, SwiGLU of as many weights as GPT-2's MLP, rotary
    positions (none with `position_embedding="none"`), no biases."""
    return gpt2_config(layers, width, heads, positions, vocabulary, **more, architecture="llama")


def config_of(values: dict, vocabulary: int, dropout: float = 0.0) -> GPT2Config:
    """The config of the model that a run with these parameters (of train.ipynb) trains. Raises ValueError where `match`
    cannot be had."""
    sizes = (values[name] for name in ("layers", "width", "heads", "positions"))
    layers = {name: values[name] for name in ("position_embedding", "architecture", "convolution") if name in values}
    config = gpt2_config(*sizes, vocabulary, dropout, **layers)
    if values.get("match") == "parameters":
        config.n_inner = mlp_width(config, values["attention"], values["options"])
    return config


def meta_model(name: str, config: GPT2Config, **options) -> GPT2:
    """The model without its weights, to count with: parameters and FLOPs of GPT-2 XL cost no memory."""
    with without_weights():
        return GPT2(config, name, options)
