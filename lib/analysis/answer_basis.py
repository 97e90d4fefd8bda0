"""What the README's answer rests on, in words: sessions and their noise, code, recall, and what is not shown."""

import re

import pandas as pd

from lib import attention
from lib.analysis import compare, text_loss
from lib.analysis import steps as tables
from lib.analysis.evidence import CACHE_CONTEXT, ENERGY, NEXT_TO_NOTHING, PAIRS, SMALLER, TIME, Evidence, uuid_of
from lib.analysis.words import cost, counted, joined
from lib.attention import CONTROL, REFERENCE
from lib.record import steps

LAUNCH_BOUND = 0.95  # share of a step that the GPU computes, below which its time is partly Python's
WAITING = 0.8  # the same, below which a variant is named for it
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}


def how_sure(evidence: Evidence) -> list[str]:
    """A line each: what the intervals rest on, the control, recall, and what is not shown."""
    e, said = evidence, []
    setting, found = e.found.setting, e.found
    sizes = joined([f"{batch} x {context:,}" for context, batch in e.batches.items()]) + " tokens"
    version = found.environment.get("packages", {}).get("torch")
    torch = f", torch {version}" if version else ""
    said.append(
        f"Time{', joules' if e.turns[ENERGY].notna().any() else ''} and memory: training steps of GPT-2, "
        f"{counted(setting.layers, 'layer')} of {setting.width}, {sizes}, {setting.precision}{torch}, "
        f"{'' if setting.compile else 'not '}compiled, on {escaped(e.machines)}. In a round each variant has a window "
        f"of whole steps at each length, planned to take {setting.window_s:g} s; ratios are paired by round, with 95 % "
        f"t intervals of their logarithms; verdicts are corrected for the number of variants of a session."
    )
    said += [_session(e, record, number) for number, record in enumerate(e.all, start=1)]
    said += _reference(e)
    said += _throttled(e)
    said += _of_what_code(e)
    said += [
        f"No result: {name_of(e, label)} at {context:,} tokens ({escaped(why)})."
        for label, lengths in e.failed.items() for context, why in lengths.items()
    ]  # fmt: skip
    said += _not_timed(e)
    said += _busy(e)
    if e.recall:
        shown = {label: one for label, one in e.recall.items() if label in e.entries}
        n = min(one.n for one in (shown or e.recall).values())
        deep: dict[int, list[str]] = {}
        for label, one in shown.items():
            deep.setdefault(one.layers, []).append(name_of(e, label))
        more = [f"{NUMBERS.get(count, count)} for {joined(deep[count])}" for count in sorted(deep) if count > 1]
        depths = "one layer" + (f" ({', '.join(more)})" if more else "")
        rates = "one rate" if e.rates == 1 else f"the best of {NUMBERS.get(e.rates, e.rates)} rates"
        said.append(
            f"Recall: {PAIRS} pairs in 128 tokens, {depths} behind a short convolution, "
            f"{escaped(e.trained)}, at {rates}, the median of {n} or more seeds, on a CPU; who is slower to learn it "
            f"counts as one that does not.{_tried_as(e)}{_recalls_untimed(e)}"
        )
    told = e.text is not None and text_loss.is_told(e.text)
    if e.text is not None:
        said.append(f"Loss of text: {escaped(' '.join(text_loss.sentences(e.text)))}")
    gone = [name_of(e, label) for label, count in e.cache.items() if count != count]
    said.append(
        f"Cache: computed from each variant's formula, bf16, one sequence of {CACHE_CONTEXT:,} tokens; not run. "
        f"Of caches below {NEXT_TO_NOTHING:.0%} of SDPA's the pick is who trains fastest at {e.long:,} tokens"
        + (f"; none for what is no variant of the study: {joined(gone)}." if gone else ".")
    )
    said.append(
        f"Not shown: other sizes, GPUs and days, training beyond {e.long:,} tokens, decoding on {escaped(e.machine)}, "
        f"and what {'the models timed learn' if told else 'is learnt'}. The published study's own claims: "
        "[replication.ipynb](notebooks/replication.ipynb)."
    )
    entries = [entry for entry in e.entries.values() if entry.label != CONTROL]
    uncertified = [name_of(e, entry.label) for entry in entries if not e.certified(entry.label, entry.label)]
    barred = [label for label in e.labels if e.certified(label, label) and not e.certified(label)]
    if barred and REFERENCE not in barred:
        names = joined([name_of(e, label) for label in barred])
        said.append(f"Not picked, since SDPA failed its certificate in their session: {names}.")
    at = found.examined if all(type(found.examined.get(name)) is int for name in ("layers", "positions")) else {}
    deep = (
        ", a longer pattern with all of its own,"
        if at and any(len(entry.attention.split(",")) > at["layers"] for entry in entries)
        else ""
    )
    how = f", examined with {at['layers']} layers{deep} at up to {at['positions']:,} tokens" if at else ""
    said.append(
        f"{len(entries) - len(uncertified)} of {len(entries)} variants passed their certificate before they were timed"
        f"{how}" + (f"; not picked: {joined(uncertified)}." if uncertified else ".")
    )
    return said


