"""The tool that plants mistakes: its list fits the code, and what it says follows from what the tests said."""

import sys
from types import SimpleNamespace

import pytest

from lib.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import mutants

MODULE = "def f(x):\n    return x + 1 if x < 2 and not x == 7 else max(x, 3)\n"


def test_every_mistake_of_the_list_can_be_planted_and_names_tests_that_are_there():
    found = mutants.listed()
    assert len(found) > 400 and len({(one.module, one.text) for one in found}) == len(found)
    for one in found:
        assert all((ROOT / test.partition("::")[0]).exists() for test in one.tests if test.startswith("tests/")), (
            one.mistake
        )
        assert one.equivalent is None or len(one.equivalent) > 20, one.mistake


@pytest.fixture
def project(tmp_path):
    (tmp_path / "m.py").write_text(MODULE)

    def planted(right, **more):
        one = {"mistake": "one", "right": right, "wrong": "x - 1"} | more
        (tmp_path / "list.yaml").write_text(repr({"m.py": {"tests": ["tests/t.py"], "mutants": [one]}}))
        return mutants.listed([], tmp_path, tmp_path / "list.yaml")

    return planted


def test_a_mistake_is_planted_where_its_text_stands_once_and_else_the_list_is_wrong(project):
    (found,) = project("x + 1", equivalent="why")
    assert found == ("m.py", "one", MODULE.replace("x + 1", "x - 1"), ("tests/t.py",), "why")
    assert project("x + 1", tests=["tests/other.py"])[0].tests == ("tests/other.py",)
    for right, times in (("x * 1", 0), ("x", 6)):
        with pytest.raises(ValueError, match=f"stands there {times} times, not once"):
            project(right)


def test_the_systematic_part_turns_each_operator_number_and_choice_round_once(project, tmp_path):
    project("x + 1")
    found = mutants.systematic([], tmp_path, tmp_path / "list.yaml")
    turned = sorted(one.mistake.partition(": ")[2] for one in found)
    assert turned == sorted(
        ["x + 1 -> x - 1", "1 -> 2", "x < 2 -> x <= 2", "2 -> 3", "not x == 7 -> +(x == 7)", "x == 7 -> x != 7",
         "7 -> 8", "x < 2 and (not x == 7) -> x < 2 or not x == 7", "max -> min", "3 -> 4"]
    )  # fmt: skip
    assert len({one.text for one in found}) == len(found) == 10


def test_red_is_killed_green_has_survived_and_what_never_ran_is_wrong():
    said = {1: "killed", 2: "killed", None: "killed", -9: "killed", 0: "survived", 4: "wrong", 5: "wrong", 70: "wrong"}
    assert {status: mutants.outcome(status) for status in said} == said


def test_the_score_counts_by_module_and_only_an_excuse_makes_a_survivor_right(capsys):
    one, excused = (mutants.Mutant("m.py", name, "", (), why) for name, why in (("one", None), ("two", "it is equal")))
    options = SimpleNamespace(tests_of=None, systematic=False)
    cases = {("killed", "survived"): 0, ("survived", "survived"): 1, ("killed", "killed"): 2, ("wrong", "survived"): 2}
    for found, status in cases.items():
        assert mutants._report([one, excused], list(found), options) == status, found
    said = capsys.readouterr().out
    assert said.count("| m.py | 2 | 1 | 0 | 1 |") == 1 and "| **all** | 2 | 0 | 1 | 1 |" in said
    assert "survived: m.py: two (excused: it is equal)" in said and "needs no excuse" in said
