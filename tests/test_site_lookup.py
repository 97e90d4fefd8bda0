"""What is looked up: each number is the record's, or a hand's, with its unit, n, reason and records."""

import json
import statistics

import pandas as pd
import pytest
from make import make_record, write_blocks

from lib import record
from lib.errors import UsageError
from lib.paths import ROOT
from lib.record import kinds, names, probe
from lib.record import steps as stored
from lib.site import lookup, lookup_page, pages


@pytest.fixture(scope="module")
def committed():
    return lookup.rows(ROOT / "records")


def only(found: pd.DataFrame, **cell) -> pd.Series:
    """The one row with these values."""
    for name, value in cell.items():
        found = found[found[name] == value]
    assert len(found) == 1, cell
    return found.iloc[0]


def test_a_row_is_what_the_record_says(tmp_path):
    write_blocks(tmp_path / "mine", ("baseline", "sdpa", "sdpa_again"), blocks=6, time_s=20.0)
    found = lookup.rows(tmp_path)
    row = found[(found["what"] == "Peak GPU memory") & (found["label"] == "sdpa")].squeeze()
    assert row["value"] == pytest.approx(2e9 / 2**30) and row["unit"] == "GiB" and row["n"] == 6
    assert row["at"] == 16 and row["profile"] == "mine" and row["certified"]
    assert len(row["records"]) == 6 and all((tmp_path / name).is_file() for name in row["records"])
    beside = found[(found["what"] == "Training time") & (found["label"] == "baseline")].squeeze()
    assert beside["ratio"] == pytest.approx(1.0) and beside["verdict"]
    silent = found[(found["what"] == "Peak resident memory") & (found["label"] == "sdpa")].squeeze()
    assert pd.isna(silent["value"]) and silent["why"].startswith("not measured:")
    loss = found[(found["what"] == "Validation loss") & (found["label"] == "baseline")].squeeze()
    assert pd.isna(loss["ratio"]) and loss["value"] == pytest.approx(5.0)


def test_every_committed_number_stands_with_its_reason_or_value(committed):
    found = committed
    assert (found.groupby("what")["unit"].nunique() == 1).all()  # or one axis would hold two units
    memory = found[(found["what"] == "Training step, peak GPU memory") & (found["at"] == 8192)]
    memory = memory[[names == ["steps-gpu/steps.json"] for names in memory["records"]]].set_index("label")
    assert memory.loc["gqa", "ratio"] == memory.loc["gqa", "value"] / memory.loc["sdpa", "value"]
    assert (found["value"].notna() != found["why"].notna()).all()
    assert set(found["kind"]) == {"computed", "training runs", "training steps", "cost by length", "small tasks"}
    records = {name for names in found["records"] for name in names}
    told = {kind for name in records for kind in [kinds.load(ROOT / "records" / name)[0]]}
    assert told == {"run", "steps", "scaling", "probe"}
    whole = found[(found["kind"] == "computed") & (found["label"] == "sdpa") & found["what"].str.startswith("Cache")]
    assert whole.set_index("at")["value"].to_dict() == {n: 2 * 2 * 12 * 768 * n / 2**20 for n in lookup.CONTEXTS}
    core = only(found, kind="computed", label="sdpa", at=512, what="Attention's own FLOPs, GPT-2 small, forward")
    assert core["value"] == pytest.approx(12 * 2 * 2 * 768 * (512 * 513 / 2) / 1e9)  # QKᵀ and PV, causal


def test_no_task_that_sdpa_was_asked_is_said_to_be_untried_by_it(committed):
    """Whatever number of layers each task's net has."""
    tasks = committed[committed["kind"] == "small tasks"]
    asked = {tuple(pair) for pair in tasks.loc[tasks["label"] == "sdpa", ["profile", "what"]].values}
    assert len({setting.partition(" ")[0] for setting in tasks["setting"]}) > 1 and len(asked) > 4
    untried = tasks[tasks["note"].fillna("").str.contains("was not tried")]
    assert not asked & {tuple(pair) for pair in untried[["profile", "what"]].values}


