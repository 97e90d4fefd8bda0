"""What is asked of contributed records: `python -m lib.analysis.contributed FOLDER [FOLDER ...]`, which CI runs too.

A line for each finding. **refused**: it cannot stand among the records (changed, no record, synthetic, of a variant
that is not here, of two definitions under one name, an A/A control out of bounds). **said**: it may stand, and a reader
must know (too few blocks, no control, a failed certificate, another text of a variant's file). Exit status 0 where
nothing is refused, 1 where something is, 2 where it was asked wrongly. docs/contribute.md says what each is for.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib import attention
from lib.analysis import capability, compare
from lib.analysis import steps as turns
from lib.analysis.conclusions import ENERGY, TIME
from lib.analysis.paired import FEWEST_BLOCKS, MARGIN, holm
from lib.analysis.words import cost, counted, joined
from lib.attention import CONTROL, REFERENCE
from lib.data.tasks import TASKS
from lib.errors import UsageError
from lib.paths import ROOT
from lib.record import FAILURES, REASONS, Certificate, Strict, files, folders, printable, probe, scaling, steps
from lib.record.folders import Looked, several

RATES, SEEDS = 3, 5  # that a cell of probes is asked to have, the seeds at its best rate
VERSIONS = ("torch", "transformers")
SURE = 0.05
LATER = 1000  # of so many the blocks of a variant that came later begin (`lib.study.plan`)
HOW = f"put {{attention: {REFERENCE}, label: {CONTROL}}} among the profile's variants"
ASKED = {TIME: "time", ENERGY: "joules", turns.METRICS[0]: "time", turns.METRICS[1]: "joules"}


class Finding(NamedTuple):
    where: str
    says: str
    is_refused: bool

    def __str__(self):
        return f"{'refused' if self.is_refused else 'said'}: {self.where}: {self.says}"


said, refused = partial(Finding, is_refused=False), partial(Finding, is_refused=True)


class One(NamedTuple):
    """A record that was read. Of a run all but its series, and its row of `record.read`."""

    path: Path
    kind: str
    found: Strict
    row: dict | None


def keep(path: Path, kind: str, found: Strict) -> One:
    if kind != "run":
        return One(path, kind, found, None)
    row = {name: value for name, value in files.row_of(path, found).items() if not name.startswith("series_")}
    return One(path, kind, found.model_copy(update={"series": None}), row)


def findings(looked: Iterable[Looked]) -> Iterator[Finding]:
    """What is to be said of folders that `folders.look` went through with `keep`."""
    seen: dict[str, Path] = {}
    for folder in looked:
        yield from (refused(where, says) for where, says in folder.wrong)
        if folder.aside:
            yield said(folder.name, f"left aside, for it is no record: {several(folder.aside)}")
        for kind in folder.kinds:
            own = [one for one in folder.kept if one.kind == kind]
            yield from _copies(own, seen)
            own, made_up = _parted(own, lambda one: getattr(one.found, "provenance", "measured") == "measured")
            for one in made_up:
                yield refused(printable(one.path), "it is synthetic, made up for a test and not measured; take it out")
            if own:
                yield from _judged(folder.name, kind, own)


def _parted(all_of: list, is_first) -> tuple[list, list]:
    return [one for one in all_of if is_first(one)], [one for one in all_of if not is_first(one)]


def _copies(own: list[One], seen: dict[str, Path]) -> Iterator[Finding]:
    for one in own:
        sign = getattr(one.found, "content_sha256", None)
        if sign in seen:
            says = (
                f"it is the same record as {printable(seen[sign])}: one measurement counts once; take one of them out"
            )
            yield refused(printable(one.path), says)
        elif sign:
            seen[sign] = one.path


def _judged(where: str, kind: str, own: list[One]) -> Iterator[Finding]:
    yield from _origin(where, own)
    try:
        yield from OF_KIND.get(kind, lambda where, own: ())(where, own)
    except Exception as error:  # of numbers that strangers made: said, and the other folders are judged too
        why = f"{type(error).__name__}: {printable(error, 200)}"
        yield refused(where, f"its {kind} records cannot be compared ({why}); take out what differs from the rest")


def _origin(where: str, own: list[One]) -> Iterator[Finding]:
    """Commit and versions."""
    facts = [(one, environment) for one in own if (environment := getattr(one.found, "environment", None)) is not None]
    without = [one for one, environment in facts if not environment.get("commit")]
    changed = [one for one, environment in facts if environment.get("commit") and environment.get("commit_modified")]
    if without:
        yield said(where, f"{_files(without)}: no commit is named, so what was run is not known; measure in a clone")
    if changed:
        says = (
            f"{_files(changed)}: measured with changes that the named commit does not hold; commit first, then measure"
        )
        yield said(where, says)
    for name in VERSIONS:
        found = Counter(printable((environment.get("packages") or {}).get(name), 40) for _, environment in facts)
        if len(found) > 1:
            parts = joined([f"{version} in {number}" for version, number in found.most_common()])
            yield said(where, f"{name} differs, {parts}: times of the two are not comparable; a folder for each")


def _files(own: list[One]) -> str:
    names = [printable(one.path.name) for one in own]
    return names[0] if len(own) == 1 else f"{len(own)} files ({several(names)})"


def _definitions(where: str, tables: Iterable[list[tuple[str, str]]]) -> Iterator[Finding]:
    """Of each table whose numbers stand side by side: (attention, fingerprint of its file)."""
    every: dict[str, set] = {}
    for table in tables:
        own: dict[str, set] = {}
        for name, sha256 in table:
            own.setdefault(name, set()).add(sha256)
            every.setdefault(name, set()).add(sha256)
        for name, found in own.items():
            if len(found) > 1:
                signs = joined(sorted(sha256[:8] for sha256 in found))
                says = (
                    f"{printable(name)} is of {len(found)} definitions ({signs}), and one column of both would be of "
                    "neither; keep the files of the newer, or a folder for each"
                )
                yield refused(where, says)
    today = {name: _today(name) for name in every}
    for name in every:
        if today[name] is None:
            says = (
                f"{printable(name, 100)}: this repository has no such file, so nobody can read what was measured; "
                "put it into lib/attention/ and measure it from there"
            )
            yield refused(where, says)
    older = [printable(name, 100) for name, found in every.items() if today[name] and found - {today[name]}]
    if older:
        says = f"measured with another text of the file than today's: {several(older)}; measure again for today's"
        yield said(where, says)


def _today(name: str) -> str | None:
    """The fingerprint of a variant's or pattern's file in this repository; None where it has none. No record leads to
    a file that lies elsewhere."""
    try:
        here = [_file(part) for part in attention.parts(name)]
        return attention.source_sha256(",".join(here)) if all(here) else None
    except (ValueError, OSError):
        return None


def _file(part: str) -> str | None:
    if part in attention.variants():
        return part
    path = (ROOT / part).resolve()
    return str(path) if path.suffix == ".py" and path.is_relative_to(ROOT) and path.is_file() else None


def _runs(where: str, own: list[One]) -> Iterator[Finding]:
    yield from _certificates(where, own)
    by_setting = compare.groups(pd.DataFrame([one.row for one in own]))
    if len(by_setting) > 1:
        says = f"runs of {len(by_setting)} settings, data or devices, in a table each; a folder for each is clearer"
        yield said(where, says)
    tables = [list(zip(group.runs["attention"], group.runs["attention_sha256"], strict=True)) for group in by_setting]
    yield from _definitions(where, tables)
    for group in by_setting:
        of = f"{where} ({printable(group.title, 200)})" if len(by_setting) > 1 else where
        yield from _one_name_each(of, group.runs)
        yield from _gaps(of, group.runs)
        yield from _blocks(of, group.runs, "block")
        yield from _control(of, [(f"{ASKED[metric]}", group.runs, metric) for metric in (TIME, ENERGY)])
        flags = Counter(flag for flags in group.runs["flags"] for flag in flags)
        if flags:
            flagged = int(group.runs["flags"].map(bool).sum())
            parts = joined([f"{printable(flag, 60)} {number}" for flag, number in flags.most_common()])
            yield said(of, f"{flagged} of {counted(len(group.runs), 'run')} flagged: {parts}; their checks say why")


CHECKS = tuple(
    name for name, field in Certificate.model_fields.items() if field.annotation is bool and name != "passed"
)


def _certificates(where: str, own: list[One]) -> Iterator[Finding]:
    apart, older = {}, []
    for one in own:
        certificate = one.found.certificate
        failed = [name for name in CHECKS if not getattr(certificate, name)]
        failed += [measure.check for measure in certificate.measures if measure.passed is False]
        failed = list(dict.fromkeys(failed))
        if certificate.passed and failed:
            says = f"its certificate says passed, and {several(failed)} is not: no run writes that; measure it again"
            yield refused(printable(one.path), says)
        if not certificate.passed:
            apart[one.found.label] = several([printable(check, 60) for check in failed]) or "no check named"
        if not certificate.measures:
            older.append(one)
    if apart:
        parts = [f"{label} ({failed})" for label, failed in sorted(apart.items())]
        yield said(where, f"drawn apart and not ranked, for the certificate fails: {'; '.join(parts)}")
    if older:
        yield said(where, f"{_files(older)}: the certificate is of one before the whole model was examined")


def _one_name_each(where: str, runs: pd.DataFrame) -> Iterator[Finding]:
    """Whether runs of one label are of one variant's options, since every table joins them."""
    for label, own in runs.groupby("label"):
        options = sorted({json.dumps(values["options"], sort_keys=True) for values in own["parameter_values"]})
        if len(options) > 1:
            says = f"runs called {printable(label)} have different options: {several(list(map(printable, options)))}"
            yield refused(where, f"{says}; give those of each a label of their own")


