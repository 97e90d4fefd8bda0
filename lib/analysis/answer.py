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
from lib.analysis import compare, style
from lib.analysis import evidence as records
from lib.analysis import steps as tables
from lib.analysis.answer_figure import headline, picture
from lib.analysis.evidence import CACHE_CONTEXT, ENERGY, PAIRS, RECALLS, TIME, WORDS, Evidence, Pick, Recall
from lib.analysis.words import cost, counted, joined
from lib.attention import CONTROL, REFERENCE
from lib.errors import UsageError

STEPS = "records/steps-gpu"
CELLS = "records/capability-cpu"
LAUNCH_BOUND = 0.95  # share of a step that the GPU computes, below which its time is partly Python's
WAITING = 0.8  # the same, below which a variant is named for it
LITTLE = 0.96  # of SDPA's cost: what is above saves less than twice what counts as equivalent
BEGIN, END = "<!-- The answer: written by `python -m lib.analysis.answer` -->", "<!-- End of the answer -->"


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
            said.append(f"{at} nothing is told**: {why}.")
            continue
        if not free.labels:
            said.append(f"{at} keep SDPA**: nothing trains in significantly less time.")
            continue
        same = [label for label in free.labels if label in kept.labels]
        if same or not e.recall:
            pick = kept if same else free
            little = all(e.ratio(label, context, TIME).ratio > LITTLE for label in pick.labels)
            at += " little is to be gained over SDPA:" if little else " take"
            known = "" if e.recall else "; what it recalls is not known"
            joules = _in_joules(e, context, keepers if e.recall else others, pick)
            said.append(f"{at} {_names(e, pick)}**, {_savings(e, pick, context)}{known}{joules}.")
            continue
        lost = joined([_lost(e, label) for label in free.labels])
        first = (
            f"take {_names(e, kept)} if recall counts**: {_savings(e, kept, context)}"
            if kept.labels else "keep SDPA if recall counts**: nothing that recalls is significantly faster"
        ) + _in_joules(e, context, keepers, kept)  # fmt: skip
        said.append(f"{at} {first}. **If it does not, {_names(e, free)}**: {_savings(e, free, context)}; {lost}.")
    cache = e.smallest_cache(keepers if e.recall else others)
    if cache.labels:
        said.append(
            f"**If the KV cache is what you pay for, {_names(e, cache)}**: "
            f"{joined(cache.ratios)} at {CACHE_CONTEXT:,} tokens"
            + (f", and recalls {RECALLS:.0%} or more" if e.recall else "; what it recalls is not known")
            + _without_a_price(e, cache, keepers if e.recall else others)
            + "."
        )
    return said


def _in_joules(evidence: Evidence, context: int, among: list[str], by_time: Pick) -> str:
    """Who of them takes the fewest joules, where that is another than by time."""
    pick = evidence.cheapest(context, ENERGY, among)
    if not pick.labels or set(pick.labels) & set(by_time.labels):
        return ""
    times = [row for label in pick.labels if (row := evidence.ratio(label, context, TIME)) is not None]
    untold = [row for row in times if row.verdict != "significantly different"]
    unsure = f" (time {joined([cost(row) for row in untold])}: not told apart)" if untold else ""
    return f"; for the fewest joules take {_names(evidence, pick)}: {joined(pick.ratios)}{unsure}"


def _without_a_price(evidence: Evidence, cache: Pick, among: list[str]) -> str:
    """The smallest cache of those whose steps take no more time than SDPA's, where the smallest of all costs time."""
    e = evidence
    own = [said for label in cache.labels if (said := e.rises(label, TIME))]
    if not own:
        return ""
    free = e.smallest(e.cache, [label for label in among if e.is_no_slower(label)])
    then = f"; at no more time {_names(e, free)}: {joined(free.ratios)}" if free.labels else ""
    return f", but {joined(own)}{then}"


def _names(evidence: Evidence, pick: Pick) -> str:
    return joined([_name(evidence, label) for label in pick.labels])


def _name(evidence: Evidence, label: str) -> str:
    return escaped(evidence.title[label])