def test_what_fails_its_certificate_is_named_and_tampered_records_are_refused(tmp_path):
    bad = make_record("baseline").certificate.model_copy(update={"causal": False, "passed": False})
    write_blocks(tmp_path / "mine", ("sdpa",), blocks=1)
    path = record.write(make_record("baseline", certificate=bad.model_dump()), tmp_path / "mine")
    found = lookup.rows(tmp_path)
    assert not found.loc[(found["label"] == "baseline") & (found["kind"] == "training runs"), "certified"].any()
    page = pages.variant("baseline", found, pages.certificates(tmp_path, lookup.held(tmp_path)))
    assert "**failed**" in page
    content = json.loads(path.read_text())
    content["metrics"]["time_s"] = 1.0
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=rf"{path.name}.*checksum"):
        lookup.rows(tmp_path)
    path.write_text(json.dumps({"kind": "survey"}))
    with pytest.raises(UsageError, match=r"its kind is 'survey'"):
        lookup.rows(tmp_path)


def test_texts_of_strangers_are_shown_as_they_are():
    nasty = "<script>alert(1)</script> | [x](javascript:y) `$a$` *b*"
    assert pages.escaped(nasty) == (r"\<script\>alert(1)\</script\> \| \[x\](javascript:y) \`\$a\$\` \*b\*")
    rows = pd.DataFrame([dict.fromkeys(lookup.COLUMNS) | {"label": "x", "variant": "</script>", "records": []}])
    assert "</script>" not in lookup_page.script(rows.assign(kind="computed", what="", at=1.0))


def test_steps_are_medians_of_turns_and_paired_ratios(committed):
    steps = json.loads((ROOT / "records/steps-gpu/steps.json").read_text())

    def of(label, name, context):
        turns = [t for one in steps["rounds"] for t in one["turns"] if (t["label"], t["context"]) == (label, context)]
        return [
            turn[name] / (turn["steps"] if name != "peak_memory_bytes" else 1)
            for turn in turns
            if turn[name] is not None
        ]

    for context, rows in ((512, 16), (8192, 1)):
        cell = {"kind": "training steps", "label": "lsh", "at": context}
        seconds, theirs = of("lsh", "time_s", context), of("sdpa", "time_s", context)
        time = only(committed, what="Training step, time", **cell)
        assert time["value"] == pytest.approx(1e3 * statistics.median(seconds)) and time["unit"] == "ms"
        assert (time["low"], time["high"]) == pytest.approx((1e3 * min(seconds), 1e3 * max(seconds)))
        pairs = [one / other for one, other in zip(seconds, theirs, strict=True)]
        assert time["ratio"] == pytest.approx(statistics.geometric_mean(pairs), rel=5e-3)  # their places aside
        assert time["ratio_low"] < time["ratio"] < time["ratio_high"] and time["n"] == len(steps["rounds"])
        assert time["range_of"] == "rounds" and time["verdict"] == "significantly different" and time["certified"]
        assert time["setting"] == f"12 layers of 768, {rows} x {context:,} tokens, bf16"
        joules = only(committed, what="Training step, energy", **cell)
        assert joules["value"] == pytest.approx(statistics.median(of("lsh", "energy_j", context)))
        assert joules["unit"] == "J" and time["device"] == "NVIDIA H200"
        memory = only(committed, what="Training step, peak GPU memory", **cell)
        peak, whole = max(of("lsh", "peak_memory_bytes", context)), max(of("sdpa", "peak_memory_bytes", context))
        assert memory["value"] == pytest.approx(peak / 2**30) and memory["ratio"] == pytest.approx(peak / whole)
        assert pd.isna(memory["ratio_low"]) and pd.isna(memory["verdict"])


