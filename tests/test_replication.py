"""The replication's tables say what definitions and records hold, and the leak is at work."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from make import make_record, places

from lib import attention, certificate, paths, record
from lib.analysis import compare, replication, style
from lib.model import build_model, gpt2_config
from lib.study import leakage, plan


def train(name, steps=150, length=16, vocabulary=12, **options):
    """Random tokens, of which nothing can be known in advance: a causal model's loss stays at log(vocabulary)."""
    generator = torch.Generator().manual_seed(0)
    model = build_model(name, gpt2_config(1, 32, 4, length, vocabulary), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        ids = torch.randint(vocabulary, (32, length), generator=generator)
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return leakage.teacher_forced_and_autoregressive_loss(
        model, torch.randint(vocabulary, (64, length), generator=generator)
    )


@pytest.mark.parametrize("name", ["sdpa", "mla"])
def test_what_sees_the_future_learns_it_and_then_fails_to_generate(name):
    chance = np.log(12)
    forced, generated = train(replication.published(name))
    assert forced < 0.8 * chance and generated > 1.1 * chance
    forced, generated = train(name, steps=20)
    assert forced > 0.99 * chance and generated == pytest.approx(forced, abs=1e-5)


def test_the_definition_that_saw_padding_masks_learns_no_future():
    forced, generated = train(replication.published("sdpa"), steps=20, masked=True)
    assert forced > 0.99 * np.log(12) and generated == pytest.approx(forced, abs=1e-5)


@pytest.fixture(scope="module")
def fresh():
    return replication.side_by_side("sdpa", {})


def test_side_by_side_shows_both_and_what_a_mask_changes(fresh):
    table = fresh
    assert list(table.columns) == ["published", "published, padded batch", "ours"]
    assert list(table.loc["no output depends on a later token"]) == ["NO", "yes", "yes"]
    assert list(table.loc["another token at 300 moves, of 300 before it"]) == ["300", "0", "0"]
    assert list(table.loc["FLOPs as published, x10¹²"]) == ["1.032", "1.032", "1.013"]
    assert list(replication.definitions("flash")) == ["published", "ours"]


def test_a_check_that_no_record_was_asked_has_no_row(fresh):
    known = {}
    for column, (path, options) in replication.definitions("flash").items():
        older = certificate.certify("sdpa" if column == "ours" else "baseline", {})
        known[path, str(options)] = {**older, "measures": []}
    table = replication.side_by_side("flash", known)
    assert "every weight is trained" in fresh.index and "every weight is trained" not in table.index
    assert "no output depends on a later token" in table.index


def test_reformer_s_borders_move():
    assert replication.moved_by_a_token("lsh")[0] == 0
    assert replication.moved_by_a_token("lsh", chunk_boundaries="reformer")[0] > 100


def test_a_random_state_of_the_caller_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    replication.moved_by_a_token(replication.published("lsh"), layers=1, context=8, at=4)
    assert torch.equal(before, torch.get_rng_state())


LABELS = (*attention.STUDY_ORDER, attention.CONTROL)


def runs(folder, blocks=1, **changes):
    """Certified runs of all eight variants and the control, each metric alike; `changes` are of one."""
    for (label, block), position in places(LABELS, blocks).items():
        record.write(make_record(label, block, position=position, **changes.get(label, {})), folder)
    return compare.groups(record.read(folder))[0].runs


def claims_of(costs, losses=None):
    return replication.table_of_claims(costs, costs if losses is None else losses).set_index("claim")


def test_the_ledger_weighs_every_claim_against_both(tmp_path):
    costs = runs(tmp_path, flash={"energy_j": 3e3, "checkpoint_bytes": 3e3}, linear={"mean_power_w": 150.0})
    claims = claims_of(costs)
    assert len(claims) == len(pd.read_csv(replication.CLAIMS)) and claims.notna().all().all()
    energy = claims.loc["Flash takes the least energy"]
    assert energy["published figures"].startswith("yes: flash 0.843; the others 0.921 to 1.126")
    assert energy["our records"] == (
        "no verdict below 5 blocks: flash 0.750; the others 1.000 to 1.000 (n = 1; A/A: × 1.000, n = 1: noise unknown)"
    )
    assert energy["what the published module does"] == "flash: sees no other token"
    size = claims.loc["Flash makes the smallest model", "our records"]
    assert size == "yes: flash 0.750; the others 1.000 to 1.000 (counted)"


def test_from_five_blocks_up_the_paired_comparisons_decide(tmp_path):
    low = {"flash": {"energy_j": 3e3}, "lsh": {"time_per_epoch_s": 12.0}, "baseline": {"energy_j": 5e3}}
    claims = claims_of(runs(tmp_path, blocks=5, **low))["our records"]
    assert claims["Flash takes the least energy"].startswith("yes: flash 0.750")
    assert claims["LSH trains fastest"].startswith("NO: lsh 1.200") and "n = 5; A/A: × 1.000 [1.000" in claims.iloc[2]
    assert claims["Flash, LSH and latent attention achieve the best energy efficiency"].startswith("inconclusive")
    assert claims["Linear attention draws the most power"].startswith("inconclusive: linear 1.000")  # as do all
    (above,) = (said for claim, said in claims.items() if claim.startswith("Less power need not mean less energy"))
    assert above.startswith("yes: baseline 1.250")


@pytest.mark.parametrize(
    ("ratios", "about", "direction", "says"),
    [
        ([1.0, 0.9, 1.2], ["b"], "lowest", "yes"), ([0.9, 0.9, 1.2], ["b"], "lowest", "NO"),  # a tie is no first place
        ([1.0, 0.9, 1.2], ["c"], "highest", "yes"), ([1.2, 0.9, 1.2], ["c"], "highest", "NO"),
        ([1.0, 1.1, 1.2], ["b", "c"], "above sdpa", "yes"), ([1.0, 0.9, 1.2], ["b", "c"], "above sdpa", "NO"),
    ],
)  # fmt: skip
def test_a_claim_of_numbers_without_noise_is_judged_by_all_that_it_names(ratios, about, direction, says):
    assert replication._yes(pd.Series(ratios, index=list("abc")), about, direction) == says


@pytest.mark.parametrize(
    ("p", "n", "ratio", "says"),
    [
        ((0.01, 0.04), 5, (1.1, 1.2), "yes"), ((0.01, 0.04), 5, (1.1, 0.9), "NO"),
        ((0.01, 0.06), 5, (1.1, 1.2), "inconclusive"), ((0.01, 0.04), 4, (1.1, 1.2), "no verdict below 5 blocks"),
    ],
)  # fmt: skip
def test_a_claim_of_what_was_measured_needs_five_blocks_and_every_difference(p, n, ratio, says):
    found = pd.DataFrame({"p": p, "n": [5, n], "ratio": ratio}, index=["a", "b"])
    assert replication._verdict(None, "energy_j", found, ["a", "b"], "above sdpa") == says


def test_what_has_no_certificate_bears_no_claim_out(tmp_path):
    """Here gqa, which is smaller than flash."""
    found = runs(tmp_path, flash={"checkpoint_bytes": 3e3}, gqa={"checkpoint_bytes": 1e3})
    claim = "Flash makes the smallest model"
    assert claims_of(found).loc[claim, "our records"].startswith("NO: flash 0.750")
    found.loc[found["label"] == "gqa", "certified"] = False
    assert claims_of(found).loc[claim, "our records"].startswith("yes: flash 0.750")


def test_the_final_loss_is_the_mean_of_the_seeds_and_a_loss_in_generation_is_above_nothing(tmp_path):
    found = runs(tmp_path, blocks=2)
    found.loc[found["label"] == "gqa", "validation_loss"] = [5.0, 5.4]
    assert replication.final_losses(found).set_index("variant").loc["gqa", "ours"] == "5.20"
    path = tmp_path / "losses.csv"
    path.write_text("run,teacher_forced_loss,autoregressive_loss\npublished_mla,2.0,8.5\n")
    assert replication.losses_both_ways(path).loc[0, "gap"] == 6.5
    assert replication.leaks(path).loc[0, "lost in generation"] == "6.50"


def test_the_page_s_own_contradiction_stands_in_the_ledger(tmp_path):
    claims = claims_of(runs(tmp_path, blocks=5, linear={"mean_power_w": 150.0}))
    low, high = (claims.loc[f"Linear attention {what} power"] for what in ("is among the lowest in", "draws the most"))
    assert low["published figures"].startswith("NO: linear 1.003") and low["our records"].startswith("yes: linear 0.75")
    assert high["published figures"].startswith("yes") and high["our records"].startswith("NO")


def test_what_was_not_measured_is_said_with_its_reason(tmp_path):
    missing = {"energy_j": None, "energy_per_non_padding_token_j": None, "mean_power_w": None}
    claims = claims_of(runs(tmp_path, **dict.fromkeys(LABELS, missing)))
    assert claims.loc["Flash takes the least energy", "our records"] == "not measured yet: the run used no GPU"
    assert claims.loc["LSH trains fastest", "our records"].startswith("no verdict below 5 blocks: lsh 1.000")


WORST = "Sliding-window attention ends at the highest loss"


def test_a_claim_that_ours_cannot_fail_is_not_tested(tmp_path):
    """A window as long as the row is full attention: the same work, weights and loss."""
    same = {"forward_flops_causal": 7e8, "validation_loss": 5.0004}
    losses = runs(tmp_path / "same", sliding_window=same, lsh={"validation_loss": 4.0})
    said = claims_of(losses).loc[WORST, "our records"]
    assert said == "not tested: at T = 16 ours of sliding_window computes what sdpa does"
    other = {"work": {"forward_flops_causal": 6e8}, "loss": {"validation_loss": 5.1}, "weights": {"parameters": 999}}
    for what, change in other.items():
        losses = runs(tmp_path / what, sliding_window=same | change)
        assert claims_of(losses).loc[WORST, "our records"].startswith("no verdict below 5 blocks")
    losses = runs(tmp_path / "five", blocks=5, sliding_window={"validation_loss": 5.1})
    assert claims_of(losses).loc[WORST, "our records"].startswith("yes: sliding_window 1.020")
    worse = losses.assign(data=[{"bigram_loss": 4.9, "unigram_loss": 6.0}] * len(losses))
    assert claims_of(worse).loc[WORST, "our records"].startswith("no verdict, worse than a bigram table")


def test_the_committed_window_is_not_tested_on_rows_that_it_covers():
    costs, losses = (
        compare.groups(record.read(paths.ROOT / "records" / name))[0].runs for name in ("quick-cpu", "replication-cpu")
    )
    said = claims_of(costs, losses)["our records"]
    assert said[WORST] == "not tested: at T = 32 ours of sliding_window computes what sdpa does"
    assert not said.str.startswith("yes").any()  # at n = 1 nothing that was measured bears a claim out


def test_each_claim_names_variants_and_a_published_figure():
    claims = pd.read_csv(replication.CLAIMS)
    for claim in claims.itertuples():
        assert set(claim.variants.split()) <= set(attention.STUDY_ORDER), claim.claim
        assert claim.figure in replication.OURS and claim.direction in ("lowest", "highest", "above sdpa")


def test_curves_are_drawn_of_both_byte_identical(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "picture", plt.close)  # for a page, which is not asked here
    runs(tmp_path / "records")
    data = {"bigram_loss": 4.5, "unigram_loss": 6.0}
    for label in ("published_mla", "published_sdpa", "published_sdpa_unpadded"):
        record.write(make_record(label, certified=False), tmp_path / "records")
    found = compare.groups(record.read(tmp_path / "records"))[0].runs
    for folder in ("first", "second"):
        figure = replication.loss_curves(found)
        style.save(figure, tmp_path / folder, "losses")
    assert (tmp_path / "first" / "losses.svg").read_bytes() == (tmp_path / "second" / "losses.svg").read_bytes()
    assert [len(axes.lines) for axes in figure.axes] == [1, 3, 1, 1, 1, 1, 1, 2]
    table = replication.final_losses(found).set_index("variant")
    assert list(table.loc["sdpa"]) == ["5.00"] * 3 + ["–"] * 2 and list(table.loc["gqa"]) == ["5.00"] + ["–"] * 4
    found = found.assign(data=[data] * len(found))
    assert list(replication.final_losses(found).set_index("variant").loc["gqa"])[3:] == ["4.50", "6.00"]
    figure = replication.loss_curves(found)
    drawn = {line.get_label(): line.get_ydata()[0] for line in figure.axes[2].lines}
    assert drawn["bigram table, 4.50"] == 4.5
    written = " ".join(" ".join(text.get_text() for text in figure.texts).split())
    assert "says nothing about attention" in written


def test_the_command_says_what_it_cannot_do(tmp_path, capsys):
    out = tmp_path / "losses.csv"
    words = ["params/replication.yaml", "--write", str(out), "--labels", "beauty"]
    assert leakage.main(words) == 2 and not out.exists()
    assert "has no run 'beauty'; it has: baseline" in capsys.readouterr().err


def test_the_profile_trains_each_definition_beside_ours():
    overrides, about = plan.read_profile("params/replication.yaml")
    runs = [run["values"] for run in plan.runs_of(overrides, about["variants"], 1)]
    pairs = {(run["attention"], run["label"]) for run in runs}
    for name in attention.STUDY_ORDER:
        assert {(name, ""), (replication.published(name), f"published_{name}")} <= pairs


def test_the_committed_losses_are_of_the_committed_runs():
    """Trained a second time, each is where its record left it; and those that are causal lose nothing."""
    folder = paths.from_root("records/replication-cpu")
    runs = record.read(folder).set_index("label")
    found = pd.read_csv(folder / "leakage_losses.csv").set_index("run")
    for label, losses in found.iterrows():
        assert losses["teacher_forced_loss"] == pytest.approx(runs.loc[label, "validation_loss"], abs=0.01)
        if runs.loc[label, "certified"]:
            assert losses["autoregressive_loss"] == pytest.approx(losses["teacher_forced_loss"], abs=1e-3)
    causal = runs[runs["certified"]]["validation_loss"].min()
    for leaking in ("published_mla", "published_sdpa_unpadded"):
        assert found.loc[leaking, "teacher_forced_loss"] < 0.6 * causal
        assert found.loc[leaking, "autoregressive_loss"] > 1.5 * causal
