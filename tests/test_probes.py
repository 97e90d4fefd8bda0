"""Probes: the net, the plan, a tiny grid run and resumed, and what the tables and sentences say of known records."""

import json
import math
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib import attention, record
from lib.analysis import capability
from lib.data.tasks import TASKS
from lib.errors import UsageError
from lib.model.probe import BaseConv, ProbeNet
from lib.paths import ROOT
from lib.record import probe
from lib.study import plan, probes

DEFAULTS = {name: line.default for name, line in plan.known_parameters("capability.ipynb").items()}
TINY = DEFAULTS | {
    "variants": ["sdpa", "linear"],
    "rates": [1e-3, 3e-3],
    "steps": 1,
    "processes": 2,
    "seeds_at_best": 2,
}


@pytest.fixture(autouse=True)
def few_tests(monkeypatch):
    monkeypatch.setattr(probes, "TEST_SEQUENCES", 8)


def net_of(name, task="induction", **options):
    torch.manual_seed(0)
    return ProbeNet([(name, options)], 16, 32, 2, 64, True, True, False)


@pytest.mark.parametrize("name", attention.variants())
def test_no_logit_depends_on_a_later_token(name):
    net, ids = net_of(name).eval(), torch.randint(1, 16, (2, 24))
    changed = ids.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 16
    with torch.no_grad():
        moved = (net(ids) - net(changed)).abs().amax((0, 2))  # (T,)
    assert moved[:15].max() < 1e-5 < moved[15:].max()


def test_only_what_is_asked_for_gets_logits():
    net, ids = net_of("sdpa"), torch.randint(1, 16, (3, 24))
    asked = torch.rand(3, 24) < 0.2
    torch.testing.assert_close(net(ids, asked), net(ids)[asked])


def test_the_convolution_is_of_the_last_three_tokens_times_a_projection():
    conv, x = BaseConv(4), torch.randn(1, 6, 4)
    kernel = conv.conv.weight[:, 0]  # (C, 3)
    padded = torch.cat([torch.zeros(1, 2, 4), x], dim=1)
    mixed = sum(kernel[:, i] * padded[:, i : i + 6] for i in range(3)) + conv.conv.bias
    torch.testing.assert_close(conv(x), mixed * conv.projection(x))


def test_weights_start_as_the_setting_says_for_every_variant():
    for name in attention.variants():
        for key, weight in net_of(name).named_parameters():
            if weight.dim() >= 2 and weight.numel() > 500:
                expected = 0.02 if key.startswith("embedding") else 1 / math.sqrt(32)
                assert weight.std().item() == pytest.approx(expected, rel=0.15), (name, key)


def test_state_bytes_are_what_the_mixers_count_and_a_pattern_s_are_their_sum():
    pattern = [("sliding_window", {"window": 16}), ("sdpa", {})]
    net = ProbeNet(pattern, 16, 32, 2, 64, True, False, False)
    assert net.state_bytes(64) == 2 * 32 * 15 * 4 + 2 * 32 * 64 * 4
    assert net_of("linear").state_bytes(64) == net_of("linear").state_bytes(8) == 2 * (16 * 16 + 16) * 4


def test_a_grid_is_run_each_cell_once_and_more_seeds_at_the_best_rate(tmp_path):
    made, said = probes.checked(TINY), []
    assert probes.run_all(made, tmp_path, said.append) == []
    found = probe.frame(probe.load_all(tmp_path))
    assert len(found.groupby(["label", "rate", "seed"])) == 2 * 2 + 2 * 1  # both rates, and a second seed at one each
    assert (found[found["seed"] == 1].groupby("label")["rate"].nunique() == 1).all()
    assert found["state_bytes"].notna().all() and set(found["difficulty"]) == set(TASKS["recall"].tested_on)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    (gone, *_) = before
    gone.unlink()
    said.clear()
    probes.run_all(made, tmp_path, said.append)
    assert sum("[1/1]" in line for line in said) == 1  # what is missing, and nothing else
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json") if path != gone} == {
        path: content for path, content in before.items() if path != gone
    }
    again, first = json.loads(gone.read_text()), json.loads(before[gone])
    assert (again["results"], again["curve"]) == (first["results"], first["curve"])  # the same cell, the same numbers


def test_a_cell_that_fails_leaves_a_record_that_says_why_and_stops_nothing(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from lib.attention.sdpa import Attention as Sdpa\n\n\nclass Attention(Sdpa):\n"
        "    def forward(self, hidden_states, **_):\n        raise RuntimeError('no such thing')\n"
    )
    values = TINY | {"variants": [str(tmp_path / "mine.py"), "sdpa"], "rates": [1e-3], "seeds_at_best": 1}
    failed = probes.run_all(probes.checked(values), tmp_path / "out", lambda _: None)
    found = probe.frame(probe.load_all(tmp_path / "out"))
    lost = found[found["label"] == "mine"]
    assert len(failed) == 1 and list(lost["says"]) == ["RuntimeError: no such thing"] and lost["accuracy"].isna().all()
    assert found[found["label"] == "sdpa"]["accuracy"].notna().all()


