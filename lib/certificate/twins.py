"""The model that a run builds, with weights that let mistakes show, and its twin in float64."""

import contextlib
import copy
import functools

import torch
from transformers.cache_utils import Cache

from lib import attention
from lib.certificate.probes import Tokens
from lib.certificate.setting import Setting
from lib.model import build_model, convolution, devices, gpt2_config
from lib.model.llama import rotary

VOCABULARY = 61  # as many tokens as tell rows apart: the head is the same for every variant
GAIN = 1.5  # of matrices, over the root of their width: scores of a few units, attention far from uniform
LOUD = 6.0  # what multiplies an attention's input, so that scores differ by hundreds: then a mask of -100 shows


class Twins:
    """A variant's model as `setting` runs it (`timed`), and the same weights in float64 (`exact`), for one seed."""

    def __init__(self, name: str, options: dict, setting: Setting, seed: int):
        self.name, self.options, self.setting, self.seed = name, options, setting, seed
        self.device = devices.choose(setting.device)
        self.autocast = devices.autocast(setting.precision, self.device)

    def config(self, dropout: float = 0.0):
        return self.setting.config(VOCABULARY, dropout)

    def build(self, dropout: float = 0.0) -> torch.nn.Module:
        """The model as a run begins with it, on the run's device."""
        return build_model(self.name, self.config(dropout), self.seed, **self.options).to(self.device)

    @functools.cached_property
    def timed(self) -> torch.nn.Module:
        """With the run's dropout, in its precision and on its device, the weights made `lively`."""
        return lively(self.build(self.setting.dropout), self.seed).eval()

    @functools.cached_property
    def plain(self) -> torch.nn.Module:
        """`timed` without dropout."""
        if self.setting.dropout == 0:
            return self.timed
        model = self.build()
        model.load_state_dict(self.timed.state_dict())
        return model.eval()

    @functools.cached_property
    def exact(self) -> torch.nn.Module:
        """`plain` in float64, on the run's device where the variant computes there in float64, else on the CPU."""
        model = copy.deepcopy(self.plain).double()
        if self.device.type != "cpu":
            try:
                with torch.no_grad():
                    model(torch.zeros(1, 4, dtype=torch.long, device=self.device), use_cache=False)
            except (ValueError, RuntimeError):
                return model.cpu()
        return model

    @property
    def exact_device(self) -> torch.device:
        return self.exact.device

    def tokens_of(self, model) -> Tokens:
        """A model as the run calls it, as a subject."""
        return Tokens(model, VOCABULARY, self.device, self.autocast, use_cache=False)

    @functools.cached_property
    def tokens(self) -> Tokens:
        """The exact model as a subject, in evaluation."""
        return Tokens(self.exact, VOCABULARY, self.exact_device, use_cache=False)

    def where(self) -> dict:
        """Lengths, rows and devices of the examination, for who reads the certificate."""
        s = self.setting
        return {
            "rows": s.rows, "length": s.length, "longest": s.longest, "decoded": s.decoded, "prefixes": s.prefixes,
            "exact_device": self.exact_device.type, "reference_length": self.reference_length,
            "gradient_length": s.gradient_length,
        }  # fmt: skip

    @functools.cached_property
    def reference_length(self) -> int:
        return self.setting.reference_length(self.exact_device.type)

    def layers(self):
        """Each layer in the run's precision without dropout, and its twin in float64."""
        return zip(attentions(self.plain), attentions(self.exact), strict=True)

    def build_another(self) -> torch.nn.Module:
        """The model as another seed builds it, on the CPU."""
        return build_model(self.name, self.config(), self.seed + 1000, **self.options)

    def layer_of_another_seed(self, index: int) -> torch.nn.Module:
        """One layer of the model as another seed builds it."""
        return attentions(self._another)[index]

    @functools.cached_property
    def _another(self) -> torch.nn.Module:
        return self.build_another()

    def placed(self, layer, form: str = "forward"):
        """A layer, or its reference, as the model calls it: with rotary positions, of its tokens from `first` on."""
        call = layer if form == "forward" else getattr(layer, form)
        if not (self.exact._rotates and attention.rotates(layer)):
            return lambda x, first=0, **more: call(x, **more)
        head_width = self.setting.width // self.setting.heads

        def with_positions(x, first=0, **more):
            places = torch.arange(first, first + x.shape[1], device=x.device)
            return call(x, position_embeddings=rotary(places[None], head_width, x), **more)

        return with_positions

    def decoded(self, layer, pieces, cache) -> list[torch.Tensor]:
        """What a layer gives for pieces of a sequence, one behind the other."""
        first, found = 0, []
        for piece in pieces:
            found.append(self.placed(layer)(piece.contiguous(), first=first, past_key_values=cache)[0])
            first += piece.shape[1]
        return found

    @functools.cached_property
    def parts(self) -> dict[str, tuple]:
        """Each different variant of the model's pattern, by its name: its class and options. Most have one."""
        return attention.by_part(self.name, self.options)

    def layers_for(self, positions: int, width: int | None = None) -> dict[str, torch.nn.Module]:
        """One layer of each variant on the CPU, for counting: of as many positions as it is given tokens, in float64,
        which counts alike and which variants with kernels of their own compute without them."""
        s = self.setting
        config = gpt2_config(1, width or s.width, s.heads, positions, VOCABULARY, convolution=s.convolution)
        return {
            name: convolution.add(variant(config, 0, **own), config, 0).double().eval()
            for name, (variant, own) in self.parts.items()
        }

    def name_at(self, index: int) -> str:
        """The variant of a layer."""
        names = attention.parts(self.name)
        return names[index % len(names)]

    def of_each_kind(self, layers: list) -> dict[int, torch.nn.Module]:
        """The first and the last layer of each variant, by their place."""
        last = {self.name_at(index): index for index in range(len(layers))}
        first = {self.name_at(index): index for index in reversed(range(len(layers)))}
        return {index: layers[index] for index in sorted({*first.values(), *last.values()})}

    @property
    def longest_option(self) -> int:
        """The largest number among options: a chunk or a window, perhaps."""
        given = [option for _, own in self.parts.values() for option in own.values()]
        return max((value for value in given if type(value) is int), default=0)

    def about(self, name: str, what: str) -> str:
        """`what` is measured, with the variant that it is about where there are several."""
        return f"{attention.stem(name)}: {what}" if len(self.parts) > 1 else what

    def hidden(self, rows: int, length: int, device, dtype) -> torch.Tensor:
        """What a layer is given: (B, T, C) of variance one, as behind a norm."""
        return torch.randn(rows, length, self.setting.width, dtype=torch.float64).to(device, dtype)


