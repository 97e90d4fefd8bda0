"""A folder on disk for what takes long to make and is the same each time: tokens, and a trained tokenizer; and for what
the hub last said."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
from filelock import FileLock

from lib.errors import UsageError
from lib.paths import read_bounded, write_whole

CACHE_VARIABLE = "ATTENTION_STUDY_CACHE"  # the folder to use, instead of the system's place for caches
MOST_BYTES = 1 << 20  # of an answer


def folder() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("attention-study"))


def made_once(what: dict, build: Callable[[Path], None]) -> Path:
    """The folder that `build` filled for just this `what` (values that JSON can hold), made now or by an earlier run.

    Two processes that ask at once build it once: the second waits. A killed build leaves nothing that counts. Raises
    UsageError where the folder cannot be written or the disk is full; what else `build` raises comes as it is.
    """
    cache, key = folder(), _key(what)
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{key}.lock"):
            if not (cache / key).is_dir():
                for left in cache.glob(f"{key}-*"):  # by a build that was killed: the lock says that nobody is at it
                    shutil.rmtree(left)
                scratch = Path(tempfile.mkdtemp(dir=cache, prefix=f"{key}-"))
                try:
                    build(scratch)
                    os.replace(scratch, cache / key)
                except BaseException:
                    shutil.rmtree(scratch, ignore_errors=True)
                    raise
    return cache / key


def forget(made: Path) -> None:
    """Removes a folder of the cache that turned out to be damaged."""
    shutil.rmtree(made, ignore_errors=True)


def remember(what: dict, answer: dict) -> None:
    """Keeps an answer to `what`, instead of an older one. Raises UsageError where it cannot be written."""
    with _writing(folder()):
        write_whole(folder() / f"{_key(what)}.json", json.dumps(answer))


def remembered(what: dict) -> dict | None:
    """The answer that was kept last, if there is one."""
    try:
        found = json.loads(read_bounded(folder() / f"{_key(what)}.json", MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _key(what: dict) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


@contextlib.contextmanager
def _writing(cache: Path):
    try:
        yield
    except OSError as error:
        if not _is_about(cache, error):
            raise
        raise UsageError(
            f"the cache {cache} cannot be written: {error.strerror or error}; free some space there, or name another "
            f"folder by the environment variable {CACHE_VARIABLE}"
        ) from error


def _is_about(cache: Path, error: OSError) -> bool:
    """Whether the system refused to write there; a builder's alarm, or a file elsewhere that it lacks, is its own."""
    if isinstance(error, TimeoutError | InterruptedError | ConnectionError | ChildProcessError):
        return False
    named = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)]
    here, there = Path(os.path.abspath(cache)), [Path(os.path.abspath(os.fsdecode(name))) for name in named]
    return not there or any(path.is_relative_to(here) or here.is_relative_to(path) for path in there)
