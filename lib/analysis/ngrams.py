"""The losses of the unigram and bigram tables beside those of the models; see `lib.data.ngrams`.

They stand in a record's data facts. For records from before that, records/ngram_losses.csv holds them by setting, seed
and data fingerprint, made by scripts/ngram_losses.py.
"""

from functools import cache

import pandas as pd

from lib.analysis.style import labels, titles
from lib.paths import ROOT

COUNTED_LATER = ROOT / "records" / "ngram_losses.csv"
TABLES = ("bigram", "unigram")


@cache
def _counted_later() -> dict:
    if not COUNTED_LATER.is_file():  # installed without the project's records, which alone it is about
        return {}
    found = pd.read_csv(COUNTED_LATER, dtype={"setting": str}).set_index(["setting", "seed", "token_sha256"])
    return {key: row.dropna().to_dict() for key, row in found.iterrows()}


def of_runs(runs: pd.DataFrame, kind: str = "loss") -> pd.DataFrame:
    """What the `bigram` and the `unigram` table of each run's training tokens lose; NaN where nobody has counted.

    `kind`: "loss" of all validation tokens, "repeated_bigram_loss" of those that a model can recall, "other_loss".
    """
    rows = []
    known = runs["data"] if "data" in runs else [None] * len(runs)
    for setting, seed, data in zip(runs["setting"], runs["seed"], known, strict=True):
        data = data or {}
        data = _counted_later().get((setting, seed, data.get("token_sha256")), {}) | data
        rows.append([data.get(f"{table}_{kind}") for table in TABLES])
    return pd.DataFrame(rows, columns=TABLES, index=runs.index, dtype=float)


def tables(runs: pd.DataFrame, kind: str = "loss") -> dict[str, float]:
    """The means over the runs, by table. None of them where some run has none: they would be of other tokens."""
    found = of_runs(runs, kind)
    return {} if found.empty or found.isna().any(axis=None) else found.mean().to_dict()


def above_bigram(runs: pd.DataFrame) -> pd.Series:
    """By label, by how many nats the validation loss at the end lies above the bigram table's; NaN where unknown."""
    return (runs["validation_loss"].astype(float) - of_runs(runs)["bigram"]).groupby(runs["label"]).mean()


def sentence(runs: pd.DataFrame) -> str:
    """What the tables say about these losses, in words, for beneath a figure or table of losses."""
    found = tables(runs)
    if not found:
        return (
            "Nobody counted the bigrams of these runs' training tokens: whether their losses say anything about "
            "attention is unknown."
        )
    above, called = above_bigram(runs), titles(runs)
    worse = [called[name] for name in labels(runs) if above[name] > 0]
    lost = f"of the same training tokens loses {found['bigram']:.2f} nats (of single tokens: {found['unigram']:.2f})"
    if not worse:
        return f"A table of token pairs {lost}; every model here is below it."
    who = "Every model here" if len(worse) == len(called) else ", ".join(worse)
    verb = "is" if len(worse) in (1, len(called)) else "are"
    return f"{who} {verb} worse than a table of token pairs, which {lost}: that loss says nothing about attention."
