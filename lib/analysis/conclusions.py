"""What a notebook's records say, in sentences: what it begins and ends with, each part a function of the records alone.

A conclusion names the answer, how large it is and its interval, what it rests on (n, the machine), and what it does not
show. Where the records do not carry an answer it says that, and what would.
"""

from typing import NamedTuple

import pandas as pd
from IPython.display import HTML

from lib import attention, markup
from lib.analysis import capability, compare, growth_tables, ngrams, notes, quality, text_loss
from lib.analysis.growth import SHOWN, ratios
from lib.analysis.style import labels, titles
from lib.analysis.words import cost, counted, joined, size
from lib.record import REASONS

TIME, ENERGY = "time_per_epoch_s", "energy_j"
SAID = {TIME: "training time", ENERGY: "joules", "peak_memory_bytes": "peak memory of the GPU"}
REAL_GAP = 0.05  # nats: rounding moves the loss of one function by less
DIFFERENT = "significantly different"


class Conclusion(NamedTuple):
    """What is shown first and last. `answer` in bold, a sentence each, begun with what it is `of`; `details` behind."""

    answer: list[str]
    details: list[str]
    rests_on: str
    not_shown: str
    of: str = ""

    def shown(self) -> HTML:
        first, *others = self.answer
        behind = [*self.details, f"Rests on: {self.rests_on}", f"Not shown: {self.not_shown}"]
        return markup.conclusion([f"{self.of}: {first}" if self.of else first, *others], behind)


def of_runs(group: compare.Group) -> Conclusion:
    """Of the runs of train.ipynb: who costs less than sdpa, and what is counted, which needs no repeats."""
    runs = group.runs
    blocks = len(compare.whole_blocks(runs).groupby(compare.BLOCK))
    if blocks < compare.FEWEST_BLOCKS or attention.REFERENCE not in set(runs["label"]):
        answer = [
            f"Which attention costs least, these runs do not say: {counted(blocks, 'whole block')}, and a verdict "
            f"needs {compare.FEWEST_BLOCKS}."
        ]
        more = f"Not ranked, and no time or loss compared; {_command(runs)} makes enough of them."
        details = [more, *_counts(runs), ngrams.sentence(runs)]
    else:
        measured = [metric for metric in (TIME, ENERGY) if runs[metric].notna().any()]
        answer, details = [_best(runs, metric) for metric in measured], [_all(runs, metric) for metric in measured]
        details += [*_counts(runs), _losses(runs)]
    noise = compare.noise(runs, TIME)
    control = "there is no A/A control" if noise is None else f"A/A control {notes.noise_in_words(noise, TIME)}"
    flagged = int(runs["flags"].map(bool).sum())
    order = compare.about_blocks(runs).removesuffix(".")
    return Conclusion(
        answer, details, f"{group.title}; {order}; {control}; {flagged} of {len(runs)} runs flagged.",
        f"other sizes, lengths and machines, and what is recalled (capability.ipynb). {_unmeasured(runs)}".strip(),
        group.title,
    )  # fmt: skip


def _command(runs: pd.DataFrame) -> str:
    """What makes so many blocks of these variants that there are intervals, and their order is balanced."""
    variants = set(runs["label"]) - {attention.CONTROL}
    square = len(variants) * (1 + len(variants) % 2)
    is_the_quick_one = set(runs["profile"]) == {"quick"} and variants == set(attention.STUDY_ORDER)
    command = "python -m lib.study" if is_the_quick_one else "the study's command with"
    return f"{command} --blocks {-(-compare.FEWEST_BLOCKS // square) * square}"


def _others(runs: pd.DataFrame) -> list[str]:
    """Who may be picked instead of sdpa: certified, and not its control."""
    certified = runs.groupby("label")["certified"].all()
    return [x for x in labels(runs) if certified[x] and x not in (attention.REFERENCE, attention.CONTROL)]


