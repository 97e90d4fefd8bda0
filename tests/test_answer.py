"""The answer: every sentence, cell and mark follows from the records, and changes with them."""

import math
import re

import numpy as np
import pandas as pd
import pytest
from test_probes import cell
from test_steps import made_record

from lib import attention, paths
from lib.analysis import answer, answer_figure, evidence
from lib.attention import CONTROL
from lib.errors import UsageError
from lib.record import probe, steps

LABELS = ("sdpa", CONTROL, "gqa", "linear", "sliding_window", "mla")
NOISE = np.random.default_rng(0).normal(0, 0.004, (len(LABELS), 8))


def made_steps(ratios: dict, joules=True, **changes) -> steps.Steps:
    """Eight rounds at 512 tokens in which each of LABELS takes `ratios` of SDPA's time; joules go the other way."""
    seconds = {
        label: [ratios.get(label, 1.0) * math.exp(noise) for noise in NOISE[i]] for i, label in enumerate(LABELS)
    }
    counted = {label: [1 / value for value in values] for label, values in seconds.items()}
    found = made_record(seconds, counted if joules else None)
    entries = [
        entry.model_copy(update={"attention": "sdpa" if entry.label == CONTROL else entry.label})
        for entry in found.entries
    ]
    return found.model_copy(update={"entries": entries} | changes)


def made_cells(**recalled):
    """Three seeds of recall for each label; two layers of SDPA and what it needs to be shown."""
    recalled = {"sdpa": 1.0, "gqa": 1.0, "mla": 0.99, "linear": 0.3, "sliding_window": 0.0} | recalled
    return probe.frame([
        cell(label, (1.0, 1.0, max(0.0, value - 0.01 * seed)), seed=seed, rate=3e-3)
        for label, value in recalled.items() for seed in range(3)
    ])  # fmt: skip


def say(ratios, cells=True, **changes):
    found = evidence.Evidence(made_steps(ratios, **changes), made_cells() if cells is True else cells)
    return found, " ".join(answer.sentences(found))


def test_where_nothing_is_faster_the_answer_is_sdpa():
    found, said = say({})
    assert "**At 512 tokens keep SDPA**: nothing trains in significantly less time." in said
    assert found.cheapest(512, evidence.TIME, found.others).labels == []
    dearer = say({"linear": 1.5, "mla": 1.2})[0]
    assert dearer.cheapest(512, evidence.TIME, dearer.others).labels == []
    assert answer_figure.headline(found) == ["512 tokens: keep SDPA; nothing trains in significantly less time."]


def test_what_is_faster_but_forgets_is_named_with_what_it_recalls_and_what_recalls_with_its_own_saving():
    found, said = say({"linear": 0.2, "gqa": 0.8})
    assert re.search(r"\*\*At 512 tokens, if recall counts, take GQA\*\*: training time (19|20)\.\d % less \[", said)
    assert "**If it does not, LINEAR**: training time ÷ 5.0 [" in said
    recalls = "LINEAR recalls 29% [28%, 30%] of 32 facts after 800 steps of training"  # the median seed
    assert f"; {recalls}." in said
    (headline,) = answer_figure.headline(found)
    assert re.fullmatch(
        r"512 tokens: GQA, training time (19|20)\.\d % less; if recall is not needed LINEAR, ÷ 5\.0\.", headline
    )
    assert answer_figure.headline(say({"linear": 0.2})[0]) == [
        "512 tokens: keep SDPA; if recall is not needed LINEAR, ÷ 5.0."
    ]
    table = answer.limits(found).set_index("if you are limited by")
    row = "time, 512 tokens, recall not needed"
    assert table.loc[row, "pick"] == "**LINEAR**"
    assert table.loc[row, "it costs"].startswith("recalls 29% [28%, 30%], joules × 5.0 [")
    assert table.loc["time, 512 tokens, recall counts", "pick"] == "**GQA**"
    assert [name for name in table.index if name.startswith("time")][-1] == row  # who recalls comes first


def test_what_the_picked_leave_unsolved_of_the_other_tasks_is_said_beside_them():
    """Of tasks that SDPA solves from every seed; a task that it does not says nothing against them."""
    ratios, task = {"gqa": 0.8, "linear": 0.2}, "lookup_key_behind"

    def noted(title="GQA", **solved):
        more = [cell(label, (1.0, 1.0, max(0.0, value - 0.1 * seed)), task, seed=seed, rate=3e-3)
                for label, value in solved.items() for seed in range(3)]  # fmt: skip
        found = pd.concat([made_cells(), probe.frame(more)] if more else [made_cells()], ignore_index=True)
        found.loc[(found["task"] == task) & (found["label"] == "sdpa"), ["accuracy", "scaled"]] = solved.get("sdpa", 1)
        found.loc[found["label"] == "gqa", "title"] = title
        return answer.markdown(evidence.Evidence(made_steps(ratios), found))

    known = "It is one of [2 tasks](notebooks/capability.ipynb), and another may order the variants otherwise"
    title = "*Lookup, key behind*"
    said = noted(sdpa=1.0, gqa=0.5, linear=0.0)
    assert f"{known}: of the one that SDPA solves from every seed GQA answers 40% [30%, 50%] of {title}. T" in said
    in_part, price = " (other tasks it solves in part)", f"| answers 40% [30%, 50%] of {title}"
    assert f"{in_part}. **If it does not, LINEAR**" in said and price in said
    assert f"{price} (tried as GQA 2:1)" in noted("GQA 2:1", sdpa=1.0, gqa=0.5)
    assert f"{known}: {title} is not known of GQA. Time" in noted(sdpa=1.0, linear=0.0)
    for silent in ({"sdpa": 0.9, "gqa": 0.5}, {"gqa": 0.5}, {"sdpa": 1.0, "gqa": 1.3}):
        said = noted(**silent)
        assert f"{known}. Time and joules" in said and in_part not in said and price not in said, silent
    assert "It is one of" not in noted()


def test_what_fails_from_one_seed_does_not_count_as_recalling():
    cells = made_cells(linear=1.0)
    cells.loc[(cells["label"] == "linear") & (cells["seed"] == 2), ["accuracy", "scaled"]] = 0.1
    found, said = say({"linear": 0.2}, cells)
    assert not found.recalls("linear") and found.recall["linear"].median > 0.95
    assert "LINEAR recalls 99% [10%, 100%] of 32 facts" in said


def test_what_is_faster_and_recalls_is_simply_taken():
    _, said = say({"gqa": 0.5, "linear": 0.9})
    assert "**At 512 tokens take GQA**: training time ÷ 2.0" in said and "joules × 2.0" in said


