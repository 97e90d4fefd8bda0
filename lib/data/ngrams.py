"""What tables of the very tokens that a run is trained on lose: by how often a token comes, and by the one before it.

Where a model's loss is above the bigram table's, it predicts worse than what needs no attention at all, so its loss
says nothing about its attention. The bigram table is interpolated (Jelinek and Mercer 1980): with c the counts in the
rows of the training,

    p(w | v) = a c(v, w) / c(v) + b c(w) / N + (1 - a - b) / V,

the weights a and b by how often v was seen, in powers of two, chosen by expectation maximisation on every tenth of
these rows with the counts of the others; validation rows choose nothing. Cost: one pass over the tokens.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lib.data.cache import made_once
from lib.data.corpus import IGNORED, Corpus, Rows
from lib.errors import UsageError

FORM = 2  # of what is kept in the cache; another number counts anew
EVERY = 10  # row of the training is held out to choose the weights
MOST_HELD_OUT = 4096  # rows
AT_ONCE = 2048  # rows counted together
KEPT = "losses.json"
ROUNDS = 100  # of expectation maximisation: the weights have settled to four digits


class Pairs(NamedTuple):
    """Tokens that the loss counts, each with the one before it."""

    before: np.ndarray  # (n,)
    token: np.ndarray  # (n,)


def repeated_bigrams(ids: np.ndarray) -> np.ndarray:
    """Which tokens of (B, T) ids end a bigram that their row has held before: (B, T - 1) bools, of tokens 1 to T - 1.

    Token t does where some s < t has the same tokens at s - 1 and s. These are the tokens that a model can recall from
    its context (Arora et al. 2023, arXiv 2312.04927, section 3, whose "AR hits" are those of them whose bigram is rare
    in the training data; here all of them count, since no limit of rareness fits data of every size).
    """
    ids = np.asarray(ids, dtype=np.int64)
    bigrams = ids[:, :-1] * (ids.max(initial=0) + 1) + ids[:, 1:]  # (B, T - 1)
    order = np.argsort(bigrams, axis=1, kind="stable")
    ordered = np.take_along_axis(bigrams, order, axis=1)
    again = np.zeros(bigrams.shape, dtype=bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    found = np.empty_like(again)
    np.put_along_axis(found, order, again, axis=1)
    return found


def losses(corpus: Corpus, trained: np.ndarray, sequences: int) -> dict:
    """What both tables of the `trained` rows lose on the tokens that a validation over `sequences` rows counts.

    `unigram_loss` and `bigram_loss` in nats per token, each also of the tokens that end a bigram which their row has
    held before (`..._repeated_bigram_loss`) and of the rest (`..._other_loss`), None of no token; `repeated_bigrams`,
    the share of the former. Counted once for the same tokens and rows, and kept in the cache.
    """
    trained, rows = np.unique(trained), min(sequences, len(corpus.validation))
    digest = hashlib.sha256(trained.astype("<i8").tobytes()).hexdigest()
    tokens = corpus.facts.get("token_sha256")
    if tokens is None:  # rows of no known data: nothing to keep them under
        return _losses(corpus, trained, rows)
    what = {"ngrams": FORM, "tokens": tokens, "trained": digest, "rows": rows, "vocabulary": corpus.vocabulary}

    def count(scratch):
        (scratch / KEPT).write_text(json.dumps(_losses(corpus, trained, rows)))

    with contextlib.suppress(UsageError, OSError, ValueError):  # a full disk or a damaged cache costs time, no record
        return json.loads((made_once(what, count) / KEPT).read_text())
    return _losses(corpus, trained, rows)


def _losses(corpus: Corpus, trained: np.ndarray, rows: int) -> dict:
    ids, counts = _counted(corpus.validation, np.arange(rows))
    (asked,) = _chunks(corpus.validation, np.arange(rows), rows)
    held_out = trained[:: max(EVERY, -(-len(trained) // MOST_HELD_OUT))]
    (chosen,) = _chunks(corpus.train, held_out, len(held_out))
    table = Table(corpus.train, corpus.vocabulary, trained, held_out, (asked, chosen))
    repeated, found = repeated_bigrams(ids)[counts], {}
    for name, given in zip(("unigram", "bigram"), table.probabilities(asked, chosen), strict=True):
        for kind, which in (("", slice(None)), ("_repeated_bigram", repeated), ("_other", ~repeated)):
            lost = -np.log(given[which])
            found[f"{name}{kind}_loss"] = float(lost.mean()) if len(lost) else None
    return found | {"repeated_bigrams": float(repeated.mean())}


def _counted(rows: Rows, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (B, T) of some rows, and which of the tokens 1 to T - 1 are no padding and count in the loss."""
    ids, labels = (tensor.numpy() for tensor in rows.batch(chosen)[:2])
    inside = np.arange(1, ids.shape[1]) < rows.lengths[chosen][:, None]
    return ids, inside & (labels[:, 1:] != IGNORED)


