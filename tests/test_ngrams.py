"""The n-gram tables and the split of the validation loss, against slow forms written from their definitions."""

import json
import math
from collections import Counter
from itertools import chain, pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_training import make_rows, make_trainer

from lib.analysis import ngrams as beside
from lib.data import cache, corpus, ngrams
from lib.record import Record
from lib.record.schema import Point
from lib.study import plan


def test_tables_that_some_run_lacks_have_no_mean():
    """It would be of other training tokens than the losses beside it."""
    counted = [{"unigram_loss": 6.0, "bigram_loss": 5.0}, {"unigram_loss": 7.0, "bigram_loss": 5.5}]
    runs = pd.DataFrame({"setting": "s", "seed": [0, 1], "data": counted})
    assert beside.tables(runs) == {"unigram": 6.5, "bigram": 5.25}
    runs["data"] = [counted[0], None]
    assert beside.tables(runs) == {}


@given(arrays.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 20)), elements=st.integers(0, 3)))
def test_a_bigram_is_repeated_where_its_row_has_held_it_before(ids):
    found = ngrams.repeated_bigrams(ids)
    for row, marks in zip(ids.tolist(), found.tolist(), strict=True):
        seen, expected = set(), []
        for pair in pairwise(row):
            expected.append(pair in seen)
            seen.add(pair)
        assert marks == expected


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=4))
def test_a_bigram_of_another_document_of_the_row_is_no_repetition(documents):
    """Each document's marks are those that it has alone; its first token, which nothing predicts, has none."""
    ids = np.array([list(chain(*documents))])
    seq_idx = np.array([np.repeat(np.arange(len(documents)) + 7, [len(one) for one in documents])])
    found = ngrams.repeated_bigrams(ids, seq_idx)[0].tolist()
    alone = [[False, *ngrams.repeated_bigrams(np.array([one]))[0].tolist()] for one in documents]
    assert [False, *found] == list(chain(*alone))


def rows_of(rows, context=None):
    lengths = np.array([len(row) for row in rows])
    flat = np.array([token for row in rows for token in row], dtype=np.uint32)
    return corpus.Rows(flat, np.cumsum(lengths) - lengths, lengths, context or int(lengths.max()), 0)


def probabilities(trained, vocabulary, weights_by_count, of_unigram, pairs):
    """The tables by dictionaries: the definition in the module's head, its weights given."""
    single = Counter(token for row in trained for token in row[1:])
    before, both = Counter(), Counter()
    for row in trained:
        before.update(row[:-1])
        both.update(pairwise(row))
    total, found = sum(single.values()), []
    for one, other in pairs:
        unigram, chance = single[other] / total, 1 / vocabulary
        bigram = both[one, other] / before[one] if before[one] else unigram
        weights = weights_by_count(before[one])
        found.append((of_unigram @ [unigram, chance], weights @ [bigram, unigram, chance]))
    return np.array(found).T


def test_the_tables_are_their_definition(monkeypatch):
    random = np.random.default_rng(0)
    rows = [
        random.choice(6, size=random.integers(2, 12), p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05]).tolist() for _ in range(40)
    ]
    validation = [random.integers(0, 7, size=9).tolist() for _ in range(5)]  # token 6 is never trained on
    data = corpus.Corpus(rows_of(rows), rows_of(validation), 7, {})
    trained = np.array([0, 3, 3, 7, 20, 21, 30])  # some rows, one of them twice
    monkeypatch.setattr(
        ngrams, "_weights", lambda parts: np.array([0.6, 0.3, 0.1]) if parts.shape[1] == 3 else np.array([0.8, 0.2])
    )
    found = ngrams.losses(data, trained, 4)
    pairs = [pair for row in validation[:4] for pair in pairwise(row)]
    chosen = [rows[row] for row in sorted(set(trained.tolist()))]
    unigram, bigram = probabilities(chosen, 7, lambda _: np.array([0.6, 0.3, 0.1]), np.array([0.8, 0.2]), pairs)
    assert found["unigram_loss"] == pytest.approx(-np.log(unigram).mean())
    assert found["bigram_loss"] == pytest.approx(-np.log(bigram).mean())
    repeated = np.concatenate([ngrams.repeated_bigrams(np.array([row]))[0] for row in validation[:4]])
    assert found["bigram_other_loss"] == pytest.approx(-np.log(bigram[~repeated]).mean())
    assert found["repeated_bigrams"] == pytest.approx(repeated.mean())
    if repeated.any():
        assert found["bigram_repeated_bigram_loss"] == pytest.approx(-np.log(bigram[repeated]).mean())