def test_a_loss_that_is_not_finite_is_a_result_of_its_own():
    (cell,) = probes.cells(probes.checked(TINY | {"variants": ["sdpa"], "rates": [1e30], "steps": 20}))
    found = probes.run(cell)
    assert found.outcome == "loss_not_finite" and not found.results and "from step" in found.says


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": ["recal"]}, "there is no task 'recal'; known: recall, "),
        ({"tasks": []}, "tasks: "),
        ({"tasks": [{"task": "recall", "convolution": 1}]}, "convolution of recall must be true or false, not 1"),
        ({"variants": ["sdpa,,linear"]}, "names no attention, or an empty one between commas"),
        ({"variants": ["sdpaa"]}, "Did you mean 'sdpa'"),
        ({"variants": [{"attention": "sliding_window", "options": {"window": 16}}]}, "options of sliding_window go by"),
        ({"variants": [{"attention": "sdpa", "options": {"sdpa": {"window": 16}}}]}, "sdpa has no option 'window'"),
        ({"variants": [{"attention": "sdpa", "option": {}}]}, "there is no parameter 'option'"),
        ({"variants": ["sdpa", "sdpa"]}, "sdpa stands twice for recall"),
        (
            {"variants": [{"attention": "gqa", "options": {"gqa": {"kv_heads": groups}}} for groups in (1, 2)]},
            "two variants or patterns are called 'gqa'; give one of them another label",
        ),
        ({"variants": [{"attention": "sdpa", "label": 3}]}, "label must be str, not 3"),
        ({"variants": [{"attention": "sdpa", "label": ["a"]}]}, "label must be str, not ['a']"),
        ({"variants": [{"attention": ["sdpa"]}]}, "attention must be str, not ['sdpa']"),
        ({"variants": [{"attention": "sdpa", "label": "a\nb"}]}, "label"),
        ({"variants": [{"attention": "lsh", "options": {"lsh": {"chunk_length": {"a": {}}}}}]}, "must be a number"),
        ({"variants": [{"attention": "sdpa", "options": {3: {}}}]}, "there is no parameter 3; known: sdpa"),
        ({"variants": [{"attention": "sdpa", "options": [1]}]}, "options must be dict, not [1]"),
        ({"variants": [{"label": "mine"}]}, "each of variants needs its attention"),
        ({"tasks": [{"task": ["recall"]}]}, "there is no task ['recall']; known: recall, "),
        ({"tasks": [{"task": 3}]}, "there is no task 3; known: recall, "),
        ({"tasks": [{}]}, "there is no task None; known: recall, "),
        ({"tasks": [{"task": "recall", 3: 4}]}, "there is no parameter 3; known: task"),
        ({"rates": [0.0]}, "rates.0: "),
        ({"rates": [1e-3, 1e-3]}, "each rate once"),
        ({"seeds": 0}, "seeds: "),
    ],
)
def test_wrong_words_are_one_sentence(changes, says):
    with pytest.raises(UsageError) as error:
        probes.checked(TINY | changes)
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_file_that_ends_the_program_is_one_sentence(tmp_path, capsys):
    (tmp_path / "leaves.py").write_text("raise SystemExit(5)\n")
    (tmp_path / "few.yaml").write_text(f"variants: [{tmp_path}/leaves.py]\n")
    assert probes.main([str(tmp_path / "few.yaml"), "--plan"]) == 2
    assert "leaves.py cannot be loaded: SystemExit: 5" in capsys.readouterr().err
    with pytest.raises(UsageError, match="cannot be loaded: SystemExit: 5"):
        plan.runs_of({}, [str(tmp_path / "leaves.py")], 1)


def test_the_command_says_what_is_wrong_and_what_it_would_take(tmp_path, capsys):
    assert probes.main([]) == 2 and "--write FOLDER" in capsys.readouterr().err
    (tmp_path / "odd.yaml").write_text("tassks: [recall]\n")
    assert probes.main([str(tmp_path / "odd.yaml")]) == 2 and "did you mean 'tasks'?" in capsys.readouterr().err
    (tmp_path / "few.yaml").write_text("variants: [sdpa]\nrates: [1.0e-3]\nseeds_at_best: 5\n")
    assert probes.main([str(tmp_path / "few.yaml"), "--plan"]) == 0
    assert "1 cells of 1 variants and tasks, 0 finished, and up to 4 more seeds" in capsys.readouterr().out


def test_one_cell_is_run_by_its_name_and_those_of_more_seeds_when_all_rates_are_there(tmp_path):
    made = probes.checked(TINY | {"variants": ["sdpa"], "rates": [1e-3]})
    (first,) = probes.cells(made)
    later = first._replace(seed=1)
    with pytest.raises(UsageError, match="those of more seeds come when all rates are finished"):
        probes.run_one(made, tmp_path, later.name)
    for one in (first, later):
        assert probes.run_one(made, tmp_path, one.name, lambda _: None) == []
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == sorted([first.name, later.name])


