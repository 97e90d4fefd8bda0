"""Every kind of record that a folder may hold, told apart by what the file says of itself."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from lib.errors import UsageError
from lib.record import files, probe, scaling, steps
from lib.record.benchmark import Benchmark
from lib.record.names import printable
from lib.record.prediction import Prediction
from lib.record.schema import Strict

LOADERS: dict[str, Callable[[Path], Strict]] = {
    "run": files.load,
    "failure": files.load_failure,
    "probe": probe.load,
    "scaling": scaling.load,
    "steps": steps.load,
    "benchmark": partial(files.read_checked, Benchmark),
    "prediction": partial(files.read_checked, Prediction),
}


def load(path: Path) -> tuple[str, Strict]:
    """A file's kind, one of LOADERS, and what it holds. Raises UsageError, in one line, where it is none of them, was
    changed after it was written, or is a copy."""
    path = Path(path)
    called = printable(path.name)
    try:
        kind = _kind(path)
        return kind, LOADERS[kind](path)
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(f"{called}: {files.why(error)}") from None


def _kind(path: Path) -> str:
    """Runs and the notes of failed ones came first, and name no kind."""
    if path.name.endswith(f".{files.FAILED}"):
        return "failure"
    kind = files.said_kind(path)
    if kind is None:
        raise ValueError("it is JSON of another kind")
    if kind not in LOADERS:
        raise ValueError(f"its kind is {printable(kind, 40)!r}, this code knows {', '.join(LOADERS)}")
    return kind
