"""The answer of the README: what to pick when, from the committed records alone (`lib.analysis.evidence`).

`python -m lib.analysis.answer` writes the sentences and the table between the marks in README.md, and the picture; a
test holds that both are what the records give.
"""

import argparse
import re
import sys
from functools import partial
from pathlib import Path

import pandas as pd

from lib import paths
from lib.analysis import evidence as records
from lib.analysis import style
from lib.analysis.answer_basis import briefly_sure, escaped, how_sure, name_of, sure
from lib.analysis.answer_figure import headline, picture
from lib.analysis.capability import CELLS, LONGER, SEEDS_WANTED, TEXT
from lib.analysis.evidence import (
    CACHE_CONTEXT,
    ENERGY,
    LITTLE,
    PAIRS,
    RECALLS,
    SMALLER,
    TIME,
    WORDS,
    Evidence,
    Pick,
    share_of,
)
from lib.analysis.words import cost, joined, size
from lib.attention import REFERENCE
from lib.errors import UsageError

STEPS = "records/steps-gpu"
BEGIN, END = "<!-- The answer: written by `python -m lib.analysis.answer` -->", "<!-- End of the answer -->"


def committed() -> Evidence:
    """The evidence in the committed records."""
    return records.read(*(paths.ROOT / folder for folder in (STEPS, CELLS, LONGER, TEXT)))


def sentences(evidence: Evidence) -> list[str]:
    """What to pick at each length, and for the cache."""
    others, e = evidence.others, evidence
    keepers = [label for label in others if e.recalls(label)]
    said = []
    for context in e.lengths:
        free, kept = e.cheapest(context, TIME, others), e.cheapest(context, TIME, keepers)
        at = f"**At {context:,} tokens"
        why = e.untold(context, TIME)
        if why is not None:
            said.append(f"{at} nothing is told**: {escaped(why)}.")
            continue
        if not free.labels:
            joules = _in_joules(e, context, keepers if e.recall else others, free)
            said.append(f"{at} keep SDPA**: nothing trains in significantly less time{joules}.")
            continue
        same = [label for label in free.labels if label in kept.labels]
        if same or not e.recall:
            pick = kept if same else free
            known = "" if e.recall else "; what it recalls is not known"
            joules = _in_joules(e, context, keepers if e.recall else others, pick)
            said.append(
                f"{at} {_take(e, pick, context)}**: {_savings(e, pick, context)}{_in_part(e, pick)}{known}{joules}."
            )
            continue
        lost = joined([_lost(e, label) for label in free.labels])
        first = (
            f"{_take(e, kept, context)}**: {_savings(e, kept, context)}{_in_part(e, kept)}"
            if kept.labels else "keep SDPA**: nothing that recalls is significantly faster"
        ) + _in_joules(e, context, keepers, kept) + _nearly(e, context, kept)  # fmt: skip
        then = f"**If it does not, {_names(e, free)}**: {_savings(e, free, context)}; {lost}."
        said.append(f"{at}, if recall counts, {first}. {then}")
    cache, free = e.smallest_cache(keepers if e.recall else others), e.smallest_cache(others)
    if cache.labels:
        other = set(free.labels) - set(cache.labels)
        said.append(
            f"**If the KV cache is what you pay for{' and recall counts' * bool(other and e.recall)}, "
            f"{_names(e, cache)}**: {joined(cache.ratios)} at {CACHE_CONTEXT:,} tokens{_in_part(e, cache)}"
            + ("" if e.recall else "; what it recalls is not known")
            + _without_a_price(e, cache, keepers if e.recall else others)
            + (f". **If it does not, {_names(e, free)}**: {joined(free.ratios)}" if other and e.recall else "")
            + "."
        )
    return said


def _take(evidence: Evidence, pick: Pick, context: int) -> str:
    """To take it, or that there is little in it, which may be the weights that it lacks."""
    names, fewer = _names(evidence, pick), [more for label in pick.labels if (more := evidence.weights(label, context))]
    if any(evidence.ratio(label, context, TIME).ratio <= LITTLE for label in pick.labels):
        return f"take {names}"
    return f"keep SDPA or save a little with {names}{f' ({joined(fewer)})' if fewer else ''}"


def _nearly(evidence: Evidence, context: int, kept: Pick) -> str:
    """Who takes less time than those picked and recalls as much in the median, but not from every seed."""
    e = evidence
    near = [
        label for label in e.others
        if label in e.recall and not e.recalls(label) and e.recall[label].median >= RECALLS
    ]  # fmt: skip
    pick = e.cheapest(context, TIME, near)
    most = min((e.ratio(label, context, TIME).low for label in kept.labels), default=1.0)
    said = [
        f"{name_of(e, label)} saves more, {how}, and recalls {share_of(e.recall[label])} after "
        f"{e.recall[label].steps:,} steps of training"
        for label, how in zip(pick.labels, pick.ratios, strict=True) if e.ratio(label, context, TIME).high < most
    ]  # fmt: skip
    return f"; near to recalling, but not {RECALLS:.0%} from every seed: {joined(said)}" if said else ""


