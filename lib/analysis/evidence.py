"""What the records say of picking an attention: who costs less, by how much, and who recalls.

From training steps that took turns (`lib.record.steps`: time, joules, memory), recall (`lib.record.probe`), and each
variant's own count of its cache. A variant is *cheaper* only where it is certified and its paired ratio to SDPA is
significantly below 1; of several, those that are not told apart from the lowest share the place. It *recalls* if
each of its seeds reaches `RECALLS`. `lib.analysis.answer` makes the README's words of it, `answer_figure` its
picture.

Steps may be of several records: other variants or other lengths under the same conditions, each beside an SDPA of its
own. A ratio is of one record; where two records meet, so do their ratios, unpaired.
"""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from lib import attention
from lib.analysis import capability, compare, text_loss
from lib.analysis import steps as tables
from lib.analysis.paired import FEWEST_BLOCKS
from lib.analysis.words import cost, counted, joined, size
from lib.attention import CONTROL, REFERENCE
from lib.data.tasks import TASKS
from lib.errors import UsageError
from lib.model import gpt2_config
from lib.model.devices import without_weights
from lib.record import REASONS, printable, probe, steps
from lib.record.steps import Steps

RECALLS = 0.95
TASK = "recall"
PAIRS = max(TASKS[TASK].tested_on)
CACHE_CONTEXT, CACHE_BYTES = 32_768, 2  # tokens; bytes of a number in bf16
TIME, ENERGY = tables.METRICS
WORDS = {TIME: "time", ENERGY: "joules"}
LITTLE = 0.96  # of SDPA's cost: what is above saves less than twice what counts as equivalent
SMALLER = capability.SMALLER  # a count below this share of SDPA's is a saving that is worth a word
NEXT_TO_NOTHING = 0.01  # of SDPA's cache: below it, caches are alike, and time decides


class Recall(NamedTuple):
    """Scaled accuracy at the hardest recall, over the seeds of the best rate."""

    median: float
    low: float
    high: float
    n: int
    title: str  # what was asked: a window has another width here
    layers: int
    steps: int  # of training; who has not begun to learn by then counts as one that does not recall
    state_share: float  # of what SDPA keeps in a net of as many layers


def share_of(found) -> str:
    """The `median` seed's share of what was asked, with the `low`est and the `high`est where they differ."""
    low, high = max(0.0, found.low), max(0.0, found.high)
    seeds = "" if f"{low:.0%}" == f"{high:.0%}" else f" [{low:.0%}, {high:.0%}]"
    return f"{max(0.0, found.median):.0%}{seeds}"


class Pick(NamedTuple):
    """Who costs least of what may be picked, and by how much."""

    labels: list[str]  # not told apart from each other; empty: nobody costs less than SDPA
    ratios: list[str]