def _session(evidence: Evidence, record, number: int) -> str:
    """Who is of a session, at which lengths, in how many rounds, and its noise."""
    e, name = evidence, f"Session {number}"
    own = e.own(record, e.lengths)
    if not own:
        return f"{name}: nobody who is not in those before, and left out."
    lengths = [at for at in e.lengths if e.own(record, [at])]
    order = "balanced" if compare.balanced(tables.runs(record, lengths[0])) else "not balanced"
    control, joules = _control(e, record), _control(e, record, ENERGY)
    noise = f"SDPA beside itself took {control}" if control else "without an A/A control"
    noise += f", and joules {joules}" if joules else ""
    elsewhere = ", on another GPU of that kind" if uuid_of(e.found) != uuid_of(record) else ""
    return (
        f"{name}{elsewhere}, {joined([f'{at:,}' for at in lengths])} tokens: SDPA; "
        f"{'; '.join(name_of(e, label) for label in own)}. {counted(len(record.rounds), 'round')} in turns within "
        f"{_minutes(record)}, their order {order}; {noise}."
    )


def _control(evidence: Evidence, record, metric: str = TIME) -> str:
    """What SDPA took beside itself in a record; empty where it was not there a second time."""
    rows = [(size.context, evidence.control(record, size.context, metric)) for size in record.setting.sizes]
    said = [f"{sure(row)} at {at:,}" for at, row in rows if row is not None]
    return f"{joined(said)} tokens" if said else ""


def sure(row) -> str:
    """A ratio, and why it has no interval where it has none."""
    return f"{cost(row)} ({row.verdict})" if row.low != row.low else cost(row)


def _reference(evidence: Evidence) -> list[str]:
    """What a step of SDPA takes, for who wants numbers that are no ratios."""
    said = []
    for context, batch in evidence.batches.items():
        turns = tables.runs(evidence.at(context)[0], context)
        own = turns[turns["label"] == REFERENCE]
        if len(own):
            joules = own[ENERGY].median()
            said.append(
                f"{1e3 * own[TIME].median():.3g} ms{'' if joules != joules else f' and {joules:.3g} J'} "
                f"for {batch} x {context:,}"
            )
    return [f"A step of SDPA, in the median: {'; '.join(said)} tokens."] if said else []


def _throttled(evidence: Evidence) -> list[str]:
    """In how many measurements the GPU's clock was held down, whose, and by what."""
    turns, said = pd.concat([steps.frame(one) for one in evidence.all]), []
    for context, own in turns.groupby("context"):
        held = (own["throttled_share"] > 0).groupby(own["label"], sort=False).agg(["sum", "count"])
        of_all = [name_of(evidence, label) for label, row in held.iterrows() if row["sum"] == row["count"]]
        of_some = [
            f"{row['sum']} of {row['count']} of {name_of(evidence, label)}"
            for label, row in held.iterrows() if 0 < row["sum"] < row["count"]
        ]  # fmt: skip
        whose = ([f"all of {joined(of_all)}"] if of_all else []) + of_some
        if whose:
            said.append(f"at {context:,} tokens in {'; '.join(whose)}")
    if not said:
        return []
    reasons = {
        reason for one in evidence.all for done in one.rounds for turn in done.turns if turn.gpu
        for reason in turn.gpu.throttled_by
    }  # fmt: skip
    by = f" ({', '.join(sorted(reasons))})" if reasons else ""
    return [
        f"Measurements in which the GPU lowered its clock by itself{escaped(by)}: {'; '.join(said)}. They count as the "
        "others, and a ratio of one with to one without has the clock's share in it."
    ]


def _of_what_code(evidence: Evidence) -> list[str]:
    """Where records are of different commits, or of changes that were never committed."""
    states = []
    for record in evidence.all:
        facts = record.environment
        commit = (facts.get("commit") or "an unknown commit")[:7]
        states.append(f"{commit}{' with changes beyond it' if facts.get('commit_modified') else ''}")
    files: dict[str, set] = {}
    for record in evidence.all:
        for entry in record.entries:
            files.setdefault(entry.label, set()).add(entry.attention_sha256)
    other = [name_of(evidence, label) for label, texts in files.items() if len(texts) > 1 and label != CONTROL]
    lines = [] if len(set(states)) == 1 and "changes" not in states[0] else [f"Code, by session: {joined(states)}."]
    return lines + ([f"Files that changed between sessions: of {joined(other)}."] if other else [])