def test_memory_of_steps_is_the_most_of_all_turns(tmp_path):
    found = kinds.load(ROOT / "records/steps-gpu/steps.json")[1].model_dump()
    turn = next(turn for turn in found["rounds"][3]["turns"] if (turn["label"], turn["context"]) == ("gqa", 512))
    turn["peak_memory_bytes"] = 2.0**40
    (tmp_path / "steps").mkdir()
    stored.write(stored.Steps.model_validate(found | {"content_sha256": ""}), tmp_path / "steps" / "steps.json")
    memory = only(lookup.rows(tmp_path), what="Training step, peak GPU memory", label="gqa", at=512)
    assert memory["value"] == 1024 and memory["n"] == len(found["rounds"])


def test_costs_by_length_are_means_of_the_processes_medians(committed):
    files = {name: json.loads((ROOT / f"records/scaling-cpu/{name}.json").read_text()) for name in ("gqa", "sdpa")}

    def of(label):
        (point,) = (p for p in files[label]["points"] if (p["part"], p["context"]) == ("model", 1024))
        samples, each = point["samples"]["prefill_s"], len(point["samples"]["prefill_s"]) // point["rounds"]
        return [statistics.median(samples[i : i + each]) for i in range(0, len(samples), each)]

    committed = committed[committed["profile"] == "scaling-cpu"]  # with two threads it is another row
    row = only(committed, kind="cost by length", label="gqa", at=1024, what="Prefill of the model, time")
    assert row["value"] == pytest.approx(1e3 * statistics.geometric_mean(of("gqa"))) and row["n"] == len(of("gqa"))
    assert (row["low"], row["high"]) == pytest.approx((1e3 * min(of("gqa")), 1e3 * max(of("gqa"))))
    assert row["ratio"] == pytest.approx(statistics.geometric_mean(of("gqa")) / statistics.geometric_mean(of("sdpa")))
    silent = only(committed, kind="cost by length", label="gqa", at=1024, what="Prefill of the model, energy")
    assert pd.isna(silent["value"]) and silent["why"] == "not measured: the run used no GPU" and silent["unit"] == "J"
    assert row["certified"] is None and row["records"] == ["scaling-cpu/gqa.json"] and row["range_of"] == "processes"


def test_small_tasks_are_medians_at_the_best_rate(committed):
    cells = [kinds.load(path)[1] for path in ROOT.glob("records/capability-cpu/recall-linear-*.json")]
    cells = [cell for cell in cells if cell.setting.convolution]
    by_rate = {}
    for cell in cells:
        (hardest,) = (one for one in cell.results if one.difficulty == 32)
        by_rate.setdefault(cell.learning_rate, {})[cell.seed] = hardest.scaled_accuracy
    shared = set.intersection(*map(set, by_rate.values()))
    best = max(by_rate, key=lambda rate: statistics.median(by_rate[rate][seed] for seed in shared))
    own = by_rate[best].values()
    title = "Recall (MQAR), scaled accuracy"  # behind a convolution
    row = only(committed, kind="small tasks", label="linear", at=32, what=title)
    assert (row["value"], row["low"], row["high"]) == pytest.approx((statistics.median(own), min(own), max(own)))
    assert row["n"] == len(own) == len(row["records"])
    assert row["range_of"] == f"seeds at rate {best:g}" and all(f"rate{best:g}-" in name for name in row["records"])


def test_small_tasks_after_more_steps_are_rows_of_their_own(committed):
    title = "Recall (MQAR), scaled accuracy, after 3,200 steps"
    row = only(committed, kind="small tasks", label="mamba2", at=32, what=title)
    assert (
        row["n"] == 3 == len(row["records"]) and "3,200 steps" not in row["setting"] and "3200 steps" in row["setting"]
    )
    usual = committed[(committed["what"] == "Recall (MQAR), scaled accuracy") & (committed["label"] == "linear")]
    assert set(usual["setting"].str.contains("800 steps")) == {True}


