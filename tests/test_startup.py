"""Imports that are put off are there when they are used, and nothing else is changed."""

import gc
import subprocess
import sys

import pytest

from lib import startup
from lib.paths import ROOT

OF_A_RUN = """
import sys
from lib import certificate, model, parameters, progress, record, training
from lib.data import corpus
from lib.measure import assemble, energy, inference, phases

energy.cpu_counter()
monitors = energy._monitors()
print(sorted({"sklearn.metrics", "scipy.stats", "statsmodels", "matplotlib", "papermill"} & set(sys.modules)))
print(monitors.power.auc([0, 2], [3, 5]))
from transformers.generation import candidate_generator

print(candidate_generator.roc_curve([0, 1], [0.1, 0.9])[1].tolist())
from sklearn.metrics import roc_auc_score, roc_curve

print(roc_curve([0, 1], [0.1, 0.9])[1].tolist(), roc_auc_score([0, 1], [0.1, 0.9]))
"""


def test_a_run_waits_for_no_module_that_it_does_not_use_and_generation_finds_its_own():
    said = subprocess.run([sys.executable, "-c", OF_A_RUN], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.splitlines() == ["[]", "8.0", "[0.0, 1.0, 1.0]", "[0.0, 1.0, 1.0] 1.0"]


PINNED = """
import sys
from lib import parameters

parameters.pin("sdpa")
print("sklearn.metrics" in sys.modules)
parameters.pin(sys.argv[1])
"""


def test_a_plan_waits_for_no_scikit_learn_and_a_variant_s_file_may_take_any_of_it(tmp_path):
    mine = "import sklearn.metrics.pairwise\nfrom sklearn.metrics import *\n\naccuracy_score\n"
    (tmp_path / "mine.py").write_text(mine + (ROOT / "lib" / "attention" / "sdpa.py").read_text())
    command = [sys.executable, "-c", PINNED, str(tmp_path / "mine.py")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.splitlines() == ["False"]


AT_THE_END = """
import atexit, sys

atexit.register(lambda: print("tabulate" in sys.modules))  # of what is to be done at the end the last
from lib import model
"""
LOG_ON = "import logging, torch; torch._logging.set_logs(dynamo=logging.INFO)"


@pytest.mark.parametrize(("log_on", "laid_out"), [("", "False"), (LOG_ON, "True")])
def test_a_process_ends_without_the_compiler_s_table_unless_its_log_is_on(log_on, laid_out):
    command = [sys.executable, "-c", AT_THE_END + log_on]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.splitlines()[-1] == laid_out and said.stderr.count("compilation metrics") == bool(log_on)


ADDRESSES = """
import sys
from lib.startup import quick_imports

with quick_imports():
    import jsonschema
print("rfc3987_syntax.syntax_helpers" in sys.modules)
print([jsonschema.FormatChecker().conforms(one, "iri") for one in ("https://ü.example/ß", "https://a b")])
"""


def test_addresses_in_other_alphabets_are_told_from_what_is_none_once_they_are_asked_for():
    said = subprocess.run([sys.executable, "-c", ADDRESSES], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.splitlines() == ["False", "[True, False]"]


def test_inside_another_what_stands_in_stays(monkeypatch):
    for name in ("wsgiref", "wsgiref.util"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with startup._when_first_used("wsgiref.util", "guess_scheme"):
        with startup._when_first_used("wsgiref.util", "guess_scheme"):
            pass
        assert not hasattr(sys.modules["wsgiref.util"], "__file__")


def test_what_is_not_installed_is_not_stood_in_for():
    with startup._when_first_used("a_package_of_nobody", "name"), pytest.raises(ImportError):
        import a_package_of_nobody  # noqa: F401


@pytest.mark.parametrize("collecting", [True, False])
def test_the_garbage_collector_is_as_it_was_also_after_an_error(collecting):
    (gc.enable if collecting else gc.disable)()
    try:
        with pytest.raises(ImportError), startup.quick_imports():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == collecting
    finally:
        gc.enable()


OLD_AT_ONCE = """
import gc, sys, weakref
from lib.startup import quick_imports

for kept in (0, 1):  # with what is frozen by somebody else it stays as it is
    if kept:
        gc.freeze()
    with quick_imports():
        import colorsys
        many = [[] for _ in range(100_000)]
    sys.modules.pop("colorsys")
    print(gc.get_count()[0] < 50_000, sum(one is many for one in gc.get_objects(generation=2)))
print(gc.get_freeze_count() > 0)


class Cycle:
    def __init__(self):
        self.itself = self


gc.unfreeze()
gone = weakref.ref(Cycle())
with quick_imports():
    import colorsys
print(gone())
"""


def test_the_collector_need_not_search_what_came_in_and_what_others_froze_stays_so():
    said = subprocess.run([sys.executable, "-c", OLD_AT_ONCE], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.splitlines() == ["True 1", "True 0", "True", "None"]


def test_what_stands_in_gives_every_other_name_of_the_real_module(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with startup._when_first_used("colorsys", "rgb_to_hls"):
        from colorsys import rgb_to_hls

        assert not hasattr(sys.modules["colorsys"], "__path__")  # asking for that imports nothing
        assert "ONE_THIRD" not in vars(sys.modules["colorsys"])
        from colorsys import ONE_THIRD
    assert ONE_THIRD == 1 / 3 and rgb_to_hls(1, 0, 0) == (0.0, 0.5, 1.0)


def test_a_room_that_is_not_there_is_an_attribute_error():
    import lib

    with pytest.raises(AttributeError, match="no attribute 'nowhere'"):
        _ = lib.nowhere