def escaped(text: str) -> str:
    """As Markdown shows it, in a table's cell or a picture's alternative text too."""
    return re.sub(r"([\\`*\[\]<>|]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def plain(text: str) -> str:
    """A sentence of `sentences` or `how_sure` for a page that is no Markdown."""
    text = re.sub(r"(?<!\\)\[([^\]]*)\]\([^)]*\)", r"\1", text.replace("**", ""))
    return re.sub(r"\\([\\`*\[\]<>|_])", r"\1", text)


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


def _lost(evidence: Evidence, label: str) -> str:
    """What is recalled by one that recalls little, and who was tried for it."""
    found, name = evidence.recall.get(label), _name(evidence, label)
    if found is None:
        return f"what {name} recalls is not known"
    other = found.title != evidence.entries[label].title
    who = f"{escaped(found.title)}, tried in its place," if other else name
    return f"{who} recalls {_share(found)} of {PAIRS} facts after {found.steps:,} steps of training"


def _share(found: Recall) -> str:
    """The median seed's share, with the lowest and the highest where they differ."""
    low, high = max(0.0, found.low), max(0.0, found.high)
    seeds = "" if f"{low:.0%}" == f"{high:.0%}" else f" [{low:.0%}, {high:.0%}]"
    return f"{max(0.0, found.median):.0%}{seeds}"


def _tried_as(evidence: Evidence) -> str:
    """Whose options were others in the small net, and what each kept there."""
    parts = []
    for label, found in evidence.recall.items():
        if label in evidence.entries:
            other = "" if found.title == evidence.entries[label].title else f" as {escaped(found.title)}"
            if other or abs(found.state_share - 1) > 0.01:
                parts.append(f"{_name(evidence, label)}{other} {found.state_share:.0%}")
    return f" Kept there, of SDPA's memory: {', '.join(parts)}." if parts else ""


def _busy(evidence: Evidence) -> list[str]:
    """Where the GPU waited for Python: a little in all, and most of the time in some."""
    said, waiting = [], {}
    for context in evidence.lengths:
        shares = {
            label: share for (at, label), record in evidence.source.items()
            if at == context and (share := record.busy.get(label, {}).get(context)) is not None
        }  # fmt: skip
        for label in [label for label, share in shares.items() if share < WAITING]:
            waiting.setdefault(label, []).append(f"{shares.pop(label):.0%} at {context:,}")
        if shares and min(shares.values()) < LAUNCH_BOUND:
            said.append(f"{min(shares.values()):.0%} to {max(shares.values()):.0%} of a step at {context:,} tokens")
    lines = []
    if said:
        lines.append(
            f"The GPU computed {joined(said)}; the rest is Python's, and a few percent of difference may go with it."
        )
    if waiting:
        names = joined([f"{_name(evidence, label)} ({', '.join(shares)} tokens)" for label, shares in waiting.items()])
        lines.append(
            f"It computed less of a step in {names}, by one profile of three steps each, and waited the rest of it."
        )
    return lines


def how_sure(evidence: Evidence) -> list[str]:
    """A line each: what the intervals rest on, the control, recall, and what is not shown."""
    e, said = evidence, []
    setting, found = e.found.setting, e.found
    control = _control(e, found)
    sizes = joined([f"{batch} x {context:,}" for context, batch in e.batches.items()]) + " tokens"
    version = found.environment.get("packages", {}).get("torch")
    torch = f", torch {version}" if version else ""
    said.append(
        f"Time{', joules' if e.turns[ENERGY].notna().any() else ''} and memory: training steps of GPT-2, "
        f"{counted(setting.layers, 'layer')} of {setting.width}, {sizes}, {setting.precision}{torch}, "
        f"{'' if setting.compile else 'not '}compiled; {counted(len(found.rounds), 'round')} in turns within "
        f"{_minutes(found)} on one {escaped(e.machine)}. Paired ratios with 95 % intervals; verdicts are corrected "
        f"for the number of variants{' of a session' if len(e.all) > 1 else ''}."
    )
    if control:
        said.append(f"Noise: SDPA against itself took {control}.")
    said += [_beside(e, record) for record in e.all[1:]]
    said += _throttled(e)
    said += _of_what_code(e)
    said += [
        f"No result: {_name(e, label)} at {context:,} tokens ({escaped(why)})."
        for label, lengths in e.failed.items() for context, why in lengths.items()
    ]  # fmt: skip
    said += _busy(e)
    if e.recall:
        shown = {label: one for label, one in e.recall.items() if label in e.entries}
        n = min(one.n for one in (shown or e.recall).values())
        deep = [_name(e, label) for label, one in shown.items() if one.layers > 1]
        steps = joined([f"{count:,}" for count in sorted({one.steps for one in (shown or e.recall).values()})])
        depths = "one layer" + (f" (two for {joined(deep)})" if deep else "")
        rates = "one rate" if e.rates == 1 else f"the best of {NUMBERS.get(e.rates, e.rates)} rates"
        said.append(
            f"Recall: {PAIRS} pairs in 128 tokens, {depths} behind a short convolution, {steps} steps at {rates}, "
            f"the median of {n} or more seeds, on a CPU; who is slower to learn it counts as one that does not."
            f"{_tried_as(e)}"
        )
    gone = [_name(e, label) for label, count in e.cache.items() if count != count]
    said.append(
        f"Cache: computed from each variant's formula, bf16, one sequence of {CACHE_CONTEXT:,} tokens; not run"
        + (f"; none for what is no variant of the study: {joined(gone)}." if gone else ".")
    )
    said.append(
        f"Not shown: other sizes, GPUs and days, training beyond {e.long:,} tokens, and the quality of what was "
        "trained. The published study's own claims: [replication.ipynb](notebooks/replication.ipynb)."
    )
    entries = [entry for entry in e.entries.values() if entry.label != CONTROL]
    uncertified = [_name(e, entry.label) for entry in entries if not e.certified(entry.label, entry.label)]
    at = found.examined
    deep = (
        ", a longer pattern with all of its own,"
        if at and any(entry.attention.count(",") >= at["layers"] for entry in entries)
        else ""
    )
    how = f", examined with {at['layers']} layers{deep} at up to {at['positions']:,} tokens" if at else ""
    said.append(
        f"{len(entries) - len(uncertified)} of {len(entries)} variants passed their certificate before they were timed"
        f"{how}" + (f"; not picked: {joined(uncertified)}." if uncertified else ".")
    )
    return said


def _beside(evidence: Evidence, record) -> str:
    """What is of another session than the first line's."""
    e = evidence
    new, own = e.own(record)
    own = [label for label in own if label not in (REFERENCE, CONTROL)]
    if not own:
        return "Another session's record has nobody who is not in these, and is left out."
    lengths = [size.context for size in record.setting.sizes]
    names = (
        f"all at {joined([f'{at:,}' for at in new])} tokens"
        if new == lengths
        else (
            joined([_name(e, label) for label in own])
            + (f", and all at {joined([f'{at:,}' for at in new])} tokens" if new else "")
        )
    )
    order = "balanced" if compare.balanced(tables.runs(record, min(lengths))) else "not balanced"
    control, joules = _control(e, record), _control(e, record, ENERGY)
    noise = f"; SDPA against itself took {control} there" if control else "; without an A/A control"
    noise += f", and joules {joules}" if joules else ""
    gpus = [(one.environment["gpu"] or {}).get("uuid") for one in (e.found, record)]
    elsewhere = " on another GPU of that kind" if gpus[0] != gpus[1] else ""
    return (
        f"Of another session{elsewhere}, with an SDPA of its own beside them: {names}; "
        f"{counted(len(record.rounds), 'round')} in "
        f"turns within {_minutes(record)}, their order {order}{noise}."
    )


def _control(evidence: Evidence, record, metric: str = TIME) -> str:
    """What SDPA took beside itself in a record; empty where it was not there a second time."""
    rows = [(size.context, evidence.control(record, size.context, metric)) for size in record.setting.sizes]
    said = [f"{_sure(row)} at {at:,}" for at, row in rows if row is not None]
    return f"{joined(said)} tokens" if said else ""


def _throttled(evidence: Evidence) -> list[str]:
    """In how many windows the GPU's clock was held down, and by what."""
    held, said = evidence.turns["throttled_share"] > 0, []
    for context, own in held.groupby(evidence.turns["context"]):
        if own.any():
            said.append(f"{own.sum()} of {len(own)} windows at {context:,}")
    if not said:
        return []
    reasons = {
        reason for one in evidence.all for done in one.rounds for turn in done.turns if turn.gpu
        for reason in turn.gpu.throttled_by
    }  # fmt: skip
    by = f" ({', '.join(sorted(reasons))})" if reasons else ""
    return [
        f"The GPU lowered its clock by itself{escaped(by)} in {joined(said)} tokens; those windows count as the others."
    ]


def _of_what_code(evidence: Evidence) -> list[str]:
    """Where records are of different commits, or of changes that were never committed."""
    states = []
    for record in evidence.all:
        facts = record.environment
        commit = (facts.get("commit") or "an unknown commit")[:7]
        states.append(f"{commit}{' with changes beyond it' if facts.get('commit_modified') else ''}")
    if len(set(states)) == 1 and "changes" not in states[0]:
        return []
    return [f"Code: {joined(states)}; the certificates are of the same code."]


def briefly_sure(evidence: Evidence) -> str:
    """What the answer rests on in a sentence, above `how_sure`."""
    e = evidence
    first, *others = [said for record in e.all if (said := _control(e, record))] or [""]
    there = f", in the other session{'s' if len(others) > 1 else ''} {' and '.join(others)}" if others else ""
    noise = f"; SDPA beside itself took {first}{there}" if first else "; without an A/A control"
    entries = [entry for entry in e.entries.values() if entry.label != CONTROL]
    passed = sum(e.certified(entry.label, entry.label) for entry in entries)
    return (
        f"How sure is that: {e.rounds} in turns on {escaped(e.machines)}, paired "
        f"ratios with 95 % intervals{noise}; {passed} of {len(entries)} variants certified. All of it"
    )


def _minutes(found) -> str:
    """From the first round's begin to the record's end."""
    if not found.rounds:
        return "no time"
    minutes = max(1, round((found.finished_at - found.rounds[0].begun_at).total_seconds() / 60))
    return "a minute" if minutes == 1 else f"{minutes} minutes"


NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}


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

    for context in e.lengths:
        for metric in (TIME, ENERGY):
            if e.turns[metric].notna().any():
                add(
                    f"{WORDS[metric]}, {context:,} tokens",
                    partial(e.cheapest, context, metric),
                    e.untold(context, metric),
                )
    memory = e.memory_at(e.long)
    if memory:
        add(f"memory in training, {e.long:,} tokens", lambda among: e.smallest(memory, among))
    add(f"KV cache, {CACHE_CONTEXT:,} tokens", e.smallest_cache)
    return pd.DataFrame(rows)


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
    return joined([f"**{_name(evidence, label)}**" for label in pick.labels]) if pick.labels else "SDPA: nothing saves"


