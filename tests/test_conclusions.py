"""What a notebook concludes follows from its records: other records, another sentence; too few, and it says so."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from make import learning, make_record, places
from test_growth import points
from test_probes import cell, made

from lib import attention, paths, record
from lib.analysis import compare, conclusions, replication, style, tables, words
from lib.measure import assemble
from lib.study import plan

LABELS = ("sdpa", "sdpa_again", "gqa", "linear", "mla", "lsh")
NOISE = np.random.default_rng(1).normal(0, 0.003, (len(LABELS), 8))
NOISE -= NOISE.mean(axis=1, keepdims=True)  # so that none differs by chance


def concluded(folder, ratios, blocks=8, **told):
    """`conclusions.of_runs` of made-up blocks in which a variant takes `ratios` of SDPA's time; `told`: by label."""
    for (label, block), position in places(LABELS, blocks).items():
        ratio = ratios.get(label, 1.0)
        time_s = (ratio(block) if callable(ratio) else ratio) * np.exp(NOISE[LABELS.index(label), block])
        metrics = {"time_per_epoch_s": time_s, "energy_j": None, "validation": learning()} | told.get(label, {})
        record.write(make_record(label, block, position=position, **metrics), folder)
    return conclusions.of_runs(compare.groups(record.read(folder))[0])


def test_the_cheapest_is_named_with_how_large_and_how_sure(tmp_path):
    said = concluded(tmp_path, {"gqa": 0.8, "linear": 0.5, "mla": 1.3})
    assert said.answer[0].startswith("Least training time: linear, ÷ 2.0")
    assert said.answer[0].endswith("] than sdpa.") and len(said.answer) == 1  # joules were not measured
    assert f"{said.of}: Least training time" in said.shown().data and "on a GPU" in said.of
    told = said.details[0]
    assert told.startswith("Training time beside sdpa's: significantly less: linear ÷ 2.0")
    assert "and gqa 20.0 % less [" in told
    assert "significantly more: mla 3" in told and "equivalent within 2 %: lsh " in told
    assert "8 whole blocks" in said.rests_on and "n = 8" in said.rests_on and "on a GPU" in said.rests_on
    assert "Joules: not measured: the run used no GPU." in said.not_shown