def test_each_table_is_a_distribution_over_the_vocabulary():
    """Whatever token came before, one that was never seen included."""
    random = np.random.default_rng(1)
    rows = [random.integers(0, 5, size=10).tolist() for _ in range(30)]
    trained = np.arange(30)
    asked = ngrams.Pairs(*(index.ravel() for index in np.indices((8, 8))))  # every pair of a vocabulary of 8
    (chosen,) = ngrams._chunks(rows_of(rows), trained[::10], 3)
    table = ngrams.Table(rows_of(rows), 8, trained, trained[::10], (asked, chosen))
    for given_by in table.probabilities(asked, chosen):
        assert (given_by > 0).all() and given_by.reshape(8, 8).sum(1) == pytest.approx(np.ones(8))


def test_weights_are_the_most_likely_ones():
    random = np.random.default_rng(2)
    parts = random.dirichlet(np.ones(5), size=(3, 4000)).transpose(1, 0, 2)[:, :, 0]  # (n, 3)
    weights = ngrams._weights(parts)
    grid = [np.array([a, b, 1 - a - b]) for a in np.arange(0.05, 1, 0.05) for b in np.arange(0.05, 1 - a - 0.01, 0.05)]
    best = max(np.log(parts @ other).sum() for other in grid)
    assert weights.sum() == pytest.approx(1) and np.log(parts @ weights).sum() >= best - 0.05


def test_validation_chooses_nothing_and_other_rows_than_those_trained_on_count_for_nothing():
    data = corpus.Corpus(make_rows(40), make_rows(9), 30, {})
    few, same_few = np.arange(10), corpus.Corpus(make_rows(40), make_rows(9), 30, {})
    same_few.train.tokens[same_few.train.starts[10] :] = 1  # what was not trained on
    assert ngrams.losses(data, few, 6) == ngrams.losses(same_few, few, 6)
    assert ngrams.losses(data, few, 6) != ngrams.losses(data, np.arange(20), 6)


def test_padding_counts_for_nothing_though_it_is_trained_on():
    data, padded = (corpus.Corpus(make_rows(40), make_rows(9), 30, {}) for _ in range(2))
    padded.train.context, padded.train.train_on_padding = 30, True
    assert ngrams.losses(data, np.arange(40), 6) == ngrams.losses(padded, np.arange(40), 6)


def test_random_tokens_lose_the_logarithm_of_the_vocabulary_and_a_chain_that_is_known_nearly_nothing():
    random = np.random.default_rng(3)
    noise = [random.integers(0, 16, size=200).tolist() for _ in range(60)]
    found = ngrams.losses(corpus.Corpus(rows_of(noise[:50]), rows_of(noise[50:]), 16, {}), np.arange(50), 10)
    assert found["unigram_loss"] == pytest.approx(math.log(16), abs=0.01)
    assert found["bigram_loss"] == pytest.approx(math.log(16), abs=0.03)
    chain = [[(start + n) % 16 for n in range(200)] for start in range(16)]
    found = ngrams.losses(corpus.Corpus(rows_of(chain), rows_of(chain), 16, {}), np.arange(16), 10)
    assert found["bigram_loss"] < 0.02 and found["unigram_loss"] == pytest.approx(math.log(16), abs=0.01)


def test_counts_are_kept_and_a_cache_that_fails_costs_no_record(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    data = corpus.Corpus(make_rows(40), make_rows(9), 30, {"token_sha256": "a" * 64})
    first = ngrams.losses(data, np.arange(40), 6)
    (kept,) = (tmp_path / "cache").glob(f"*/{ngrams.KEPT}")
    kept.write_text(json.dumps(first | {"unigram_loss": 1.5}))
    assert ngrams.losses(data, np.arange(40)[::-1], 6)["unigram_loss"] == 1.5  # in whatever order
    for damaged in ("{", "[1]", json.dumps(first | {"unigram_loss": "<b>"}), json.dumps(first | {"mine": 1.0})):
        kept.write_text(damaged)
        assert ngrams.losses(data, np.arange(40), 6) == first
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "file"))
    assert ngrams.losses(data, np.arange(40), 6) == first


