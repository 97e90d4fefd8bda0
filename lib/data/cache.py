"""A folder on disk for what takes long to make and is the same each time: tokens, and a trained tokenizer."""

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

CACHE_VARIABLE = "ATTENTION_STUDY_CACHE"  # the folder to use, instead of the system's place for caches


def made_once(what: dict, build: Callable[[Path], None]) -> Path:
    """The folder that `build` filled for just this `what` (values that JSON can hold), made now or by an earlier run.

    Two processes that ask at once build it once: the second waits. A killed build leaves nothing that counts. Raises
    UsageError where the folder cannot be written or the disk is full.
    """
    cache = Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("attention-study"))
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
    try:
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
    except OSError as error:
        raise UsageError(
            f"the cache {cache} cannot be written: {error.strerror}; free some space there, or name another folder "
            f"by the environment variable {CACHE_VARIABLE}"
        ) from error
    return cache / key


def forget(folder: Path) -> None:
    """Removes a folder of the cache that turned out to be damaged."""
    shutil.rmtree(folder, ignore_errors=True)