def test_two_that_are_not_told_apart_share_the_place():
    found, _ = say({"gqa": 0.5, "mla": 0.5001})
    assert sorted(found.cheapest(512, evidence.TIME, found.others).labels) == ["gqa", "mla"]


def test_joules_have_a_pick_of_their_own_and_none_where_they_were_not_counted():
    found, _ = say({"gqa": 2.0})  # twice the time, half the joules
    table = answer.limits(found).set_index("if you are limited by")
    row = table.loc["joules, 512 tokens, recall or not"]
    assert row["pick"] == "**GQA**" and row["it saves"].startswith("÷ 2.0") and "time × 2.0" in row["it costs"]
    found, _ = say({"gqa": 2.0}, joules=False)
    assert not answer.limits(found)["if you are limited by"].str.contains("joules").any()
    assert "joules" not in answer.how_sure(found)[0]


def test_who_takes_the_fewest_joules_is_named_where_that_is_another():
    for ratios in ({"gqa": 0.8, "mla": 2.0}, {"gqa": 0.8, "linear": 0.5, "mla": 2.0}):  # joules go the other way
        said = say(ratios)[1]
        assert re.search(
            r"take GQA\*\*: training time (19|20).*; for the fewest joules take MLA: ÷ (1\.9|2\.0)",
            said,
        )
    assert "fewest joules" not in say({"gqa": 0.8})[1] and "fewest joules" not in say({"mla": 2.0}, joules=False)[1]


def test_time_and_joules_share_a_row_where_they_share_pick_and_cost():
    rows = [
        ("time, 512 tokens", "A", "1", "c"),
        ("joules, 512 tokens", "A", "2", "c"),
        ("joules, 8 tokens", "A", "3", "c"),
    ]
    columns = ["if you are limited by", "pick", "it saves", "it costs"]
    short = answer.in_short(pd.DataFrame(rows, columns=columns))
    assert short.to_numpy().tolist() == [
        ["time or joules, 512 tokens", "A", "time 1, joules 2", "c"], ["joules, 8 tokens", "A", "3", "c"],
    ]  # fmt: skip
    for other in (("joules, 512 tokens", "B", "2", "c"), ("joules, 512 tokens", "A", "2", "d")):
        assert len(answer.in_short(pd.DataFrame([rows[0], other], columns=columns))) == 2


def test_what_fails_its_certificate_is_never_picked_and_is_named():
    made = made_steps({"linear": 0.1})
    entries = [e.model_copy(update={"certified": e.label != "linear"}) for e in made.entries]
    found = evidence.Evidence(made.model_copy(update={"entries": entries}), made_cells())
    assert "LINEAR" not in " ".join(answer.sentences(found)) and "linear" not in found.others
    assert answer.how_sure(found)[-1].endswith("not picked: LINEAR.")


def test_the_control_is_no_choice_and_stands_as_the_noise():
    found, said = say({CONTROL: 0.5})
    assert CONTROL not in found.labels and CONTROL.upper() not in said
    assert any(
        line.startswith("Session 1, ") and "SDPA beside itself took ÷ 2.0" in line for line in answer.how_sure(found)
    )
    assert re.search(r"; SDPA beside itself differs by (99|100)\.\d %;", answer.briefly_sure(found))


def test_the_cache_is_what_the_variants_themselves_count_for_the_whole_model():
    found, said = say({})
    assert found.cache["sdpa"] == 2 * 16 * 32_768 * 2  # keys and values, one layer of width 16, two bytes
    assert "**If the KV cache is what you pay for and recall counts, " in said
    assert "**If it does not, SLIDING_WINDOW" in said or "**If it does not, LINEAR" in said  # smaller, and forget


def test_a_pattern_stands_in_sentences_table_and_picture_like_a_variant():
    text = made_steps({"linear": 0.5}).model_dump_json().replace('"label":"linear"', '"label":"linear+sdpa"')
    text = text.replace('"attention":"linear"', '"attention":"linear,sdpa"').replace('"LINEAR"', '"Linear + SDPA"')
    made = steps.Steps.model_validate_json(text.replace('"layers":1', '"layers":2'))
    found = evidence.Evidence(made, made_cells(**{"linear+sdpa": 1.0}))
    said = " ".join(answer.sentences(found))
    assert re.search(r"At 512 tokens take Linear \+ SDPA\*\*: training time ÷ 2\.\d+ \[", said)
    assert answer.limits(found)["pick"].str.contains("Linear + SDPA", regex=False).any()
    each = [2 * 16 * 32_768 * 2, (16 * 8 + 16) * 4]  # keys and values; a state of two heads and its normalizer
    assert found.cache["linear+sdpa"] == sum(each) and found.recalls("linear+sdpa")
    figure = answer_figure.picture(found)
    assert "Linear + SDPA" in [tick.get_text() for tick in figure.axes[0].get_yticklabels()]


def test_of_few_rounds_and_beside_an_sdpa_without_a_certificate_nothing_is_told():
    made = made_steps({"gqa": 0.5})
    few = made.model_copy(update={"rounds": made.rounds[:4]})
    entries = [e.model_copy(update={"certified": e.label != "sdpa"}) for e in made.entries]
    for found in (few, made.model_copy(update={"entries": entries})):
        shown = evidence.Evidence(found, None)
        assert "**At 512 tokens nothing is told**" in answer.sentences(shown)[0]
        assert answer_figure.headline(shown)[0].startswith("512 tokens: not told; ")


def test_what_was_tried_with_another_option_is_named_so():
    cells = made_cells()
    cells.loc[cells["label"] == "sliding_window", "title"] = "WINDOW 16"
    found, said = say({"sliding_window": 0.5}, cells=cells)
    assert "WINDOW 16, tried in its place, recalls 0% of 32 facts" in said
    assert any("SLIDING_WINDOW as WINDOW 16 100%" in line for line in answer.how_sure(found))


def test_what_saves_next_to_nothing_is_said_to():
    _, said = say({"gqa": 0.97})
    assert "**At 512 tokens keep SDPA or save a little with GQA**: training time" in said
    (headline,) = answer_figure.headline(say({"gqa": 0.97})[0])
    assert re.fullmatch(r"512 tokens: SDPA or GQA, training time (2|3)\.\d % less\.", headline)
    assert answer_figure.headline(say({"gqa": 0.8})[0])[0].startswith("512 tokens: GQA, training time")
    made = changed(made_steps({"gqa": 0.97}), "gqa", parameters=0)
    sdpa = next(entry.parameters for entry in made.entries if entry.label == "sdpa")
    found = evidence.Evidence(changed(made, "gqa", parameters=int(0.9 * sdpa)), made_cells())
    assert re.search(r"save a little with GQA \(1\d\.\d % fewer parameters\)\*\*", answer.sentences(found)[0])


