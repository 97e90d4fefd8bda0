"""Which blocks of a study count, and what the same command does about those that do not.

A block counts only where all of it ran in one session on one device: ratios are taken inside it. What was torn (killed,
deleted, edited, made with another file or on other data) is set aside and run again as a whole, never patched. A study
of one block gives points alone, so of it only what is missing is run.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from lib import attention, parameters, paths, record
from lib.study import plan

FINISHED, INCOMPLETE, BEGUN, TO_RUN = "finished", "incomplete", "begun", "to run"
WITHOUT = "without what failed"  # gone through to its end; some of its runs failed
SERIES = plan.MOST_BLOCKS  # blocks of variants that came later are numbered from here on: no plan reaches so far


class Made(NamedTuple):
    """What a study asks of a record that is there: its place, and the device that it is from."""

    study: record.StudyPosition
    device_name: str
    gpu_uuid: str | None

    @property
    def seat(self) -> tuple:
        """Alike for all runs of a block that counts."""
        return self.study.session, self.study.block, self.device_name, self.gpu_uuid


class Data:
    """What runs would be trained on if they began now. Each data set is looked at once, when it is first asked for, and
    each record once, as long as its file is the same."""

    def __init__(self):
        self.seen: dict[str, str] = {}
        self.records: dict[tuple, tuple[Made, str, str | None]] = {}

    def token_sha256(self, run: dict) -> str:
        """The fingerprint of a run's tokens. Raises UsageError for data that it cannot be trained on."""
        from lib.data import corpus  # here, because its seconds would be added to every run of the workflow

        setting = parameters.setting(run["values"])
        if setting not in self.seen:
            self.seen[setting] = corpus.load(SimpleNamespace(**run["values"])).facts["token_sha256"]
        return self.seen[setting]

    def read(self, path: Path) -> tuple[Made, str, str | None]:
        """Of a record: `Made`, and the fingerprints of its variant's file and of its tokens. Raises ValueError and
        OSError as `record.load` does."""
        status = path.stat()
        key = (path, status.st_mtime_ns, status.st_size, status.st_ino)
        if key not in self.records:
            found = record.load(path)
            made = Made(found.study, found.environment["device_name"], record.gpu_uuid(found.environment))
            self.records[key] = made, found.attention_sha256, found.data.get("token_sha256")
        return self.records[key]


def examined_run(run: dict, folder: Path, data: Data | None) -> tuple[Made | None, str | None]:
    """A run's record where it is there, or why what stands in its place is not: made with another file or data."""
    path = folder / f"{parameters.run_name(run['values'])}.json"
    if not path.exists():
        return None, None
    try:
        found, attention_sha256, token_sha256 = (data or Data()).read(path)
        if attention_sha256 != attention.source_sha256(run["values"]["attention"]):
            return None, "its variant's file has changed since"
    except (OSError, ValueError):
        return None, "its record is damaged"
    wanted = run["values"].get("save_model")
    if wanted and not paths.from_root(wanted).is_dir():
        return None, "its model was not saved"
    if data is not None and token_sha256 != data.token_sha256(run):
        return None, f"{run['values']['dataset']} has changed since"
    return found, None


def finished(run: dict, folder: Path, data: Data | None) -> Made | None:
    """The record of just this run, of the variant's file as it is now and of the tokens that `data` holds, where it is
    there. Without `data` of any tokens: for the process that has just trained on them."""
    return examined_run(run, folder, data)[0]


def is_finished(run: dict, folder: Path, data: Data | None) -> bool:
    return finished(run, folder, data) is not None


class Block(NamedTuple):
    """A block of a plan beside what a folder holds of it: `found`, a record or None for each run."""

    number: int
    runs: list[dict]
    found: list[Made | None]
    state: str
    left: bool  # whether anything stands in the place of its records

    @property
    def todo(self) -> list[dict]:
        """The runs that the same command makes; of a block `WITHOUT`, at first those that failed."""
        if self.state in (FINISHED, INCOMPLETE, TO_RUN):
            return [] if self.state == FINISHED else self.runs
        return [run for run, one in zip(self.runs, self.found, strict=True) if one is None]


