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
from lib.analysis.answer_figure import headline, picture
from lib.analysis.evidence import CACHE_CONTEXT, ENERGY, PAIRS, RECALLS, TIME, Evidence, Pick, cost, joined
from lib.attention import CONTROL
from lib.errors import UsageError

STEPS = "records/steps-gpu/steps.json"
CELLS = "records/capability-cpu"
BEGIN, END = "<!-- The answer: written by `python -m lib.analysis.answer` -->", "<!-- End of the answer -->"


def sentences(evidence: Evidence) -> list[str]:
    """What to pick at the short length, at the long one, for the cache, and how sure that is."""
    others, e = evidence.others, evidence
    keepers = [label for label in others if e.recalls(label)]
    said = []
    for context in dict.fromkeys((e.short, e.long)):
        free, kept = e.cheapest(context, TIME, others), e.cheapest(context, TIME, keepers)
        at = f"**At {context:,} tokens"
        why = e.untold(context, TIME)
        if why is not None:
            said.append(f"{at} nothing is told**: {why}.")
            continue
        if not free.labels:
            said.append(f"{at} keep SDPA**: nothing trains in significantly less time.")
            continue
        same = [label for label in free.labels if label in kept.labels]
        if same or not e.recall:
            pick = kept if same else free
            known = "" if e.recall else "; what it recalls is not known"
            said.append(f"{at} take {_names(e, pick)}**: beside SDPA, {_savings(e, pick, context)}{known}.")
            continue
        lost = joined([
            f"{_name(e, label)} recalls {_recalled(e, label)} of {PAIRS} facts" if label in e.recall
            else f"what {_name(e, label)} recalls was not tried" for label in free.labels
        ])  # fmt: skip
        then = (
            f"Where recall counts take {_names(e, kept)}: {_savings(e, kept, context)}"
            if kept.labels else "Where recall counts keep SDPA: nothing that recalls is significantly faster"
        )  # fmt: skip
        said.append(
            f"{at} take {_names(e, free)} if recall does not count**: beside SDPA, {_savings(e, free, context)}; "
            f"{lost}. {then}."
        )
    cache = e.smallest(e.cache, keepers if e.recall else others)
    if cache.labels:
        price = _price(e, cache.labels)
        said.append(
            f"**If the KV cache is what you pay for, {_names(e, cache)}**: "
            f"{joined(cache.ratios)} at {CACHE_CONTEXT:,} tokens"
            + (f", and recalls {RECALLS:.0%} or more" if e.recall else "; what it recalls is not known")
            + (f"; it costs {price}." if price != "–" else ".")
        )
    return said


def _names(evidence: Evidence, pick: Pick) -> str:
    return joined([_name(evidence, label) for label in pick.labels])


def _name(evidence: Evidence, label: str) -> str:
    return escaped(evidence.title[label])


