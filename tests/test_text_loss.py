"""What runs say of language: losses of text beside SDPA's, of tokens that end a repeated bigram and of the rest."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_answer import made_cells, made_steps
from test_compare import blocks, read

from lib import attention, paths, record
from lib.analysis import answer, capability, conclusions, evidence, quality, text_loss
from lib.errors import UsageError

GAPS = {  # nats above SDPA's: of tokens that end a repeated bigram, of the rest
    "sdpa": (0.0, 0.0), attention.CONTROL: (0.3, 0.0), "gqa": (0.0, 0.0), "mla": (0.6, 0.1), "linear": (0.2, 0.2),
    "flash": (-0.4, -0.1),
}  # fmt: skip
SHARE = 0.25  # of tokens that end a repeated bigram


def made(folder, count=8, gaps=GAPS, share=SHARE, bigram=9.0) -> pd.DataFrame:
    """Runs whose losses differ from SDPA's by `gaps`, and by a little from block to block."""
    runs, random = read(folder, blocks(dict.fromkeys(gaps, 1.0), count=count)), np.random.default_rng(2)
    points = []
    for run in runs.itertuples():
        again, rest = (3 + run.block / 10 + gap + 0.001 * random.normal() for gap in gaps[run.label])
        end = {"loss": 0.25 * again + 0.75 * rest, "repeated_bigram_loss": again, "other_loss": rest}
        points.append([dict.fromkeys(end, 9.0), end])
    known = {"repeated_bigrams": share, "bigram_loss": bigram, "unigram_loss": 9.5}
    losses = [end["loss"] for _, end in points]
    data = [(one or {}) | known for one in runs["data"]]
    return runs.assign(series_validation=points, data=data, validation_loss=losses)


def said_of_repeated(runs):
    return [one for one in text_loss.sentences(runs) if "held before" in one]


def test_each_kind_of_tokens_is_compared_at_the_end_and_in_pairs(tmp_path):
    runs = made(tmp_path)
    kinds = {kind: [points[-1][kind] for points in runs["series_validation"]] for kind in text_loss.KINDS}
    kinds[text_loss.MORE] = np.subtract(kinds["repeated_bigram_loss"], kinds["other_loss"])
    for kind, values in kinds.items():
        ends = runs.assign(end=values).pivot(index="block", columns="label", values="end")
        test = stats.ttest_1samp(ends["mla"] - ends["sdpa"], 0)
        found = text_loss.differences(runs, kind).loc["mla"]
        assert found["difference"] == pytest.approx((ends["mla"] - ends["sdpa"]).mean())
        assert [found["low"], found["high"]] == pytest.approx(list(test.confidence_interval()))


def test_who_differs_more_on_repeated_bigrams_is_named_with_by_how_much(tmp_path):
    higher, lower = said_of_repeated(made(tmp_path))
    assert higher.startswith("On tokens that end a bigram which their row has held before (25% of all) the difference")
    assert "is higher than on the rest by +0.5" in higher and higher.endswith("for mla.")
    assert "is lower than on the rest by -0.3" in lower and lower.endswith("for flash.")
    assert "sdpa_again" not in higher  # a control is no finding
    assert "linear" not in higher + lower  # loses as much more on all tokens
    unknown = said_of_repeated(made(tmp_path, share=None))
    assert unknown[0].startswith("On tokens that end a bigram which their row has held before the difference")


def test_where_nobody_differs_more_on_repeated_bigrams_that_is_said_of_who_loses_more(tmp_path):
    alike = {"sdpa": (0.0, 0.0), "gqa": (0.0, 0.0), "linear": (0.2, 0.2), "mla": (-0.2, -0.2)}
    (said,) = said_of_repeated(made(tmp_path, gaps=alike))
    assert "nobody's difference from SDPA is told apart from that on the rest (linear " in said
    assert "mla" not in said and said.endswith("it is not shown that what is lost is recall.")
    assert not said_of_repeated(made(tmp_path / "none", gaps=dict.fromkeys(alike, (0.0, 0.0))))


def test_a_smaller_model_is_said_to_be_one(tmp_path):
    runs = made(tmp_path)
    assert not any("parameters" in one for one in text_loss.sentences(runs))
    smaller = runs.assign(parameters=np.where(runs["label"] == "gqa", 0.9, 1.0) * runs["parameters"])
    assert "gqa has 10.0% fewer parameters." in text_loss.sentences(smaller)