def by_number(runs: list[dict]) -> dict[int, list[dict]]:
    """The runs by block."""
    found: dict[int, list[dict]] = {}
    for run in runs:
        found.setdefault(run["block"], []).append(run)
    return dict(sorted(found.items()))


def examined(
    runs: list[dict], folder: Path, data: Data, session: str | None = None, patch: bool | None = None
) -> list[Block]:
    """Every block of a plan with its state. `session` goes on where it is named: its blocks are begun, not torn.

    `patch`: whether what is missing is run alone, by default where the plan has but one block. Raises UsageError where
    there are records, but not their data.
    """
    parts = by_number(runs)
    patch = len(parts) == 1 if patch is None else patch
    return [_examined(number, part, folder, data, session, patch) for number, part in parts.items()]


def _examined(number, runs, folder, data, session, patch) -> Block:
    found = [finished(run, folder, data) for run in runs]
    left = any((folder / f"{parameters.run_name(run['values'])}.json").exists() for run in runs)
    seats = {one.seat for one in found if one is not None}
    if None not in found and (patch or _is_one(seats)):
        state = FINISHED
    elif not left:
        state = TO_RUN
    elif patch or (session is not None and {seat[0] for seat in seats} == {session} and _is_one(seats)):
        state = BEGUN
    elif _is_one(seats) and all(_failed(run, folder) for run, one in zip(runs, found, strict=True) if one is None):
        state = WITHOUT
    else:
        state = INCOMPLETE
    return Block(number, runs, found, state, left)


def _is_one(seats: set[tuple]) -> bool:
    return len(seats) == 1 and None not in next(iter(seats))[:2]


def _failed(run: dict, folder: Path) -> bool:
    """Whether a run has failed by its note, and was not killed, which says nothing of it."""
    name = parameters.run_name(run["values"])
    try:
        note = record.load_failure(folder / f"{name}.{record.FAILED}")
    except (OSError, ValueError):
        return False
    return note.reason != "killed" and not (folder / f"{name}.json").exists()


def about(found: list[Block]) -> list[str]:
    """What is said of blocks that will be repeated, before anything runs."""
    torn = [block for block in found if block.state == INCOMPLETE]
    lines = []
    for block in torn:
        kept = sum(one is not None for one in block.found)
        sessions = len({one.seat for one in block.found if one is not None})
        why = f"{len(block.runs) - kept} of its {len(block.runs)} runs have no record that counts"
        why = why if kept < len(block.runs) else f"its runs are of {sessions} sessions or devices"
        lines.append(f"block {block.number} is incomplete: {why}; what is left is set aside, and it runs again whole")
    without = [block for block in found if block.state == WITHOUT]
    for block in without:
        names = ", ".join(parameters.display_name(run["values"]) for run in block.todo)
        lines.append(f"block {block.number} is whole without {names}, which failed: tried again, and then the block")
    return lines


def numbers(found) -> str:
    """Numbers of blocks as a sentence names them: 0 to 4, 7."""
    parts: list[list[int]] = []
    for number in sorted(found):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)


class Later(NamedTuple):
    """A plan in which variants that came later run in blocks of their own, and sentences that say so."""

    runs: list[dict]
    says: list[str]


def settled(runs: list[dict], folder: Path, data: Data) -> Later:
    """The plan, where blocks are whole without some of its variants: these then run in new blocks, beside the reference
    and the A/A control alone. Neither are whole blocks repeated, nor is a variant patched into them.

    Raises UsageError where there are records, but not their data.
    """
    parts = by_number(runs)
    if len(parts) == 1:
        return Later(runs, [])
    missing = _newcomers(parts, folder, data)
    if not missing:
        return Later(runs, [])
    kept = [run for run in runs if _label(run) not in missing.get(run["block"], ())]
    labels = [label for label in _labels(runs) if any(label in of for of in missing.values())]
    with_control = attention.CONTROL in _labels(runs) or _had_control(parts, missing, folder, data)
    extra, says = [], []
    for series, group in _series(labels, parts, missing, folder).items():
        for block in [block for block in missing if missing[block] & group]:
            extra += _beside_reference(parts[block], group & missing[block], series * SERIES + block, with_control)
    made = by_number(extra)
    if made:
        beside = " and ".join([attention.REFERENCE, *([attention.CONTROL] if with_control else [])])
        says.append(
            f"blocks {numbers(missing)} are whole without {' and '.join(labels)}, and stay: new blocks "
            f"{numbers(made)} hold {'it' if len(labels) == 1 else 'them'} beside {beside} ({len(extra)} runs)"
        )
    return Later([*kept, *extra], says)


