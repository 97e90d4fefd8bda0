"""Does a variant compute what its name promises? A variant that fails is drawn apart and never ranked.

Every check runs one small layer in float64 on the CPU, with weights large enough that attention is far from uniform.
"""

import torch

from lib import attention
from lib.model import gpt2_config

TOLERANCE = 1e-6
LENGTH, PERTURBED = 33, 17  # odd, so that no window, chunk or bucket fits by luck


def certify(name: str, knobs: dict) -> dict:
    """The checks of one variant: each a bool, or the number that it was judged by.

    - `causal`: changing token 17 changes no output before it
    - `prefix_equal`: f(x[:t]) = f(x)[:t] for every t
    - `mixes`: changing token 17 changes an output after it
    - `cached_equal`: token by token with the cache gives what one pass gives
    - `reference_difference`: largest difference from the variant's own slow form, over its largest output
    - `passed`: all of it, the difference at most 1e-6
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        config = gpt2_config(layers=1, width=32, heads=4, positions=2 * LENGTH, vocabulary=2)
        layer = attention.load(name)(config, 0, **knobs).double().eval()
        for parameter in layer.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.3)
        x = torch.randn(2, LENGTH, 32, dtype=torch.float64)
        return _checks(layer, x)


def _checks(layer, x) -> dict:
    out = layer(x)[0]
    scale = out.abs().max().item()

    changed = x.clone()
    changed[:, PERTURBED] += 1.0
    moved = (layer(changed)[0] - out).abs().amax(dim=(0, 2)) / scale  # (T,)

    prefixes = [layer(x[:, :t].contiguous())[0] - out[:, :t] for t in range(1, x.shape[1])]
    prefix_difference = max(difference.abs().max().item() for difference in prefixes) / scale
    cached = torch.cat(list(_token_by_token(layer, x)), dim=1)
    cached_difference = (cached - out).abs().max().item() / scale
    reference_difference = (layer.reference(x) - out).abs().max().item() / scale

    checks = {
        "causal": moved[:PERTURBED].max().item() <= TOLERANCE,
        "prefix_equal": prefix_difference <= TOLERANCE,
        "mixes": moved[PERTURBED + 1 :].max().item() > TOLERANCE,
        "cached_equal": cached_difference <= TOLERANCE,
    }
    passed = all(checks.values()) and reference_difference <= TOLERANCE
    return checks | {"reference_difference": reference_difference, "passed": passed}


def _token_by_token(layer, x):
    from transformers.cache_utils import Cache

    cache = Cache(layers=[layer.new_cache()])
    for t in range(x.shape[1]):
        yield layer(x[:, t : t + 1].contiguous(), past_key_values=cache)[0]