def test_two_that_are_not_told_apart_share_the_place_and_other_records_have_another_answer(tmp_path):
    both = concluded(tmp_path / "both", {"gqa": 0.5, "linear": 0.5})
    assert "(which share the place)" in both.answer[0] and "gqa" in both.answer[0] and "linear" in both.answer[0]
    none = concluded(tmp_path / "none", {})
    assert none.answer == ["No variant takes significantly less training time than sdpa."]
    torn = concluded(tmp_path / "torn", {"gqa": lambda block: 0.98 * 1.2 ** (-1) ** (block // 2)})
    assert torn.answer == none.answer and "inconclusive: gqa" in torn.details[0]


def test_what_fails_its_certificate_and_the_control_are_no_answer(tmp_path):
    ratios = {"linear": 0.2, "sdpa_again": 0.3, "gqa": 0.9}
    said = concluded(tmp_path, ratios, linear={"certified": False})
    assert said.answer[0].startswith("Least training time: gqa, ") and "linear" not in " ".join(said.details)
    assert "A/A control × 0.3" in said.rests_on


@pytest.mark.parametrize("blocks", [1, 4])
def test_below_five_blocks_nothing_is_told_but_what_is_counted(blocks, tmp_path):
    said = concluded(tmp_path, {"linear": 0.2}, blocks, gqa={"cache_bytes": 2.5e5}, sdpa={"cache_bytes": 2**20})
    counted = f"{blocks} whole block{'s' if blocks > 1 else ''}"
    assert said.answer == [f"Which attention costs least, these runs do not say: {counted}, and a verdict needs 5."]
    assert "linear" not in " ".join([*said.answer, *said.details])  # the fastest by far, of too few blocks
    assert "gqa keeps the smallest cache, 0.238 MiB of a sequence of 16 tokens instead of 1 MiB." in said.details[1]
    assert "; the study's command with --blocks 10 makes enough of them" in said.details[0]  # not the quick study


@pytest.mark.parametrize("variants", [*range(2, 9)])
def test_the_page_proposes_as_many_blocks_as_the_plan_does(variants):
    names = attention.STUDY_ORDER[:variants]
    runs = pd.DataFrame({"label": [*names, attention.CONTROL], "profile": "quick"})
    (proposed,) = re.findall(r"--blocks (\d+) gives|, and their multiples: --blocks (\d+)\)", plan._about(1, variants))
    command = "python -m lib.study" if variants == 8 else "the study's command with"
    assert conclusions._command(runs) == f"{command} --blocks {max(proposed)}"
    assert conclusions._command(runs.assign(profile="paper")).startswith("the study's command with --blocks ")


def test_joules_have_an_answer_of_their_own_where_they_were_counted(tmp_path):
    energy = {label: {"energy_j": 1e3 * (0.5 if label == "mla" else 1)} for label in LABELS}
    said = concluded(tmp_path, {"gqa": 0.8}, **energy)
    assert said.answer[1].startswith("Least joules: mla, ÷ 2.00") and "Joules" not in said.not_shown


def test_a_loss_counts_only_below_the_bigram_table(tmp_path):
    data = {"unigram_loss": 7.0, "bigram_loss": 6.0}
    told = {label: {"data": data, "validation_loss": 4.0 if label == "mla" else 5.0} for label in LABELS}
    said = concluded(tmp_path / "below", {}, **told)
    lower = "Validation loss beside sdpa's, paired: significantly lower: mla -1.000 nats [-1.000, -1.000], p < 0.001"
    assert said.details[-1].startswith(lower)
    worse = {label: {"data": data, "validation_loss": 6.5} for label in LABELS}
    assert "says nothing about attention" in concluded(tmp_path / "above", {}, **worse).details[-1]


METRICS = ["forward_backward_s"]
COSTS = {"sdpa": lambda t: t, "linear": lambda t: 64 * t**0.5, "mla": lambda t: t * 2}


def of_lengths(costs=COSTS, **how):
    return conclusions.of_lengths(points(costs, **{"n": 3, "noise": 0.005} | how), METRICS, "sdpa", "a machine")


def test_of_lengths_that_the_reference_was_not_measured_at_nothing_is_told():
    found = points({"sdpa": lambda t: t, "mla": lambda t: 2 * t}, n=3, noise=0.005)
    apart = found[(found["label"] == "sdpa") == (found["context"] == found["context"].min())]
    said = conclusions.of_lengths(apart, METRICS, "sdpa", "a machine")
    assert said.answer == [
        "Which attention is cheaper at which length, these points do not say: nothing stands beside the reference."
    ]


def test_of_lengths_both_ends_are_told_and_who_is_surely_cheaper_there():
    said = of_lengths()
    assert said.answer[0].startswith("At 256 tokens nothing is surely cheaper than sdpa (forward and backward")
    assert said.answer[1].startswith(
        "At 8,192 tokens cheaper than sdpa (forward and backward of one layer): linear, 29"
    )
    assert "mla" not in " ".join(said.answer) and "mla 2.0" in said.details[0]
    assert said.rests_on.startswith("a machine. 3 processes for each point allow")
    torn = of_lengths({"sdpa": lambda t: t, "linear": lambda t: 0.9 * t}, noise=0.3)
    assert all("nothing is surely cheaper" in one for one in torn.answer)
    (short, _) = of_lengths({"sdpa": lambda t: t, "mla": lambda t: t / 2}).answer
    assert short.startswith("At 256 tokens cheaper than sdpa (forward and backward of one layer): mla, ÷ 2.0")


def test_of_one_process_for_each_point_nothing_is_claimed():
    said = of_lengths(n=1, noise=0)
    assert said.answer == ["Which attention is cheaper at which length, these points do not say: n = 1."]
    assert not said.details and "nothing is claimed" in said.rests_on


def test_of_the_tasks_who_recalls_and_who_forgets():
    found = made(cell("gqa", (1.0, 1.0, 0.99), state=500), cell("sliding_window", (0.1, 0.0, 0.0), state=120))
    said = conclusions.of_capability(found)
    assert "; GQA with 50% of SDPA's memory" in said.answer[0]
    assert (
        any("SLIDING_WINDOW 0.00 (0.10 of 8 pairs)" in one for one in said.details) and "Medians over" in said.rests_on
    )
    more = made(*[cell(name, (1.0, 1.0, 0.97), seed=seed) for name in ("gqa", "sliding_window") for seed in range(3)])
    more["setting"] = more["setting"].str.replace('"steps":800', '"steps":3200')
    (line,) = (one for one in conclusions.of_capability(found, more).details if "SLIDING_WINDOW" in one)
    assert "SLIDING_WINDOW 0.00 (0.10 of 8 pairs), after 3,200 steps 0.97 [0.97, 0.97]" in line
    assert "800 steps of training where no more are said" in conclusions.of_capability(found, more).rests_on
    assert "no more are said" not in said.rests_on
    assert line.startswith("Half or more, by the longest training, at the best rate")
    for fewer in (more.query("seed < 2"), found):  # too few seeds, or no more steps
        assert all("after" not in one for one in conclusions.of_capability(found, fewer).details)
    nobody = conclusions.of_capability(made().query("label != 'sdpa'"))
    assert nobody.answer == ["Recall cannot be judged from these records: SDPA does not solve it in them."]
    assert nobody.rests_on


MODULES = pd.DataFrame(
    [("sdpa", "Scaled", "without padding", 211), ("linear", "Linear", "always", 211), ("flash", "Flash", "never", 0),
     ("gqa", "Grouped", "never", 211), ("lsh", "Hashed", "never", 31)],
    columns=["name", "module", "sees_future", "seen_by"],
).assign(projects=[False, False, False, True, False], agrees=True, weights=0.75)  # fmt: skip


def both_ways(folder, **losses):
    rows = [f"{run},{forced},{written}" for run, (forced, written) in losses.items()]
    path = folder / "losses.csv"
    path.write_text("\n".join(["run,teacher_forced_loss,autoregressive_loss", *rows]))
    return replication.losses_both_ways(path)


def test_of_the_published_study_who_sees_the_future_and_what_it_costs(tmp_path):
    losses = {"sdpa": (4.8, 4.801), "published_sdpa_unpadded": (0.37, 10.17), "published_flash": (4.77, 4.77)}
    said = conclusions.of_replication(both_ways(tmp_path, **losses), MODULES, "small models")
    assert said.answer == [
        "2 of 5 published modules see the tokens that they are to predict: Linear always, Scaled in a batch without "
        "padding.",
        "Loss in one pass, where they see them, against token by token, where they cannot, in nats: Scaled 0.37 "
        "against 10.17; ours differ by 0.00.",
    ]
    assert (
        said.details[0] == "In Hashed each token is seen by 31 of those behind it and in Flash no token sees another."
    )
    assert said.details[1].startswith("4 of 5 have no output projection")
    sound = conclusions.of_replication(
        both_ways(tmp_path, published_sdpa=(5, 5)), MODULES.assign(sees_future="never"), ""
    )
    assert sound.answer == ["None of the 5 published modules sees a token that it is to predict."]


def test_the_finding_draws_the_losses_and_marks_what_a_name_does_not_promise(tmp_path):
    losses = {"sdpa": (4.8, 4.8), "published_sdpa_unpadded": (0.37, 10.17)}
    figure = replication.finding(both_ways(tmp_path, **losses), MODULES)
    left, right = figure.axes
    drawn = {(float(x), float(y)) for line in left.lines for x, y in zip(*line.get_data(), strict=True)}
    assert {(0.37, 0.0), (10.17, 0.0), (4.8, 0.0)} <= drawn
    assert {"0.37", "10.17"} <= {text.get_text() for text in left.texts}
    marked = [text.get_text() for text in right.texts if text.get_text().endswith(" !")]
    assert marked == [
        "without padding !",
        "none !",
        "always !",
        "none !",
        "0 of 211 !",
        "none !",
        "31 of 211 !",
        "none !",
    ]
    assert "0.37 in one pass, 10.17 token by token" in figure.alternative


def test_the_published_modules_are_what_their_files_compute():
    found = replication.modules(replication.certificates(record.read(paths.ROOT / "records" / "replication-cpu")))
    found = found.set_index("name")
    assert found["sees_future"].to_dict() == {
        "baseline": "never", "sdpa": "without padding", "gqa": "never", "linear": "always",
        "sliding_window": "without padding", "lsh": "without padding", "flash": "never", "mla": "always",
    }  # fmt: skip
    assert found.loc["sliding_window", "seen_by"] == 3 and found.loc["flash", "seen_by"] == 0
    assert list(found.index[~found["agrees"]]) == ["lsh"] and list(found.index[found["projects"]]) == ["baseline"]


def test_the_readme_s_correction_is_what_the_committed_records_say():
    page = " ".join((paths.ROOT / "README.md").read_text().split())
    folders = ("replication-cpu", "quick-cpu")
    known = replication.certificates(*(record.read(paths.ROOT / "records" / folder) for folder in folders))
    leaks = replication.losses_both_ways(paths.ROOT / "records" / "replication-cpu" / "leakage_losses.csv")
    modules = replication.modules(known)
    assert conclusions.correction(leaks, modules) in page and conclusions.losses_both_ways(leaks, modules) in page
    assert f"![{style.alternative(replication.finding(leaks, modules))}](figures/replication_finding.png)" in page
    assert "0.37 against 10.17" in page and "2.18 against 8.55" in page
    assert "4.73 against 5.47; ours differ by 0.00" in page


def test_a_run_says_what_is_flagged_what_could_not_be_asked_and_that_it_is_one():
    check = {"value": None, "limit": None}
    checks = [check | {"check": "clock", "verdict": "green", "says": "the clock held"}]
    checks += [check | {"check": name, "verdict": "null", "says": "the run used no GPU"} for name in ("idle", "heat")]
    (answer,), rest = assemble.in_words(make_record("gqa", checks=checks, energy_j=None, time_s=12.0))
    assert answer == "Self-check: green."
    assert rest[0] == "Not to be asked here (the run used no GPU): idle, heat."
    assert "12 s for 4 steps, joules not measured (the run used no GPU), a validation loss of 5.000 nats" in rest[1]
    assert "n = 1" in rest[2]
    checks.append(check | {"check": "neighbours", "verdict": "flagged", "says": "2 other processes seen"})
    flagged, _ = assemble.in_words(make_record("gqa", checks=checks, flags=["neighbours"]))
    assert flagged == [
        "Self-check: 1 of 2 checks flagged; use this run with care.",
        "neighbours: 2 other processes seen.",
    ]


def test_a_conclusion_is_shown_whole_and_as_text():
    said = conclusions.Conclusion(["A <b>."], ["", "C."], "n = 8", "much").shown().data
    assert "<b>A &lt;b&gt;.</b>" in said and "<p></p>" not in said
    assert "Rests on: n = 8" in said and "Not shown: much" in said


def test_the_main_table_has_no_column_that_says_nothing(tmp_path):
    told = {label: {"energy_per_non_padding_token_j": None} for label in LABELS}
    concluded(tmp_path / "one", {}, 1, **told)
    one = tables.main(compare.groups(record.read(tmp_path / "one"))[0].runs)
    assert not {"rank", "n", "verdict", "verdict on the loss", "mJ per token", "flagged"} & set(one)
    assert {"variant", "s per epoch", "ratio to SDPA"} <= set(one)
    concluded(tmp_path / "eight", {}, **told)
    eight = tables.main(compare.groups(record.read(tmp_path / "eight"))[0].runs)
    assert {"rank", "n", "verdict"} <= set(eight) and "mJ per token" not in eight


@pytest.mark.parametrize(
    ("count", "says"),
    [(34_000, "33.2 KiB"), (2**20, "1 MiB"), (1152 * 2**20, "1,152 MiB"), (8.87 * 2**30, "8.87 GiB")],
)
def test_bytes_have_the_unit_that_leaves_few_digits(count, says):
    assert words.size(count) == says


@pytest.mark.parametrize(
    ("ratio", "low", "high", "says"),
    [
        (0.979, 0.972, 0.986, "2.1 % less [1.4, 2.8]"),
        (3.3, 3.2, 3.4, "× 3.3 [3.2, 3.4]"),
        (0.5, np.nan, np.nan, "÷ 2.00"),
    ],
)
def test_a_ratio_has_its_words_and_its_interval(ratio, low, high, says):
    assert words.cost(SimpleNamespace(ratio=ratio, low=low, high=high)) == says