def test_a_small_cache_that_costs_time_is_named_with_its_price_and_with_what_costs_none():
    found = evidence.Evidence(made_steps({"mla": 1.3}), made_cells())
    found.cache |= {"mla": 10, "gqa": 20, "sdpa": 100}
    said = answer.sentences(found)[-1]
    assert "**If the KV cache is what you pay for, MLA**" in said
    assert re.search(r", but training time \d\d\.\d % more \[.*\] at 512; at no more time GQA: ", said)
    table = answer.limits(found).set_index("if you are limited by")
    assert table.loc["KV cache, 32,768 tokens, recall or not", "pick"] == "**MLA**"
    assert table.loc["KV cache, 32,768 tokens, recall counts, no more training time", "pick"] == "**GQA**"
    free = evidence.Evidence(made_steps({}), made_cells())
    assert not answer.limits(free)["if you are limited by"].str.contains("no more training time").any()


def test_fewer_parameters_and_a_gpu_that_waits_are_told():
    made = made_steps({"gqa": 0.5}, busy={"sdpa": {512: 0.88}, "gqa": {512: 0.97}})
    entries = [e.model_copy(update={"parameters": 919 if e.label == "gqa" else 1000}) for e in made.entries]
    found = evidence.Evidence(made.model_copy(update={"entries": entries}), made_cells())
    assert answer.limits(found).iloc[0]["it costs"].endswith(", 8.1 % fewer parameters")
    assert any(
        line.startswith("The GPU computed 88% to 97% of a step at 512 tokens") for line in answer.how_sure(found)
    )
    all_busy = found.found.model_copy(update={"busy": {"sdpa": {512: 0.99}}})
    assert not any("Python" in line for line in answer.how_sure(evidence.Evidence(all_busy, None)))


def test_without_probes_nothing_is_said_of_recall():
    found, said = say({"linear": 0.2}, cells=None)
    assert "take LINEAR" in said and "what it recalls is not known" in said
    assert not answer.limits(found)["if you are limited by"].str.contains("recall").any()


def test_a_task_that_sdpa_does_not_solve_is_no_evidence():
    found, said = say({"linear": 0.2}, cells=made_cells(sdpa=0.5))
    assert found.recall == {} and "take LINEAR" in said


@pytest.mark.parametrize(
    ("ratio", "low", "high", "says"),
    [
        (0.5, 0.4, 0.625, "÷ 2.00 [1.60, 2.50]"),
        (0.2, 0.16, 0.25, "÷ 5.0 [4.0, 6.2]"),
        (0.979, 0.972, 0.986, "2.1 % less [1.4, 2.8]"),
        (1.3, 1.25, 1.35, "30.0 % more [25.0, 35.0]"),
        (0.998, 0.996, 1.0001, "0.2 % less [0.0, 0.4]"),
        (4.0, math.nan, math.nan, "× 4.0"),
        (1.25, math.nan, math.nan, "25.0 % more"),
    ],
)
def test_ratios_are_said_as_people_say_them(ratio, low, high, says):
    class Row:
        pass

    row = Row()
    row.ratio, row.low, row.high = ratio, low, high
    assert evidence.cost(row) == says


def test_every_variant_has_its_row_and_every_mark_stands_at_its_number():
    found, _ = say({"linear": 0.2, "gqa": 0.8})
    figure = answer_figure.picture(found)
    recall, time, energy, memory, cache = figure.axes
    assert [tick.get_text() for tick in recall.get_yticklabels()] == [found.title[label] for label in found.labels]
    at = {label: len(found.labels) - 1 - i for i, label in enumerate(found.labels)}
    for axis, metric in ((time, evidence.TIME), (energy, evidence.ENERGY)):
        marks = {
            round(float(line.get_xdata()[0]), 9)
            for line in axis.lines
            if line.get_marker() == "o" and len(line.get_xdata())
        }
        assert marks == {round(float(found.ratio(label, 512, metric).ratio), 9) for label in found.labels}
        bars = [line.get_xdata() for line in axis.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 5]
        row = found.ratio("linear", 512, metric)
        assert any(np.allclose(bar, (row.low, row.high)) for bar in bars)
    medians = {line.get_ydata()[0]: line.get_xdata()[0] for line in recall.lines if line.get_marker() == "|"}
    assert medians == {at[label]: pytest.approx(100 * found.recall[label].median) for label in found.labels}
    assert [patch.get_width() for patch in memory.patches] == [1.0] * len(found.labels)  # GiB
    assert {round(p.get_y() + p.get_height() / 2): p.get_width() for p in cache.patches} == {
        at[label]: pytest.approx(found.cache[label] / 2**20) for label in found.labels
    }


def test_a_number_that_was_not_measured_is_a_sentence_in_its_place():
    found, _ = say({}, joules=False, cells=None)
    words = [text.get_text() for axis in answer_figure.picture(found).axes for text in axis.texts]
    assert "not known" in words and "not measured:\nthe run used no GPU" in words


def test_the_command_writes_between_the_marks_and_nowhere_else(tmp_path, capsys):
    steps.write(made_steps({"linear": 0.2}), tmp_path / "steps.json")
    (tmp_path / "cells").mkdir()
    page = tmp_path / "page.md"
    words = ["--steps", str(tmp_path / "steps.json"), "--cells", str(tmp_path / "cells"), "--page", str(page),
             "--figures", str(tmp_path)]  # fmt: skip
    page.write_text("before, and no place for it\n")
    assert answer.main(words) == 2 and "the page has no place for the answer" in capsys.readouterr().err
    page.write_text(f"before\n{answer.BEGIN} old {answer.END}\nbehind\n")
    assert answer.main(words) == 0 and (tmp_path / "answer.png").is_file()
    first = page.read_text()
    assert first.startswith("before\n") and first.endswith("behind\n") and "take LINEAR" in first and "old" not in first
    assert answer.main(words) == 0 and page.read_text() == first
    assert "Loss of text" not in first  # the committed runs are not these cells' author's
    committed = [*words[:2], *words[4:]]
    assert answer.main(committed) == 0 and "Loss of text" in page.read_text()
    assert answer.main(words) == 0 and page.read_text() == first
    (tmp_path / "steps.json").unlink()
    assert answer.main(words) == 2 and page.read_text() == first
    with pytest.raises(UsageError):
        answer.put("nothing", "x")


def with_a_long_length(made, **failed):
    """The same turns at 8192 tokens too, but for those of `failed`, by why."""
    rounds = [
        one.model_copy(update={"turns": one.turns + [
            turn.model_copy(update={"context": 8192}) for turn in one.turns if turn.label not in failed
        ]}) for one in made.rounds
    ]  # fmt: skip
    sizes = [*made.setting.sizes, made.setting.sizes[0].model_copy(update={"context": 8192})]
    lacks = {label: {8192: why} for label, why in failed.items()}
    setting = made.setting.model_copy(update={"sizes": sizes})
    return made.model_copy(update={"rounds": rounds, "setting": setting, "failed": lacks})