def _in_joules(evidence: Evidence, context: int, among: list[str], by_time: Pick) -> str:
    """Who of them takes the fewest joules, where that is another than by time."""
    pick = evidence.cheapest(context, ENERGY, among)
    if not pick.labels or set(pick.labels) & set(by_time.labels):
        return ""
    times = [row for label in pick.labels if (row := evidence.ratio(label, context, TIME)) is not None]
    said = [cost(row) + ": not told apart" * (row.verdict != "significantly different") for row in times]
    in_time = f" (time {joined(said)})" if said else ""
    return f"; for the fewest joules take {_names(evidence, pick)}: {joined(pick.ratios)}{in_time}"


def _without_a_price(evidence: Evidence, cache: Pick, among: list[str]) -> str:
    """The smallest cache of those whose steps take no more time than SDPA's, where the smallest of all costs time."""
    e = evidence
    own = [said for label in cache.labels if (said := e.rises(label, TIME))]
    if not own:
        return ""
    free = _no_slower(e, cache, among)
    then = f"; at no more time {_names(e, free)}: {joined(free.ratios)}" if free.labels else ""
    return f", but training {joined(own)}{then}"


def _no_slower(evidence: Evidence, cache: Pick, among: list[str]) -> Pick:
    """The smallest cache of those whose steps take no more time than SDPA's, where that is another; nobody else."""
    if not any(evidence.rises(label, TIME) for label in cache.labels):
        return Pick([], [])
    return evidence.smallest(evidence.cache, [label for label in among if evidence.is_no_slower(label)])


def _names(evidence: Evidence, pick: Pick) -> str:
    return joined([name_of(evidence, label) for label in pick.labels])


def plain(text: str) -> str:
    """A sentence of `sentences` or `how_sure` for a page that is no Markdown."""
    text = re.sub(r"(?<!\\)\[([^\]]*)\]\([^)]*\)", r"\1", text.replace("**", ""))
    return re.sub(r"\\([\\`*\[\]<>|_])", r"\1", text)


def _savings(evidence: Evidence, pick: Pick, context: int) -> str:
    """Time of those picked, and joules where they were counted."""
    said = [f"training time {joined(pick.ratios)}"]
    joules = [evidence.ratio(label, context, ENERGY) for label in pick.labels]
    if all(row is not None for row in joules):
        said.append(f"joules {joined([sure(row) for row in joules])}")
    elif evidence.turns[ENERGY].notna().any():
        said.append("joules not counted")
    return ", ".join(said)


def _lost(evidence: Evidence, label: str) -> str:
    """What is recalled by one that recalls little, and who was tried for it."""
    found, name = evidence.recall.get(label), name_of(evidence, label)
    if found is None:
        return f"what {name} recalls is not known"
    other = found.title != evidence.entries[label].title
    who = f"{escaped(found.title)}, tried in its place," if other else name
    return f"{who} recalls {share_of(found)} of {PAIRS} facts after {found.steps:,} steps of training"


def limits(evidence: Evidence) -> pd.DataFrame:
    """The table "if you are limited by": a row per limit, without and with the wish to recall."""
    e, others = evidence, evidence.others
    keepers = [label for label in others if e.recalls(label)]
    rows = []

    def add(limit, pick_of, at, why=None):
        if why is not None:
            said = f"not told: {escaped(why)}"
            rows.append({"if you are limited by": limit, "pick": said, "it saves": "–", "it costs": "–"})
            return
        picks = {", recall counts": pick_of(keepers), ", recall not needed": pick_of(others)}
        if not e.recall:
            picks = {"": pick_of(others)}
        elif len({_picked(e, pick) for pick in picks.values()}) == 1:
            picks = {", recall or not": pick_of(keepers)}
        for wish, pick in picks.items():
            rows.append(_row(e, limit + wish, pick, at))

    for context in e.lengths:
        begin = len(rows)
        for metric in (TIME, ENERGY):
            if e.turns[metric].notna().any():
                pick_of, why = partial(e.cheapest, context, metric), e.untold(context, metric)
                add(f"{WORDS[metric]}, {context:,} tokens", pick_of, context, why)
        rows[begin:] = sorted(rows[begin:], key=lambda row: row["if you are limited by"].endswith("not needed"))
    memory = e.memory_at(e.long)
    why = None if memory else "SDPA's memory was not measured there"
    add(f"memory in training, {e.long:,} tokens", lambda among: e.smallest(memory, among), e.long, why)
    cache = f"KV cache, {CACHE_CONTEXT:,} tokens"
    add(cache, e.smallest_cache, e.long)
    among = keepers if e.recall else others
    free = _no_slower(e, e.smallest_cache(among), among)
    if free.labels:
        cache += f"{', recall counts' if e.recall else ''}, no more training time"
        place = len(rows) - (e.recall and rows[-1]["if you are limited by"].endswith("not needed"))
        rows.insert(place, _row(e, cache, free, e.long))
    return pd.DataFrame(rows)


