#!/usr/bin/env python3
"""Plants mistakes in copies of the project, one at a time, and says which of them no test sees.

`tests/mutants.yaml` lists the mistakes by module: the text that stands there, what a tired colleague could have written
in its place, and the tests that belong to it. Each is planted in a copy in the temporary folder, never here. It is
killed where a test goes red (or does not end in time), else it has survived: a test is missing. Exit status 1 where one
survives that the list does not excuse, 2 where the list is wrong: a text that no longer stands in its module exactly
once, tests that are red without a mistake, an excuse for a mistake that is killed.

`--systematic` plants what the list does not name, in the modules that are named: every comparison, operator, number,
`min`, `max`, `and`, `or` and `not` the other way round. Many of these are no mistakes, so all survivors are only shown.
"""

import argparse
import ast
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "mutants.yaml"
PATIENCE = 30.0, 5.0  # seconds for the tests of one mistake, and times as long as without one: loops end somewhere
LONGEST_S = 1800.0  # without a mistake
KILLED, SURVIVED, WRONG = "killed", "survived", "wrong"
OUTCOME = {0: SURVIVED, 1: KILLED, 2: KILLED}  # pytest's: all green; a red test; a module that no longer imports
PRELOADED = ("pytest", "_hypothesis_pytestplugin", "hypothesis", "datasets", "statsmodels.formula.api", "zeus.monitor")
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "out", ".hypothesis", "*.egg-info")


class Mutant(NamedTuple):
    module: str
    mistake: str
    text: str  # of the whole module, with the mistake
    tests: tuple[str, ...]
    equivalent: str | None = None  # why no test can see it


def listed(modules=(), root: Path = ROOT, listing: Path = LIST) -> list[Mutant]:
    """The mistakes of the list, or those alone whose module and mistake, "lib/training.py: no validation before
    training", hold one of some words. Raises ValueError for one that cannot be planted."""
    found = []
    for module, own in yaml.safe_load(listing.read_text(encoding="utf-8")).items():
        text = (root / module).read_text(encoding="utf-8")
        for one in own["mutants"]:
            if modules and not any(name in f"{module}: {one['mistake']}" for name in modules):
                continue
            if (count := text.count(one["right"])) != 1:
                raise ValueError(f"{module}, {one['mistake']!r}: {one['right']!r} stands there {count} times, not once")
            planted, tests = text.replace(one["right"], one["wrong"]), tuple(one.get("tests", own["tests"]))
            found.append(Mutant(module, one["mistake"], planted, tests, one.get("equivalent")))
    if not found:
        raise ValueError(f"no mistake is listed for {', '.join(modules)}")
    return found


OTHER = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
SWAPPED = {"min": "max", "max": "min", "median": "fmean", "fmean": "median", "mean": "sum", "all": "any", "any": "all"}


def changes(tree: ast.Module):
    """Pairs of a node and a function that puts it the other way round; undone by calling what that returns."""

    def put(node, name, value):
        def change():
            before = getattr(node, name)
            setattr(node, name, value)
            return lambda: setattr(node, name, before)

        return node, change

    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.JoinedStr)]
    written = {id(part) for values in texts for value in values for part in ast.walk(value)}
    for node in ast.walk(tree):
        if id(node) in written:
            continue  # what a text says is held by the list, not by operators
        if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in OTHER:
            yield put(node, "op", OTHER[type(node.op)]())
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OTHER:
            yield put(node, "ops", [OTHER[type(node.ops[0])]()])
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield put(node, "op", ast.UAdd())
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield put(node, "value", node.value + 1 if type(node.value) is int else node.value * 1.1 + 0.1)
        elif isinstance(node, ast.Name) and node.id in SWAPPED:
            yield put(node, "id", SWAPPED[node.id])
        elif isinstance(node, ast.Attribute) and node.attr in SWAPPED:
            yield put(node, "attr", SWAPPED[node.attr])


def systematic(modules=(), root: Path = ROOT, listing: Path = LIST) -> list[Mutant]:
    """One mutant for each operator, number and choice in the modules, with the module's tests."""
    found = []
    for module, own in yaml.safe_load(listing.read_text(encoding="utf-8")).items():
        if modules and not any(name in module for name in modules):
            continue
        tree = ast.parse((root / module).read_text(encoding="utf-8"))
        for node, change in changes(tree):
            right = ast.unparse(node)
            undo = change()
            wrong, text = ast.unparse(node), ast.unparse(tree)
            undo()
            said = f"line {node.lineno}: {right[:60]} -> {wrong[:60]}"
            found.append(Mutant(module, said, text, tuple(own["tests"])))
    return found


