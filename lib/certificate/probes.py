"""Questions to anything that maps a sequence to a sequence: what moves which output, and by how much.

A subject says how to draw an input, how to run on one, and what its outputs can be differentiated by. Everything below
it is the same for a module (B, T, C) -> (B, T, C) and for a language model, (B, T) token ids -> (B, T, V) logits.
"""

import contextlib
import math
from collections.abc import Callable

import torch

from lib.certificate.measures import largest, relative

BORDER = 64  # a usual chunk: half of the places looked at lie where one ends


class NoSlope(Exception):
    """There is nothing that the outputs could be differentiated by."""


class Floats:
    """A module (B, T, C) -> (B, T, C), or a tuple that begins so."""

    def __init__(self, module: Callable, width: int, like: torch.Tensor, autocast=contextlib.nullcontext):
        self.module, self.width, self.like, self.autocast = module, width, like, autocast

    def draw(self, rows: int, length: int) -> torch.Tensor:
        x = torch.randn(rows, length, self.width, dtype=torch.float64)
        return x.to(self.like.dtype).to(self.like.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            out = self.module(x.contiguous())
        return out if isinstance(out, torch.Tensor) else out[0]

    def traced(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The output, and what it can be differentiated by: (B, T, *) each."""
        x = x.detach().clone().requires_grad_()
        return self(x), [x]


class Tokens:
    """A causal language model, (B, T) token ids -> (B, T, V) logits, transformers' or any other."""

    def __init__(self, model: torch.nn.Module, vocabulary: int, device, autocast=contextlib.nullcontext, **options):
        self.model, self.vocabulary, self.device, self.autocast = model, vocabulary, device, autocast
        self.options = options  # of every call

    def draw(self, rows: int, length: int) -> torch.Tensor:
        return torch.randint(self.vocabulary, (rows, length)).to(self.device)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            return logits_of(self.model(ids, **self.options))

    def traced(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The logits, and what each embedding gave for the ids: (B, T, *) each; none where no embedding reads them.

        A model may pad the ids to whole chunks: then that has more than T tokens.
        """
        found, (rows, length) = [], ids.shape

        def reads(x) -> bool:
            return x.dim() == 2 and x.shape[0] == rows and x.shape[1] >= length and torch.equal(x[:, :length], ids)

        def keep(_, given, out):
            if given and reads(given[0]):
                out = out if out.requires_grad else out.detach().requires_grad_()
                found.append(out)
                return out
            return None

        embeddings = [module for module in self.model.modules() if isinstance(module, torch.nn.Embedding)]
        hooks = [module.register_forward_hook(keep) for module in embeddings]
        try:
            return self(ids), found
        finally:
            for hook in hooks:
                hook.remove()


def logits_of(out) -> torch.Tensor:
    """(B, T, V) of what a language model returns: a tensor, a tuple, or transformers' output."""
    if isinstance(out, torch.Tensor):
        return out
    return out.logits if hasattr(out, "logits") else out[0]


def places(length: int, count: int, shift: int = 0) -> list[int]:
    """`count` places before the last token, spread over the length: by turns where a chunk ends and where none does."""
    found = []
    for i in range(count):
        at = (i + 1) * length // (count + 1) + shift
        at = at // BORDER * BORDER - 1 if (i + shift) % 2 == 0 and at >= BORDER else at
        found.append(min(max(at, 0), length - 2))
    return found


def gradient_leaks(subject, x: torch.Tensor, rounds: int = 1, shift: int = 0) -> tuple[float, float | None]:
    """The largest gradient by a later token, and by another row, over the largest there is: 0 and 0 where it is causal.

    Each row's output is asked at a place of its own; by turns of the even and the odd rows, so that the others must
    have none. One row has no other: None. Infinity where a gradient is not finite, NaN where all are zero.
    Raises NoSlope.
    """
    (rows, length), later, other, top = x.shape[:2], 0.0, 0.0, 0.0
    with torch.enable_grad():
        out, leaves = subject.traced(x)
        if not leaves:
            raise NoSlope("no nn.Embedding reads the token ids, so there is no gradient to look at")
        if not out.requires_grad:
            raise NoSlope("its output has no gradient: it is detached, made under no_grad, or of whole numbers")
        for turn in range(rounds):
            at = torch.tensor(places(length, rows, shift + 5 * turn), device=x.device)
            for asked in (range(0, rows, 2), range(1, rows, 2)):
                asked = torch.tensor(list(asked), device=x.device)
                if not len(asked):
                    continue
                picked = out[asked, at[asked]].float()
                loss = (picked * torch.randn(picked.shape).to(picked)).sum()  # a plain sum may cancel
                given = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
                for gradient in (g for g in given if g is not None):
                    moved = gradient.abs().amax(-1)  # (B, T)
                    is_later = torch.arange(moved.shape[1], device=x.device) > at[:, None]
                    is_asked = torch.zeros(rows, 1, dtype=torch.bool, device=x.device)
                    is_asked[asked] = True
                    top = max(top, largest(moved))
                    later = max(later, largest(moved[is_later & is_asked]))
                    other = max(other, largest(moved.masked_select(~is_asked)))
    if top == 0:
        return math.nan, None
    if not math.isfinite(top):
        return math.inf, math.inf
    return later / top, other / top if rows > 1 else None


@torch.no_grad()
def changed_tails(subject, x: torch.Tensor, out: torch.Tensor, shift: int = 0) -> float:
    """How far outputs move when all tokens behind them are drawn anew, a place per row."""
    at = places(x.shape[1], x.shape[0], shift)
    changed, fresh = x.clone(), subject.draw(*x.shape[:2])
    for row, t in enumerate(at):
        changed[row, t + 1 :] = fresh[row, t + 1 :]
    other, scale = subject(changed), largest(out)
    return max(relative(other[row, : t + 1], out[row, : t + 1], scale) for row, t in enumerate(at))


@torch.no_grad()
def prefix_difference(subject, x: torch.Tensor, out: torch.Tensor, lengths: list[int]) -> float:
    """The largest difference of f(x[:t]) from f(x)[:t] over `lengths`."""
    scale = largest(out)
    return max(relative(subject(x[:, :t]), out[:, :t], scale) for t in lengths)


@torch.no_grad()
def row_difference(subject, x: torch.Tensor, out: torch.Tensor) -> float:
    """How far a row's output is, alone and beside other rows than before, from what it was."""
    scale, last = largest(out), x.shape[0] - 1
    alone = max(relative(subject(x[row : row + 1])[0], out[row], scale) for row in {0, last})
    beside = subject.draw(*x.shape[:2])
    beside[last] = x[last]
    return max(alone, relative(subject(beside)[last], out[last], scale))


@torch.no_grad()
def moved_later(subject, x: torch.Tensor, out: torch.Tensor) -> float:
    """How far a token drawn anew in the middle moves any output behind it."""
    t = (x.shape[1] - 1) // 2
    changed = x.clone()
    while torch.equal(changed[:, t], x[:, t]):
        changed[:, t] = subject.draw(*x.shape[:2])[:, t]
    return relative(subject(changed)[:, t + 1 :], out[:, t + 1 :], largest(out))


def pieces_of(n: int) -> list[int]:
    """A way through n tokens: a long piece, single tokens past a usual window, several behind a cache, odd ends."""
    wanted, pieces = [max(1, 5 * n // 12), *[1] * 12, 37, 1, 64, 3], []
    for size in wanted:
        size = min(size, n - sum(pieces))
        if size > 0:
            pieces.append(size)
    rest = n - sum(pieces)
    return [*pieces, rest] if rest else pieces