def _row(evidence: Evidence, limit: str, pick: Pick, context: int) -> dict:
    return {
        "if you are limited by": limit,
        "pick": _picked(evidence, pick),
        "it saves": joined(pick.ratios) if pick.labels else "–",
        "it costs": _price(evidence, pick.labels, context),
    }


def in_short(table: pd.DataFrame) -> pd.DataFrame:
    """`limits` with one row for time and joules where they lead to the same pick at the same cost."""
    limit, saves, rows = "if you are limited by", "it saves", []
    for row in table.to_dict("records"):
        twin = {limit: row[limit].replace("joules,", "time,", 1), "pick": row["pick"], "it costs": row["it costs"]}
        same = [one for one in rows if {name: one[name] for name in twin} == twin]
        if row[limit].startswith("joules,") and same and row[saves] != "–":
            same[0][limit] = twin[limit].replace("time,", "time or joules,", 1)
            same[0][saves] = f"time {same[0][saves]}, joules {row[saves]}"
        else:
            rows.append(row)
    return pd.DataFrame(rows, columns=table.columns)


def _picked(evidence: Evidence, pick: Pick) -> str:
    names = [f"**{name_of(evidence, label)}**" for label in pick.labels]
    return joined(names) if names else "SDPA: nothing saves"


def _price(evidence: Evidence, labels: list[str], context: int) -> str:
    """What else the picked cost: recall, time and joules where they take more at that length, lengths at which they
    fail."""
    said = []
    for label in labels:
        own = []
        found = evidence.recall.get(label)
        other = found is not None and found.title != evidence.entries[label].title
        who = f" (tried as {escaped(found.title)})" if other else ""
        if found is not None and not evidence.recalls(label):
            own.append(f"recalls {share_of(found)}{who}")
        elif found is None and evidence.recall:
            own.append("recall not known")
        elif short := _unsolved(evidence, label):
            own.append(f"answers {joined(short)}{who}")
        own += evidence.costs(label, context)
        own += [f"no result at {at:,} ({escaped(why)})" for at, why in evidence.failed.get(label, {}).items()]
        own += filter(None, [_memory(evidence, label, context), evidence.weights(label, context)])
        said.append(", ".join(own))
    said = [one if len(labels) == 1 else f"{name_of(evidence, label)}: {one}"
            for label, one in zip(labels, said, strict=True) if one]  # fmt: skip
    return "; ".join(said) or "–"


def _memory(evidence: Evidence, label: str, context: int) -> str:
    """What its training takes of more memory than SDPA's at a length, in words; empty for little, or where unknown."""
    held = evidence.memory_at(context)
    if REFERENCE not in held or label not in held or held[label] * SMALLER <= held[REFERENCE]:
        return ""
    return f"{size(held[label])} instead of {size(held[REFERENCE])} in training"


def markdown(evidence: Evidence) -> str:
    """What stands between the marks."""
    table = in_short(limits(evidence))
    head = f"| {' | '.join(table.columns)} |\n|{' --- |' * len(table.columns)}\n"
    body = "".join(f"| {' | '.join(map(str, row))} |\n" for row in table.itertuples(index=False))
    basis = "".join(f"- {line}\n" for line in how_sure(evidence))
    basis = f"<details><summary>{briefly_sure(evidence)}</summary>\n\n{basis}\n</details>"
    said = "\n".join(f"- {line}" for line in sentences(evidence))
    alt = escaped(" ".join(headline(evidence)))
    note = _footnote(evidence)
    return f"{BEGIN}\n\n{said}\n\n{note}![{alt}](figures/answer.png)\n\n{head}{body}\n{basis}\n\n{END}"