def _gaps(where: str, runs: pd.DataFrame) -> Iterator[Finding]:
    """Which blocks are not there though later ones are: what was left out by its numbers is no sample."""
    for session, own in runs.dropna(subset=["session", "block"]).groupby("session"):
        there = set(own["block"].astype(int))
        begun = {number // LATER * LATER for number in there}
        gone = sorted(
            {number for begin in begun for number in range(begin, max(n for n in there if n < begin + LATER))} - there
        )
        if gone:
            blocks = several([str(number) for number in gone])
            says = f"of session {printable(session, 60)} later blocks are here, and {blocks} not"
            yield said(where, f"{says}; put them back, or say with the records why they went: not for what they showed")


def _blocks(where: str, runs: pd.DataFrame, unit: str) -> Iterator[Finding]:
    """Whether blocks (of steps: rounds) are whole, enough and in balanced order, and hold the A/A control."""
    whole = compare.whole_blocks(runs)
    if whole.empty:
        says = f"no {unit} is whole ({REFERENCE} and every other once, in one session, on one device): points alone"
        yield said(where, f"{says}, no verdict; let the same command run whole {unit}s")
        return
    torn = runs.drop(whole.index)
    if len(torn):
        names = [printable(name) for name in torn["name" if "name" in torn else "label"]]
        says = f"{counted(len(torn), 'run')} of no whole {unit}, which count in no interval: {several(names)}"
        yield said(where, f"{says}; take them out, or let the same command run those {unit}s again")
    number, by_label = len(whole.groupby(compare.BLOCK)), whole.groupby("label").size()
    few = sorted(by_label.index[by_label < FEWEST_BLOCKS])
    if number < FEWEST_BLOCKS:
        says = f"{counted(number, f'whole {unit}')}, and a verdict needs {FEWEST_BLOCKS}: points alone until then"
        yield said(where, says)
    elif few:
        yield said(where, f"fewer than {FEWEST_BLOCKS} whole {unit}s, so no verdict, of {several(few)}")
    for panel in compare.panels(whole):
        number, others = len(panel.groupby(compare.BLOCK)), len(set(panel["label"]) - {CONTROL})
        if number >= FEWEST_BLOCKS and not compare.balanced(panel):
            square = others * (1 + others % 2)
            says = f"the order over {number} {unit}s is not balanced, as of {others} variants it is after {square}"
            yield said(where, f"{says}; until then the place of each is in the model, and intervals are wider")
    if CONTROL not in by_label:
        says = f"no whole {unit} has the A/A control, so the noise is not known; {HOW}"
        yield said(where, says)


def _control(where: str, asked: list[tuple[str, pd.DataFrame, str]]) -> Iterator[Finding]:
    """The bounds of the A/A control, of (words, runs, metric): no significant difference from the reference, by Holm
    over all that is asked, or one of at most 2 %."""
    rows = [(what, compare.ratios(runs, metric).set_index("label")) for what, runs, metric in asked]
    rows = [(what, table.loc[CONTROL]) for what, table in rows if {CONTROL, REFERENCE} <= set(table.index)]
    rows = [(what, row) for what, row in rows if row.n >= FEWEST_BLOCKS]
    judged, mute = _parted(rows, lambda one: not np.isnan(one[1].p))
    for (what, row), p in zip(judged, holm([row.p for _, row in judged]), strict=True):
        if p < SURE and abs(np.log(row.ratio)) > MARGIN:
            says = (
                f"the A/A control is out of bounds: {REFERENCE} a second time took {cost(row)} {what} (n = {row.n}), "
                "so differences between variants may be the machine's too; see that nothing else runs, measure again"
            )
            yield refused(where, says)
    for what, row in mute:
        yield said(where, f"the A/A control's {what} cannot be judged: {row.verdict}")


def _steps(_: str, own: list[One]) -> Iterator[Finding]:
    for one in own:
        yield from _of_steps(printable(one.path), one.found)


def _of_steps(where: str, found: steps.Steps) -> Iterator[Finding]:
    yield from _definitions(where, [[(entry.attention, entry.attention_sha256) for entry in found.entries]])
    apart = [entry.label for entry in found.entries if not entry.certified]
    if apart:
        yield said(where, f"not to be picked, for the certificate fails: {several(apart)}")
    failed = [
        f"{label} at {context:,} tokens ({printable(why, 80)})"
        for label, lengths in found.failed.items()
        for context, why in lengths.items()
    ]
    if failed:
        yield said(where, f"without a number: {several(failed)}")
    frame = steps.frame(found)
    if frame.empty:
        yield said(where, "it holds no round yet; the command that wrote it goes on where it stopped")
        return
    asked, of_lengths = [], {}
    for context in dict.fromkeys(frame["context"]):
        runs = turns.runs(found, context)
        for one in _blocks(where, runs, "round"):
            of_lengths.setdefault(one, []).append(f"{context:,}")
        asked += [(f"{ASKED[metric]} at {context:,} tokens", runs, metric) for metric in turns.METRICS]
    lengths = frame["context"].nunique()
    for one, contexts in of_lengths.items():
        at = "" if len(contexts) == lengths else f" (at {joined(contexts)} tokens)"
        yield one._replace(says=f"{one.says}{at}")
    yield from _control(where, asked)
    yield from _surroundings(where, found, frame)


def _surroundings(where: str, found: steps.Steps, frame: pd.DataFrame) -> Iterator[Finding]:
    windows = counted(len(frame), "window")
    for column, what in (
        ("other_processes", "another process was on the GPU"),
        ("throttled_share", "the clock was held down"),
    ):
        if number := int((frame[column] > 0).sum()):
            yield said(where, f"{what} in {number} of {windows}; measure again where nothing else runs")
    cold = sum(one.warm is False for one in found.rounds)
    if cold:
        yield said(where, f"the GPU had not come to its heat before {cold} of {counted(len(found.rounds), 'round')}")
    for reason, number in Counter(frame["energy_null_reason"].dropna()).items():
        if reason != "no_gpu":
            yield said(where, f"no joules in {number} of {windows}: {REASONS[reason]}")


def _scaling(where: str, own: list[One]) -> Iterator[Finding]:
    found = [one.found for one in own]
    yield from _definitions(where, [[(one.attention, one.attention_sha256) for one in found]])
    if any(scaling.machine(one) != scaling.machine(found[0]) for one in found):
        says = "its records of scaling differ in setting or machine, which no figure joins; a folder for each"
        yield refused(where, says)
    points = [point for one in found for point in one.points if point.outcome == "measured"]
    if not points:
        yield said(where, "its records of scaling hold no point yet; the command that wrote them goes on")
    few = [point.rounds for point in points if point.rounds < FEWEST_BLOCKS]
    if few:
        says = f"fewer than {FEWEST_BLOCKS} processes ({min(few)} at least) behind {len(few)} of {len(points)} points"
        yield said(where, f"{says}, so intervals are wide; the same command with more `rounds` adds them")


def _probes(where: str, own: list[One]) -> Iterator[Finding]:
    own, foreign = _parted(own, lambda one: one.found.setting.task in TASKS)
    for one in foreign:
        says = f"its task {printable(one.found.setting.task, 40)!r} is none of this code's; they are {', '.join(TASKS)}"
        yield refused(printable(one.path), f"{says}; take it out")
    found = [one.found for one in own]
    if not found:
        return
    columns: dict[tuple, list] = {}  # of a task, with and without the convolution: what stands side by side
    for one in found:
        own_column = columns.setdefault((one.setting.task, one.setting.convolution), [])
        own_column += [(mixer.attention, mixer.attention_sha256) for mixer in one.pattern]
    yield from _definitions(where, columns.values())
    lost = [one for one in found if one.outcome != "measured"]
    if lost:
        names = [f"{one.label}, {one.setting.task}, rate {one.learning_rate:g}, seed {one.seed}" for one in lost]
        yield said(where, f"{counted(len(lost), 'probe')} without a result: {several(names)}")
    cells = probe.frame(found)
    kept = capability.in_one_setting(cells)
    if other := len(cells.drop(kept.index).drop_duplicates(["label", "task", "rate", "seed", "setting"])):
        says = f"{counted(other, 'probe')} of another setting than most of their task, which no table shows"
        yield said(where, f"{says}; a folder for each")
    shown = capability.shown_tasks(kept)
    for task in (task for task in TASKS if task in set(kept["task"]) and task not in shown):
        says = f"{task} is not shown: its reference does not solve it in these records, or was not tried"
        yield said(where, f"{says}; put {REFERENCE}'s probes beside them")
    keys = ["label", "task", "convolution"]
    rates, best = kept.groupby(keys)["rate"].nunique(), capability.at_best(kept).groupby(keys)["seed"].nunique()
    for number, wanted, what in ((rates, RATES, "rates"), (best, SEEDS, "seeds at the best rate")):
        few = [
            f"{label} in {task}{'' if convolution else ' without convolution'}"
            for label, task, convolution in number.index[number < wanted]
        ]
        if few:
            says = f"fewer than {wanted} {what} in {len(few)} of {len(number)} entries"
            yield said(where, f"{says}: {several(few)}; the command that wrote them adds more")


def _failures(where: str, own: list[One]) -> Iterator[Finding]:
    ended = [f"{printable(one.found.label)} ({FAILURES[one.found.reason]})" for one in own]
    yield said(where, f"{counted(len(ended), 'run')} ended without a record: {several(ended)}")


OF_KIND = {"run": _runs, "failure": _failures, "probe": _probes, "scaling": _scaling, "steps": _steps}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lib.analysis.contributed", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a folder that holds records")
    given = parser.parse_args(words)
    files_of: list[int] = []
    refusals = 0

    def counting(looked):
        for one in looked:
            files_of.append(sum(one.kinds.values()) + len(one.wrong))
            yield one

    try:
        for one in findings(counting(folders.look(given.folders, keep))):
            print(one)
            refusals += one.is_refused
    except UsageError as error:
        print(f"python -m lib.analysis.contributed: {error}", file=sys.stderr)
        return 2
    if not sum(files_of):
        named = several([printable(folder) for folder in given.folders])
        print(f"python -m lib.analysis.contributed: no record lies in {named}; name another folder", file=sys.stderr)
        return 2
    print(f"{counted(sum(files_of), 'file')}, {refusals} refused")
    return 1 if refusals else 0


if __name__ == "__main__":
    sys.exit(main())