def _price(evidence: Evidence, labels: list[str]) -> str:
    """What else the picked cost: recall, time and joules where they take more, lengths at which they fail."""
    said = []
    for label in labels:
        own = []
        found = evidence.recall.get(label)
        if found is not None and not evidence.recalls(label):
            other = found.title != evidence.entries[label].title
            who = f" (tried as {escaped(found.title)})" if other else ""
            own.append(f"recalls {_share(found)}{who}")
        elif found is not None and found.title != evidence.entries[label].title:
            own.append(f"recall tried as {escaped(found.title)}")
        elif found is None and evidence.recall:
            own.append("recall not known")
        own += filter(None, (evidence.rises(label, metric) for metric in (TIME, ENERGY)))
        for context in evidence.lengths:
            why = evidence.failed.get(label, {}).get(context)
            if why is not None:
                own.append(f"no result at {context:,} ({escaped(why)})")
        if evidence.weights(label):
            own.append(evidence.weights(label))
        said.append(", ".join(own))
    said = [one if len(labels) == 1 else f"{_name(evidence, label)}: {one}"
            for label, one in zip(labels, said, strict=True) if one]  # fmt: skip
    return "; ".join(said) or "–"


def markdown(evidence: Evidence) -> str:
    """What stands between the marks."""
    table = in_short(limits(evidence))
    head = f"| {' | '.join(table.columns)} |\n|{' --- |' * len(table.columns)}\n"
    body = "".join(f"| {' | '.join(map(str, row))} |\n" for row in table.itertuples(index=False))
    sure = "".join(f"- {line}\n" for line in how_sure(evidence))
    sure = f"<details><summary>{briefly_sure(evidence)}</summary>\n\n{sure}\n</details>"
    said = "\n".join(f"- {line}" for line in sentences(evidence))
    alt = escaped(" ".join(headline(evidence)))
    recall = f"*Recall is of {PAIRS} facts in 128 tokens by nets of one or two layers, not of the models timed.*\n\n"
    recall = recall if evidence.recall else ""
    return f"{BEGIN}\n\n{said}\n\n![{alt}](figures/answer.png)\n\n{head}{body}\n{recall}{sure}\n\n{END}"


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
