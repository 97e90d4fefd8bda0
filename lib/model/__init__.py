"""GPT-2 with its attention replaced: transformers' `GPT2LMHeadModel`, everything else as it is there."""

import copy
import hashlib
import math

import torch
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import Cache
from transformers.utils import logging

from lib import attention

logging.disable_progress_bar()  # one widget per saved checkpoint, in the notebook's page


def _unused(*_, **__):
    raise RuntimeError("every block's attention is replaced; transformers' own is never called")


# An implementation without a mask function: transformers then builds no T x T mask, which would be charged to variants
# that never read it, and skips a search for packed sequences that synchronises the GPU in every forward.
AttentionInterface.register("replaced", _unused)


def build_model(name: str, config: GPT2Config, seed: int = 0, **options) -> "GPT2":
    """A GPT-2 with the attention `name` (a variant, or the path of a .py file) and its options.

    The same seed gives every variant the same weights wherever names and shapes are shared. `config` is left as it is.
    Raises ValueError for an unknown variant or a option that it refuses, TypeError for a option that it does not have.
    """
    config = copy.deepcopy(config)
    config.attention, config.attention_options = name, options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2(config)
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


# Which of several configurations `from_pretrained` reads, and so which weights.
WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class GPT2(GPT2LMHeadModel):
    """GPT-2 whose blocks hold the attention that `config.attention` names, with `config.attention_options`.

    `forward` takes (B, T) token ids and `labels` as transformers' does. An `attention_mask` (B, S) is honoured,
    positions included, where padding stands before a token, and dropped where it only follows: causality hides it.
    """

    def __init__(self, config):
        config = copy.deepcopy(config)
        config._attn_implementation = "replaced"
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers reads it off its own class names only
        variant = attention.load(config.attention)
        for layer, block in enumerate(self.transformer.h):
            block.attn = variant(config, layer, **config.attention_options)

    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        """As transformers', for a folder that `save_pretrained` wrote.

        A folder whose attention is a file is loaded only where the caller names that file again,
        `from_pretrained(folder, attention="mine.py")`: a downloaded folder must not choose what code runs here,
        wherever in it the configuration lies, and whatever is passed as `config`.
        """
        is_named, config = "attention" in kwargs, kwargs.pop("config", None)
        where = {name: kwargs[name] for name in WHERE if name in kwargs}
        if not isinstance(config, GPT2Config):
            config, kwargs = GPT2Config.from_pretrained(config or folder, return_unused_kwargs=True, **kwargs)
        elif is_named:
            config = copy.deepcopy(config)
            config.attention = kwargs.pop("attention")
        if not is_named and config.attention not in attention.variants():
            raise ValueError(
                f"this model was saved with the attention file {config.attention!r}; pass attention=<that file>"
            )
        return super().from_pretrained(folder, *args, config=config, **kwargs | where)  # that very configuration

    def forward(
        self,
        input_ids,
        attention_mask=None,
        past_key_values=None,
        position_ids=None,  # `generate` gives positions only to a forward that names them
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
            if (attention_mask.cummin(dim=1).values != attention_mask).any():  # padding stands before a token
                kwargs["padding_mask"] = attention_mask
                if position_ids is None:
                    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        return super().forward(
            input_ids,
            past_key_values=past_key_values,
            position_ids=position_ids,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def new_cache(self) -> Cache:
        """An empty cache: a layer of the variant's own kind per block."""
        return Cache(layers=[block.attn.new_cache() for block in self.transformer.h])

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.use_cache is not False and generation_config.cache_implementation is None:
            model_kwargs.setdefault("past_key_values", self.new_cache())
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


def gpt2_config(layers: int, width: int, heads: int, positions: int, vocabulary: int, dropout: float = 0.0):
    """The `GPT2Config` of a size: `layers` blocks of `width` = heads x head width, `positions` learned positions."""
    return GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, n_positions=positions, vocab_size=vocabulary,
        attn_pdrop=dropout, resid_pdrop=dropout, embd_pdrop=dropout, bos_token_id=None, eos_token_id=None,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own `gelu_new` in one kernel: equal to rounding
    )  # fmt: skip


def meta_model(name: str, config: GPT2Config, **options) -> GPT2:
    """The model without its weights, to count with: parameters and FLOPs of GPT-2 XL cost no memory."""
    config = copy.deepcopy(config)
    config.attention, config.attention_options = name, options
    with torch.device("meta"):
        return GPT2(config)
