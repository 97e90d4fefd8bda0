"""Seconds that every process pays before it does anything, and need not: a third of what imports took."""

import contextlib
import gc
import importlib.util
import sys
from types import ModuleType


@contextlib.contextmanager
def quick_imports():
    """Imports inside wait for neither the garbage collector nor scikit-learn, nor for grammars of web addresses.

    PyTorch and transformers are four thousand modules; while they come in, the collector searches them again and again
    and finds nothing. Where it was off before, it stays off.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with _when_first_used("sklearn.metrics", "roc_curve"), _when_first_used("rfc3987_syntax", "is_valid_syntax"):
            yield
    finally:
        if collecting:
            gc.enable()


@contextlib.contextmanager
def _when_first_used(module: str, function: str):
    """Inside, whoever takes `function` from `module` gets one that imports the module when it is called.

    transformers takes `roc_curve` from scikit-learn, for assisted generation alone; jsonschema, which reads notebooks,
    takes `is_valid_syntax` for addresses in other alphabets. Any other name gives the real one.
    """
    if module in sys.modules or importlib.util.find_spec(module.partition(".")[0]) is None:
        yield
        return

    def real():
        if sys.modules.get(module) is standing_in:
            del sys.modules[module]
        return importlib.import_module(module)

    def other(name):
        if name.startswith("__"):  # Python's own questions, such as whether it is a package
            raise AttributeError(name)
        return getattr(real(), name)

    standing_in = ModuleType(module)
    standing_in.__getattr__ = other
    setattr(standing_in, function, lambda *given, **named: getattr(real(), function)(*given, **named))
    sys.modules[module] = standing_in
    try:
        yield
    finally:
        if sys.modules.get(module) is standing_in:
            del sys.modules[module]
