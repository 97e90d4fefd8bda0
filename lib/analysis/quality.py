"""What runs say of quality, in two sentences: validation losses beside the reference's, paired, in nats."""

import pandas as pd

from lib import attention
from lib.analysis import compare, ngrams
from lib.analysis.notes import NO_CONTROL, noise_in_words
from lib.analysis.style import labels, titles

DIFFERENT = "significantly different"


def sentences(runs: pd.DataFrame) -> list[str]:
    """Two sentences, of one group's `runs`: who learned more or less than the reference, each with its difference,
    95 % interval, Holm-adjusted p and n; and what that rests on: noise, and the n-gram table.

    Below five whole blocks the first says so instead. What fails its certificate and the control are not named.
    """
    called = titles(runs)
    reference = called.get(attention.REFERENCE)
    found = compare.differences(runs).set_index("label")
    certified = runs.groupby("label")["certified"].all()
    names = [x for x in labels(runs) if certified[x] and x not in (attention.REFERENCE, attention.CONTROL)]
    found = found.reindex(names)
    if reference is None:
        return ["Losses are not compared: there is no run of SDPA among these."]
    if found["p"].isna().all():
        whole = len(compare.whole_blocks(runs).groupby(compare.BLOCK))
        why = f"a verdict needs {compare.FEWEST_BLOCKS} whole blocks, and there are {whole}"
        if whole >= compare.FEWEST_BLOCKS:
            why = "no other variant with so many blocks passes its certificate"
        first = f"Whose validation loss differs from {reference}'s is not told: {why}."
    else:
        first = f"Validation loss beside {reference}'s, paired: {'; '.join(_by_verdict(found, called))}."
    noise = compare.noise(runs, "validation_loss")
    control = NO_CONTROL if noise is None else f"A/A control: {noise_in_words(noise, 'validation_loss')}."
    return [first, f"{control} {ngrams.sentence(runs)}".strip()]


def _by_verdict(found: pd.DataFrame, called: dict[str, str]) -> list[str]:
    lower = found[(found["verdict"] == DIFFERENT) & (found["difference"] < 0)].sort_values("difference", kind="stable")
    higher = found[(found["verdict"] == DIFFERENT) & (found["difference"] > 0)].sort_values("difference", kind="stable")
    parts = {"significantly lower": lower, "significantly higher": higher}
    rest = found[found["verdict"].ne(DIFFERENT) & found["verdict"].notna()]
    parts |= {verdict: own for verdict, own in rest.groupby("verdict", sort=False)}
    return [
        f"{verdict}: {', '.join(_one(called[x], own.loc[x]) for x in own.index)}"
        for verdict, own in parts.items()
        if len(own)
    ]


def _one(name: str, found: pd.Series) -> str:
    if pd.isna(found["difference"]):
        return name
    if pd.isna(found["low"]):
        return f"{name} {found['difference']:+.3f} nats"
    p = "" if pd.isna(found["p"]) or found["verdict"].startswith("equivalent") else f", p {_p(found['p'])}"
    return (
        f"{name} {found['difference']:+.3f} nats [{found['low']:+.3f}, {found['high']:+.3f}]{p}, n = {found['n']:.0f}"
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.2g}"