def attentions(model) -> list[torch.nn.Module]:
    return [block.attn for block in model.transformer.h]


@torch.no_grad()
def lively(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model with all its matrices drawn anew, and its vectors moved: attention as uneven as after training."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, device=weight.device)
        if name.endswith(("wte.weight", "wpe.weight")):
            weight.copy_(noise)
        elif weight.dim() >= 2:
            weight.copy_(noise * GAIN / weight.numel() ** 0.25)
        else:
            weight.add_(0.2 * noise)
    return model


@contextlib.contextmanager
def loud(model):
    """Every attention's input multiplied, so that what a mask only dampens is heard."""

    def louder(_, given):
        return (given[0] * LOUD, *given[1:])

    hooks = [layer.register_forward_pre_hook(louder) for layer in attentions(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def as_reference(model):
    """The model with each layer's slow reference in the place of its forward."""
    layers = attentions(model)
    for layer in layers:
        layer.forward = functools.partial(_reference, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _reference(layer, hidden_states, *_, position_embeddings=None, **__):
    if position_embeddings is not None and attention.rotates(type(layer)):
        return layer.reference(hidden_states, position_embeddings=position_embeddings), None
    return layer.reference(hidden_states), None


def cache_of(layers) -> Cache:
    """An empty cache, of which each layer finds its own place."""
    return Cache(layers=[layer.new_cache() for layer in layers])