def _label(run: dict) -> str:
    return parameters.display_name(run["values"])


def _labels(runs: list[dict]) -> list[str]:
    return list(dict.fromkeys(map(_label, runs)))


def _newcomers(parts: dict[int, list[dict]], folder: Path, data) -> dict[int, set[str]]:
    """By block that is whole by the plan of its time, and holds the reference: the labels that it never held."""
    missing, untold = {}, {}
    for number, runs in parts.items():
        found = {_label(run): finished(run, folder, data) for run in runs}
        there = {label: one for label, one in found.items() if one is not None}
        absent = {_label(run) for run in runs if _never_ran(run, folder)}
        if not there or attention.REFERENCE not in there or not _is_one({one.seat for one in there.values()}):
            continue
        planned = next(iter(there.values())).study.variants
        if planned is not None and not set(found) <= set(planned) and set(found) & set(planned) == set(there):
            missing[number] = set(found) - set(planned)
        elif planned is None and absent and set(found) - absent == set(there):
            untold[number] = absent
    same = {frozenset(labels) for labels in untold.values()}
    if len(untold) == len(parts) and len(same) == 1:  # records of before the plan was noted: no block ever held them
        missing |= untold
    return missing


def _had_control(parts, missing, folder: Path, data) -> bool:
    """Whether the A/A control is of the plan that some of the whole blocks had."""
    runs = [run for number in missing for run in parts[number] if _label(run) == attention.REFERENCE]
    return any(attention.CONTROL in (finished(run, folder, data).study.variants or ()) for run in runs)


def _never_ran(run: dict, folder: Path) -> bool:
    name = parameters.run_name(run["values"])
    return not any((folder / f"{name}.{ending}").exists() for ending in ("json", record.FAILED))


def _series(labels: list[str], parts, missing, folder: Path) -> dict[int, set[str]]:
    """Which labels share a series of new blocks: those that were begun together, and all others together."""
    series, rest = {}, set(labels)
    number = 1
    while rest:
        here = {label for label in rest if _has_records(label, number, parts, missing, folder)}
        begun = {name for label in here for name in _has_records(label, number, parts, missing, folder)}
        if here:
            series[number] = here | (rest & begun)
        elif not _taken(number, parts, missing, folder):
            series[number] = set(rest)
        rest -= series.get(number, set())
        number += 1
    return series


def _moved(run: dict, block: int) -> dict:
    """A run in another block: with its seed."""
    return run | {"block": block, "values": run["values"] | {"seed": block}, "given": run["given"] | {"seed": block}}


def _has_records(label: str, series: int, parts, missing, folder: Path) -> list[str]:
    """The labels of the blocks of a series in which a label has records; none where it has not."""
    for block in missing:
        for run in parts[block]:
            path = folder / f"{parameters.run_name(_moved(run, series * SERIES + block)['values'])}.json"
            if _label(run) == label and path.exists():
                try:
                    return record.load(path).study.variants or [label]
                except (OSError, ValueError):
                    return [label]
    return []


def _taken(series: int, parts, missing, folder: Path) -> bool:
    """Whether the reference has run in a series: it is another newcomer's."""
    return bool(_has_records(attention.REFERENCE, series, parts, missing, folder))


def _beside_reference(runs: list[dict], labels: set[str], number: int, with_control: bool) -> list[dict]:
    """A new block of the reference, the control and `labels`, in the order that a plan of these would have."""
    by_label = {_label(run): run for run in runs}
    reference = by_label[attention.REFERENCE]
    others = [reference, *(by_label[label] for label in sorted(labels - {attention.CONTROL}))]
    block = number % SERIES
    order = [others[which] for which in plan.orders(len(others), block + 1)[block]]
    if with_control:
        again = {part: reference[part] | plan.CONTROL_RUN for part in ("values", "given")}
        order.insert(block % (len(order) + 1), reference | again)
    return [_moved(run, number) | {"position": position} for position, run in enumerate(order)]