def test_what_is_counted_in_a_ratio_is_what_stands_beside_it(tmp_path):
    write_blocks(tmp_path / "mine", ("baseline", "sdpa"), blocks=6, time_s=20.0)
    record.write(make_record("baseline", 6, time_s=500.0), tmp_path / "mine")  # of a block without its reference
    row = only(lookup.rows(tmp_path), label="baseline", what="Training time")
    assert row["value"] == 20.0 and row["n"] == 6 == len(row["records"]) and row["ratio"] == pytest.approx(1.0)


def test_two_definitions_of_one_name_are_refused(tmp_path):
    write_blocks(tmp_path / "mine", ("sdpa",), blocks=1)
    other = make_record("sdpa", 1).model_dump()
    other["parameters"]["options"] = {"window": 16}
    other["name"] = names.run_name(other["parameters"])
    record.write(record.Record.model_validate(other), tmp_path / "mine")
    with pytest.raises(UsageError, match=r"mine: runs called 'sdpa' have different options, .* label of its own"):
        lookup.rows(tmp_path)


def test_what_was_not_measured_or_lies_there_twice_is_refused(tmp_path):
    steps = kinds.load(ROOT / "records/steps-gpu/steps.json")[1].model_dump() | {"content_sha256": ""}
    (tmp_path / "a").mkdir()
    stored.write(stored.Steps.model_validate(steps), tmp_path / "a" / "one.json")
    lookup.rows(tmp_path)
    stored.write(stored.Steps.model_validate(steps), tmp_path / "a" / "two.json")
    with pytest.raises(UsageError, match=r"a/two.json: it is the same record as a/one.json"):
        lookup.rows(tmp_path)
    stored.write(stored.Steps.model_validate(steps | {"provenance": "synthetic"}), tmp_path / "a" / "two.json")
    with pytest.raises(UsageError, match=r"a/two.json: it is synthetic, not measured"):
        lookup.rows(tmp_path)


def test_a_title_that_is_another_s_has_its_label_beside_it(tmp_path):
    steps = kinds.load(ROOT / "records/steps-gpu/steps.json")[1].model_dump() | {"content_sha256": ""}
    next(entry for entry in steps["entries"] if entry["label"] == "linear")["title"] = "SDPA"
    (tmp_path / "a").mkdir()
    stored.write(stored.Steps.model_validate(steps), tmp_path / "a" / "steps.json")
    found = lookup.rows(tmp_path)
    found = found[found["kind"] == "training steps"]
    assert set(found.loc[found["label"] == "linear", "variant"]) == {"SDPA (linear)"}


def cell(folder, label="linear", seed=0, accuracy=0.5, device="a CPU", layers=1, rate=0.001, **changes):
    found = next(iter(ROOT.glob("records/capability-cpu/recall-sdpa-rate0.001-*.json")))
    found = probe.load(found).model_dump() | {"label": label, "title": label, "seed": seed, "learning_rate": rate}
    found["environment"]["device_name"], found["setting"]["layers"] = device, layers
    found["pattern"] = [mixer | {"attention": label} for mixer in found["pattern"]]
    for one in found["results"]:
        one["scaled_accuracy"] = accuracy
    found |= changes | {"content_sha256": ""}
    digest = abs(hash((label, seed, device, layers, rate))) % 10**8
    probe.write(probe.Probe.model_validate(found | {"name": f"recall-{label}-{digest:08}"}), folder)


