"""Seconds that each process pays before it does anything and as it ends, and need not: a third of what imports took."""

import atexit
import contextlib
import gc
import importlib.util
import logging
import sys
from collections.abc import Callable
from types import ModuleType


@contextlib.contextmanager
def quick_imports():
    """Imports inside wait for neither the garbage collector nor scikit-learn, nor for grammars of web addresses.

    PyTorch and transformers are four thousand modules; while they come in, the collector searches them again and again
    and finds nothing. Where it was off before, it stays off.
    """
    collecting, before = gc.isenabled(), len(sys.modules)
    if collecting:
        gc.collect(1)  # what is garbage by now is not to grow old with what comes in
    gc.disable()
    try:
        with (
            _when_first_used("sklearn.metrics", "roc_curve", "auc"),
            _when_first_used("rfc3987_syntax", "is_valid_syntax"),
        ):
            yield
    finally:
        if collecting:
            if len(sys.modules) > before and not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()  # what came in is old at once: the collector has not to search it first
            gc.enable()
    _end_without_a_table()


def _end_without_a_table() -> None:
    """Nor does a process wait, as it ends, for the table of what PyTorch's compiler took, unless its log is on: also
    where nothing was compiled, that loads a package (tabulate) and all widths of all characters."""
    compiler = sys.modules.get("torch._dynamo.utils")
    if hasattr(compiler, "dump_compile_times"):
        for earlier in (compiler.dump_compile_times, _dump_compile_times):
            atexit.unregister(earlier)
        atexit.register(_dump_compile_times, compiler)


def _dump_compile_times(compiler: ModuleType) -> None:
    if compiler.log.isEnabledFor(logging.INFO):
        compiler.dump_compile_times()


@contextlib.contextmanager
def _when_first_used(module: str, *functions: str):
    """Inside, whoever takes one of `functions` from `module` gets one that imports the module when it is called.

    transformers takes `roc_curve` from scikit-learn, for assisted generation alone, and Zeus `auc`, for energy where a
    GPU has no counter of it; jsonschema, which reads notebooks, takes `is_valid_syntax` for addresses in other
    alphabets. Any other name gives the real one.
    """
    package = module.partition(".")[0]
    if module in sys.modules or package in sys.modules or importlib.util.find_spec(package) is None:
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
    for function in functions:
        setattr(standing_in, function, _calls(real, function))
    sys.modules[module] = standing_in
    try:
        yield
    finally:
        if sys.modules.get(module) is standing_in:
            del sys.modules[module]


def _calls(module: Callable[[], ModuleType], function: str):
    return lambda *given, **named: getattr(module(), function)(*given, **named)