class Evidence:
    """What the records say. `found`: the steps; `cells`: of `lib.record.probe.frame`, or None where there are none;
    `beside`: steps of other variants or lengths under the same conditions. A variant's turns at a length are those of
    the record of the most rounds in which it, and SDPA, did not fail there. `longer`: cells of more training, by which
    whom they have is judged. `text`: runs of train.ipynb, of which the loss of text is told.
    """

    def __init__(
        self, found: Steps, cells: pd.DataFrame | None, beside: list[Steps] = (), longer: pd.DataFrame | None = None,
        text: pd.DataFrame | None = None,
    ):  # fmt: skip
        self.found, self.all, self.text = found, [found, *beside], text
        self._ranked = {}
        self.entries, self.home = {}, {}  # by label: its entry, and the record that it is of
        self.source = {}  # by (length, label): the record whose turns count
        batches = {}
        for one in self.all:
            if not any(done.turns for done in one.rounds):
                raise UsageError("the record of steps has no turn yet; `python -m lib.study.steps --write` adds rounds")
            if REFERENCE not in {entry.label for entry in one.entries}:
                raise UsageError(f"the record of steps lacks {REFERENCE}, which all ratios are to")
            if _conditions(one) != _conditions(found):
                raise UsageError("two records of steps are of other settings or devices, so no evidence together")
            for entry in one.entries:
                same = self.entries.get(entry.label, entry)
                if (same.attention, same.options) != (entry.attention, entry.options):
                    raise UsageError(
                        f"two records of steps call different variants {entry.label}; give one another label"
                    )
                if self.entries.setdefault(entry.label, entry) is entry:
                    self.home[entry.label] = one
            for asked in one.setting.sizes:
                if batches.setdefault(asked.context, asked.batch_size) != asked.batch_size:
                    raise UsageError(f"two records of steps have batches of two sizes at {asked.context:,} tokens")
        for context in batches:
            for measured in (True, False):  # who failed wherever it was tried has failed
                for one in self.at(context):
                    for label in [entry.label for entry in one.entries]:
                        if not measured or not any(context in one.failed.get(who, {}) for who in (label, REFERENCE)):
                            self.source.setdefault((context, label), one)
        titles = Counter(entry.title for entry in self.entries.values() if entry.label != CONTROL)
        self.title = {
            label: f"{entry.title} ({label})" if titles[entry.title] > 1 else entry.title
            for label, entry in self.entries.items()
        }
        self.ratios = self._own(tables.ratios).set_index(["context", "metric", "label"])
        self.batches = dict(sorted(batches.items()))  # by length
        self.lengths = list(self.batches)
        self.short, self.long = min(self.lengths), max(self.lengths)
        self.turns = self._own(steps.frame)
        self.failed = {}  # by label and length: why
        for (context, label), one in self.source.items():
            if context in one.failed.get(label, {}):
                self.failed.setdefault(label, {})[context] = one.failed[label][context]
        self.memory = self.turns.groupby(["context", "label"])["peak_memory_bytes"].max()
        self.cache = {label: self._cache(entry) for label, entry in self.entries.items()}
        self.recall = _recall(cells) if cells is not None else {}
        self.tasks = cells["task"].nunique() if cells is not None else 0
        self.elsewhere = capability.beside_recall(cells) if cells is not None else None
        self.rates = cells.loc[cells["task"] == TASK, "rate"].nunique() if cells is not None else 0
        self.points = _points(cells) if cells is not None else pd.DataFrame(columns=["label", "scaled"])
        if cells is not None and longer is not None and len(longer):
            longer = capability.of_most_steps(longer)
            usual = max((one.steps for one in self.recall.values()), default=0)
            more = {
                label: one for label, one in _recall(longer).items()
                if one.steps > usual and one.n >= capability.SEEDS_WANTED
            }  # fmt: skip
            self.recall |= more
            usual, points = self.points, _points(longer)
            kept = usual[~usual["label"].isin(more)], points[points["label"].isin(more)]
            self.points = pd.concat(kept, ignore_index=True)

    def _own(self, table) -> pd.DataFrame:
        """A table of each record, with the rows that are taken from it."""
        found = []
        for one in self.all:
            rows = table(one)
            found.append(rows[[self.source[key] is one for key in zip(rows["context"], rows["label"], strict=True)]])
        return pd.concat(found, ignore_index=True)

    def _cache(self, entry) -> float:
        """Bytes that a whole model keeps of one sequence of `CACHE_CONTEXT` tokens.

        NaN of what is no variant of the study: a record may name any file, and none runs because a record names it.
        """
        setting = self.found.setting
        if not attention.is_ours(entry.attention):
            return np.nan
        config = gpt2_config(setting.layers, setting.width, setting.heads, CACHE_CONTEXT, setting.vocabulary)
        try:
            with without_weights():
                layers = attention.layers(entry.attention, config, **entry.options)
            return sum(layer.cache_bytes(CACHE_CONTEXT, CACHE_BYTES) for layer in layers)
        except Exception as error:  # options and sizes that somebody sent
            said = (
                f"there is no {printable(entry.attention)} of the steps' setting and options: {printable(error, 200)}"
            )
            raise UsageError(said) from None

    @property
    def labels(self) -> list[str]:
        """All but the control, from the most to the least expensive at the longest length that each has, SDPA first."""

        def place(label):
            if label == REFERENCE:
                return (0, 0.0)
            ratios = [ratio for at in self.lengths if (ratio := self.ratio(label, at, TIME)) is not None]
            return (1, -ratios[-1].ratio if ratios else -np.inf)

        return sorted((label for label in self.entries if label != CONTROL), key=place)

    @property
    def others(self) -> list[str]:
        """What may be picked instead of SDPA: what is certified; nobody of a record whose SDPA is not."""
        return [label for label in self.labels if label != REFERENCE and self.certified(label)]

    def certified(self, label: str, beside: str = REFERENCE) -> bool:
        """Whether it, and what stands beside it, passed in every record whose turns of it count."""
        used = [one for (_, of), one in self.source.items() if of == label]
        return all(entry.certified for one in used for entry in one.entries if entry.label in (label, beside))

    def at(self, context: int) -> list[Steps]:
        """The records of that length, the most rounds first."""
        found = [one for one in self.all if context in {asked.context for asked in one.setting.sizes}]
        return sorted(found, key=lambda one: -len(one.rounds))

    def ratio(self, label: str, context: int, metric: str):
        """The paired ratio to SDPA, with `low`, `high` and `verdict`; None where there is none."""
        key = (context, metric, label)
        row = self.ratios.loc[key] if key in self.ratios.index else None
        return None if row is None or np.isnan(row.ratio) else row

    def control(self, record: Steps, context: int, metric: str):
        """A record's A/A control as `ratio` has it."""
        if context not in {asked.context for asked in record.setting.sizes}:
            return None
        found = compare.ratios(tables.runs(record, context), metric)
        rows = [row for row in found.itertuples() if row.label == CONTROL and not np.isnan(row.ratio)]
        return rows[0] if rows else None

    def memory_at(self, context: int) -> dict[str, float]:
        """Bytes by label; empty where none, or not SDPA's, was counted."""
        found = self.memory.dropna()
        found = found[found.index.get_level_values("context") == context].droplevel("context").to_dict()
        reference = found.get(REFERENCE, np.nan)
        return {label: count for label, count in found.items() if self._alike(context, label, reference)}

    def _alike(self, context: int, label: str, reference: float) -> bool:
        """Whether the SDPA beside a variant needed the memory that SDPA is said to need."""
        turns = steps.frame(self.source[context, label])
        own = turns[(turns["context"] == context) & (turns["label"] == REFERENCE)]["peak_memory_bytes"].max()
        return abs(own / reference - 1) < 1 - SMALLER

    def untold(self, context: int, metric: str) -> str | None:
        """Why nobody is compared with SDPA there; None where somebody is."""
        why = self.failed.get(REFERENCE, {}).get(context)
        if why is not None:
            return f"SDPA has no result ({why})"
        if not any(e.certified for one in self.at(context) for e in one.entries if e.label == REFERENCE):
            return "SDPA itself failed its certificate"
        rows = [row for label in self.others if (row := self.ratio(label, context, metric)) is not None]
        if any(not np.isnan(row.low) for row in rows):
            return None
        most = max((int(row.n) for row in rows), default=0)
        if not rows:
            own = self.turns[self.turns["context"] == context]
            if metric == ENERGY and own[ENERGY].isna().all():
                return "; ".join(REASONS[reason] for reason in sorted(set(own["energy_null_reason"].dropna())))
            return "nobody is there to compare who is certified in each session"
        return f"n = {most}, and a verdict needs {FEWEST_BLOCKS}" if most < FEWEST_BLOCKS else rows[0].verdict

    def recalls(self, label: str) -> bool:
        return label in self.recall and self.recall[label].low >= RECALLS

    def cheapest(self, context: int, metric: str, among: list[str]) -> Pick:
        """Of `among` those that cost significantly less than SDPA and share the lowest rank of their session, without
        those that cost significantly more than such a one of another session."""
        lower = [
            label for label in among
            if (row := self.ratio(label, context, metric)) is not None
            and row.ratio < 1 and row.verdict == "significantly different"
        ]  # fmt: skip
        leaders = []
        for record in self.at(context):
            ranks = self._ranks(record, context, metric)
            own = [label for label in lower if label in ranks and self.source[context, label] is record]
            own.sort(key=lambda label: ranks[label])
            leaders += [[label for label in own if ranks[label][0] == ranks[own[0]][0]]] if own else []

        first = [label for labels in leaders for label in labels]
        found = [
            label for label in first
            if not any(
                self._told_apart(label, other, context, metric, len(leaders) - 1) for other in first
                if self.source[context, label] is not self.source[context, other]
            )
        ]  # fmt: skip
        aside = {label: self._aside(context, label) for label in found}
        return Pick(found, [cost(self.ratio(label, context, metric)) + aside[label] for label in found])

    def _ranks(self, record: Steps, context: int, metric: str) -> dict[str, tuple[int, int]]:
        """`compare.ranks` of a record, worked out once for all who may be picked."""
        key = id(record), context, metric
        if key not in self._ranked:
            self._ranked[key] = compare.ranks(tables.runs(record, context), metric)
        return self._ranked[key]

    def _aside(self, context: int, label: str) -> str:
        """Which session a number is of, where that is not the first of its length."""
        source = self.source[context, label]
        place = next(index for index, one in enumerate(self.all, start=1) if one is source)
        return "" if source is self.at(context)[0] else f" in session {place}"

    def _told_apart(self, one: str, other: str, context: int, metric: str, comparisons: int) -> bool:
        """Whether the first's ratio to SDPA is above the other's, of another record: Welch's t of their logarithms by
        round, Bonferroni."""
        logs = []
        for label in (one, other):
            turns = tables.runs(self.source[context, label], context)
            turns = turns.pivot(index="block", columns="label", values=metric)
            logs.append(np.log(turns[label] / turns[REFERENCE]).dropna())
        found = stats.ttest_ind(*logs, equal_var=False)
        return found.pvalue < 0.05 / comparisons and found.statistic > 0

    def smallest(self, bytes_of: dict, among: list[str]) -> Pick:
        """Of `among` those that need the fewest bytes, if fewer than SDPA; counts, so there is no interval."""
        known = {label: bytes_of[label] for label in among if not np.isnan(bytes_of.get(label, np.nan))}
        fewest = min(known.values(), default=np.inf)
        reference = bytes_of.get(REFERENCE, np.nan)
        if not fewest < SMALLER * reference:
            return Pick([], [])
        best = [label for label, value in known.items() if value <= fewest / SMALLER]
        return Pick(best, [f"{size(known[label])} instead of {size(reference)}" for label in best])

    def smallest_cache(self, among: list[str]) -> Pick:
        """As `smallest`; of those that keep as little, or next to nothing, who takes the least time when it is long."""
        pick, reference = self.smallest(self.cache, among), self.cache.get(REFERENCE, np.nan)
        tiny = [label for label in among if self.cache.get(label, np.nan) < NEXT_TO_NOTHING * reference]
        fastest = self.cheapest(self.long, TIME, tiny or pick.labels).labels
        return self.smallest(self.cache, fastest) if fastest else pick

    def rises(self, label: str, metric: str, lengths: list[int] | None = None) -> str:
        """At which of the lengths, by default all, a variant's steps cost more than SDPA's, and how much:
        significantly, or by too few rounds to tell. Empty where they do not."""
        rows = [(context, self.ratio(label, context, metric)) for context in lengths or self.lengths]
        said = [
            f"{cost(row)}{'' if row.low == row.low else f' ({row.verdict})'} at {context:,}"
            for context, row in rows
            if row is not None and row.ratio > 1 and (row.verdict == "significantly different" or row.low != row.low)
        ]
        return f"{WORDS[metric]} {joined(said)}" if said else ""

    def costs(self, label: str, context: int) -> list[str]:
        """`rises` in time and in joules at a length; at all others, and that it is not known there, where it is not."""
        known = self.ratio(label, context, TIME) is not None
        said = [self.rises(label, metric, [context] if known else None) for metric in (TIME, ENERGY)]
        return [one for one in said if one] + ([] if known else [f"not known at {context:,} tokens"])

    def is_no_slower(self, label: str) -> bool:
        """Timed at every length, with an interval, and nowhere significantly slower than SDPA."""
        rows = [self.ratio(label, context, TIME) for context in self.lengths]
        return all(row is not None and row.low == row.low for row in rows) and not self.rises(label, TIME)

    def weights(self, label: str, context: int) -> str:
        """What its model has more or fewer parameters than SDPA's, from 1 % on, in words; empty for less. A model of
        more positions has more."""
        of = {entry.label: entry.parameters for entry in self.source.get((context, label), self.home[label]).entries}
        share = of[label] / of[REFERENCE] - 1
        return "" if abs(share) < 0.01 else f"{100 * abs(share):.1f} % {'more' if share > 0 else 'fewer'} parameters"

    @property
    def trained(self) -> str:
        """How many steps the nets of recall were trained, and who more of them, in words; empty without recall."""
        shown = {label: one.steps for label, one in self.recall.items() if label in self.entries}
        counts = sorted(set(shown.values() or {one.steps for one in self.recall.values()}))
        if not counts:
            return ""
        others = [
            f"{count:,} for {joined([self.title[label] for label, steps in shown.items() if steps == count])}"
            for count in counts[1:]
        ]
        return f"{counts[0]:,} steps of training" + (f" ({', '.join(others)})" if others else "")

    @property
    def machine(self) -> str:
        return self.found.environment["device_name"]

    @property
    def rounds(self) -> str:
        """How many there are, in words: of the first record, and of the others by lengths or how many variants."""
        others = []
        for one in self.all[1:]:
            new = [at for at in self.lengths if self.at(at)[0] is one]
            where = [f"at {joined([f'{at:,}' for at in new])} tokens"] if new else []
            aside = self.own(one, [at for at in self.lengths if at not in new])
            where += [f"for {len(aside)} of the variants"] if aside else []
            others += [f"{len(one.rounds)} {' and '.join(where)}"] if where else []
        return counted(len(self.found.rounds), "round") + (f" ({', '.join(others)})" if others else "")

    def own(self, record: Steps, lengths: list[int]) -> list[str]:
        """The labels, but SDPA and its control, of which a record has turns that count at these lengths."""
        labels = [label for label in self.entries if label not in (REFERENCE, CONTROL)]
        return [label for label in labels if any(self.source.get((at, label)) is record for at in lengths)]

    @property
    def machines(self) -> str:
        """How many, and which: records of one kind of GPU may be of several."""
        count = len({uuid_of(one) for one in self.all})
        return f"one {self.machine}" if count == 1 else f"{count} GPUs of the kind {self.machine}"