def test_cells_of_other_devices_layers_and_outcomes_are_told_apart(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for seed in range(3):
        cell(folder, seed=seed, accuracy=0.2)
        cell(folder, seed=seed, accuracy=0.8, layers=2)
        cell(folder, seed=seed, accuracy=0.4, device="b GPU")
        cell(folder, "sdpa", seed=seed, accuracy=0.3)
        cell(folder, "kda", seed=seed, accuracy=0.1)
        cell(folder, "kda", seed=seed, accuracy=0.7, title="KDA, otherwise", rate=0.003)
    lost = {"outcome": "loss_not_finite", "says": "it diverged", "results": [], "time_s": None}
    cell(folder, "gqa", **lost)
    cell(folder, "mla", seed=0, accuracy=0.9)
    cell(folder, "mla", seed=1, **lost)
    found = lookup.rows(tmp_path)
    found = found[(found["kind"] == "small tasks") & ((found["at"] == 32) | found["at"].isna())]
    linear = found[found["label"] == "linear"]
    got = {(row.device, row.setting.split(" of ")[0], row.value, int(row.n)) for row in linear.itertuples()}
    assert got == {("a CPU", "1 layer", 0.2, 3), ("a CPU", "2 layers", 0.8, 3), ("b GPU", "1 layer", 0.4, 3)}
    assert "sdpa reaches 0.30 where it must reach 0.99" in only(linear, device="a CPU", value=0.2)["note"]
    kda = found[found["label"] == "kda"]
    assert dict(zip(kda["variant"], kda["value"], strict=True)) == {"kda": 0.1, "KDA, otherwise": 0.7}
    assert not set(only(kda, value=0.1)["records"]) & set(only(kda, value=0.7)["records"])
    gqa = only(found, label="gqa")
    assert pd.isna(gqa["value"]) and gqa["why"] == "not measured: the loss was not finite" and len(gqa["records"]) == 1
    assert only(found, label="mla")["note"].startswith("1 of 2 seeds ended without a result")
    page = pages.variant("linear", lookup.rows(tmp_path), pages.certificates(tmp_path, lookup.held(tmp_path)))
    assert "b GPU" in page and "0.20" in page and "0.80" in page


def test_flags_failures_and_failed_certificates_stand_beside_the_numbers(tmp_path):
    folder = tmp_path / "mine"
    write_blocks(folder, ("sdpa",), blocks=1)
    bad = make_record("baseline").certificate.model_copy(update={"causal": False, "passed": False}).model_dump()
    check = {"check": "busy", "value": 1.0, "limit": 0.5, "verdict": "flagged", "says": "a neighbour"}
    record.write(make_record("baseline", certificate=bad, checks=[check], flags=["busy"]), folder)
    failure = record.Failure(
        name="gqa-seed0-00000000", label="gqa", setting="0" * 8, study=record.StudyPosition(),
        finished_at="2026-11-25T10:00:00Z", reason="out_of_memory", says="it needed more",
    )  # fmt: skip
    record.write_failure(failure, folder)
    found = lookup.rows(tmp_path)
    row = only(found, label="baseline", what="Training time")
    assert row["note"] == "1 of 1 runs flagged: busy" and not row["certified"]
    page = pages.variant("baseline", found, pages.certificates(tmp_path, lookup.held(tmp_path)))
    assert "fails its certificate; 1 of 1 runs flagged: busy" in page
    lost = only(found, label="gqa", kind="training runs")
    assert lost["why"] == "not measured: 1 run ended without a record: out of memory"
    page = pages.variant("gqa", found, pages.certificates(tmp_path, lookup.held(tmp_path)))
    assert (
        "Nothing of it was measured" in page and "out of memory" in page and "No committed record holds it" not in page
    )


def test_a_variant_that_gpt2_small_cannot_have_stops_nobody(monkeypatch):
    def refuses(name, context):
        if name == "gqa":
            raise UsageError("gqa has no count")
        return counts(name, context)

    counts = lookup.by_formula
    monkeypatch.setattr(lookup, "by_formula", refuses)
    found = pd.DataFrame(lookup.computed(), columns=list(lookup.COLUMNS)).astype({"at": float, "value": float})
    assert set(found.loc[found["label"] == "gqa", "why"]) == {"gqa has no count"}
    nobody = pd.DataFrame(columns=["label", "profile", "sha256", "passed", "n"])
    assert "gqa has no count" in pages.variant("gqa", found, nobody) and "gqa.md" in pages.variants(found)