def _footnote(evidence: Evidence) -> str:
    """Which recall counts, and who of the table was tried in another form."""
    e, picked = evidence, " ".join(limits(evidence)["pick"])
    if not e.recall:
        return ""
    others = {
        label: one.title for label, one in e.recall.items()
        if label in e.entries and f"**{name_of(e, label)}**" in picked and one.title != e.entries[label].title
    }  # fmt: skip
    tried = joined([f"{name_of(e, label)} was tried as {escaped(title)}" for label, title in others.items()] or [""])
    return (
        f"*If recall counts*, who gave back less than {RECALLS:.0%} of {PAIRS} facts in 128 tokens from even one seed "
        "is left out. That was tried in nets of one or two layers, not in the models timed nor at their lengths"
        f"{'; ' * bool(others)}{tried}. {_elsewhere(e, picked)}Time and joules are of training at the length that is "
        "named; decoding was timed on a CPU alone ([scaling.ipynb](notebooks/scaling.ipynb)). In brackets: 95 % "
        "intervals of costs, and of what is recalled the worst and the best seed.\n\n"
    )


def _elsewhere(evidence: Evidence, picked: str) -> str:
    """That there are other tasks, and what those of the table that recall leave unsolved, or were not tried in, of
    these that SDPA solves from every seed: a sentence; empty where recall is the one task of the records."""
    e, known, said = evidence, evidence.elsewhere, []
    if e.tasks < 2:
        return ""
    keepers = [label for label in e.recall if label in e.entries and label != REFERENCE and e.recalls(label)]
    keepers = [label for label in keepers if f"**{name_of(e, label)}**" in picked]
    tried = known[known["n"] >= SEEDS_WANTED].set_index("label")
    for label in keepers:
        short = _unsolved(e, label)
        said += [f"{name_of(e, label)} answers {joined(short)}"] if short else []
    if said:
        count = known["task"].nunique()
        said[0] = f"of {'the one' if count == 1 else count} that SDPA solves from every seed {said[0]}"
    for task in dict.fromkeys(known["task"]):
        names = [name_of(e, label) for label in keepers if label not in tried.index[tried["task"] == task]]
        said += [f"*{task}* is not known of {joined(names)}"] if names else []
    others = "another" if e.tasks == 2 else "others"
    return (
        f"It is one of [{e.tasks} tasks](notebooks/capability.ipynb), and {others} may order the variants otherwise"
        f"{': ' * bool(said)}{'; '.join(said)}. "
    )


def _in_part(evidence: Evidence, pick: Pick) -> str:
    """That who is picked because it recalls does not solve every task that SDPA does."""
    return " (other tasks it solves in part)" if any(_unsolved(evidence, one) for one in pick.labels) else ""


def _unsolved(evidence: Evidence, label: str) -> list[str]:
    """What who recalls answers of the other tasks that SDPA solves from every seed, of those that it does not solve."""
    known = evidence.elsewhere
    if evidence.tasks < 2 or label == REFERENCE or not evidence.recalls(label):
        return []
    own = known[(known["label"] == label) & (known["n"] >= SEEDS_WANTED) & (known["low"] < RECALLS)]
    return [
        f"{share_of(row)} of *{row.task}*" + f" as {escaped(row.title)}" * (row.title != evidence.recall[label].title)
        for row in own.itertuples()
    ]


def put(page: str, text: str) -> str:
    """`page` with `text` between its marks. Raises UsageError where it has not just one of each, in order."""
    if BEGIN not in page or END not in page:
        raise UsageError(f"the page has no place for the answer; it goes between {BEGIN!r} and {END!r}")
    if page.count(BEGIN) > 1 or page.count(END) > 1 or page.index(END) < page.index(BEGIN):
        raise UsageError(f"the page must have {BEGIN!r} once, and behind it {END!r} once")
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: text, page, count=1, flags=re.DOTALL)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.analysis.answer", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=Path, default=paths.ROOT / STEPS, help="a record of `lib.study.steps`, or a folder of some"
    )
    parser.add_argument("--cells", type=Path, default=paths.ROOT / CELLS, help="the folder of `lib.study.probes`")
    own = "; without it the committed ones, beside the committed cells alone"
    parser.add_argument("--longer", type=Path, help=f"the same, of more steps of training{own}")
    parser.add_argument("--text", type=Path, help=f"a folder of runs of train.ipynb, of which the loss is told{own}")
    parser.add_argument("--page", type=Path, default=paths.ROOT / "README.md", help="where the answer is written")
    parser.add_argument("--figures", type=Path, default=paths.ROOT / "figures", help="where the picture is written")
    options = parser.parse_args(words)
    try:
        committed_too = options.cells.resolve() == (paths.ROOT / CELLS).resolve()
        beside = [
            folder if folder or not committed_too else paths.ROOT / committed
            for folder, committed in ((options.longer, LONGER), (options.text, TEXT))
        ]
        evidence = records.read(options.steps, options.cells, *beside)
        page = put(options.page.read_text(encoding="utf-8"), markdown(evidence))
        style.save(picture(evidence), options.figures, "answer")
        paths.write_whole(options.page, page)
    except (UsageError, OSError) as error:
        print(f"python -m lib.analysis.answer: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