def changed(made, label, **changes):
    entries = [entry.model_copy(update=changes) if entry.label == label else entry for entry in made.entries]
    return made.model_copy(update={"entries": entries})


def test_too_few_rounds_tell_nothing_and_no_turn_is_a_sentence():
    made = made_steps({"linear": 0.2})
    found = evidence.Evidence(made.model_copy(update={"rounds": made.rounds[:4]}), made_cells())
    assert "**At 512 tokens nothing is told**: n = 4, and a verdict needs 5." in answer.sentences(found)
    assert "keep SDPA" not in answer.markdown(found)
    for lacks in ({"rounds": []}, {"entries": [entry for entry in made.entries if entry.label != "sdpa"]}):
        with pytest.raises(UsageError):
            evidence.Evidence(made.model_copy(update=lacks), None)


def test_where_sdpa_has_no_result_or_no_certificate_nothing_is_picked():
    made = made_steps({"linear": 0.2})
    for failed in ({"sdpa": "out of memory"}, dict.fromkeys(LABELS, "out of memory")):
        found = evidence.Evidence(with_a_long_length(made, **failed), made_cells())
        assert "**At 8,192 tokens nothing is told**: SDPA has no result (out of memory)." in answer.markdown(found)
        answer_figure.picture(found)
    found = evidence.Evidence(changed(made, "sdpa", certified=False), made_cells())
    assert "take" not in " ".join(answer.sentences(found)) and found.others == []


def test_no_cost_is_hidden():
    found = evidence.Evidence(with_a_long_length(made_steps({"linear": 0.2}), linear="out of memory"), made_cells())
    row = "time, 512 tokens, recall not needed"
    costs = answer.limits(found).set_index("if you are limited by").loc[row, "it costs"]
    assert costs.startswith("recalls 29% [28%, 30%], joules × 5.0 [") and costs.endswith(
        "no result at 8,192 (out of memory)"
    )
    cells = made_cells()
    found, said = say({"linear": 0.2}, cells=cells[cells["label"] != "linear"])
    assert "; what LINEAR recalls is not known." in said
    costs = answer.limits(found).set_index("if you are limited by").loc[row, "it costs"]
    assert costs.startswith("recall not known")
    _, said = say({"gqa": 1.5}, cells=made_cells(mla=0.0))
    assert re.search(
        r"KV cache is what you pay for and recall counts, GQA\*\*: .*, but training time (49|50)\.\d % more \[", said
    )
    _, said = say({}, cells=made_cells(gqa=0.5, mla=0.5))
    assert "KV cache" not in said  # nobody else recalls
    costs = answer.limits(evidence.Evidence(with_a_long_length(made_steps({"gqa": 0.5})), made_cells()))
    first = costs.set_index("if you are limited by").loc["time, 512 tokens, recall or not", "it costs"]
    assert "at 512" in first and "at 8,192" not in first  # of the row's length


def test_the_headline_picks_whom_the_sentences_pick():
    found, said = say({"gqa": 0.5, "linear": 0.5})
    assert "take GQA**" in said and answer_figure.headline(found) == ["512 tokens: GQA, training time ÷ 2.00."]


def test_titles_alike_are_told_apart_and_marks_in_them_are_shown():
    made = changed(made_steps({"linear": 0.2}), "linear", title="GQA")
    assert evidence.Evidence(made, None).title["linear"] == "GQA (linear)"
    found = evidence.Evidence(changed(made, "linear", title="a|b *c* [d]"), made_cells())
    page = answer.markdown(found)
    assert r"**a\|b \*c\* \[d\]**" in page and "a|b" not in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


def test_a_variant_whose_file_is_gone_has_no_cache_and_is_named():
    found = evidence.Evidence(changed(made_steps({}), "linear", attention="x/linear.py"), made_cells())
    assert math.isnan(found.cache["linear"])
    assert any("none for what is no variant of the study: LINEAR." in line for line in answer.how_sure(found))
    answer_figure.picture(found)


def counted_in_three(label: str, ratios: dict) -> steps.Steps:
    """`made_steps` in which one variant's joules were counted in three of eight rounds."""
    made, nothing = made_steps(ratios), {"energy_j": None, "energy_null_reason": "no_gpu"}
    rounds = [
        one.model_copy(update={"turns": [
            turn.model_copy(update=nothing) if index < 5 and turn.label == label else turn for turn in one.turns
        ]}) for index, one in enumerate(made.rounds)
    ]  # fmt: skip
    return made.model_copy(update={"rounds": rounds})


def test_joules_of_few_rounds_say_how_many_in_what_is_saved_and_in_what_it_costs():
    found = evidence.Evidence(counted_in_three("linear", {"linear": 0.2}), made_cells())
    assert "joules × 5.0 (n = 3)" in answer.sentences(found)[0]
    cost = evidence.Evidence(counted_in_three("mla", {"mla": 0.5}), made_cells()).rises("mla", evidence.ENERGY)
    assert re.fullmatch(r"joules × (1\.99|2\.0\d?) \(n = 3\) at 512", cost)


def test_marks_doubled_or_in_the_wrong_order_are_no_place():
    for page in (answer.END + answer.BEGIN, (answer.BEGIN + answer.END) * 2, answer.BEGIN + answer.BEGIN + answer.END):
        with pytest.raises(UsageError, match="once"):
            answer.put(page, "x")


def test_made_up_steps_and_a_folder_that_is_not_there_are_no_evidence(tmp_path):
    steps.write(made_steps({}), tmp_path / "steps.json")
    with pytest.raises(UsageError, match="no folder"):
        evidence.read(tmp_path / "steps.json", tmp_path / "missing")
    steps.write(made_steps({}, provenance="synthetic"), tmp_path / "made_up.json")
    with pytest.raises(UsageError, match="synthetic"):
        evidence.read(tmp_path / "made_up.json", tmp_path)
    with pytest.raises(UsageError, match="no folder nowhere/ of cells of more training"):
        evidence.read(tmp_path / "steps.json", tmp_path, tmp_path / "nowhere")


def test_the_readme_says_what_the_committed_records_say():
    """A record that changes an answer changes the sentence: `python -m lib.analysis.answer` writes it anew."""
    page = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    found = answer.committed()
    assert answer.put(page, answer.markdown(found)) == page
    assert {entry.label for entry in found.found.entries} == {*attention.STUDY_ORDER, CONTROL}
    assert len(found.all) == len(list((paths.ROOT / answer.STEPS).glob("*.json"))) > 1