def test_snakemake_has_a_job_for_each_cell_and_waits_for_the_rates_before_more_seeds(tmp_path):
    pytest.importorskip("snakemake")
    (tmp_path / "few.yaml").write_text("variants: [sdpa, linear]\nrates: [1.0e-3, 3.0e-3]\n")
    words = ["-s", str(ROOT / "workflow" / "probes.smk"), "--dry-run", "--quiet", "host"]
    for profile, code, says in (("few.yaml", 0, r"cell +4"), ("none.yaml", 1, "snakemake: .*none.yaml")):
        command = [sys.executable, "-m", "snakemake", *words, "--config", f"profile={profile}", "folder=out"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code and re.search(says, done.stdout + done.stderr), done.stderr


def cell(label, scaled, task="recall", rate=1e-3, seed=0, convolution=True, state=1000, **changes):
    """A made-up cell: `scaled` by difficulty, the hardest last."""
    of, net = TASKS[task], TASKS[task].net
    results = [
        {
            "difficulty": difficulty, "context": 128, "state_bytes": state, "scaled_accuracy": value,
            "accuracy": max(0.0, min(1.0, value)),
        }
        for difficulty, value in zip(of.tested_on, scaled, strict=True)
    ]  # fmt: skip
    setting = vars(net) | {
        "task": task, "convolution": convolution, "warmup_share": 0.1, "weight_decay": 0.1, "test_sequences": 8,
    }  # fmt: skip
    values = {
        "name": f"{task}-{label}-{rate}-{seed}-{convolution}", "started_at": record.now(), "finished_at": record.now(),
        "time_s": 1.0, "label": label, "title": label.upper(), "setting": setting, "learning_rate": rate, "seed": seed,
        "pattern": [{"attention": label, "options": {}, "attention_sha256": "0" * 64}], "parameters": 1,
        "environment": {"device": "cpu", "device_name": "a CPU"}, "outcome": "measured", "curve": [],
        "results": results,
    }  # fmt: skip
    return probe.Probe(**values | changes)


def made(*more):
    found = [cell("sdpa", (1.0, 1.0, value), rate=1e-2, seed=seed) for seed, value in enumerate((0.98, 1.0, 0.99))]
    found += [cell("sdpa", (0.2, 0.1, 0.0)), cell("linear", (0.9, 0.8, 0.7), state=250), *more]
    return probe.frame(found)


def test_the_best_rate_counts_with_the_median_of_its_seeds_and_their_range():
    row = capability.summary(made()).query("label == 'sdpa' and hardest").iloc[0]
    assert (row["rate"], row["n"], row["median"], row["low"], row["high"]) == (1e-2, 3, 0.99, 0.98, 1.0)


@pytest.mark.parametrize(
    ("at_8", "at_16", "at_32", "best"),
    [
        ((1.0, 0.2, 0.3), (0.3, 0.2, 0.1), (0.5, 0.9, 0.7), 3e-3),  # the hardest says it
        ((0.0, 1.0, 0.0), (0.0, 0.9, 0.0), (0.02, -0.01, 0.03), 3e-3),  # there all guess: what is less hard
        ((0.0, 1.0, 0.0), (0.1, 0.1, 0.0), (0.0, 0.0, 0.1), 3e-3),  # there too
        ((0.0, 0.1, 0.0), (0.1, 0.1, 0.0), (0.0, 0.0, 0.1), 1e-2),  # all guess everywhere
        ((0.9, 0.5, 0.5), (0.5, 0.5, 0.5), (0.5, 0.6, 0.5), 1e-3),  # half right, and alike
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), 3e-3),  # of equals the middle one
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (0.9, 0.9, 0.2), 1e-3),  # of two the lower one
    ],
)
def test_the_best_rate_is_that_of_the_hardest_that_tells_rates_apart(at_8, at_16, at_32, best, tmp_path):
    """For whom more seeds are run, and in the tables."""
    rates = (1e-3, 3e-3, 1e-2)
    scaled = dict(zip(rates, zip(at_8, at_16, at_32, strict=True), strict=True))
    found = made(*(cell("mla", own, rate=rate) for rate, own in scaled.items()))
    assert set(capability.summary(found).query("label == 'mla'")["rate"]) == {best}
    grid = probes.cells(probes.checked(TINY | {"variants": ["mla"], "rates": list(rates), "seeds": 1}))
    mixer = {"attention": "mla", "options": {}, "attention_sha256": attention.source_sha256("mla")}
    for one in grid:
        own = {"name": one.name, "pattern": [mixer] * len(one.pattern)}
        probe.write(cell("mla", scaled[one.learning_rate], rate=one.learning_rate, **own), tmp_path)
    assert [one.learning_rate for one in probes.best(grid, tmp_path)] == [best]