def _chunks(rows: Rows, chosen: np.ndarray, at_once: int = AT_ONCE) -> Iterator[Pairs]:
    for first in range(0, len(chosen), at_once):
        ids, counts = _counted(rows, chosen[first : first + at_once])
        yield Pairs(ids[:, :-1][counts], ids[:, 1:][counts])


class Table:
    """Counts of the `trained` rows, of those bigrams that `asked` holds; with and without the `held_out` rows."""

    def __init__(self, rows: Rows, vocabulary: int, trained: np.ndarray, held_out: np.ndarray, asked: tuple):
        self.vocabulary = vocabulary
        self.bigrams = np.unique(np.concatenate([self._number(pairs) for pairs in asked]))
        kept = np.setdiff1d(trained, held_out)
        rest = [self._count(rows, which) for which in (kept, held_out)]
        self.of_rest = rest[0]
        self.of_all = tuple(one + other for one, other in zip(*rest, strict=True))

    def _number(self, pairs: Pairs) -> np.ndarray:
        return pairs.before * self.vocabulary + pairs.token

    def _count(self, rows: Rows, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How often each token comes (V), each comes before another (V), and each bigram that is asked for comes."""
        tokens, before, both = (
            np.zeros(size, np.int64) for size in (self.vocabulary, self.vocabulary, len(self.bigrams))
        )
        for pairs in _chunks(rows, chosen):
            tokens += np.bincount(pairs.token, minlength=self.vocabulary)
            before += np.bincount(pairs.before, minlength=self.vocabulary)
            numbers = self._number(pairs)
            place = np.minimum(np.searchsorted(self.bigrams, numbers), len(self.bigrams) - 1)
            both += np.bincount(place[self.bigrams[place] == numbers], minlength=len(self.bigrams))
        return tokens, before, both

    def _parts(self, pairs: Pairs, counts) -> tuple[np.ndarray, np.ndarray]:
        """What bigram, unigram and chance give each token, (n, 3), and how often the token before it was seen, (n,)."""
        tokens, before, both = counts
        seen = before[pairs.before]
        unigram = tokens[pairs.token] / max(1, tokens.sum())
        of_both = both[np.searchsorted(self.bigrams, self._number(pairs))]
        bigram = np.where(seen > 0, of_both / np.maximum(seen, 1), unigram)
        return np.stack([bigram, unigram, np.full(len(seen), 1 / self.vocabulary)], axis=1), seen

    def probabilities(self, asked: Pairs, held_out: Pairs) -> tuple[np.ndarray, np.ndarray]:
        """What the unigram and the bigram table of all rows give the tokens of `asked`, (n,) each; above 0."""
        parts, seen = self._parts(held_out, self.of_rest)
        ours, seen_by_all = self._parts(asked, self.of_all)
        often, asked_often = (np.log2(counts + 1).astype(int) for counts in (seen, seen_by_all))
        overall, bigram = _weights(parts), np.empty(len(ours))
        for which in np.unique(asked_often):
            mine = parts[often == which]
            bigram[asked_often == which] = ours[asked_often == which] @ (_weights(mine) if len(mine) else overall)
        return ours[:, 1:] @ _weights(parts[:, 1:]), bigram


def _weights(parts: np.ndarray) -> np.ndarray:
    """The weights (k,) of k distributions under whose mixture tokens are most likely, given (n, k) probabilities."""
    n, k = parts.shape
    weights = np.full(k, 1 / k)
    for _ in range(ROUNDS):
        shares = parts * weights
        shares /= shares.sum(1, keepdims=True)
        weights = (shares.sum(0) + 1 / k) / (n + 1)  # never 0: what nobody has seen may come all the same
    return weights