def made_beside(ratios: dict, **changes) -> steps.Steps:
    """`made_steps` of another session, five rounds: twice as slow a machine, and `x_` before the variants' labels."""
    made = made_steps({label: 2 * ratios.get(label, 1.0) for label in LABELS}, **changes)
    entries = [
        entry if entry.attention == "sdpa"
        else entry.model_copy(update={"label": f"x_{entry.label}", "title": f"X {entry.title}"})
        for entry in made.entries
    ]  # fmt: skip
    own = {entry.label for entry in entries}
    rounds = [
        one.model_copy(update={"turns": [
            turn if turn.label in own else turn.model_copy(update={"label": f"x_{turn.label}"}) for turn in one.turns
        ]}) for one in made.rounds[:5]
    ]  # fmt: skip
    return made.model_copy(update={"entries": entries, "rounds": rounds})


def test_variants_of_another_session_are_compared_with_its_own_sdpa_and_named_with_its_noise():
    found = evidence.Evidence(made_steps({"gqa": 0.8}), made_cells(), [made_beside({"gqa": 0.5})])
    assert found.ratio("x_gqa", 512, evidence.TIME).ratio == pytest.approx(0.5, rel=0.01)
    assert found.ratio("gqa", 512, evidence.TIME).ratio == pytest.approx(0.8, rel=0.01)
    assert found.cheapest(512, evidence.TIME, found.others).labels == ["x_gqa"]
    line = next(line for line in answer.how_sure(found) if line.startswith("Session 2, 512 tokens: SDPA; "))
    assert "X GQA; X LINEAR; X SLIDING_WINDOW; X MLA. 5 rounds in turns" in line.replace("\\", "")
    assert "not balanced; SDPA beside itself took" in line
    assert "8 rounds (5 for 4 of the variants) in turns" in answer.briefly_sure(found)
    assert answer.how_sure(found)[-1].startswith("9 of 9 variants")
    answer_figure.picture(found)


def test_two_of_different_sessions_share_the_place_where_their_ratios_are_not_told_apart():
    """Welch's t of the ratios by round, since no round has both."""
    apart, same = (
        evidence.Evidence(made_steps({"gqa": 0.5}), made_cells(), [made_beside({"mla": other})])
        for other in (0.55, 0.5005)
    )
    assert apart.cheapest(512, evidence.TIME, apart.others).labels == ["gqa"]
    above, below = (("x_mla", "gqa"), ("gqa", "x_mla"))
    assert apart._told_apart(*above, 512, evidence.TIME, 1) and not apart._told_apart(*below, 512, evidence.TIME, 1)
    assert sorted(same.cheapest(512, evidence.TIME, same.others).labels) == ["gqa", "x_mla"]


def test_steps_of_another_setting_or_device_are_no_evidence_together(tmp_path):
    first, other = made_steps({}), made_beside({})
    elsewhere = other.model_copy(update={"environment": other.environment | {"device_name": "Another"}})
    longer = other.model_copy(update={"setting": other.setting.model_copy(update={"layers": 3})})
    for two in (elsewhere, longer):
        with pytest.raises(UsageError, match="other settings or devices"):
            evidence.Evidence(first, None, [two])
    with pytest.raises(UsageError, match="no record of steps in"):
        evidence.read(tmp_path, tmp_path)
    steps.write(other, tmp_path / "a.json")
    steps.write(first, tmp_path / "b.json")
    found = evidence.read(tmp_path, paths.ROOT / answer.CELLS)
    assert [len(one.rounds) for one in found.all] == [8, 5]


def test_a_record_that_adds_nobody_says_so_and_one_name_for_two_variants_is_refused():
    again = made_steps({"gqa": 0.5})
    found = evidence.Evidence(made_steps({"gqa": 0.8}), made_cells(), [again])
    assert "Session 2: nobody who is not in those before, and left out." in answer.how_sure(found)
    assert found.ratio("gqa", 512, evidence.TIME).ratio == pytest.approx(0.8, rel=0.01)
    entries = [
        one.model_copy(update={"options": {"chunk": 2}}) if one.label == "linear" else one for one in again.entries
    ]
    with pytest.raises(UsageError, match="call different variants linear; give one another label"):
        evidence.Evidence(made_steps({}), None, [again.model_copy(update={"entries": entries})])


def test_nobody_of_a_record_whose_sdpa_is_not_certified_is_picked():
    other = made_beside({"gqa": 0.5})
    entries = [one.model_copy(update={"certified": one.label != "sdpa"}) for one in other.entries]
    other = steps.Steps.model_validate(other.model_dump() | {"entries": [one.model_dump() for one in entries]})
    found = evidence.Evidence(made_steps({"gqa": 0.8}), made_cells(), [other])
    assert found.cheapest(512, evidence.TIME, found.others).labels == ["gqa"] and "x_gqa" not in found.others


def test_at_no_more_time_is_said_of_nobody_whose_time_is_not_known():
    made = made_steps({"mla": 1.3})
    few = made.model_copy(update={"rounds": made.rounds[:3]})
    assert evidence.Evidence(made, made_cells()).is_no_slower("gqa")
    assert not evidence.Evidence(made, made_cells()).is_no_slower("mla")
    assert not evidence.Evidence(few, made_cells()).is_no_slower("gqa")
    failed = with_a_long_length(made, gqa="out of memory")
    assert not evidence.Evidence(failed, made_cells()).is_no_slower("gqa")
    assert any(line.startswith("No result: GQA at ") for line in answer.how_sure(evidence.Evidence(failed, None)))


def test_sessions_name_their_gpus_their_noise_and_their_code():
    one, other = made_steps({}), made_beside({})
    facts = {"gpu": {"uuid": "GPU-2"}, "commit": "b" * 40, "commit_modified": True}
    other = other.model_copy(update={"environment": other.environment | facts})
    found = evidence.Evidence(one, made_cells(), [other])
    said = answer.how_sure(found)
    assert "8 rounds (5 for 4 of the variants) in turns on 2 GPUs of the kind" in answer.briefly_sure(found)
    assert re.search(
        r"; SDPA beside itself differs by 0\.\d( to 0\.\d)? % by session and length;", answer.briefly_sure(found)
    )
    assert any(line.startswith("Session 2, on another GPU of that kind, ") for line in said)
    assert any(line.startswith("Code, by session: ") and "bbbbbbb with changes beyond it" in line for line in said)


def test_a_variant_for_which_the_gpu_waits_is_named_with_its_shares():
    made = made_steps({})
    busy = {"sdpa": {512: 0.9}, "gqa": {512: 0.94}, "linear": {512: 0.4}}
    said = answer.how_sure(evidence.Evidence(made.model_copy(update={"busy": busy}), None))
    assert any(line.startswith("The GPU computed 90% to 94% of a step at 512 tokens;") for line in said)
    assert any(line.startswith("It computed less of a step in LINEAR (40% at 512 tokens), by one") for line in said)