@given(st.data())
def test_tables_show_the_best_rate_of_any_grid(data):
    """Also of several seeds, and where cells are missing."""
    rates, seeds = (1e-3, 3e-3, 1e-2), (0, 1, 2)
    value = st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0])
    there = data.draw(st.sets(st.sampled_from([(rate, seed) for rate in rates for seed in seeds]), min_size=1))
    tried = [cell("mla", data.draw(st.tuples(value, value, value)), rate=rate, seed=seed) for rate, seed in there]
    scaled: dict = {}
    for one in tried:
        for result in one.results:
            own = scaled.setdefault(result.difficulty, {}).setdefault(one.learning_rate, {})
            own[one.seed] = result.scaled_accuracy
    best, shown = probe.best_rate(scaled), set(capability.at_best(probe.frame(tried))["rate"])
    assert shown == {best} and best in {rate for rate, _ in there}
    if len(there) == len(rates) * len(seeds):  # the rule once more, by another way
        medians = {rate: sorted(own.values())[1] for rate, own in scaled[max(scaled)].items()}
        highest = max(medians.values())
        assert medians[best] == highest or highest <= min(medians.values()) + 0.1


def test_more_seeds_at_one_rate_do_not_choose_it():
    """The best rate is chosen by the seeds that every rate has, or the rate tried most often would have a say more."""
    lucky = [cell("mla", (1, 1, value), rate=3e-3, seed=seed) for seed, value in enumerate((0.4, 1.0, 1.0))]
    row = capability.summary(made(*lucky, cell("mla", (1, 1, 0.5)))).query("label == 'mla' and hardest").iloc[0]
    assert (row["rate"], row["median"]) == (1e-3, 0.5)


def test_a_task_that_sdpa_does_not_solve_is_named_and_not_shown():
    unsolved = made(*(cell(label, (0.5, 0.5, 0.5, 0.4, 0.3), "induction") for label in ("sdpa", "linear")))
    assert capability.shown_tasks(unsolved) == ["recall"]
    assert any(
        "Induction is not shown: sdpa reaches 0.50 where it must reach 0.95" in s for s in capability.remarks(unsolved)
    )
    alone = made(cell("linear", (1, 1, 1), "lookup_key_behind"))
    assert any("sdpa was not tried" in said for said in capability.remarks(alone))
    assert capability.conclusion(probe.frame([cell("sdpa", (0, 0, 0))])) == [
        "Recall cannot be judged from these records: SDPA does not solve it in them."
    ]


def test_the_sentences_follow_from_the_records():
    found = made(cell("gqa", (1.0, 1.0, 0.99), state=500), cell("sliding_window", (0.1, 0.0, 0.0), state=120))
    said = " ".join(capability.conclusion(found))
    assert "GQA and SDPA recall all, from every seed" in said and "; GQA with 50% of SDPA's memory" in said
    assert "Half or more, by the longest training, at the best rate tried: LINEAR 0.70 (0.90 of 8 pairs)." in said
    assert (
        "Less than half, by the longest training, at the best rate tried: SLIDING_WINDOW 0.00 (0.10 of 8 pairs)."
        in said
    )
    assert "Not from every seed" not in said
    assert "Who solves the hardest" not in said
    keys = made(
        *[cell(label, (1.0, 1.0, value), "lookup_key_behind", seed=seed) for label, value in
          (("sdpa", 1.0), ("gqa", 0.94), ("linear", 0.95)) for seed in range(3)],
        *[cell("mla", (1.0, 1.0, 1.0), "lookup_key_behind", seed=seed) for seed in range(2)],  # too few seeds
        *[cell(label, (0.0, 0.0, 0.0, 0.1), "parity") for label in ("sdpa", "gqa")],
    )  # fmt: skip
    assert (
        "Who solves the hardest of each other task from every one of 3 seeds or more: Parity (256 bits): nobody; "
        "Lookup, key behind (30 symbols): SDPA and LINEAR."
    ) in capability.conclusion(keys)
    easier = probe.frame(
        [cell("mla", (1.0, 0.95, 0.9, 0.1), "parity", seed=seed, convolution=False) for seed in range(3)]
    )
    assert "Parity (256 bits): nobody, and of 64 MLA; " in " ".join(capability.conclusion(pd.concat([keys, easier])))
    asked = capability.asked_table(keys).set_index("task")
    assert list(asked.index) == ["Recall (MQAR)", "Parity", "Lookup, key behind"]
    assert asked.loc["Parity", ["trained on", "tested on", "layers", "steps"]].tolist() == [
        "3 to 40 bits", "up to 256", 2, "1,500",
    ]  # fmt: skip
    other = " ".join(capability.conclusion(made(cell("gqa", (0.3, 0.3, 0.3), state=500))))
    assert "Less than half, by the longest training, at the best rate tried: GQA 0.30." in other


