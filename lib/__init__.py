"""The attention study: eight kinds of self-attention inside GPT-2, trained, measured and compared.

Shape letters used everywhere: B batch, T tokens (of the queries), S keys seen so far, C width, H heads, D = C/H.
"""

import importlib.util
import os
import sys

from lib.extras import Finder

# OpenMP's idle threads spin by default; on a busy machine that made training steps 3 to 20 times slower.
# Read when torch loads, so `lib` is imported first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# torch's profiler reports its own starts and stops on the terminal otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# What a terminal has no sign for is printed as its number: a study must not end because a variant says "φ" where the
# locale is C.
for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):  # in a notebook they are of another kind, which takes any sign
        stream.reconfigure(errors="backslashreplace")


sys.meta_path.append(Finder)  # the last to be asked, so it hears of what nobody has


def __getattr__(name: str):
    """A room of lib/, imported when it is first asked for: `from lib import model`, `lib.model` after `import lib`."""
    from lib.startup import quick_imports

    if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with quick_imports():
        return importlib.import_module(f"{__name__}.{name}")
