"""What a certificate says: checks, and the measurements that each of them rests on."""

import math
import signal
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from lib.errors import UsageError, is_out_of_memory

TOLERANCE = 1e-6  # of float64, relative to the largest value
CLAIMS = {  # a check, and what it claims where it passes, in the 50 characters that pandas shows
    "causal": "no output depends on a later token",
    "rows_independent": "no output depends on another row",
    "prefix_equal": "a prefix gives the prefix of the output",
    "mixes": "tokens are mixed",
    "reach": "as far as the definition says",
    "repeatable": "the same input gives the same output",
    "training_equal": "training computes what evaluation does",
    "cached_equal": "token by token with the cache: the same",
    "prefill_equal": "a prefill in one or in pieces: the same",
    "padding_equal": "padding changes no real token",
    "documents_equal": "documents of a packed row are as if alone",
    "reference": "output and gradients are its reference's",
    "reference_causal": "the reference itself sees no later token",
    "gpt2_equal": "the reference is GPT-2's where options make it so",
    "precision": "as exact as the precision allows",
    "gradients": "gradients are the output's slopes",
    "weights_trained": "every weight is trained",
    "gpt2_projection": "output projection as GPT-2's",
    "gpt2_initialisation": "initial weights as GPT-2's",
    "cache_bytes": "the cache holds what the formula says",
    "core_flops": "the FLOPs formula fits what is computed",
}


@dataclass(frozen=True)
class Measure:
    """One measurement: it passes where `largest` is at most `allowed`; of a fact without numbers `says` is the reason.

    `passed` None: not to be had here, for the reason that `says` gives.
    """

    check: str
    what: str
    largest: float | None = None
    allowed: float | None = None
    passed: bool | None = None
    says: str = ""

    @property
    def is_close_call(self) -> bool:
        """Failed by a number that has a tolerance, as a tie that rounding breaks would."""
        return self.passed is False and bool(self.allowed)


def within(check: str, what: str, largest: float, allowed: float) -> Measure:
    """A measurement against its limit. What is not finite passes no limit."""
    largest = float(largest)
    return Measure(check, what, largest if math.isfinite(largest) else None, allowed, largest <= allowed)


def fact(check: str, what: str, passed: bool | None, says: str = "") -> Measure:
    return Measure(check, what, passed=passed, says=says)


def largest(x: torch.Tensor) -> float:
    """The largest magnitude; infinity where anything is not finite."""
    if x.numel() == 0:
        return 0.0
    value = x.detach().abs().max().item()
    return value if math.isfinite(value) else math.inf


def relative(a: torch.Tensor, b: torch.Tensor, scale: float | None = None) -> float:
    """The largest difference over the largest value of `b`, or over `scale`; infinity where anything is not finite."""
    scale = largest(b) if scale is None else scale
    difference = largest(a - b if a.dtype == b.dtype == torch.float64 else a.float() - b.float())
    if not math.isfinite(scale):
        return math.inf
    return 0.0 if difference == 0 else difference / scale if scale > 0 else math.inf


def deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of the difference over that of `b`: one token's tie does not rule it."""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


def collected(about: tuple[str, ...], ask: Callable[[], Iterable[Measure]]) -> list[Measure]:
    """The measurements that `ask` yields; what it dies of fails those of the checks in `about` that it owes.

    What is not the subject's own mistake is raised, so that nothing is kept of it: memory that runs out, an alarm or
    another signal, and UsageError for what else the system refuses.
    """
    found = []
    try:
        found.extend(ask())
    except Exception as error:
        ended = isinstance(error, MemoryError | TimeoutError | InterruptedError) or is_of_a_signal(error)
        if ended or (isinstance(error, UsageError) and not isinstance(error, ValueError)):  # a model's refusal is both
            raise
        if is_out_of_memory(str(error)):
            raise
        said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]
        if isinstance(error, OSError):
            raise UsageError(
                f"the examination was cut short by the system ({said}), and nothing of it is kept; mend that and try "
                "again"
            ) from error
        owed = [check for check in about if check not in {one.check for one in found}] or about
        what = "it cannot be examined"
        if isinstance(error, ValueError | NotImplementedError) and _is_said_by_python(error):
            what, said = "it refuses this setting", said.partition(": ")[2] or said
        found += [fact(check, what, False, said) for check in owed]
    return found


def _is_said_by_python(error: BaseException) -> bool:
    """Whether a `raise` made it, as one that refuses does; a call that goes wrong has none."""
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return (innermost.line or "").startswith("raise ")


def is_of_a_signal(error: BaseException) -> bool:
    """Whether a signal's handler raised it, as an alarm's does with an exception of its own."""
    handlers = {getattr(signal.getsignal(one), "__code__", None) for one in signal.valid_signals()} - {None}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in handlers:
            return True
        trace = trace.tb_next
    return False
