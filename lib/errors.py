"""What a user can put right."""

import contextlib


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
