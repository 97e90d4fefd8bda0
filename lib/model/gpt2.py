"""transformers' GPT-2 around an attention of ours: its config, its forward and `generate`, its folders on disk."""

import contextlib

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import is_tracing

from lib import attention
from lib.model import caches, convolution, llama
from lib.model.arguments import Unsupported, read, refuse_unknown
from lib.model.initial import initialise


def _unused(*_, **__):
    raise RuntimeError("every block's attention is replaced; transformers' own is never called")


# An implementation without a mask function: transformers then builds no T x T mask, which would be charged to variants
# that never read it, and skips a search for packed sequences that synchronises the GPU in every forward.
AttentionInterface.register("replaced", _unused)


CONSTANTS = (".attn.bias", ".attn.masked_bias")  # GPT-2's causal mask, which older files hold among the weights


class VariantConfig(GPT2Config):
    """GPT-2's config with the variant, its options, and whose layers the model has. A type of its own, so that no
    folder loads as what it is not."""

    model_type = "gpt2_variant"
    attention: str | None = None
    attention_options: dict | None = None
    position_embedding: str = "learned"
    architecture: str = "gpt2"
    convolution: int = 0

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        """A plain GPT-2 folder is read too; it names no attention. Raises Unsupported for another kind of model."""
        values, kwargs = super().get_config_dict(*args, **kwargs)
        if values.get("model_type", cls.model_type) not in (cls.model_type, GPT2Config.model_type):
            raise Unsupported(f"this is a model of type {values['model_type']!r}; only GPT-2's weights fit GPT-2")
        return values | {"model_type": cls.model_type}, kwargs

    @classmethod
    def of(cls, config: GPT2Config, attention: str, options: dict) -> "VariantConfig":
        """A copy of a GPT-2 config that names an attention."""
        values = {name: value for name, value in config.to_dict().items() if name != "model_type"}
        return cls(**values | {"attention": attention, "attention_options": dict(options)})


# What changes transformers' own attention, which is replaced, and the only value that a variant stands for.
HONOURED = {
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
    "add_cross_attention": False, "is_causal": True, "output_attentions": False,
}  # fmt: skip


class NoPositions(torch.nn.Module):
    """Stands where positions are embedded, and adds nothing: for a variant that brings its own, or none at all."""

    def forward(self, position_ids):
        return torch.zeros((), device=position_ids.device)  # of no dimension, so that the sum keeps its dtype


