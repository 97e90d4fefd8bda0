"""What a user can put right."""

import contextlib
import sys
from pathlib import Path


def _refuse_another_lib(package, here: Path) -> None:
    """Raises ImportError where this is imported as part of a package `lib` that is not ours: a folder `lib/` of one's
    own that Python finds first, into which an editable installation would put our rooms, half of each."""
    theirs = getattr(package, "__file__", None)
    if theirs is None or Path(theirs).resolve().parent != here.parent:
        where = Path(theirs).parent if theirs else next(iter(getattr(package, "__path__", ["?"])))
        raise ImportError(
            f"Python's `lib` is {where}, not this project's {here.parent}: two packages cannot share that name; start "
            "Python in another folder, or put this project's first in PYTHONPATH"
        )


_refuse_another_lib(sys.modules.get("lib"), Path(__file__).resolve())


class UsageError(Exception):
    """One sentence that says what is wrong and the way out. Notebooks show it without a traceback."""

    def _render_traceback_(self):
        return [f"{type(self).__name__}: {self}"]


class OutOfMemory(UsageError):
    """The run needs more memory than there is; a study records that as this variant's result and goes on."""


class LossNotFinite(UsageError):
    """Training diverged."""


@contextlib.contextmanager
def one_sentence_when_out_of_memory():
    """Turns the ways in which memory runs out, on CPU and GPU, into one sentence."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # PyTorch's own class for it is a RuntimeError
        if isinstance(error, RuntimeError) and not is_out_of_memory(str(error)):
            raise
        said = (str(error).strip().splitlines() or ["no memory left"])[0]
        raise OutOfMemory(f"out of memory ({said[:160]}); lower batch_size, context or the model's size") from error


def is_out_of_memory(said: str) -> bool:
    """Whether an error's message is PyTorch's for memory that could not be had."""
    return any(
        sign in said.lower() for sign in ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    )
