"""What runs of train.ipynb lose of text beside SDPA: of all tokens, of repeated bigrams, and of the rest.

A token that ends a bigram which its row has held before (`lib.data.ngrams.repeated_bigrams`) is where looking back may
help most. Arora et al. 2023 (arXiv 2312.04927, section 3) count of these the ones whose bigram is rare in the training
data; here all count, and most are common, so this shows less of recall than theirs. Losses are paired in blocks, so
with the same seed and rows (`lib.analysis.compare.differences`).
"""

from pathlib import Path

import numpy as np
import pandas as pd

from lib import attention, paths, record
from lib.analysis import capability, compare, ngrams, quality
from lib.analysis.quality import DIFFERENT
from lib.analysis.style import labels, titles
from lib.analysis.words import counted, joined
from lib.errors import UsageError

KINDS = {"loss": "all tokens", "repeated_bigram_loss": "repeated bigrams", "other_loss": "the rest"}
MORE = "repeated bigrams − the rest"
ARCHITECTURES = {"gpt2": "GPT-2's", "llama": "Llama's"}


def read(folder: Path) -> pd.DataFrame:
    """The runs of `folder`. Raises UsageError where there are none that were measured, or of several settings."""
    runs = record.read(folder) if folder.is_dir() else pd.DataFrame()
    if runs.empty or not (runs["provenance"] == "measured").any():
        raise UsageError(f"there is no measured run of train.ipynb in {folder.name}/; `python -m lib.study` makes some")
    groups = compare.groups(runs)
    if len(groups) > 1:
        raise UsageError(
            f"{folder.name}/ holds runs of {len(groups)} settings, whose losses are not compared; name a folder of one"
        )
    return groups[0].runs


def beside(folder: str, records: str) -> pd.DataFrame | None:
    """What capability.ipynb shows beside the cells of `records` (`capability.folder_beside`); None where that is no
    folder."""
    folder = capability.folder_beside(folder, records, capability.TEXT)
    return read(paths.from_root(folder)) if folder else None


def ends(runs: pd.DataFrame, kind: str) -> pd.Series:
    """The loss of one of KINDS at the end of each run, or for MORE how far that of repeated bigrams is above the
    rest's; NaN where no such token was."""
    if kind == MORE:
        return ends(runs, "repeated_bigram_loss") - ends(runs, "other_loss")
    last = [points[-1].get(kind) if points else None for points in runs["series_validation"]]
    return pd.Series(last, runs.index, dtype=float)


def differences(runs: pd.DataFrame, kind: str = "loss") -> pd.DataFrame:
    """`compare.differences` of `ends`, a row per label; NaN where no run of SDPA is there. Of MORE: by how much the
    difference from SDPA is larger on repeated bigrams than on the rest."""
    found = compare.differences(runs.assign(validation_loss=ends(runs, kind)))
    return found.set_index("label").reindex(labels(runs))


def share_of_repeated(runs: pd.DataFrame) -> float:
    """The share of the validation's tokens that end a repeated bigram; NaN where a record does not say."""
    shares = [(data or {}).get("repeated_bigrams") for data in runs["data"]]
    return float(np.mean(np.array(shares, dtype=float)))