def _rows_of_recall(cells: pd.DataFrame) -> pd.DataFrame:
    found = capability.summary(cells)
    found = found[(found["task"] == TASK) & found["hardest"] & found["convolution"]]
    return found if TASK in set(cells["task"]) and capability.why_not_shown(cells, TASK) is None else found.iloc[:0]


def _recall(cells: pd.DataFrame) -> dict[str, Recall]:
    rows, found = _rows_of_recall(cells), {}
    layers, shares = capability.layers(cells), capability.state_shares(cells)
    settings = cells[cells["task"] == TASK].groupby("label")["setting"].first()
    for row in rows.itertuples():
        numbers, steps = (row.median, row.low, row.high, row.n), json.loads(settings[row.label])["steps"]
        found[row.label] = Recall(*numbers, row.title, layers[row.label], steps, shares[row.label])
    return found


def _points(cells: pd.DataFrame) -> pd.DataFrame:
    best = capability.at_best(cells)
    best = best[(best["task"] == TASK) & best["convolution"]]
    return best[best["difficulty"] == best["difficulty"].max()][["label", "scaled"]]


def uuid_of(found: Steps) -> str | None:
    return (found.environment.get("gpu") or {}).get("uuid")


def _conditions(found: Steps) -> tuple:
    setting, packages = found.setting.model_copy(update={"sizes": []}), found.environment.get("packages", {})
    return setting, found.environment["device_name"], packages.get("torch")


