"""Does an attention compute what its name promises? A variant that fails is drawn apart and never ranked.

`certify` is for a variant of the study, `examine` for any module that maps (B, T, C) to (B, T, C). Every check runs one
small layer in float64 on the CPU, with weights large enough that attention is far from uniform.
"""

import math

import pandas as pd
import torch
from transformers.cache_utils import Cache

from lib import attention
from lib.model import build_model, gpt2_config

TOLERANCE = 1e-6
WIDTH, HEADS = 32, 4
LENGTH = 150  # more than a default window, and no multiple of any chunk


def examine(module, x: torch.Tensor) -> dict:
    """What can be said of any `module`: (B, T, C) -> (B, T, C), or a tuple that begins so, at the input `x`, T >= 3.

    - `causal`: changing a token changes no output before it, and no output has a gradient by a later token
    - `prefix_equal`: f(x[:t]) = f(x)[:t] for every t
    - `mixes`: changing a token changes an output after it
    - `receptive_field`: how many tokens the last output depends on, itself included
    """
    length = x.shape[1]

    def output(given):
        out = module(given.contiguous())
        return out if isinstance(out, torch.Tensor) else out[0]

    with torch.no_grad():
        out = output(x)
        scale = out.abs().max().item()
        perturbation_leak, later = 0.0, 0.0
        for t in sorted({1, length // 2, length - 2}):
            changed = x.clone()
            changed[:, t] += torch.randn_like(changed[:, t])
            moved = (output(changed) - out).abs().amax(dim=(0, 2)) / scale  # (T,)
            perturbation_leak = max(perturbation_leak, moved[:t].max().item())
            later = max(later, moved[t + 1 :].max().item())
        prefixes = (output(x[:, :t]) - out[:, :t] for t in range(1, length))
        prefix_difference = max(difference.abs().max().item() for difference in prefixes) / scale
    gradient_leak = max(_gradient(output, x, t)[t + 1 :].max().item() for t in (0, length // 2, length - 2))
    last = _gradient(output, x, length - 1)
    return {
        "causal": max(perturbation_leak, gradient_leak / scale) <= TOLERANCE,
        "prefix_equal": prefix_difference <= TOLERANCE,
        "mixes": later > TOLERANCE,
        "receptive_field": int((last > 0).sum()),
    }


def _gradient(output, x, t) -> torch.Tensor:
    """How much each token moves output t: (T,)."""
    x = x.clone().requires_grad_()
    weight = torch.randn(x.shape[0], x.shape[2], dtype=x.dtype)  # a plain sum may cancel
    (gradient,) = torch.autograd.grad((output(x)[:, t] * weight).sum(), x)
    return gradient.abs().amax(dim=(0, 2))


def certify(name: str, options: dict) -> dict:
    """The certificate of a variant, by name or path: the checks of `examine`, and

    - `cached_equal`: token by token with its cache it gives what one pass gives
    - `reference_difference`, `reference_gradient_difference`: largest difference of output and gradients from the
      variant's own slow form, over the largest value
    - `parameters_vs_baseline`: weights of one layer over those of GPT-2's own
    - `gpt2_projection`, `gpt2_initialisation`: an output projection as GPT-2's that is used, and its initial weights
    - `memory_growth`, `flops_growth`: exponents of T, of what is kept for the backward pass and of the analytic count
    - `passed`: all bools, both differences at most 1e-6
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = _layer(name, options, 2 * LENGTH)
        x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
        checks = examine(layer, x) | {
            "cached_equal": _cached_difference(layer, x) <= TOLERANCE,
            "gpt2_projection": _uses_projection(layer, x),
            "gpt2_initialisation": _is_initialised_as_gpt2(name, options),
        }
        output_difference, gradient_difference = _reference_differences(layer, x)
        baseline = _layer("baseline", {}, 2 * LENGTH)
        numbers = {
            "reference_difference": output_difference,
            "reference_gradient_difference": gradient_difference,
            "parameters_vs_baseline": _size(layer) / _size(baseline),
            **_growth(name, options),
        }
    true = all(value for value in checks.values() if isinstance(value, bool))
    passed = true and max(output_difference, gradient_difference) <= TOLERANCE
    return checks | numbers | {"passed": passed}


def table(certificates: dict[str, dict]) -> pd.DataFrame:
    """Certificates as a reader sees them, a column per variant; numbers rounded to what survives another CPU."""

    def shown(said):
        within = max(said["reference_difference"], said["reference_gradient_difference"]) <= TOLERANCE
        return {
            "no output depends on a later token": yes(said["causal"]),
            "a prefix gives the prefix of the output": yes(said["prefix_equal"]),
            "tokens are mixed": yes(said["mixes"]),
            f"tokens that the last of {LENGTH} sees": str(said["receptive_field"]),
            "token by token with the cache: the same": yes(said["cached_equal"]),
            f"output and gradients are its reference's, within {TOLERANCE:g}": yes(within),
            "output projection as GPT-2's": yes(said["gpt2_projection"]),
            "initial weights as GPT-2's": yes(said["gpt2_initialisation"]),
            "weights, over GPT-2's own": f"{said['parameters_vs_baseline']:.3f}",
            "memory for the backward pass grows as": f"T^{said['memory_growth']:.1f}",
            "FLOPs of attention core grow as": f"T^{said['flops_growth']:.1f}",
            "passed": yes(said["passed"]),
        }

    return pd.DataFrame({name: shown(said) for name, said in certificates.items()})


def yes(fact: bool) -> str:
    """A fact as tables show it."""
    return "yes" if fact else "NO"


def _layer(name, options, positions):
    config = gpt2_config(1, WIDTH, HEADS, positions, 2)
    layer = attention.load(name)(config, 0, **options).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return layer


def _size(layer) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def _cached_difference(layer, x) -> float:
    cache = Cache(layers=[layer.new_cache()])
    with torch.no_grad():
        steps = [layer(token.contiguous(), past_key_values=cache)[0] for token in x.split(1, dim=1)]
        out = layer(x)[0]
    return ((torch.cat(steps, dim=1) - out).abs().max() / out.abs().max()).item()


def _reference_differences(layer, x) -> tuple[float, float]:
    """Of the output, and of the gradients by the input and every weight."""
    x = x.clone().requires_grad_()
    weight = torch.randn_like(x)
    wanted = [x, *layer.parameters()]
    results = []
    for out in (layer(x)[0], layer.reference(x)):
        gradients = torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)
        results.append((out, [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients, strict=True)]))
    (ours, our_gradients), (theirs, their_gradients) = results
    largest = max(g.abs().max().item() for g in their_gradients)
    pairs = zip(our_gradients, their_gradients, strict=True)
    gradient_difference = max((a - b).abs().max().item() for a, b in pairs) / largest
    return ((ours - theirs).abs().max() / theirs.abs().max()).item(), gradient_difference


def _uses_projection(layer, x) -> bool:
    """Whether the output goes through a (C, C) matrix and a bias named c_proj, as GPT-2's does."""
    projection = getattr(layer, "c_proj", None)
    if projection is None or tuple(projection.weight.shape) != (WIDTH, WIDTH) or projection.bias is None:
        return False
    with torch.no_grad():
        before, bias = layer(x)[0], projection.bias.clone()
        projection.bias += 1.0
        shifted = layer(x)[0] - before
        projection.bias.copy_(bias)
    return bool((shifted - 1.0).abs().max() < TOLERANCE)


def _is_initialised_as_gpt2(name, options) -> bool:
    """Matrices N(0, 0.02), the output projection's divided by √(2 L), biases 0: as `lib.model` builds it."""
    layers = 2
    model = build_model(name, gpt2_config(layers, 128, HEADS, 2 * LENGTH, 2), **options)
    for key, value in model.named_parameters():
        if ".attn." in key and value.dim() >= 2:
            expected = 0.02 / math.sqrt(2 * layers) if key.endswith("c_proj.weight") else 0.02
            if abs(value.std().item() / expected - 1) > 0.1:
                return False
        elif ".attn." in key and key.endswith("bias") and value.any():
            return False
    return True


def _growth(name, options) -> dict:
    """Exponents over a doubling of T, long enough that what does not grow with T no longer counts.

    Each length has a layer with just as many positions: what a variant derives from them grows too.
    """
    kept, flops = [], []
    for length in (1024, 2048):
        layer = _layer(name, options, length)
        flops.append(layer.core_flops(length))
        kept.append(activation_bytes(layer.train(), torch.randn(1, length, WIDTH, dtype=torch.float64)))
    return {"memory_growth": math.log2(kept[1] / kept[0]), "flops_growth": math.log2(flops[1] / flops[0])}


def activation_bytes(layer, hidden_states) -> int:
    """Bytes that a layer's forward over (B, T, C) keeps for its backward, weights and input included."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(hidden_states.detach().requires_grad_())  # held: a freed storage's place may be another's
    del out
    return sum(storages.values())