def test_what_a_pattern_keeps_is_told_beside_as_many_layers_of_sdpa():
    cells = made_cells(gqa=1.0)
    of_two = cells["label"] == "gqa"
    cells.loc[of_two, "setting"] = cells.loc[of_two, "setting"].str.replace('"layers":1', '"layers":2')
    cells.loc[cells["label"] == "sdpa", "state_bytes"], cells.loc[of_two, "state_bytes"] = 1000, 500
    found = evidence.Evidence(made_steps({}), cells)
    assert (found.recall["gqa"].layers, found.recall["gqa"].state_share) == (2, 0.25)
    assert any("one layer (two for GQA) behind" in line for line in answer.how_sure(found))
    cells.loc[of_two, "setting"] = cells.loc[of_two, "setting"].str.replace('"layers":2', '"layers":4')
    more = evidence.Evidence(made_steps({}), cells)
    assert any("one layer (four for GQA) behind" in line for line in answer.how_sure(more))


def test_who_recalls_with_less_memory_and_was_not_timed_is_named():
    def said(**recalled):
        cells = made_cells(**recalled)
        kept = {"mla+sdpa": 100, "kda+sdpa": 50, "gqa": 20}  # GQA was timed
        cells["state_bytes"] = cells["label"].map(kept).fillna(200)
        return next(x for x in answer.how_sure(evidence.Evidence(made_steps({}), cells)) if x.startswith("Recall: "))

    both = said(**{"mla+sdpa": 1.0, "kda+sdpa": 1.0, "differential+sdpa": 1.0})
    assert both.endswith(" Not timed, and recalling all from every seed too: KDA+SDPA 25%, MLA+SDPA 50%.")
    assert said(**{"mla+sdpa": 1.0, "kda+sdpa": 0.96}).endswith(" from every seed too: MLA+SDPA 50%.")  # one seed: 0.94
    assert "Not timed" not in said()


def made_longer(ratios: dict, **changes) -> steps.Steps:
    """`made_steps` of another session at 8,192 tokens alone, where a model has more positions."""
    made = made_steps(ratios, **changes)
    size = made.setting.sizes[0].model_copy(update={"context": 8192, "batch_size": 1})
    rounds = [
        one.model_copy(update={"turns": [turn.model_copy(update={"context": 8192}) for turn in one.turns]})
        for one in made.rounds
    ]
    entries = [entry.model_copy(update={"parameters": 5000}) for entry in made.entries]
    setting = made.setting.model_copy(update={"sizes": [size]})
    return made.model_copy(update={"rounds": rounds, "setting": setting, "entries": entries})


def test_a_length_of_another_session_has_its_own_ratios_sentence_row_and_noise():
    longer = made_longer({"gqa": 0.5, "linear": 0.25})
    found = evidence.Evidence(made_steps({"gqa": 0.8}), made_cells(), [longer])
    assert found.lengths == [512, 8192] and found.ratio("gqa", 512, evidence.TIME).ratio == pytest.approx(0.8, rel=0.01)
    assert found.ratio("gqa", 8192, evidence.TIME).ratio == pytest.approx(0.5, rel=0.01)
    said = answer.sentences(found)
    assert "**At 512 tokens take GQA**" in said[0] and "At 8,192 tokens, if recall counts, take GQA**" in said[1]
    assert "**If it does not, LINEAR**: training time ÷ 4.0" in said[1]
    rows = set(answer.limits(found)["if you are limited by"])
    assert len(answer_figure.headline(found)) == 2 and "time, 8,192 tokens, recall counts" in rows
    lines = answer.how_sure(found)
    assert " and 1 x 8,192 tokens" in lines[0]
    session = next(line for line in lines if line.startswith("Session 2, 8,192 tokens: SDPA; "))
    assert re.search(r"8 rounds in turns .*SDPA beside itself took .* at 8,192 tokens, and joules", session)
    assert any(
        re.search(r"A step of SDPA, .* ms and .* J for .* x 512; .* ms .* for 1 x 8,192 tokens", one) for one in lines
    )
    assert "8 rounds (8 at 8,192 tokens)" in answer.briefly_sure(found)
    assert "in session" not in " ".join(said)  # the first of its length
    assert (
        found.weights("gqa", 512) == found.weights("gqa", 8192) == ""
    )  # beside the SDPA of the record that its own entry is of
    answer_figure.picture(found)


def test_who_is_of_a_second_session_of_the_same_length_is_marked():
    found = evidence.Evidence(made_steps({"gqa": 0.8}), made_cells(), [made_beside({"gqa": 0.5})])
    assert found.cheapest(512, evidence.TIME, found.others).ratios[0].endswith("] in session 2")


def test_records_that_disagree_on_a_batch_are_refused_and_a_failure_is_of_its_length():
    longer = made_longer({})
    (size,) = longer.setting.sizes
    setting = longer.setting.model_copy(update={"sizes": [size.model_copy(update={"batch_size": 7})]})
    with pytest.raises(UsageError, match="batches of two sizes at 8,192 tokens"):
        evidence.Evidence(with_a_long_length(made_steps({})), None, [longer.model_copy(update={"setting": setting})])
    rounds = [
        one.model_copy(update={"turns": [turn for turn in one.turns if turn.label != "gqa"]}) for one in longer.rounds
    ]
    failed = longer.model_copy(update={"rounds": rounds, "failed": {"gqa": {8192: "out of memory"}}})
    found = evidence.Evidence(made_steps({"gqa": 0.8}), made_cells(), [failed])
    assert found.failed == {"gqa": {8192: "out of memory"}}
    assert "no result at 8,192 (out of memory)" in answer.limits(found).loc[0, "it costs"]


def test_a_certificate_that_failed_at_one_length_bars_a_variant_at_all():
    longer = changed(made_longer({}), "gqa", certified=False)
    found = evidence.Evidence(made_steps({"gqa": 0.5}), made_cells(), [longer])
    assert "gqa" not in found.others and "mla" in found.others
    assert answer.how_sure(found)[-1].endswith("not picked: GQA.")


def test_of_caches_next_to_nothing_the_fastest_is_picked():
    found = evidence.Evidence(made_steps({"linear": 1.5, "sliding_window": 0.6, "gqa": 0.9}), made_cells())
    found.cache |= {"linear": 1, "sliding_window": 9, "gqa": 500, "mla": 200, "sdpa": 1000}
    assert found.smallest_cache(["linear", "sliding_window", "gqa", "mla"]).labels == ["sliding_window"]
    assert found.smallest_cache(["gqa", "mla"]).labels == ["mla"]  # not next to nothing
    found.cache |= {"sliding_window": 11}
    assert found.smallest_cache(["linear", "sliding_window"]).labels == ["linear"]
    assert found.smallest_cache([]).labels == []