def _beside(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    found = compare.ratios(runs, metric).set_index("label").reindex(_others(runs))
    return found.dropna(subset=["ratio"]).sort_values("ratio", kind="stable")


def _best(runs: pd.DataFrame, metric: str) -> str:
    """Who costs least, if less than sdpa; several where they share the first rank."""
    found, ranks, called = _beside(runs, metric), compare.ranks(runs, metric), titles(runs)
    reference = called[attention.REFERENCE]
    if found["low"].isna().all():
        return f"Who takes less {SAID[metric]} than {reference} is not told: {_first(found['verdict'])}."
    less = found[(found["ratio"] < 1) & (found["verdict"] == DIFFERENT)]
    first = min((ranks[label][0] for label in less.index if label in ranks), default=None)
    best = [label for label in less.index if label in ranks and ranks[label][0] == first]
    if not best:
        return f"No variant takes significantly less {SAID[metric]} than {reference}."
    said = joined([f"{called[label]}, {cost(less.loc[label])}" for label in best])
    share = " (which share the place)" if len(best) > 1 else ""
    return f"Least {SAID[metric]}: {said} than {reference}{share}."


def _first(verdicts: pd.Series) -> str:
    return verdicts.iloc[0] if len(verdicts) else "nothing is there to compare"


def _all(runs: pd.DataFrame, metric: str) -> str:
    """Everybody beside sdpa, by verdict."""
    found, called = _beside(runs, metric), titles(runs)
    sides = {
        "significantly less": found[(found["verdict"] == DIFFERENT) & (found["ratio"] < 1)],
        "significantly more": found[(found["verdict"] == DIFFERENT) & (found["ratio"] > 1)],
    }
    rest = found[found["verdict"] != DIFFERENT]
    sides |= {verdict: own for verdict, own in rest.groupby("verdict", sort=False)}
    said = [
        f"{side}: {joined([f'{called[label]} {cost(row)}' for label, row in own.iterrows()])}"
        for side, own in sides.items()
        if len(own)
    ]
    return f"{SAID[metric].capitalize()} beside {called[attention.REFERENCE]}'s: {'; '.join(said)}." if said else ""


def _counts(runs: pd.DataFrame) -> list[str]:
    """The smallest cache, which is counted: the same in every run."""
    held = runs.groupby("label")["cache_bytes"].max().dropna()
    if attention.REFERENCE not in held or not set(held.index) & set(_others(runs)):
        return []
    called, of = titles(runs), held[[x for x in _others(runs) if x in held]]
    if of.min() >= held[attention.REFERENCE]:
        return ["No variant's cache is smaller than SDPA's; it is counted, the same in every run."]
    least = called[of.idxmin()]
    at = runs["parameter_values"].iloc[0]["context"]
    return [
        f"Counted, the same in every run: {least} keeps the smallest cache, {size(of.min())} of a sequence of {at:,} "
        f"tokens instead of {size(held[attention.REFERENCE])}."
    ]


def _losses(runs: pd.DataFrame) -> str:
    """Whose loss differs, where losses say anything about attention."""
    above = ngrams.above_bigram(runs)
    if above.isna().any() or (above > 0).any():
        return ngrams.sentence(runs)
    return quality.sentences(runs)[0]


def _unmeasured(runs: pd.DataFrame) -> str:
    missing = {
        SAID[metric]: notes.why(runs, metric) for metric in (ENERGY, "peak_memory_bytes") if runs[metric].isna().any()
    }
    return " ".join(f"{line[0].upper()}{line[1:]}" for line in notes.absent(missing))


def of_lengths(points: pd.DataFrame, metrics: list[str], reference: str, title: str) -> Conclusion:
    """Of cost by context length: who is surely cheaper than `reference` at the shortest and the longest length.

    `metrics`: of training first; `title`: of the machine and sizes.
    """
    *standing, basis = growth_tables.conclusion(points, metrics, reference)
    contexts = sorted(ratios(points, metrics[0], reference)["context"].unique())
    if growth_tables.processes(points) < 2 or not contexts:
        why = "nothing stands beside the reference" if growth_tables.processes(points) > 1 else "n = 1"
        answer, standing = [f"Which attention is cheaper at which length, these points do not say: {why}."], []
    else:
        answer = [_at_length(points, metrics[0], reference, at) for at in dict.fromkeys((contexts[0], contexts[-1]))]
    unknown = points.loc[points["metric"].str.contains("energy"), "reason"].dropna().unique()
    joules = f" Joules: not measured: {', '.join(REASONS[reason] for reason in unknown)}." if len(unknown) else ""
    return Conclusion(
        answer, standing, f"{title}. {basis}",
        f"other machines, widths and batches, and what a variant can recall or learn (capability.ipynb).{joules}",
        title,
    )  # fmt: skip


def _at_length(points: pd.DataFrame, metric: str, reference: str, context: int) -> str:
    called, found = titles(points), ratios(points, metric, reference)
    less = found[(found["context"] == context) & (found["high"] < 1)].sort_values("ratio", kind="stable")
    what = f"{SHOWN[metric][0][0].lower()}{SHOWN[metric][0][1:]}"
    if less.empty:
        return f"At {context:,} tokens nothing is surely cheaper than {called[reference]} ({what})."
    said = joined([f"{called[row.label]}, {cost(row)}" for row in less.itertuples()])
    return f"At {context:,} tokens cheaper than {called[reference]} ({what}): {said}."


def of_capability(
    cells: pd.DataFrame, longer: pd.DataFrame | None = None, text: pd.DataFrame | None = None
) -> Conclusion:
    """Of the small tasks: who recalls, with how much memory, and who forgets; of these also after more training; and
    what runs of `text` say of language."""
    said = capability.conclusion(cells, longer)
    first, *details, basis = [*said, *([""] if len(said) == 1 else [])]
    told = text is not None and text_loss.is_told(text)
    untried = [row.title for row in cells[cells["accuracy"].isna()].drop_duplicates("label").itertuples()]
    lost = f" No result of some runs: {joined(untried)}." if untried else ""
    return Conclusion(
        [first], [*details, *([] if text is None else [f"Of text: {' '.join(text_loss.sentences(text))}"])],
        f"{'of the tasks: ' * (text is not None)}{basis or 'no task that SDPA solves.'}",
        f"larger nets and {'longer texts' if told else 'language itself'}; more steps than these, after which some may "
        "recall what they do not here; a variant that fails here is "
        f"hard to train or not able, and which of the two stays open.{lost}",
    )  # fmt: skip


def of_replication(leaks: pd.DataFrame, modules: pd.DataFrame, title: str) -> Conclusion:
    """Of the published study: which modules read what they are to predict, and what that hid.

    `leaks`: of `replication.losses_both_ways`; `modules`: of `replication.modules`; `title`: of the runs.
    """
    answer = [correction(leaks, modules)]
    if both := losses_both_ways(leaks, modules):
        answer.append(both)
    blind = list(modules.loc[modules["seen_by"] == 0, "module"])
    near = modules[(modules["seen_by"] > 0) & (modules["seen_by"] < modules["seen_by"].max())]
    said = [f"in {row.module} each token is seen by {row.seen_by} of those behind it" for row in near.itertuples()]
    said += [f"in {joined(blind)} no token sees another"] if blind else []
    details = [f"{joined(said)[:1].upper()}{joined(said)[1:]}."] if said else []
    lacking = int((~modules["projects"]).sum())
    details.append(
        f"{lacking} of {len(modules)} have no output projection, which makes them smaller and cheaper alone."
    )
    return Conclusion(
        answer, details, f"{title}; one seed of each (n = 1); what a module sees is computed exactly, by this page.",
        "the paper's own sizes and machine: its numbers stand in the table of claims as published, not measured again.",
    )  # fmt: skip


def correction(leaks: pd.DataFrame, modules: pd.DataFrame) -> str:
    """How many of the published modules see the tokens that they are to predict, and when."""
    always, bare = (
        list(modules.loc[modules["sees_future"] == when, "module"]) for when in ("always", "without padding")
    )
    if not always and not bare:
        return f"None of the {len(modules)} published modules sees a token that it is to predict."
    said = [f"{joined(always)} always"] if always else []
    said += [f"{joined(bare)} in a batch without padding"] if bare else []
    return (
        f"{len(always) + len(bare)} of {len(modules)} published modules see the tokens that they are to predict: "
        f"{', '.join(said)}."
    )


def losses_both_ways(leaks: pd.DataFrame, modules: pd.DataFrame) -> str:
    """What those lose token by token that lose little in one pass; empty where none does."""
    name = modules.set_index("name")["module"]
    theirs, ours = (leaks[leaks["is_published"] == which] for which in (True, False))
    wide = theirs[theirs["gap"] > REAL_GAP].sort_values("gap", ascending=False)
    if wide.empty:
        return ""
    said = [f"{name[x.name]} {x.teacher_forced_loss:.2f} against {x.autoregressive_loss:.2f}"
            for x in wide.itertuples(index=False)]  # fmt: skip
    apart = f"; ours differ by {ours['gap'].abs().max():.2f}" if len(ours) else ""
    return (
        "Loss in one pass, where they see them, against token by token, where they cannot, in nats: "
        f"{joined(said)}{apart}."
    )