def is_told(runs: pd.DataFrame) -> bool:
    """Whether these losses carry a verdict on attention: beside SDPA, from five blocks, below the bigram table."""
    return bool(differences(runs)["p"].notna().any() and (ngrams.above_bigram(runs) <= 0).all())


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per variant, the lowest loss first: nats per token, and nats above SDPA's of each kind of tokens, with 95 %
    intervals; the verdict is of all tokens."""
    found, called = {kind: differences(runs, kind) for kind in (*KINDS, MORE)}, titles(runs)
    level, rows = runs["validation_loss"].astype(float).groupby(runs["label"]).mean(), []
    for label in sorted(labels(runs), key=lambda label: level[label]):
        row = {"variant": called[label], "nats per token": f"{level[label]:.3f}"}
        row |= {f"above SDPA's, {name}": _nats(found[kind].loc[label]) for kind, name in KINDS.items()}
        of = found["loss"].loc[label]
        told = {"verdict": "–", "n": "–"} if pd.isna(of["n"]) else {"verdict": of["verdict"], "n": f"{of['n']:.0f}"}
        rows.append(row | {MORE: _nats(found[MORE].loc[label])} | told)
    return pd.DataFrame(rows)


def _nats(row: pd.Series) -> str:
    if pd.isna(row["difference"]) or row["verdict"] == "the reference":
        return "–"
    ends = "" if pd.isna(row["low"]) else f" [{row['low']:+.3f}, {row['high']:+.3f}]"
    return f"{row['difference']:+.3f}{ends}"


def sentences(runs: pd.DataFrame) -> list[str]:
    """Who loses more or less of text than SDPA, on which tokens, and what that rests on: a sentence or two each."""
    return [quality.sentences(runs)[0], *(_where(runs) if is_told(runs) else []), *_weights(runs), basis(runs)]


def _where(runs: pd.DataFrame) -> list[str]:
    """Whose difference from SDPA is another on repeated bigrams than on the rest, or that nobody's surely is."""
    found, called, share = differences(runs, MORE), titles(runs), share_of_repeated(runs)
    surely = found[(found["verdict"] == DIFFERENT) & (found.index != attention.CONTROL)]
    of = "" if np.isnan(share) else f" ({share:.0%} of all)"
    on = f"On tokens that end a bigram which their row has held before{of}"
    of_all = differences(runs)
    lost = of_all[(of_all["verdict"] == DIFFERENT) & (of_all["difference"] > 0) & (of_all.index != attention.CONTROL)]
    if surely.empty and len(lost) and found.loc[lost.index, "low"].notna().all():
        by = joined([f"{called[label]} {_nats(found.loc[label])} nats" for label in lost.index])
        return [
            f"{on} nobody's difference from SDPA is told apart from that on the rest ({by}): it is not shown that what "
            "is lost is recall."
        ]
    return [
        f"{on} the difference from SDPA is {side} than on "
        f"the rest by {joined([f'{_nats(row)} nats for {called[label]}' for label, row in own.iterrows()])}."
        for side, own in (
            ("higher", surely[surely["difference"] > 0].sort_values("difference", ascending=False, kind="stable")),
            ("lower", surely[surely["difference"] < 0].sort_values("difference", kind="stable")),
        ) if len(own)
    ]  # fmt: skip


def basis(runs: pd.DataFrame) -> str:
    """The nets, the training, the validation and the n-gram table of these runs."""
    p, seen = runs["parameter_values"].iloc[0], runs["series_non_padding_tokens"].map(lambda tokens: tokens[-1]).max()
    text = "the builtin text (Python docstrings)" if p["dataset"] == "builtin" else record.printable(p["dataset"], 60)
    whose = ARCHITECTURES.get(p.get("architecture", "gpt2"), "its own")
    return (
        f"A model with {counted(p['layers'], 'layer')} of {whose}, {p['width']} wide, trained on {seen:,} tokens of "
        f"{text} in rows of {p['context']:,}, at one learning rate for all; p is corrected for the number of variants, "
        "intervals are not: they are of seeds, on one validation text. "
        f"{ngrams.sentence(runs)}"
    )


def _weights(runs: pd.DataFrame) -> list[str]:
    """Whose model is smaller or larger than SDPA's by 1 % or more."""
    held, called = runs.groupby("label")["parameters"].max(), titles(runs)
    if attention.REFERENCE not in held:
        return []
    share = held / held[attention.REFERENCE] - 1
    said = [
        f"{called[label]} has {abs(share[label]):.1%} {'more' if share[label] > 0 else 'fewer'} parameters"
        for label in labels(runs) if abs(share[label]) >= 0.01
    ]  # fmt: skip
    return [f"{joined(said)}."] if said else []