def test_windows_in_which_the_clock_was_held_down_are_counted_with_the_reason():
    made = made_steps({})
    gpu = {
        "samples": 4, "sm_clock_mhz_minimum": 1, "sm_clock_mhz_median": 1, "sm_clock_mhz_maximum": 1,
        "temperature_c_begin": 1, "temperature_c_end": 1, "power_limit_w_minimum": 1.0, "power_limit_w_maximum": 1.0,
        "throttled_share": 0.5, "throttled_by": {"power cap": 0.5},
    }  # fmt: skip
    content = made.model_dump(mode="json")
    for turn in content["rounds"][0]["turns"]:
        turn["gpu"] = gpu
    found = evidence.Evidence(steps.Steps.model_validate(content), None)
    (line,) = [line for line in answer.how_sure(found) if "lowered its clock" in line]
    names = "SDPA_AGAIN; 1 of 8 of SDPA; 1 of 8 of GQA; 1 of 8 of MLA; 1 of 8 of LINEAR; 1 of 8 of SLIDING_WINDOW"
    assert f"(power cap): at 512 tokens in 1 of 8 of {names}." in line
    for one in content["rounds"]:
        one["turns"] = [turn | {"gpu": gpu if turn["label"] == "sdpa" else None} for turn in one["turns"]]
    found = evidence.Evidence(steps.Steps.model_validate(content), None)
    assert any("(power cap): at 512 tokens in all of SDPA. They" in line for line in answer.how_sure(found))
    assert not any("lowered" in line for line in answer.how_sure(evidence.Evidence(made, None)))


def lacking(made, **failed):
    """The record without the turns of those who `failed`, at its only length, and why."""
    context = made.setting.sizes[0].context
    rounds = [
        one.model_copy(update={"turns": [turn for turn in one.turns if turn.label not in failed]})
        for one in made.rounds
    ]
    return made.model_copy(
        update={"rounds": rounds, "failed": {label: {context: why} for label, why in failed.items()}}
    )


def test_parameters_are_of_the_model_of_the_row_s_length():
    first, longer = made_steps({"gqa": 0.9}), made_longer({"gqa": 0.5})
    for made, own in ((first, 900), (longer, 2200)):
        made.entries[:] = changed(
            changed(made, "sdpa", parameters=1000 if own == 900 else 2000), "gqa", parameters=own
        ).entries
    found = evidence.Evidence(first, made_cells(), [longer])
    assert (found.weights("gqa", 512), found.weights("gqa", 8192)) == (
        "10.0 % fewer parameters", "10.0 % more parameters",
    )  # fmt: skip


def test_each_of_two_picks_has_the_cost_of_the_row_s_length_and_what_was_not_run_there_its_others():
    two = evidence.Evidence(made_steps({"gqa": 0.5, "mla": 0.5}), made_cells(), [made_longer({"mla": 2.0})])
    row = answer.limits(two).set_index("if you are limited by").loc["time, 512 tokens, recall or not", "it costs"]
    assert row.count("at 512") == 2 and "8,192" not in row
    longer = made_longer({})
    keep = [label for label in LABELS if label != "linear"]
    longer = longer.model_copy(update={
        "entries": [entry for entry in longer.entries if entry.label in keep],
        "rounds": [one.model_copy(update={"turns": [turn for turn in one.turns if turn.label in keep]})
                   for one in longer.rounds],
    })  # fmt: skip
    found = evidence.Evidence(made_steps({"linear": 3.0}), made_cells(), [longer])
    assert found.costs("linear", 8192)[0].startswith("time × 3.0 [") and "not known at 8,192 tokens" in found.costs(
        "linear", 8192
    )
    assert any("Not run at 8,192 tokens: LINEAR." in line for line in answer.how_sure(found))
    (never,) = (line for line in answer.how_sure(found) if "In none of these sessions" in line)
    assert "kda" in never and not {"linear", "mla", "sdpa"} & set(re.findall(r"\w+", never))


def test_the_fewest_joules_are_told_with_their_time():
    said = say({"gqa": 0.8, "mla": 2.0})[1]
    assert re.search(r"take MLA: ÷ [12]\.\d+ \[[^]]*\] \(time × 2\.0", said)
    assert "not told apart" not in said
    said = say({"gqa": 2.0})[1]  # nobody is faster, and one takes half the joules
    assert "nothing trains in significantly less time; for the fewest joules take GQA: ÷ " in said


def test_an_sdpa_without_a_certificate_is_named_with_those_it_bars():
    other = changed(made_beside({"gqa": 0.5}), "sdpa", certified=False)
    said = answer.how_sure(evidence.Evidence(made_steps({}), made_cells(), [other]))
    assert any(line.startswith("Not picked, since SDPA failed its certificate in their session: X ") for line in said)


def test_a_failure_does_not_hide_what_another_session_measured_and_more_rounds_count():
    both = evidence.Evidence(lacking(made_steps({}), gqa="out of memory"), made_cells(), [made_steps({"gqa": 0.5})])
    assert both.failed == {} and both.ratio("gqa", 512, evidence.TIME).ratio == pytest.approx(0.5, rel=0.01)
    alone = lacking(made_steps({}), sdpa="out of memory")
    other = made_steps({"gqa": 0.5})
    other = other.model_copy(update={"rounds": other.rounds[:6]})
    found = evidence.Evidence(alone, made_cells(), [other])
    assert found.untold(512, evidence.TIME) is None and "gqa" in found.cheapest(512, evidence.TIME, found.others).labels
    few = made_steps({"gqa": 0.5})
    few = few.model_copy(update={"rounds": few.rounds[:3]})
    found = evidence.Evidence(few, made_cells(), [made_steps({"gqa": 0.8})])
    assert found.ratio("gqa", 512, evidence.TIME).n == 8


def test_a_session_of_nobody_counts_nowhere():
    again = made_steps({CONTROL: 1.5})
    again = again.model_copy(update={"rounds": again.rounds[:6]})
    found = evidence.Evidence(made_steps({}), made_cells(), [again])
    assert (
        "8 rounds in turns" in answer.briefly_sure(found)
        and " 4" not in answer.briefly_sure(found).split("certified")[0][-20:]
    )
    assert re.search(r"differs by 0\.\d %;", answer.briefly_sure(found))
    both = with_a_long_length(made_beside({}))
    found = evidence.Evidence(made_steps({}), made_cells(), [both])
    assert "8 rounds (5 at 8,192 tokens and for 4 of the variants)" in answer.briefly_sure(found)