class GPT2(GPT2LMHeadModel):
    """GPT-2 whose blocks hold the attention that `config.attention` names, with `config.attention_options`.

    A config may come from a folder that somebody made, so a file of code is only run where the caller names it, by
    `named_attention`, `build_model` or `from_pretrained(folder, attention="mine.py")`.

    Raises Unsupported where the config names no attention, or a file that the caller did not, or asks for something
    else that is not honoured (`HONOURED`).
    """

    config: VariantConfig
    _can_compile_fullgraph = False  # in transformers this speaks of static caches

    def __init__(self, config, named_attention=None, named_options=None):
        saved = getattr(config, "attention", None)
        name = named_attention or saved
        if name is None:
            raise Unsupported("this config names no attention; pass attention=<a variant>, for example 'sdpa'")
        if named_attention is None and not attention.is_ours(name):
            raise Unsupported(f"this model was saved with the attention file {name!r}; pass attention=<that file>")
        for option, value in HONOURED.items():
            if getattr(config, option, value) != value:
                raise Unsupported(
                    f"{option} is {getattr(config, option)} in this config, and changes an attention that is replaced "
                    f"here; only {value} is honoured"
                )
        if named_options is None:  # those of the folder, unless they are another variant's
            same = saved is not None and attention.label(saved) == attention.label(name)
            named_options = (getattr(config, "attention_options", None) if same else None) or {}
        config = VariantConfig.of(config, name, named_options)
        config._attn_implementation = "replaced"
        super().__init__(config)
        if config.position_embedding not in ("learned", "none"):
            raise Unsupported(f"position_embedding must be learned or none, not {config.position_embedding!r}")
        if not isinstance(config.convolution, int) or not (config.convolution == 0 or config.convolution >= 2):
            raise Unsupported(f"convolution must be 0, or at least 2 tokens, not {config.convolution!r}")
        if config.architecture not in ("gpt2", "llama"):
            raise Unsupported(f"architecture must be gpt2 or llama, not {config.architecture!r}")
        self._rotates = config.architecture == "llama" and config.position_embedding == "learned"
        if self._rotates and config.n_embd // config.n_head % 2:
            raise Unsupported("rotary positions turn pairs of numbers; give heads an even width")
        if config.architecture == "llama" or config.position_embedding == "none":
            self.transformer.wpe = NoPositions()
        self.loss_function = mean_loss
        if config.architecture == "llama":
            llama.exchange(self.transformer, config)
            for block in self.transformer.h:
                block.mlp.apply(self._init_weights)  # before a variant draws: then every variant has the same
        attention.check_options(name, config.attention_options)
        variant = attention.load(name)
        for layer, block in enumerate(self.transformer.h):
            block.attn = convolution.add(variant(config, layer, **config.attention_options), config, layer)
            if config.architecture == "llama":
                llama.without_biases(block.attn)
        layers = self._new_layers()
        self._layer_kinds = list(map(caches.kind, layers))
        self._is_stateful = not all(layer.is_croppable for layer in layers)  # transformers then refuses to draft
        self._keeps_every_key = all(map(caches.keeps_every_key, layers))
        self._sees_no_later_token = all(getattr(block.attn, "causal", True) for block in self.transformer.h)
        self.keeps_documents = all(attention.keeps_documents(block.attn) for block in self.transformer.h)

    @classmethod
    def from_pretrained(
        cls, folder, *args, attention=None, attention_options=None, ignore_mismatched_sizes=False,
        output_loading_info=False, **kwargs,
    ):  # fmt: skip
        """As transformers', for a folder that `save_pretrained` wrote, or one of GPT-2's own weights (or on the hub).

        `attention` names the variant. A plain GPT-2 folder has none, and a folder whose attention is a file is loaded
        only where the caller names that file again: a downloaded folder must not choose what code runs here.

        Raises Unsupported where the weights are not the variant's, unless `ignore_mismatched_sizes` lets those start
        anew that do not fit, and leaves out those of another attention.
        """
        config = kwargs.get("config")
        if kwargs.get("attn_implementation") or getattr(config, "_attn_implementation", None) not in NOT_ASKED_FOR:
            raise Unsupported("attn_implementation picks among transformers' own; name a variant by attention=")
        model, found = super().from_pretrained(
            folder, *args, named_attention=attention, named_options=attention_options, ignore_mismatched_sizes=True,
            output_loading_info=True, **kwargs,
        )  # fmt: skip
        odd = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
        lost = sorted(key for key in found["unexpected_keys"] if ".attn." in key and not key.endswith(CONSTANTS))
        if lost and not odd and not ignore_mismatched_sizes:
            raise Unsupported(
                f"the weights in {folder} are not those of {model.config.attention!r} with these options, which has no "
                f"{lost[0]} and {len(lost) - 1} others that are there; name the attention and the options that they "
                "were trained with, or leave them out by ignore_mismatched_sizes=True"
            )
        if odd and not ignore_mismatched_sizes:
            raise Unsupported(
                f"the weights in {folder} are not those of {model.config.attention!r}, which has {odd[0]} and "
                f"{len(odd) - 1} others of its own; name an attention with the same weights, or let its own start "
                "anew by ignore_mismatched_sizes=True"
            )
        model._start_anew({*odd, *(name for name, _ in model.named_non_persistent_buffers())})
        return (model, found) if output_loading_info else model

    @torch.no_grad()
    def _start_anew(self, names):
        """Gives what of an attention no file holds the values of a new one: transformers leaves its memory as found."""
        for layer, block in enumerate(self.transformer.h):
            prefix = f"transformer.h.{layer}.attn."
            own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            if own:
                new = attention.load(self.config.attention)(self.config, layer, **self.config.attention_options)
                new = convolution.add(new, self.config, layer)
                if self.config.architecture == "llama":
                    llama.without_biases(new)
                initialise(new, layer, self.config, torch.initial_seed())
                for name in own:
                    _weight(block.attn, name).copy_(_weight(new, name))

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        """Raises Unsupported: transformers' implementations are not called."""
        raise Unsupported(
            f"attn_implementation {attn_implementation!r} is not honoured, since the attention is replaced; build the "
            "model with another attention"
        )

    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,  # `generate` gives positions only to a forward that names them
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        seq_idx=None,
        **kwargs,
    ):
        """transformers' GPT-2, argument by argument. Raises Unsupported for one that is not honoured.

        `input_ids` (B, T) or `inputs_embeds` (B, T, C). `attention_mask` (B, S) hides padding wherever it stands, and
        positions count what it leaves. `seq_idx` (B, T) tells the documents of a packed row apart, where the variant
        can: each is as if alone, at positions from 0. A mask (B, 1, T, S), `position_ids` that restart and
        FlashAttention's `cu_seq_lens_q` say the same. A packed row has no cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise Unsupported("give either input_ids or inputs_embeds")
        shape = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        if past_key_values is not None:
            past_key_values = caches.own(past_key_values, self._layer_kinds, self._new_layers)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        tokens = read(shape, past, attention_mask, position_ids, seq_idx, kwargs)
        refuse_unknown(kwargs, labels)
        refuse_unknown(
            {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
        )
        self._check_positions(past + shape[1], tokens.position_ids)
        packed = tokens.seq_idx is not None
        if packed and not self.keeps_documents:
            raise Unsupported(
                f"{self.config.attention!r} cannot keep the documents of a row apart; give each a row of its own"
            )
        if packed and (use_cache or past_key_values is not None):
            raise Unsupported("a row of several documents has no cache to go on from; pass use_cache=False")
        checkpointing = self.is_gradient_checkpointing and self.training
        if checkpointing and (use_cache or past_key_values is not None):
            raise Unsupported("gradient checkpointing in training keeps no cache; pass use_cache=False and no cache")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not packed
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        padding_mask = self._padding(tokens.padding_mask, past_key_values)
        if isinstance(past_key_values, caches.VariantCache) and not self._keeps_every_key:
            past_key_values.note(padding_mask, shape, past)
        if self._rotates:
            positions = tokens.position_ids
            if positions is None:
                positions = torch.arange(past, past + shape[1], device=self.transformer.wte.weight.device)[None]
            like = self.transformer.wte.weight if inputs_embeds is None else inputs_embeds
            kwargs["position_embeddings"] = llama.rotary(positions, self.config.n_embd // self.config.n_head, like)
        offloading = getattr(past_key_values, "offloading", False)
        with caches.offloaded(past_key_values, self.transformer.h) if offloading else contextlib.nullcontext():
            return super().forward(
                input_ids,
                past_key_values=past_key_values,
                attention_mask=tokens.given_mask,
                token_type_ids=token_type_ids,
                position_ids=tokens.position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                padding_mask=padding_mask,
                seq_idx=tokens.seq_idx,
                **kwargs,
            )

    def _check_positions(self, length, position_ids):
        most = self.config.n_positions
        if length > most and (position_ids is None or (not is_tracing(position_ids) and position_ids.max() >= most)):
            raise Unsupported(f"{length} tokens are more than the model's {most} positions; give fewer")

    def _padding(self, mask, cache):
        """The mask, or None where it only trails and so hides nothing: causality does, and what it hides is not kept.

        A cache that lets go of keys, or sums them up, must be told at once; one that keeps them can be told later.
        """
        told_later = self._sees_no_later_token and (cache is None or self._keeps_every_key)
        if mask is None or is_tracing(mask) or not told_later:
            return mask
        return None if torch.equal(mask.cummin(dim=1).values, mask) else mask

    def new_cache(self, offloading: bool = False) -> caches.VariantCache:
        """An empty cache: a layer of the variant's own kind per block; `offloading` keeps it in the host's memory."""
        return caches.VariantCache(self._new_layers(), offloading)

    def _new_layers(self):
        return [block.attn.new_cache() for block in self.transformer.h]

    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        """transformers' own. Raises Unsupported, before anything runs, for a cache that is not the variant's."""
        for source in (kwargs, vars(generation_config or self.generation_config)):
            _check_cache(source.get("cache_implementation"))
        return super().generate(inputs, generation_config, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Raises Unsupported: the cache would be cut into pages of keys and values."""
        _check_cache("paged")

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        assistant = generation_mode_kwargs.get("assistant_model")
        if getattr(assistant, "_is_stateful", False):
            raise Unsupported("this assistant_model's cache cannot take back what it drafted; use one of another kind")

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        _check_cache(generation_config.cache_implementation)
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = self.new_cache(offloading=generation_config.cache_implementation == "offloaded")
        if generation_config.is_assistant:  # what it drafts is taken back
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache


def _weight(module, name):
    return module.get_parameter(name) if name in dict(module.named_parameters()) else module.get_buffer(name)


NOT_ASKED_FOR = (None, "replaced")  # values of `_attn_implementation`


def _check_cache(implementation) -> None:
    if implementation not in caches.MADE_HERE:
        raise Unsupported(
            f"cache_implementation {implementation!r} is not offered, since each variant has a cache of its own; leave "
            "it out, or use 'offloaded'"
        )


def mean_loss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_):
    """transformers' mean cross-entropy over the labels, in nats, but 0 where there is not one to take a mean of."""
    if num_items_in_batch is None:
        counted = labels[..., 1:] if shift_labels is None else shift_labels
        num_items_in_batch = (counted != ignore_index).sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.clamp(min=1)  # without a look at it, which would wait for the device
    else:
        num_items_in_batch = max(1, num_items_in_batch)
    return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels)


AutoConfig.register(VariantConfig.model_type, VariantConfig, exist_ok=True)
AutoModelForCausalLM.register(VariantConfig, GPT2, exist_ok=True)