def test_what_some_seeds_recall_is_not_said_to_recall_all():
    torn = [cell("gqa", (1.0, 1.0, value), seed=seed, state=9) for seed, value in enumerate((1.0, 0.97, 0.1))]
    first, second, *_ = capability.conclusion(made(*torn))
    assert "SDPA recalls all, from every seed" in first and "GQA" not in first and "memory" not in first
    assert second == "Not from every seed: GQA from 2 of 3 (median 0.97, 0.10 at worst)."
    odd = [cell("sdpa", (1.0, 1.0, value), rate=1e-2, seed=seed) for seed, value in enumerate((1.0, 1.0, 0.5))]
    assert capability.conclusion(probe.frame(odd))[0] == "Of 32 pairs in 128 tokens nobody recalls all from every seed."


def test_where_a_variant_gives_in_is_said_and_never_that_it_cannot():
    tried = {"sdpa": [(1, 1, 1, 1, 1)] * 2, "gqa": [(1, 1, 0.96, 0.9, 0.8), (1, 1, 0.94, 0.9, 0.8)],
             "linear": [(0.96, 0.9, 0.99, 0.5, 0.2)] * 2,
             "mla": [(1, 1, 1, 1, 1), (0.9, 0.9, 0.9, 0.9, 0.4)]}  # fmt: skip
    rows = [
        cell(label, values, "induction", seed=seed) for label, two in tried.items() for seed, values in enumerate(two)
    ]
    said = capability.remarks(made(*rows))
    assert (
        "Induction, up to where every seed has 0.95 or more: 1,024 tokens, the hardest: SDPA; 128 tokens: GQA; "
        "64 tokens: LINEAR; nowhere: MLA (0.95 [0.90, 1.00] at 64, 0.70 at 1,024). Each at the best of 1 rate: what "
        "was not learnt then is not shown to be beyond a variant."
    ) in said
    assert not any("cannot" in one for one in (*said, *capability.conclusion(made(*rows))))


def test_a_best_rate_at_the_edge_of_those_tried_is_said():
    rates = {"gqa": (0.1, 0.2, 0.9), "mla": (0.9, 0.5, 0.5), "lsh": (0.5, 0.9, 0.5)}
    more = [cell(label, (1, 1, value), rate=rate) for label, own in rates.items()
            for rate, value in zip((1e-3, 3e-3, 1e-2), own, strict=True)]  # fmt: skip
    assert [one for one in capability.remarks(made(*more)) if "best rate" in one] == [
        "Recall (MQAR): the best rate is the highest tried, 0.01, of SDPA and GQA and the lowest tried, 0.001, of MLA; "
        "beyond it may lie a better one."
    ]  # linear had one rate, and lsh's lies between


def test_what_computes_sdpa_s_function_is_no_result_of_its_own():
    twin = [cell("flash", (1.0, 1.0, value), rate=1e-2, seed=seed) for seed, value in enumerate((0.98, 1.0))]
    found = made(*twin)
    assert capability.one_function(found) == ["flash"]
    assert "SDPA (and FLASH, the same function) recalls all" in capability.conclusion(found)[0]
    assert any(one.startswith("FLASH computes SDPA's function") for one in capability.remarks(found))
    assert (
        capability.one_function(made(cell("flash", (1.0, 1.0, 1.0), rate=1e-2, seed=1))) == []
    )  # right alike: no proof
    assert capability.one_function(made(*twin, cell("flash", (0.2, 0.1, 0.1)))) == []


def committed() -> pd.DataFrame:
    return probe.frame(probe.load_all(ROOT / "records/capability-cpu"))


def test_every_number_of_the_page_is_of_the_committed_records():
    page = " ".join((ROOT / "docs" / "capability.md").read_text().split())
    said = capability.rate_matters(committed())
    assert page.count(said) == 1, f"docs/capability.md has to say: {said}"
    assert not re.findall(r"\d\.\d|\de-\d", page.replace(said, "")), "a number that nothing holds"


def test_what_the_page_says_of_too_few_steps_is_of_the_committed_records():
    longer = probe.frame(probe.load_all(ROOT / "records" / "capability-steps-cpu"))
    cells = pd.concat([committed(), longer])
    hardest = cells[(cells["task"] == "recall") & cells["convolution"] & (cells["difficulty"] == 32)]
    steps = capability.trained_for(hardest)
    short, long = (hardest[steps == count] for count in (800, 3200))
    begun = short[short["rate"] == 3e-3].groupby("label")["scaled"].agg(["max", "count"]).loc[["mamba2", "retention"]]
    assert begun["max"].max() < 0.05 and set(begun["count"]) == {5}
    best = capability.summary(capability.of_most_steps(longer)).query("hardest").set_index("label")
    assert (best["n"] >= 3).all() and best.loc["sdpa", "low"] > 0.99
    assert 0.4 < capability.summary(short).query("hardest").set_index("label").loc["linear", "median"] < 0.7
    assert best.loc["linear", "low"] > 0.9 and 0.6 < best.loc["gated_deltanet", "median"] < 0.75
    assert 0.45 < best.loc["retention", "median"] < 0.6
    whole = long[long["label"] == "mamba2"]["scaled"]
    assert set(whole > 0.99) == {True, False} and whole[whole <= 0.99].max() < 0.05


