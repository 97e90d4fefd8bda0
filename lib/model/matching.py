"""Models of one size: the MLP's width, or an attention's options, by which a variant has SDPA's weights or state.

A comparison at equal layers mixes two questions: what an attention costs, and what fewer weights or a smaller memory
cost. `match` sets one of them aside: `parameters` gives what attention saves to the MLP, `state` gives each sequence a
cache of SDPA's size, where the variant's options can.
"""

from lib import attention
from lib.model.devices import without_weights
from lib.model.llama import multiple, swiglu_width


def mlp_width(config, name: str, options: dict) -> int:
    """Hidden units of the MLP with which the model has as many weights as with SDPA and its own MLP.

    Raises ValueError where attention alone has more.
    """
    width, is_llama = config.n_embd, getattr(config, "architecture", "gpt2") == "llama"
    own = config.n_inner or (swiglu_width(width) if is_llama else 4 * width)
    spare = _weights(attention.REFERENCE, config, {}, is_llama) - _weights(name, config, options, is_llama)
    of_a_unit = 3 * width if is_llama else 2 * width + 1
    found = own + multiple(width, spare / config.n_layer / of_a_unit)
    if found < 1:
        more = f"{-spare / config.n_layer:,.0f} weights a layer more than SDPA"
        raise ValueError(f"match: parameters leaves no MLP, since {name} has {more}; use match none")
    return found


def _weights(name: str, config, options: dict, is_llama: bool) -> int:
    """Those of all layers' attention; Llama's have no biases."""
    with without_weights():
        layers = attention.layers(name, config, **options)
    named = (pair for layer in layers for pair in layer.named_parameters())
    return sum(weight.numel() for of, weight in named if not (is_llama and of.rsplit(".", 1)[-1] == "bias"))


def options_of_state(config, context: int, name: str, options: dict) -> dict:
    """`options` with those added by which a layer's cache of `context` tokens comes nearest to SDPA's.

    A variant says by its `sized` which; one without has no say in it, and stays as it is. Raises ValueError where an
    option is given that would be chosen.
    """
    with without_weights():
        numbers = attention.load(attention.REFERENCE)(config, 0).cache_bytes(context, 1)
    chosen = {}
    for part, (variant, own) in attention.by_part(name, options).items():
        found = _nearest(part, variant, own, config, context, numbers) if hasattr(variant, "sized") else {}
        for option, value in found.items():
            if own.get(option, value) != value:
                given = f"{part}'s {option}, and options give {own[option]!r}"
                raise ValueError(f"match: state would choose {given}; leave one of the two out")
        chosen[part] = own | found
    if len(chosen) == 1:
        return next(iter(chosen.values()))
    return {attention.stem(part): own for part, own in chosen.items() if own}


def _nearest(part: str, variant, own: dict, config, context: int, numbers: int) -> dict:
    """What `sized` says for as many numbers as SDPA's cache has, or for half as many, as a state is kept in fp32 beside
    a cache in bf16: by which the bytes, where SDPA's are bf16, come nearer."""
    wanted, found = 2 * numbers, {}
    for asked in (numbers, numbers // 2):
        try:
            options = variant.sized(config, context, asked)
            with without_weights():
                off = abs(variant(config, 0, **own | options).cache_bytes(context, 2) - wanted)
        except Exception as error:
            said = f"and its call ends in {type(error).__name__}: {error}"
            wants = "options for (config, context, numbers)"
            raise ValueError(f"{attention.stem(part)}'s sized must give {wants}, {said}") from error
        found.setdefault(off, options)
    return found[min(found)]
