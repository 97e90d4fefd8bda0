"""Where things lie: the repository, the folder of results; and files that are written whole or not at all."""

import os
import stat
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT_VARIABLE = "ATTENTION_STUDY_OUT"  # the folder that runs write to, instead of notebooks/out


def out_folder() -> Path:
    """Where runs leave records and executed notebooks: notebooks/out, or what the environment variable names."""
    return Path(os.environ.get(OUT_VARIABLE) or ROOT / "notebooks" / "out")


def from_root(path: str) -> Path:
    """A path that a notebook or profile names: from the repository's root, wherever it is run."""
    return ROOT / path


def figures_folder(path: str) -> Path:
    """Where figures go: the folder that a notebook names, or beside the records that the environment variable sends
    elsewhere, so that a test never draws over the committed ones."""
    return out_folder() / "figures" if os.environ.get(OUT_VARIABLE) else from_root(path)


def portable(path: str) -> str:
    """A path as seen from the repository's root, so that no record names a machine's folders; a name stays a name."""
    return Path(os.path.relpath(path, ROOT)).as_posix() if Path(path).is_absolute() else path


def read_bounded(path: Path, most_bytes: int) -> str:
    """The text of a regular file of at most so many bytes, for files that somebody else wrote.

    Raises ValueError, in one line, for a FIFO, a device, what is larger, and what is no UTF-8; OSError as `open` does.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # else a FIFO waits for who writes into it
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > most_bytes:
            raise ValueError(f"it is larger than {most_bytes:,} bytes")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(status.st_size + 1)
    finally:
        os.close(descriptor)
    if len(content) > status.st_size:
        raise ValueError("it grew while it was read")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("it is no text in UTF-8") from None


def write_whole(path: Path, text: str) -> Path:
    """Writes a file that is either there whole or not at all; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=".", suffix=".tmp", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return path
