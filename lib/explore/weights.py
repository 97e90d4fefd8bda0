"""Which token weighs how much in which output, for any attention, asked of the module itself.

With queries and keys fixed, what goes into the output projection is linear in the values. So the values are found as
those numbers inside the layer on which it depends linearly; then 1 is added to all values of one token, and every
head's mixture moves by just the weight that it gives this token. No variant is asked what it is: one that never writes
its weights down (linear attention, hashing, a fused kernel) shows them like the others.

Where no such numbers are found there are no weights to show, and the size of the Jacobian stands instead.
"""

from dataclasses import dataclass

import torch

LINEAR_WITHIN = 1e-9  # in float64
PROBED = 8  # tokens on which the values are looked for
ROWS = 32  # of a batch: a large one does not fit the processor's cache


@dataclass(frozen=True)
class Map:
    """`values` (H, T, T): what output t has of token s, by head; `kind` says of which kind."""

    values: torch.Tensor
    kind: str  # "weights", or "influence": Frobenius norms of d output_t / d token_s, over all heads (H = 1)


def of_layer(layer, hidden_states, heads: int) -> Map:
    """The map of an attention `layer` in evaluation and float64, at the input (1, T, C), T >= 2."""
    inner = _inner_modules(layer, hidden_states)
    for module, width in reversed(inner.items()):  # the last before the mixing: values, not what they are made from
        channels = _value_channels(layer, module, width, hidden_states[:, :PROBED])
        found = _weights(layer, module, channels, hidden_states, heads) if channels.any() else None
        if found is not None and (found.tril(-1) + found.triu(1)).any():
            return Map(found, "weights")
    return Map(influence(lambda x: layer(x)[0], hidden_states)[None], "influence")


def influence(function, x, directions: int | None = None) -> torch.Tensor:
    """Norm of d f(x)_t / d x_s for `function`: (B, T, C) -> (B, T, C) at x (1, T, C), as (T, T): row t, column s.

    The Frobenius norm, exactly; or, with `directions`, along so many random ones, which is zero in the same places.
    """
    T, C = x.shape[1:]
    rows = x.detach().expand(T, T, C).clone().requires_grad_()  # a copy for each output that is asked
    own = function(rows)[range(T), range(T)]  # (T, C)
    if directions is None:
        chosen = torch.eye(C, dtype=x.dtype)
    else:
        chosen = torch.randn(directions, C, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    squares = torch.zeros(T, T, dtype=x.dtype)
    for direction in chosen:
        (gradient,) = torch.autograd.grad((own * direction).sum(), rows, retain_graph=True)
        squares += gradient.square().sum(-1)
    return squares.sqrt()


@torch.no_grad()
def _mixture(layer, hidden_states, module=None, addition=None) -> torch.Tensor:
    """What goes into the output projection, or the output of a layer without one, (B, T, C), where `addition` is added
    to what `module` gives."""
    seen, hooks = [], []
    if module is not None:
        hooks.append(module.register_forward_hook(lambda _module, _given, out: out + addition))
    if isinstance(getattr(layer, "c_proj", None), torch.nn.Module):
        hooks.append(layer.c_proj.register_forward_pre_hook(lambda _module, given: seen.append(given[0])))
    try:
        with torch.random.fork_rng(devices=[]):  # for a layer that draws: alike each time
            torch.manual_seed(0)
            out = layer(hidden_states)[0]
    finally:
        for hook in hooks:
            hook.remove()
    return seen[-1].reshape(*hidden_states.shape[:2], -1) if seen else out


def _inner_modules(layer, hidden_states) -> dict[torch.nn.Module, int]:
    """The modules inside that give numbers for each token, in the order in which they are called, and how many."""
    called = {}

    def note(module, _, out):
        if isinstance(out, torch.Tensor) and out.dim() == 3 and out.shape[:2] == hidden_states.shape[:2]:
            called.setdefault(module, out.shape[2])

    hooks = [module.register_forward_hook(note) for module in layer.modules() if module is not layer]
    with torch.no_grad():
        layer(hidden_states)
    for hook in hooks:
        hook.remove()
    called.pop(getattr(layer, "c_proj", None), None)
    return called


def _value_channels(layer, module, width: int, x) -> torch.Tensor:
    """Which of a module's channels move the mixture, and move it linearly: (O,) bools; none where not jointly."""
    size = torch.linspace(0.5, 1.5, x.shape[1], dtype=x.dtype)[None, :, None]  # another at each token
    each = torch.eye(width, dtype=x.dtype)[:, None] * size  # (O, T, O): one channel in each row of the batch
    parts = [_moved_and_bent(layer, module, x, some) for some in each.split(ROWS)]
    moved, bent = (torch.cat(part) for part in zip(*parts, strict=True))
    channels = (moved > LINEAR_WITHIN) & (bent <= LINEAR_WITHIN * (1 + moved))
    moved, bent = _moved_and_bent(layer, module, x, channels * size)
    jointly = bent.item() <= LINEAR_WITHIN * (1 + moved.item())  # two factors of a product are linear each
    return channels & jointly


def _moved_and_bent(layer, module, x, addition):
    """First and second differences of the mixture along `addition`, the largest in each row of the batch: (B,) each."""
    none = _mixture(layer, x)
    x = x.repeat(len(addition), 1, 1)
    once, twice = (_mixture(layer, x, module, factor * addition) for factor in (1, 2))
    return (once - none).abs().amax((1, 2)), (twice - 2 * once + none).abs().amax((1, 2))


def _weights(layer, module, channels, hidden_states, heads: int) -> torch.Tensor | None:
    """(H, T, T), or None where they do not tell what happens when every token's values change at once."""
    T = hidden_states.shape[1]
    none = _mixture(layer, hidden_states)
    each = torch.eye(T, dtype=none.dtype)[..., None] * channels  # (S, T, O): all values of one token
    parts = [_mixture(layer, hidden_states.repeat(len(some), 1, 1), module, some) for some in each.split(ROWS)]
    moved = (torch.cat(parts) - none).permute(2, 1, 0)  # (C, T, S)
    if len(moved) % heads:
        return None
    found = moved.unflatten(0, (heads, -1)).mean(1)  # (H, T, S)
    change = torch.linspace(-1.0, 2.0, T, dtype=none.dtype)
    told = (found @ change).repeat_interleave(len(moved) // heads, 0).T  # (T, C)
    seen = _mixture(layer, hidden_states, module, change[:, None] * channels) - none
    if (seen - told).abs().max() > LINEAR_WITHIN:
        return None
    return found.masked_fill(found.abs() < LINEAR_WITHIN, 0.0)