def escaped(text: str) -> str:
    """As Markdown shows it, in a table's cell or a picture's alternative text too."""
    return re.sub(r"([\\`*\[\]<>|]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _savings(evidence: Evidence, pick: Pick, context: int) -> str:
    """Time of those picked, and joules where they were counted."""
    said = [f"training time {joined(pick.ratios)}"]
    joules = [evidence.ratio(label, context, ENERGY) for label in pick.labels]
    if all(row is not None for row in joules):
        said.append(f"joules {joined([_sure(row) for row in joules])}")
    elif evidence.turns[ENERGY].notna().any():
        said.append("joules not counted")
    return ", ".join(said)


def _sure(row) -> str:
    """A ratio, and why it has no interval where it has none."""
    return f"{cost(row)} ({row.verdict})" if row.low != row.low else cost(row)


def _recalled(evidence: Evidence, label: str) -> str:
    found = evidence.recall.get(label)
    if found is None:
        return "not tried"
    other = "" if found.title == evidence.entries[label].title else f" (tried as {escaped(found.title)})"
    return f"{max(0.0, found.median):.0%}{other}"


def _tried_as(evidence: Evidence) -> str:
    """Whose options were others in the small net."""
    others = [
        f"{_name(evidence, label)} as {escaped(found.title)}" for label, found in evidence.recall.items()
        if label in evidence.entries and found.title != evidence.entries[label].title
    ]  # fmt: skip
    return f" ({joined(others)})" if others else ""


def how_sure(evidence: Evidence) -> list[str]:
    """A line each: what the intervals rest on, the control, recall, and what is not shown."""
    e, said = evidence, []
    control = [
        f"{_sure(row)} at {context:,}" for context in e.lengths if (row := e.ratio(CONTROL, context, TIME)) is not None
    ]
    setting, rounds = e.found.setting, _counted(len(e.found.rounds), "round")
    said.append(
        f"Time{', joules' if e.turns[ENERGY].notna().any() else ''} and memory: {rounds} "
        f"of training steps in turns, {_counted(setting.layers, 'layer')} of {setting.width}, {setting.precision}, on "
        f"{e.machine}; paired ratios with 95 % intervals, Holm over the variants."
    )
    if control:
        said.append(f"Noise: SDPA against itself took {joined(control)} tokens.")
    if e.recall:
        n = min(one.n for one in e.recall.values())
        rates = "one rate" if e.rates == 1 else f"the best of {NUMBERS.get(e.rates, e.rates)} rates"
        said.append(
            f"Recall: {PAIRS} pairs in 128 tokens, a small net, {rates}, the median of {n} or more seeds{_tried_as(e)}."
        )
    gone = [_name(e, label) for label, count in e.cache.items() if count != count]
    said.append(
        f"Cache: each variant's own count, bf16, one sequence of {CACHE_CONTEXT:,} tokens"
        + (f"; not counted, for want of the file: {joined(gone)}." if gone else ".")
    )
    said.append(
        "Not shown: other sizes, other GPUs, longer contexts in training, and what becomes of a loss. The published "
        "study's own claims: [replication.ipynb](notebooks/replication.ipynb)."
    )
    uncertified = [_name(e, label) for label, entry in e.entries.items() if not entry.certified]
    certified = sum(entry.certified for entry in e.entries.values())
    said.append(
        f"{certified} of {len(e.entries)} passed their certificate before they were timed"
        + (f"; not picked: {joined(uncertified)}." if uncertified else ".")
    )
    return said


NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def limits(evidence: Evidence) -> pd.DataFrame:
    """The table "if you are limited by": a row per limit, without and with the wish to recall."""
    e, others = evidence, evidence.others
    keepers = [label for label in others if e.recalls(label)]
    rows = []

    def add(limit, pick_of, why=None):
        if why is not None:
            rows.append({"if you are limited by": limit, "pick": f"not told: {why}", "it saves": "–", "it costs": "–"})
            return
        for wish, among in (("", others), (", and recall counts", keepers)):
            if wish and not e.recall:
                continue
            pick = pick_of(among)
            if wish and rows[-1]["pick"] == _picked(e, pick):
                rows[-1]["if you are limited by"] += ", recall or not"
                continue
            rows.append({
                "if you are limited by": limit + wish,
                "pick": _picked(e, pick),
                "it saves": joined(pick.ratios) if pick.labels else "–",
                "it costs": _price(e, pick.labels),
            })  # fmt: skip

    for context in dict.fromkeys((e.short, e.long)):
        pick_of = partial(e.cheapest, context, TIME)
        add(f"time, {context:,} tokens", pick_of, e.untold(context, TIME))
    if e.turns[ENERGY].notna().any():
        for context in dict.fromkeys((e.short, e.long)):
            pick_of = partial(e.cheapest, context, ENERGY)
            add(f"joules, {context:,} tokens", pick_of, e.untold(context, ENERGY))
    memory = e.memory_at(e.long)
    if memory:
        add(f"memory in training, {e.long:,} tokens", lambda among: e.smallest(memory, among))
    add(f"KV cache, {CACHE_CONTEXT:,} tokens", lambda among: e.smallest(e.cache, among))
    return pd.DataFrame(rows)


def _picked(evidence: Evidence, pick: Pick) -> str:
    return joined([f"**{_name(evidence, label)}**" for label in pick.labels]) if pick.labels else "SDPA: nothing saves"


def _price(evidence: Evidence, labels: list[str]) -> str:
    """What else the picked cost: recall, time and joules where they take more, lengths at which they fail."""
    said = []
    for label in labels:
        own = []
        found = evidence.recall.get(label)
        if found is not None and found.median < RECALLS:
            own.append(f"recalls {_recalled(evidence, label)}")
        elif found is None and evidence.recall:
            own.append("recall not tried")
        for context in dict.fromkeys((evidence.short, evidence.long)):
            for metric, word in ((TIME, "time"), (ENERGY, "joules")):
                row = evidence.ratio(label, context, metric)
                if row is not None and row.ratio > 1 and row.verdict == "significantly different":
                    own.append(f"{word} {cost(row)} at {context:,}")
            why = evidence.found.failed.get(label, {}).get(context)
            if why is not None:
                own.append(f"no result at {context:,} ({escaped(why)})")
        said.append(", ".join(own))
    said = [one if len(labels) == 1 else f"{_name(evidence, label)}: {one}"
            for label, one in zip(labels, said, strict=True) if one]  # fmt: skip
    return "; ".join(said) or "–"


def markdown(evidence: Evidence) -> str:
    """What stands between the marks."""
    table = limits(evidence)
    head = f"| {' | '.join(table.columns)} |\n|{' --- |' * len(table.columns)}\n"
    body = "".join(f"| {' | '.join(map(str, row))} |\n" for row in table.itertuples(index=False))
    sure = "".join(f"- {line}\n" for line in how_sure(evidence))
    said = "\n".join(f"- {line}" for line in sentences(evidence))
    alt = escaped(" ".join(headline(evidence)))
    return f"{BEGIN}\n\n{said}\n\n![{alt}](figures/answer.png)\n\n{head}{body}\nHow sure is that:\n\n{sure}\n{END}"


def put(page: str, text: str) -> str:
    """`page` with `text` between its marks. Raises UsageError where it has not just one of each, in order."""
    if BEGIN not in page or END not in page:
        raise UsageError(f"the page has no place for the answer; it goes between {BEGIN!r} and {END!r}")
    if page.count(BEGIN) > 1 or page.count(END) > 1 or page.index(END) < page.index(BEGIN):
        raise UsageError(f"the page must have {BEGIN!r} once, and behind it {END!r} once")
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: text, page, count=1, flags=re.DOTALL)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.analysis.answer", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=Path, default=paths.ROOT / STEPS, help="the record of `lib.study.steps`")
    parser.add_argument("--cells", type=Path, default=paths.ROOT / CELLS, help="the folder of `lib.study.probes`")
    parser.add_argument("--page", type=Path, default=paths.ROOT / "README.md", help="where the answer is written")
    parser.add_argument("--figures", type=Path, default=paths.ROOT / "figures", help="where the picture is written")
    options = parser.parse_args(words)
    try:
        evidence = records.read(options.steps, options.cells)
        page = put(options.page.read_text(encoding="utf-8"), markdown(evidence))
        style.save(picture(evidence), options.figures, "answer")
        paths.write_whole(options.page, page)
    except (UsageError, OSError) as error:
        print(f"python -m lib.analysis.answer: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