def test_the_validation_loss_is_split_into_repeated_bigrams_and_the_rest():
    trainer = make_trainer(batch_size=2)
    trainer.corpus.validation.tokens[:] %= 3  # few tokens: many repeated bigrams
    found = trainer.validate(0)
    ids, labels = trainer.corpus.validation.batch(np.arange(6))
    with torch.no_grad():
        logs = trainer.model.eval()(ids, use_cache=False).logits.log_softmax(-1)
    lost = -logs[:, :-1].gather(2, ids[:, 1:, None])[:, :, 0]
    counts, repeated = labels[:, 1:] != corpus.IGNORED, torch.from_numpy(ngrams.repeated_bigrams(ids.numpy()))
    assert found["loss"] == pytest.approx(lost[counts].mean().item(), rel=1e-6)
    assert found["repeated_bigram_loss"] == pytest.approx(lost[counts & repeated].mean().item(), rel=1e-6)
    assert found["other_loss"] == pytest.approx(lost[counts & ~repeated].mean().item(), rel=1e-6)
    assert found["repeated_bigram_loss"] != found["other_loss"]
    assert Point(**found).other_loss == found["other_loss"]


def test_documents_that_are_kept_apart_are_validated_as_if_alone():
    """Loss, and what counts as a bigram that was held before: in the model's split and in the tables'."""
    documents = [[1, 2, 1, 2], [1, 2, 3], [2, 3, 2, 3, 2], [1, 2, 1, 2]]  # in rows of 8, behind a document of one token
    rows = rows_of([[7, *chain(*documents[:2])], list(chain(*documents[2:]))[:8]])
    rows.ends = np.cumsum([1, 4, 3, 5, 4])
    trainer = make_trainer(batch_size=2, validation_sequences=2, context=8)
    trainer.corpus.validation = rows
    found = trainer.validate(0)
    repeated, others = [], []
    for one in ([7], [1, 2, 1, 2], [1, 2, 3], [2, 3, 2, 3, 2], [1, 2, 1]):
        ids = torch.tensor([one])
        with torch.no_grad():
            logs = trainer.model(ids, use_cache=False).logits.log_softmax(-1)[0, :-1]
        lost = -logs.gather(1, ids[0, 1:, None])[:, 0]
        again = ngrams.repeated_bigrams(ids.numpy())[0]
        repeated, others = repeated + lost[again].tolist(), others + lost[~again].tolist()
    assert found["repeated_bigram_loss"] == pytest.approx(np.mean(repeated), rel=1e-6)
    assert found["other_loss"] == pytest.approx(np.mean(others), rel=1e-6)
    assert found["loss"] == pytest.approx(np.mean(repeated + others), rel=1e-6)
    tables = ngrams.losses(trainer.corpus, np.arange(20), 2)
    assert tables["repeated_bigrams"] == pytest.approx(len(repeated) / len(repeated + others))


def test_without_a_repeated_bigram_its_loss_is_none_and_never_0():
    trainer = make_trainer(ragged=False)
    rows = trainer.corpus.validation
    rows.tokens[:] = np.concatenate([np.arange(rows.context)] * len(rows))
    found = trainer.validate(0)
    assert found["repeated_bigram_loss"] is None and found["other_loss"] == pytest.approx(found["loss"])


def test_the_tables_of_the_committed_records_are_those_of_today_s_data():
    """Where today's code still reads the same tokens: records keep their own."""
    values = {name: line.default for name, line in plan.known_parameters().items()}
    p = SimpleNamespace(**values)
    data = corpus.load(p)
    kept = {key[2]: row for key, row in beside._counted_later().items()}
    if data.facts["token_sha256"] not in kept:
        pytest.skip("the builtin data were made otherwise when these records were")
    trained = data.train.order(p.batch_size * p.steps_per_epoch * p.epochs, p.seed)
    found = ngrams.losses(data, trained, p.validation_sequences)
    assert found == pytest.approx(kept[data.facts["token_sha256"]], abs=1e-5)


def test_older_records_have_neither_and_stay_valid():
    fields = Record.model_fields
    assert fields["started_at"].default is None
    assert Point(non_padding_tokens=0, loss=1.0) == Point(non_padding_tokens=0, loss=1.0, repeated_bigram_loss=None)