class Copy:
    """A copy of the project in which one mistake at a time is planted and tested, with a cache of its own."""

    def __init__(self, folder: Path, tests_of: str | None):
        self.folder, self.root, self.cache = folder, folder / "project", folder / "cache"
        shutil.copytree(ROOT, self.root, ignore=NOT_COPIED)
        self.cache.mkdir()
        self.child, self.second = None, int(time.time())
        if tests_of:
            shutil.rmtree(self.root / "tests")
            archive = subprocess.run(["git", "archive", tests_of, "tests"], cwd=ROOT, capture_output=True, check=True)
            with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
                files.extractall(self.root, filter="data")

    def start(self, tests, limit_s: float, module: str = "", text: str = "", warm: Path | None = None) -> None:
        """Begins to run the tests, in a module's other text, on the cache `warm`: a mistake must not be kept in it."""
        self.path, self.begin_s, self.limit_s = self.root / module, time.monotonic(), limit_s
        self.before = self.path.read_bytes() if module else None
        if warm:
            shutil.rmtree(self.cache)
            shutil.copytree(warm, self.cache)
        if module:
            self._put(text.encode())
        self.scratch, self.output = tempfile.TemporaryDirectory(dir=self.folder), tempfile.TemporaryFile()  # noqa: SIM115
        self.child = os.fork()
        if not self.child:
            self._become(tests)

    def _put(self, text: bytes) -> None:
        """Another text of the module, at another second: else Python would take what it compiled of the one before."""
        self.path.write_bytes(text)
        self.second += 2
        os.utime(self.path, (self.second, self.second))

    def ended(self) -> tuple[int | None, str, float] | None:
        """pytest's exit status (None: it had to be killed), its output and seconds; None while it goes on."""
        pid, status = os.waitpid(self.child, os.WNOHANG)
        took_s = time.monotonic() - self.begin_s
        if not pid and took_s < self.limit_s:
            return None
        if not pid:
            os.killpg(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
        self.child = None
        if self.before is not None:
            self._put(self.before)
        self.output.seek(0)
        said = self.output.read().decode(errors="replace")
        self.output.close()
        self.scratch.cleanup()
        return os.waitstatus_to_exitcode(status) if pid else None, said, took_s

    def _become(self, tests: tuple[str, ...]) -> None:
        """pytest, in this forked process, which has imported everything but the project."""
        try:
            os.setsid()
            os.dup2(self.output.fileno(), 1), os.dup2(self.output.fileno(), 2)
            os.chdir(self.root)
            os.environ |= {
                "PYTHONPATH": str(self.root), "ATTENTION_STUDY_CACHE": str(self.cache), "TMPDIR": self.scratch.name,
                "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            }  # fmt: skip
            tempfile.tempdir = None
            sys.path[:0] = [str(self.root)]
            import pytest

            flags = ["-x", "-q", "-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin", "--hypothesis-seed=0"]
            flags += ["--no-header", "--tb=line", "--disable-warnings"]
            status = int(pytest.main([*flags, f"--basetemp={self.scratch.name}/pytest", *tests]))
            sys.stdout.flush()
        except BaseException as error:
            print(repr(error), flush=True)
            status = 70
        os._exit(status)


def in_turns(copies: list[Copy], tasks: list[tuple], done) -> None:
    """Starts each task, the words of `Copy.start`, on the next free copy; `done(number, *ended)` is told of each."""
    waiting, running = list(enumerate(tasks))[::-1], {}
    while waiting or running:
        for copy in copies:
            if copy in running and (ended := copy.ended()):
                done(running.pop(copy), *ended)
            if copy not in running and waiting:
                running[copy], words = waiting.pop()
                copy.start(*words)
        time.sleep(0.02)


def outcome(status: int | None) -> str:
    return KILLED if status is None or status < 0 else OUTCOME.get(status, WRONG)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/mutants.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--module", nargs="+", default=[], metavar="NAME", help="parts of paths or mistakes")
    parser.add_argument("--jobs", type=int, choices=range(1, 9), default=2, help="how many at once (%(default)s)")
    parser.add_argument("--tests-of", metavar="COMMIT", help="with the tests of another commit: the score before")
    parser.add_argument("--systematic", action="store_true", help="operators and numbers, in the modules of the list")
    parser.add_argument("--show", action="store_true", help="what pytest said of each that survived")
    options = parser.parse_args(words)
    try:
        has_tests = ["git", "cat-file", "-e", f"{options.tests_of}:tests"]
        if options.tests_of and subprocess.run(has_tests, cwd=ROOT, capture_output=True).returncode:
            raise ValueError(f"there are no tests of a commit {options.tests_of!r}; name one that `git log` shows")
        mutants = (systematic if options.systematic else listed)(options.module)
        for mutant in mutants:
            compile(mutant.text, mutant.mistake, "exec")  # what does not compile would be killed by any test
    except (ValueError, SyntaxError) as error:
        print(f"scripts/mutants.py: {error}", file=sys.stderr)
        return 2
    _preload([mutant.module for mutant in mutants])
    with tempfile.TemporaryDirectory(prefix="attention-study-mutants-") as folder:
        return _report(mutants, _outcomes(mutants, options, Path(folder)), options)


def _selected(tests: tuple[str, ...], copy: Copy, options) -> tuple[str, ...]:
    """The tests; of another commit the files that are there, whole: what stood in them may be called otherwise."""
    if not options.tests_of:
        return tests
    files = dict.fromkeys(test.partition("::")[0] for test in tests)  # and pytest's options
    return tuple(file for file in files if not file.startswith("tests/") or (copy.root / file).exists())


def _outcomes(mutants: list[Mutant], options, folder: Path) -> list[str]:
    """The outcome of each mistake; one that is wrong where its tests are red without it."""
    copies, took_s = [Copy(folder / str(number), options.tests_of) for number in range(options.jobs)], {}
    selected = [_selected(mutant.tests, copies[0], options) for mutant in mutants]
    every, warm = [tests for tests in dict.fromkeys(selected) if any("tests/" in one for one in tests)], folder / "warm"

    def clean(number, status, said, seconds):
        print(f"{'green' if status == 0 else 'RED'} in {seconds:.1f} s without a mistake: {' '.join(every[number])}")
        if status == 0:
            took_s[every[number]] = seconds
        else:
            print(said)
        sys.stdout.flush()

    in_turns(copies, [(tests, LONGEST_S) for tests in every], clean)
    for copy in copies:
        shutil.copytree(copy.cache, warm, dirs_exist_ok=True)
    found = [WRONG if tests in every else SURVIVED for tests in selected]  # survived where there is no test at all
    planted = [number for number, tests in enumerate(selected) if tests in took_s]

    def tested(turn, status, said, seconds):
        mutant, what = mutants[planted[turn]], outcome(status)
        found[planted[turn]] = what
        print(f"{what:<9} {seconds:5.1f} s  {mutant.module}: {mutant.mistake}")
        if what == WRONG or (options.show and what == SURVIVED):
            print(said)
        sys.stdout.flush()

    least_s, times = PATIENCE
    tasks = [
        (selected[n], least_s + times * took_s[selected[n]], mutants[n].module, mutants[n].text, warm) for n in planted
    ]
    in_turns(copies, tasks, tested)
    return found


def _preload(modules: list[str]) -> None:
    """Imports, once and not once for each mistake, all that the modules of the project import but these themselves."""
    sys.path[:0] = [str(ROOT)]
    for module in {module.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for module in modules}:
        importlib.import_module(module)
    for name in PRELOADED:
        importlib.import_module(name)
    sys.path.remove(str(ROOT))
    for name in [name for name in sys.modules if name.partition(".")[0] == "lib"]:
        del sys.modules[name]


def _report(mutants: list[Mutant], found: list[str], options) -> int:
    """Prints the score by module and what survived; the exit status."""
    pairs = list(zip(mutants, found, strict=True))
    print("\n| module | planted | killed | survived | equivalent |\n| --- | --- | --- | --- | --- |")
    for module in [*dict.fromkeys(mutant.module for mutant in mutants), None]:
        own = [(mutant, what) for mutant, what in pairs if module in (None, mutant.module)]
        excused = sum(what == SURVIVED and mutant.equivalent is not None for mutant, what in own)
        killed, survived = (sum(what == which for _, what in own) for which in (KILLED, SURVIVED))
        print(f"| {module or '**all**'} | {len(own)} | {killed} | {survived - excused} | {excused} |")
    odd = False
    for mutant, what in pairs:
        if what == SURVIVED:
            excuse = f" (excused: {mutant.equivalent})" if mutant.equivalent else ""
            print(f"survived: {mutant.module}: {mutant.mistake}{excuse}")
        if what == WRONG or (what == KILLED and mutant.equivalent and not options.tests_of):
            odd, why = True, "its tests are red without it" if what == WRONG else "it is killed, and needs no excuse"
            print(f"wrong in the list: {mutant.module}: {mutant.mistake}: {why}")
    if options.systematic:
        return 0
    return 2 if odd else int(any(what == SURVIVED and not mutant.equivalent for mutant, what in pairs))


if __name__ == "__main__":
    sys.exit(main())