def test_how_much_the_rate_matters_is_told_of_who_needs_it_most():
    rows = [("gqa", 1e-3, 0.3), ("gqa", 1e-2, 0.99), ("mla", 1e-3, 0.1), ("mla", 1e-2, 0.9), ("lsh", 1e-3, 0.5)]
    found = made(*(cell(label, (1, 1, value), rate=rate) for label, rate, value in rows))
    assert capability.rate_matters(found) == (
        "In recall of 32 pairs SDPA has 0.99 at rate 0.01 (n = 3), and 0.00 at 0.001 (n = 1); SDPA at its worst rate, "
        "0.001, has 0.20, 0.10 and 0.00 of 8, 16 and 32 pairs (n = 1)."
    )


def test_tables_show_medians_ranges_and_what_was_not_tried():
    found = made(cell("linear", (0.5, 0.5, 0.5), convolution=False), cell("sdpa", (0.0, 0.0, 0.1), convolution=False))
    table = capability.tasks_table(found).set_index("variant")
    assert table.loc["SDPA", "Recall (MQAR), 32 pairs"] == "0.99 [0.98, 1.00] (n = 3)"
    assert table.loc["LINEAR", "Recall (MQAR), 32 pairs"] == "0.70 (n = 1)"
    both = capability.convolution_table(found).set_index("variant")
    assert (
        both.loc["SDPA", "without"] == "0.10 (n = 1)" and both.loc["LINEAR", "with the convolution"] == "0.70 (n = 1)"
    )
    assert (
        capability.convolution_table(made()) == "Recall with and without the convolution: not tried in these records."
    )
    rates = capability.rates_table(found).set_index("variant")
    assert rates.loc["SDPA", "rate 0.001"] == "0.00 (n = 1)" and rates.loc["LINEAR", "rate 0.01"] == "–"
    by = capability.difficulty_table(found).set_index("variant")
    assert by.loc["LINEAR", "scaled accuracy by difficulty"] == "8: 0.90, 16: 0.80, 32: 0.70"
    published = capability.published_table(found)
    assert published[published["mixer"] == "LINEAR"]["numbers kept"].tolist() == ["62"]


def test_a_label_of_one_s_own_says_what_it_stands_for():
    mixer = {"attention": "here/mine.py", "options": {"gate": False, "taps": [1, 2]}, "attention_sha256": "0" * 64}
    own = cell("short", (0.9, 0.8, 0.7), title="short", pattern=[mixer, mixer])
    assert capability.remarks(made(own))[0] == "short is mine (gate: false, taps: [1, 2])."
    plain = cell("linear", (0.9, 0.8, 0.7), title="linear", seed=1)
    assert not any(said.startswith("linear is") for said in capability.remarks(made(plain)))


def test_what_was_not_tried_is_said():
    found = made(*(cell("sdpa", [1.0] * 5, "induction", seed=seed) for seed in range(3)))
    assert "Induction: LINEAR was not tried." in capability.remarks(found)
    assert not any(said.startswith("Recall (MQAR): LINEAR was not") for said in capability.remarks(found))


def test_the_order_of_the_published_figure_is_compared_seed_by_seed():
    window = [cell("sliding_window", (0, 0, value), seed=seed) for seed, value in enumerate((0.1, 0.2))]
    first, why = capability.published_order(made(*window))
    assert "is found again, seed by seed: SDPA 0.99, LINEAR 0.70 and SLIDING_WINDOW 0.15." in first
    assert "Taylor map" in why
    window.append(cell("sliding_window", (0, 0, 0.75), seed=2))
    (first, _) = capability.published_order(made(*window))
    assert "not found again of every seed" in first and "LINEAR and SLIDING_WINDOW overlap" in first
    assert "Too few" in capability.published_order(made().query("label == 'sdpa'"))[0]


def test_every_seed_is_a_point_of_the_figure_at_its_state():
    (axes,) = capability.recall_figure(made()).axes
    points = {
        line.get_label(): line.get_xydata().tolist() for line in axes.lines if not line.get_label().startswith("_")
    }
    assert points["SDPA"] == [[1, value] for value in (0.98, 1.0, 0.99)]
    assert points["LINEAR"] == [[0.25, 0.7]]
    found = made()
    alone = capability.recall_figure(found[found["label"] == "linear"])  # nothing to have a share of
    assert alone.axes[0].lines[0].get_xydata().tolist() == [[250 / 1024, 0.7]] and "KiB" in alone.axes[0].get_xlabel()
    assert 0.99 in {line.get_ydata()[0] for line in axes.lines if line.get_label().startswith("_")}  # the median