def read(
    where: Path, cells_folder: Path, longer_folder: Path | None = None, text_folder: Path | None = None
) -> Evidence:
    """The evidence in these records: of the file of steps `where`, or of all in that folder, first that of the most
    lengths, of these that of the most rounds. `longer_folder`: of cells of more training, if there is one;
    `text_folder`: of runs of train.ipynb.

    Raises UsageError where steps or runs are none or made up, or a folder is none.
    """
    files = sorted(where.glob("*.json")) if where.is_dir() else [where]
    if not files:
        raise UsageError(f"there is no record of steps in {where.name}/")
    records = [steps.load(file) for file in files]
    for file, one in zip(files, records, strict=True):
        if one.provenance != "measured":
            raise UsageError(f"{file.name} is {one.provenance}, not measured: no evidence")
    if not cells_folder.is_dir():
        raise UsageError(f"there is no folder {cells_folder.name}/ of `lib.study.probes`")
    if longer_folder is not None and not longer_folder.is_dir():
        raise UsageError(f"there is no folder {longer_folder.name}/ of cells of more training")
    cells, longer = (
        probe.frame(probe.load_all(folder)) if folder is not None and any(folder.glob("*.json")) else None
        for folder in (cells_folder, longer_folder)
    )
    first, *beside = sorted(records, key=lambda one: (-len(one.setting.sizes), -len(one.rounds)))
    text = None if text_folder is None else text_loss.read(text_folder)
    return Evidence(first, cells, beside, longer, text)