def _not_timed(evidence: Evidence) -> list[str]:
    """Who was in no session, and who was not in that of a length."""
    run = {part for record in evidence.all for entry in record.entries for part in attention.parts(entry.attention)}
    never = [name for name in attention.variants() if name not in run]
    said = [f"In none of these sessions: {joined([escaped(name) for name in never])}."] if never else []
    for context in evidence.lengths:
        absent = [label for label in evidence.labels if (context, label) not in evidence.source]
        if absent:
            said.append(f"Not run at {context:,} tokens: {joined([name_of(evidence, label) for label in absent])}.")
        few = [
            f"{name_of(evidence, label)} ({row.verdict})" for label in evidence.others
            if (row := evidence.ratio(label, context, TIME)) is not None and row.low != row.low
        ]  # fmt: skip
        if few:
            said.append(f"Without a verdict at {context:,} tokens: {joined(few)}.")
    return said


def _busy(evidence: Evidence) -> list[str]:
    """Where the GPU waited for Python: a little in all, and most of the time in some."""
    said, waiting, unknown = [], {}, []
    for context in evidence.lengths:
        shares = {
            label: share for (at, label), record in evidence.source.items()
            if at == context and (share := record.busy.get(label, {}).get(context)) is not None
        }  # fmt: skip
        unknown += [] if shares else [f"{context:,}"]
        for label in [label for label, share in shares.items() if share < WAITING]:
            waiting.setdefault(label, []).append(f"{shares.pop(label):.0%} at {context:,}")
        if shares and min(shares.values()) < LAUNCH_BOUND:
            said.append(f"{min(shares.values()):.0%} to {max(shares.values()):.0%} of a step at {context:,} tokens")
    lines = []
    if unknown and len(unknown) < len(evidence.lengths):
        lines.append(f"How long the GPU waited is not known at {joined(unknown)} tokens: not profiled there.")
    if said:
        lines.append(
            f"The GPU computed {joined(said)}; the rest is Python's, and a few percent of difference may go with it."
        )
    if waiting:
        names = joined(
            [f"{name_of(evidence, label)} ({', '.join(shares)} tokens)" for label, shares in waiting.items()]
        )
        lines.append(
            f"It computed less of a step in {names}, by one profile of three steps each, and waited the rest of it."
        )
    return lines


def _tried_as(evidence: Evidence) -> str:
    """Whose options were others in the small net, and what each kept there."""
    parts = []
    for label, found in evidence.recall.items():
        if label in evidence.entries:
            other = "" if found.title == evidence.entries[label].title else f" as {escaped(found.title)}"
            if other or abs(found.state_share - 1) > 0.01:
                parts.append(f"{name_of(evidence, label)}{other} {found.state_share:.0%}")
    return f" Kept there, of SDPA's memory in as many layers at 128 tokens: {', '.join(parts)}." if parts else ""


def _recalls_untimed(evidence: Evidence) -> str:
    """Who recalls with less memory than SDPA, and was in no session."""
    parts = [
        f"{escaped(found.title)} {found.state_share:.0%}"
        for label, found in sorted(evidence.recall.items(), key=lambda item: item[1].state_share)
        if label not in evidence.entries and evidence.recalls(label) and found.state_share < SMALLER
    ]
    return f" Not timed, and recalling all from every seed too: {', '.join(parts)}." if parts else ""


def briefly_sure(evidence: Evidence) -> str:
    """What the answer rests on in a sentence, above `how_sure`."""
    e = evidence
    controls = [
        row for record in e.all for at in e.lengths
        if e.own(record, [at]) and (row := e.control(record, at, TIME)) is not None
    ]  # fmt: skip
    off = [max(row.ratio, 1 / row.ratio) - 1 for row in controls]
    by = " by session and length" if len(off) > 1 else ""
    noise = f"SDPA beside itself differs by {_range(off)}{by}" if off else "without an A/A control"
    entries = [entry for entry in e.entries.values() if entry.label != CONTROL]
    passed = sum(e.certified(entry.label, entry.label) for entry in entries)
    return (
        f"How sure is that: {e.rounds} in turns on {escaped(e.machines)}, paired ratios with 95 % intervals; "
        f"{noise}; {passed} of {len(entries)} variants certified"
    )


def _range(shares: list[float]) -> str:
    low, high = f"{100 * min(shares):.1f}", f"{100 * max(shares):.1f}"
    return f"{low} %" if low == high else f"{low} to {high} %"


def _minutes(found) -> str:
    """From the first round's begin to the record's end."""
    if not found.rounds:
        return "no time"
    minutes = max(1, round((found.finished_at - found.rounds[0].begun_at).total_seconds() / 60))
    return "a minute" if minutes == 1 else f"{minutes} minutes"


def name_of(evidence: Evidence, label: str) -> str:
    return escaped(evidence.title[label])


def escaped(text: str) -> str:
    """As Markdown shows it, in a table's cell or a picture's alternative text too."""
    return re.sub(r"([\\`*\[\]<>|]|(?<!\w)_|_(?!\w))", r"\\\1", text)