def test_who_keeps_about_as_much_stands_side_by_side_in_the_figure():
    kept = pd.Series({"a": 1.0, "low": 0.5, "high": 0.5, "more": 0.55, "b": 0.25})
    at = capability._side_by_side(kept)
    assert at["a"] == 1 and at["b"] == 0.25 and at.sort_values().index.tolist() == ["b", "low", "high", "more", "a"]
    steps = at[["low", "high", "more"]].to_numpy()
    assert steps[1:] / steps[:-1] == pytest.approx(capability.APART) and kept["low"] < at["high"] < kept["more"]


@pytest.mark.parametrize(("factor", "count"), [(1.19, 12), (1.0, 12), (1.02, 9), (1.5, 4)])
def test_nobody_is_drawn_where_others_keep_more_or_far_from_what_it_keeps(factor, count):
    kept = pd.Series({f"mixer {place}": factor**place for place in range(count)})
    at = capability._side_by_side(kept)
    assert at[kept.index].is_monotonic_increasing and at.is_unique
    assert ((at / kept).between(1 / capability.ALIKE, capability.ALIKE)).all()


def test_who_was_trained_longer_is_shown_with_both():
    more = made(
        *[cell(name, (1.0, 1.0, 0.97), seed=seed, rate=3e-3) for name in ("linear", "mla") for seed in range(3)]
    )
    more["setting"] = more["setting"].str.replace('"steps":800', '"steps":3200')
    figure = capability.recall_figure(made(), more)
    (axes,) = figure.axes
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "none" and line.get_marker() != "None"]
    assert [0.97] * 3 in [line.get_ydata().tolist() for line in hollow] and "(hollow: 3,200)" in axes.get_title("left")
    assert not any(
        line.get_markerfacecolor() == "none" for line in capability.recall_figure(made(), made()).axes[0].lines
    )
    table = capability.tasks_table(made(), more).set_index("variant")
    assert table.loc["LINEAR"].iloc[0] == "0.70 (n = 1), after 3,200 steps 0.97 [0.97, 0.97] (n = 3)"
    assert not any(
        "longer" in one for one in capability.conclusion(made(), more)
    )  # of those who recall little, all were
    few = made(cell("gqa", (0.1, 0.1, 0.1)))
    assert "Not trained for longer, so not shown to be unable: GQA." in capability.conclusion(few, more)
    rates = capability.rates_table(made(), more)
    assert rates["task"].unique().tolist() == ["Recall (MQAR)", "Recall (MQAR), 3,200 steps"]
    assert (
        rates.set_index(["task", "variant"]).loc[("Recall (MQAR), 3,200 steps", "MLA"), "rate 0.003"] == "0.97 (n = 3)"
    )
    assert capability.rates_table(made(), made()).equals(capability.rates_table(made()))
    fails = made().assign(scaled=0.2, accuracy=0.2)
    assert not len(capability.rates_table(fails, more))  # SDPA cannot: recall is in no table
    wide = more.assign(setting=more["setting"].str.replace('"width":64', '"width":128'), scaled=0.1)
    wide = wide[wide["label"] == "linear"]
    assert capability.rates_table(made(), pd.concat([more, wide])).equals(rates)
    alone = more[(more["label"] == "linear") & (more["seed"] == 0)]
    alone = alone.assign(setting=alone["setting"].str.replace('"steps":3200', '"steps":6400'), scaled=0.0)
    lone = capability.conclusion(made(), pd.concat([more, alone]))  # puts nobody's results aside
    assert any("after 3,200 steps 0.97" in one for one in lone)
    assert "MLA" not in table.index  # known after more steps alone: in the table of recall


def test_numbers_of_two_authors_are_not_mixed_unasked():
    assert capability.folder_beside("beside", capability.CELLS, capability.LONGER) == capability.LONGER
    assert capability.folder_beside("beside", "records/mine", capability.LONGER) == ""
    assert capability.folder_beside("records/more", "records/mine", capability.LONGER) == "records/more"
    assert capability.folder_beside("", capability.CELLS, capability.TEXT) == ""


def test_a_variant_of_other_options_in_a_task_is_named_there():
    found = made(cell("gqa", (1.0, 1.0, 1.0), title="GQA 2:1"),
                 cell("gqa", (1, 1, 1, 1), "parity", convolution=False, title="GQA 4:1"),
                 cell("sdpa", (0, 0, 0, 0), "parity", convolution=False))  # fmt: skip
    row = capability.tasks_table(found).set_index("variant").loc["GQA 4:1"]
    assert row.tolist() == ["1.00 (n = 1), as GQA 2:1", "1.00 (n = 1)"]
    rates = capability.rates_table(found)
    assert rates.groupby("task", sort=False)["variant"].agg(list).tolist()[0].count("GQA 2:1") == 1


def test_what_is_learnt_here_is_shown_with_its_accuracy():
    shown = probes.learning(["sdpa"], "induction", seconds=0.05)
    assert set(shown["label"]) == {"sdpa"} and shown["accuracy"].nunique() == 1 and shown["loss"].notna().all()
    figure = capability.learning_figure(shown)
    assert "accuracy" in figure.axes[0].get_legend().get_texts()[0].get_text()