def test_the_table_has_the_lowest_loss_first_and_each_kind_beside_sdpa(tmp_path):
    table = text_loss.table(made(tmp_path)).set_index("variant")
    levels = [float(value) for value in table["nats per token"]]
    assert levels == sorted(levels) and table.index[0] == "flash"
    assert table.loc["mla", "above SDPA's, repeated bigrams"].startswith("+0.6")
    assert table.loc["mla", "above SDPA's, the rest"].startswith("+0.1")
    assert table.loc["mla", text_loss.MORE].startswith("+0.5") and table.loc["mla", "n"] == "8"
    assert table.loc["sdpa", "above SDPA's, all tokens"] == "–" and table.loc["sdpa", "verdict"] == "the reference"


def test_rows_that_repeat_nothing_have_no_loss_of_repeated_bigrams(tmp_path):
    runs = made(tmp_path)
    none = [[{**end, "repeated_bigram_loss": None} for end in points] for points in runs["series_validation"]]
    runs = runs.assign(series_validation=none)
    table = text_loss.table(runs).set_index("variant")
    assert (table["above SDPA's, repeated bigrams"] == "–").all() and (table[text_loss.MORE] == "–").all()
    assert table.loc["mla", "above SDPA's, all tokens"] != "–" and not said_of_repeated(runs)


def test_few_blocks_and_no_reference_tell_nothing(tmp_path):
    runs = made(tmp_path, count=4)
    assert "a verdict needs 5 whole blocks, and there are 4" in text_loss.sentences(runs)[0]
    assert not said_of_repeated(runs) and not text_loss.is_told(runs)
    assert "[" not in " ".join(text_loss.table(runs)["above SDPA's, all tokens"])
    alone = made(tmp_path)
    alone = alone[alone["label"] != "sdpa"]
    assert "no run of SDPA" in text_loss.sentences(alone)[0] and not text_loss.is_told(alone)
    assert set(text_loss.table(alone)["above SDPA's, all tokens"]) == {"–"}
    refused = made(tmp_path)
    refused = refused.assign(certified=refused["label"] == "sdpa")
    assert "passes its certificate" in quality.sentences(refused)[0] and not text_loss.is_told(refused)


def test_losses_above_the_table_of_token_pairs_are_not_taken_apart(tmp_path):
    runs = made(tmp_path, bigram=3.4)
    assert not text_loss.is_told(runs) and not said_of_repeated(runs)
    assert "worse than a table of token pairs" in text_loss.sentences(runs)[-1]
    assert text_loss.is_told(made(tmp_path))


def test_what_it_rests_on_is_named(tmp_path):
    runs = made(tmp_path)
    tokens = max(seen[-1] for seen in runs["series_non_padding_tokens"])
    said = text_loss.basis(runs)
    assert said.startswith(
        f"A model with 2 layers of GPT-2's, 32 wide, trained on {tokens:,} tokens of the builtin text"
    )
    assert "in rows of 16, " in said
    other = [values | {"dataset": "mine.parquet", "architecture": "llama"} for values in runs["parameter_values"]]
    said = text_loss.basis(runs.assign(parameter_values=other))
    assert "2 layers of Llama's, 32 wide" in said and "tokens of mine.parquet in rows" in said


def test_a_folder_without_measured_runs_or_with_several_settings_is_refused(tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match=f"no measured run of train.ipynb in {folder.name}/"):
            text_loss.read(folder)
    runs = made(tmp_path)
    found = runs
    monkeypatch.setattr(record, "read", lambda folder: found)
    assert len(text_loss.read(tmp_path)) == len(runs)
    found = pd.concat([runs, runs.assign(setting="ffffffff")])
    with pytest.raises(UsageError, match="runs of 2 settings, whose losses are not compared; name a folder of one"):
        text_loss.read(tmp_path)
    found = runs.assign(provenance="synthetic")
    with pytest.raises(UsageError, match="no measured run"):
        text_loss.read(tmp_path)


def test_the_readme_and_the_page_of_tasks_say_what_was_learnt_of_text(tmp_path):
    runs, cells = made(tmp_path), made_cells()
    silent, told = (answer.how_sure(evidence.Evidence(made_steps({}), cells, text=text)) for text in (None, runs))
    assert any(", and what is learnt." in line for line in silent)
    (line,) = [one for one in told if one.startswith("Loss of text: ")]
    assert "significantly higher" in line and "for mla" in line
    assert any(", and what the models timed learn." in one for one in told)
    worse = answer.how_sure(evidence.Evidence(made_steps({}), cells, text=made(tmp_path, bigram=1.0)))
    assert any(", and what is learnt." in line for line in worse)
    assert "language itself" in conclusions.of_capability(cells).not_shown
    shown = conclusions.of_capability(cells, None, runs)
    assert "language itself" not in shown.not_shown and any("for mla" in one for one in shown.details)


def test_the_committed_runs_are_below_the_table_of_token_pairs_and_enough_for_verdicts():
    runs = text_loss.read(paths.ROOT / capability.TEXT)
    assert text_loss.is_told(runs) and runs["certified"].all()