def test_joules_that_were_not_counted_at_a_length_have_their_reason():
    found = evidence.Evidence(made_steps({"gqa": 0.5}), made_cells(), [made_longer({"gqa": 0.5}, joules=False)])
    table = answer.limits(found).set_index("if you are limited by")
    assert table.loc["joules, 8,192 tokens", "pick"] == "not told: the run used no GPU"


def test_who_has_too_few_rounds_for_a_verdict_is_named():
    other = made_beside({"gqa": 0.5})
    other = other.model_copy(update={"rounds": other.rounds[:4]})
    said = answer.how_sure(evidence.Evidence(made_steps({}), made_cells(), [other]))
    assert any(
        re.search(r"Without a verdict at 512 tokens: .*X GQA \(n = 4\)", line.replace("\\", "")) for line in said
    )


@pytest.mark.parametrize(("share", "told"), [(1.01, False), (1.5, True)])
def test_more_memory_in_training_is_a_cost(share, told):
    made = made_steps({"gqa": 0.8})
    rounds = [
        one.model_copy(update={"turns": [
            turn.model_copy(update={"peak_memory_bytes": share * 2**30}) if turn.label == "gqa" else turn
            for turn in one.turns
        ]}) for one in made.rounds
    ]  # fmt: skip
    costs = answer.limits(evidence.Evidence(made.model_copy(update={"rounds": rounds}), made_cells()))
    row = costs[costs["if you are limited by"].str.startswith("time")].iloc[0]
    assert row["pick"] == "**GQA**" and ("1,536 MiB instead of 1,024 MiB in training" in row["it costs"]) == told


def test_memory_beside_another_sdpa_is_not_compared():
    other = made_beside({})
    rounds = [
        one.model_copy(update={"turns": [
            turn.model_copy(update={"peak_memory_bytes": 0.9 * 2**30}) for turn in one.turns]}) for one in other.rounds
    ]  # fmt: skip
    found = evidence.Evidence(made_steps({}), made_cells(), [other.model_copy(update={"rounds": rounds})])
    assert set(found.memory_at(512)) == set(LABELS)


def test_what_somebody_sent_is_a_sentence_and_never_markup(tmp_path):
    made = made_steps({"gqa": 0.5})
    odd = {key: value for key, value in made.environment.items() if key != "gpu"} | {"device_name": "GPU $\\bad{$"}
    for environment, examined in ((odd, {"foo": 1}), (odd, {"layers": "x", "positions": 2}), (odd, {})):
        found = evidence.Evidence(
            made.model_copy(update={"environment": environment, "examined": examined}), made_cells()
        )
        assert "GPU $" in answer.markdown(found)
        answer_figure.picture(found).canvas.draw()
    found = evidence.Evidence(with_a_long_length(made, **dict.fromkeys(LABELS, "a|b <script>")), None)
    page = answer.markdown(found)
    assert "<script>" not in page and r"a\|b" in page


def test_each_length_has_a_mark_of_its_own():
    for count in range(1, 7):
        places, faces = answer_figure._marks(count)
        assert len(set(faces)) == len(faces) == len(places) == count and places == sorted(places, reverse=True)


def test_of_three_sessions_who_is_surely_dearer_than_another_pick_goes():
    first, noisy, third = made_steps({"gqa": 0.55}), made_beside({"gqa": 0.53}), made_beside({"gqa": 0.60})
    wild = [1.0, 1.3, 0.8, 1.25, 0.75]
    rounds = [
        one.model_copy(update={"turns": [
            turn.model_copy(update={"time_s": turn.time_s * factor}) if turn.label == "x_gqa" else turn
            for turn in one.turns]}) for one, factor in zip(noisy.rounds, wild, strict=True)
    ]  # fmt: skip
    noisy = noisy.model_copy(update={"rounds": rounds})
    text = third.model_dump_json().replace('"x_', '"y_').replace('"X ', '"Y ')
    third = steps.Steps.model_validate_json(text)
    found = evidence.Evidence(first, made_cells(), [noisy, third])
    assert "y_gqa" not in found.cheapest(512, evidence.TIME, ["gqa", "x_gqa", "y_gqa"]).labels


def test_who_was_trained_longer_is_judged_by_that():
    more = probe.frame([
        cell(label, (1.0, 1.0, value), seed=seed, rate=3e-3)
        for label, value in {"sdpa": 1.0, "linear": 0.99, "mla": 0.2}.items() for seed in range(3)
    ])  # fmt: skip
    more["setting"] = more["setting"].str.replace('"steps":800', '"steps":3200')
    few = more[(more["label"] != "mla") | (more["seed"] == 0)]
    found = evidence.Evidence(made_steps({"linear": 0.5}), made_cells(), [], few)
    assert found.recalls("linear") and found.recall["linear"].steps == 3200
    assert found.recalls("mla") and found.recall["mla"].steps == 800  # one seed is too few to judge by
    assert found.trained == "800 steps of training (3,200 for SDPA and LINEAR)"
    assert set(found.points.loc[found.points["label"] == "linear", "scaled"]) == {0.99}
    assert any("800 steps of training (3,200 for SDPA and LINEAR), at" in line for line in answer.how_sure(found))


def test_who_nearly_recalls_and_takes_less_time_is_named():
    cells = made_cells(linear=0.98)
    cells.loc[(cells["label"] == "linear") & (cells["seed"] == 2), ["accuracy", "scaled"]] = 0.93
    found, said = say({"linear": 0.5, "gqa": 0.8}, cells)
    assert not found.recalls("linear")
    assert re.search(
        r"; near to recalling, but not 95% from every seed: LINEAR saves more, ÷ 2\.\d+ \[[^]]*\], and recalls 97% "
        r"\[93%, 98%\] after 800 steps of training\. ", said,
    )  # fmt: skip
    for ratios in ({"linear": 0.9, "gqa": 0.8}, {"linear": 0.5}):  # dearer than who recalls; nobody who recalls saves
        said = say(ratios, cells)[1]
        assert ("near to" in said) == (ratios["linear"] == 0.5)
    assert "near to" not in say({"linear": 0.5, "gqa": 0.8})[1]  # far from it
    forgets = made_cells(linear=0.98, mla=0.2)  # and is the fastest: who recalls is named beside it
    forgets.loc[(forgets["label"] == "linear") & (forgets["seed"] == 2), ["accuracy", "scaled"]] = 0.93
    for ratio in (0.7, 0.9):  # of one that nearly recalls, beside one that does and takes 0.8
        said = say({"linear": ratio, "gqa": 0.8, "mla": 0.5}, forgets)[1]
        assert "**If it does not, MLA**" in said and ("near to" in said) == (ratio == 0.7)