def test_a_record_comes_back_as_it_was_and_an_odd_one_is_named(tmp_path):
    one = cell("sdpa", (1, 1, 1))
    path = probe.write(one, tmp_path)
    assert probe.load(path).results == one.results
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.warns(UserWarning, match="was changed after it was written"), pytest.raises(UsageError):
        probe.load_all(tmp_path)
    with pytest.raises(ValueError, match="says why"):
        cell("sdpa", (1, 1, 1), results=[])


def test_rates_without_a_common_seed_are_compared_all_the_same():
    found = made(cell("gqa", (1.0, 1.0, 1.0), seed=0), cell("gqa", (0.5, 0.5, 0.5), rate=1e-2, seed=1))
    assert capability.summary(found).query("label == 'gqa' and hardest")["rate"].item() == 1e-3


def test_cells_of_another_setting_are_left_out_and_counted():
    alike = made()
    other = alike[alike["label"] == "linear"].copy()
    other["setting"] = other["setting"].str.replace('"steps":', '"steps":9')
    other["scaled"] = 0.0
    both = pd.concat([alike, other], ignore_index=True)
    pd.testing.assert_frame_equal(capability.summary(both), capability.summary(alike))
    assert "Left out, of another setting than most of their task: n = 1." in capability.remarks(both)


def test_a_task_whose_reference_was_tried_in_another_way_is_not_shown():
    found = made().assign(task="induction", convolution=False)
    assert capability.shown_tasks(found) == []
    found = made().assign(task="induction", difficulty=1024.0)
    assert capability.shown_tasks(found) == [] and "was not tested" in capability.remarks(found)[0]


def test_recall_stands_beside_the_share_of_sdpa_s_memory_in_as_many_layers():
    def of_layers(count, *given, **changes):
        found = cell(*given, **changes)
        return found.model_copy(update={"setting": found.setting.model_copy(update={"layers": count})})

    pattern = [
        of_layers(4, "linear+sdpa", (1.0, 1.0, 0.97), state=1200, seed=seed, rate=1e-2, title="A + B")
        for seed in range(3)
    ]
    mla = [cell("mla", (1.0, 1.0, 0.96), state=190, seed=seed, rate=1e-2) for seed in range(3)]
    fewer = [mla[0].results[0].model_copy(update={"state_bytes": 50}), *mla[0].results[1:]]  # fewer pairs, fewer tokens
    mla[0] = mla[0].model_copy(update={"results": fewer})
    parity = of_layers(2, "mla", (0.0,) * len(TASKS["parity"].tested_on), "parity")
    found = pd.concat([probe.frame([parity]), made(*pattern, *mla)], ignore_index=True)
    table = capability.recall_table(found).set_index("variant")
    assert list(table.index) == ["MLA", "LINEAR", "A + B", "SDPA"]  # the smallest share first
    assert table["of SDPA's memory"].tolist() == ["19%", "25%", "30%", "100%"]
    assert table.loc["A + B"].tolist() == [4, "30%", f"{1200 / 1024:.3g}", "0.97 [0.97, 0.97] (n = 3)"]
    assert capability.conclusion(found)[0].endswith(
        "; MLA with 19% and A + B with 30% of SDPA's memory in as many layers."
    )
    without = found[found["label"] != "sdpa"]
    assert set(capability.recall_table(without)["of SDPA's memory"]) == {"–"}
    nobody = capability.recall_table(found.assign(task="induction"))
    assert nobody == "Recall and what is kept for it: not tried in these records."


def test_recall_after_more_steps_stands_beside_that_after_the_usual_ones():
    def longer(label, value, seed=0, steps=3200):
        found = cell(label, (1.0, 1.0, value), seed=seed, rate=3e-3)
        return found.model_copy(update={"setting": found.setting.model_copy(update={"steps": steps})})

    cells = made()
    more = probe.frame([longer("linear", value, seed) for seed, value in enumerate((0.9, 0.8, 1.0))])
    usual = probe.frame([longer("mamba2", 0.0, steps=800)])  # in the same folder, for it has no other
    table = capability.recall_table(cells, pd.concat([more, usual])).set_index("variant")
    assert table.loc["LINEAR", "800 steps"] == "0.70 (n = 1)" and table.loc["SDPA", "3,200 steps"] == "–"
    assert table.loc["LINEAR", "3,200 steps"] == "0.90 [0.80, 1.00] (n = 3)" and "MAMBA2" in table.index
    both = pd.concat([more, usual, probe.frame([longer("mamba2", 1.0)])])
    table = capability.recall_table(cells, both).set_index("variant")
    assert table.loc["MAMBA2", ["800 steps", "3,200 steps"]].tolist() == ["0.00 (n = 1)", "1.00 (n = 1)"]
    assert "3,200 steps" not in capability.recall_table(cells, cells)
    assert len(capability.of_most_steps(both)) == 4 * 3
