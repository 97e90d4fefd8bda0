"""Operators counted by hand, the roofline by hand, and predictions that stay apart from what was measured."""

from collections import Counter
from datetime import timedelta
from functools import partial

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from make import NINTH, TINY, make_record, record_of
from test_training import make_trainer
from torch._subclasses.fake_tensor import FakeTensorMode

from lib import attention, parameters, record
from lib.analysis import compare, predictions
from lib.measure import flops, operators
from lib.measure.operators import Operator
from lib.model import build_model, devices, gpt2_config
from lib.record import prediction
from lib.record.prediction import Device
from lib.study import plan, roofline

CPU = torch.device("cpu")


def counted(run, *shapes, dtype=torch.float32):
    with FakeTensorMode():
        tensors = [torch.empty(shape, dtype=dtype) for shape in shapes]
        with operators.Operators() as found:
            run(*tensors)
    return found.found


def attended(is_causal, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


@pytest.mark.parametrize(
    ("run", "shapes", "expected"),
    [
        # (2, 3) by (3, 5): 2 x 2 x 3 x 5 FLOPs; 6 + 15 numbers read, 10 written, 4 bytes each.
        (torch.mm, [(2, 3), (3, 5)], [Operator("fp32", 60, 4 * 31)]),
        (torch.add, [(4, 4), (4, 4)], [Operator("fp32", 0, 4 * 48)]),
        (lambda x: x.view(16).unsqueeze(0).expand(3, 16).transpose(0, 1), [(4, 4)], []),
        (lambda x: torch.empty_like(x), [(4, 4)], []),
        (lambda x: x.mul_(2), [(4, 4)], [Operator("fp32", 0, 4 * 32)]),
        (lambda x: x.expand(100, 4) + 1, [(1, 4)], [Operator("fp32", 0, 4 * (4 + 400))]),
        # Two rows of four numbers out of a table of a thousand: two indices of 8 bytes, two rows read, two written.
        (
            lambda table: F.embedding(torch.empty(2, dtype=torch.long), table),
            [(1000, 4)],
            [Operator("fp32", 0, 16 + 2 * 32)],
        ),
        # Heads 2, queries 8, keys 8, width 4: two products of 2 x 2 x 8 x 8 x 4; queries, keys, values and output of 64
        # numbers, and a log-sum-exp a query.
        (partial(attended, False), [(1, 2, 8, 4)] * 3, [Operator("attention", 2 * 1024, 4 * (4 * 64 + 16))]),
        (partial(attended, True), [(1, 2, 8, 4)] * 3, [Operator("attention", 1024, 4 * (4 * 64 + 16))]),
    ],
    ids=["product", "sum", "views", "allocation", "in place", "expanded", "look-up", "attention", "causal attention"],
)
def test_operators_are_counted_as_with_a_pencil(run, shapes, expected):
    assert counted(run, *shapes) == expected


def test_a_product_in_bf16_is_counted_as_one_and_takes_half_the_bytes():
    assert counted(torch.mm, (2, 3), (3, 5), dtype=torch.bfloat16) == [Operator("bf16", 60, 2 * 31)]


def test_the_backward_pass_of_fused_attention_makes_five_products():
    def run(q, k, v):
        q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        attended(False, q, k, v).sum().backward()

    found = [operator.flops for operator in counted(run, *[(1, 2, 8, 4)] * 3) if operator.unit == "attention"]
    assert found == [2 * 1024, 5 * 1024]


def values_of(name, **changes):
    return plan.runs_of(TINY | {"accumulation": 1} | changes, [name], 1)[0]["values"]


@pytest.mark.parametrize("name", ["baseline", "linear"])
def test_a_step_has_three_times_the_products_of_its_forward(name):
    """Without fused kernels: backward makes two products for each of forward's. Rows and passes count as often."""
    values = values_of(name, batch_size=2, accumulation=3)
    sizes = (values[which] for which in ("layers", "width", "heads", "positions"))
    model = build_model(name, gpt2_config(*sizes, 300))
    forward = flops.counted(model, values["context"], devices.autocast("fp32", CPU))
    found = operators.step(values, 300, "fp32")
    assert sum(operator.flops for operator in found) == 3 * forward * 2 * 3
    weights = sum(weight.numel() for weight in model.parameters())
    assert found[-1].bytes >= 4 * 7 * weights  # AdamW reads weight, gradient and two moments, and writes all but one


@pytest.fixture
def layers_run(monkeypatch):
    """How many layers each count of a step went through."""
    seen, real = [], operators._of_layers
    monkeypatch.setattr(operators, "_of_layers", lambda model, blocks, *rest: seen.append(len(blocks)) or real(
        model, blocks, *rest
    ))  # fmt: skip
    return seen


def all_layers(monkeypatch, values):
    """The operators of a step where no two layers are taken to be alike, from a count of each."""
    numbers = iter(range(10**6))
    with monkeypatch.context() as patched:
        patched.setattr(operators, "_kind", lambda block: next(numbers))
        return Counter(operators.step(values, 300, "bf16"))


@pytest.mark.parametrize("name", attention.variants())
def test_layers_that_are_alike_are_counted_once_and_it_is_as_if_all_were(name, monkeypatch, layers_run):
    values = values_of(name, layers=4, accumulation=2)
    assert Counter(operators.step(values, 300, "bf16")) == all_layers(monkeypatch, values)
    every_one = name == "differential"  # whose layers have a number each
    assert layers_run == ([4, 4] if every_one else [1, 2, 2, 4])


UNLIKE = {
    "a setting of its own": (
        "self.layer_idx, self.weight",
        "self.times = 1 + layer_idx % 2\n        {0}",
        "self.times",
    ),
    "asks its number": ("self.layer_idx, self.weight", "{0}", "1 + self.layer_idx % 2"),
}


@pytest.mark.parametrize("how", UNLIKE)
def test_layers_that_are_not_alike_are_each_counted(how, tmp_path, monkeypatch, layers_run):
    """Every second layer mixes twice."""
    begin, told, times = UNLIKE[how]
    text = NINTH.replace(begin, told.format(begin), 1)
    text = text.replace("        return self.c_proj((v", f"        for _ in range({times}):\n            v = v * 1.5\n"
                        "        return self.c_proj((v", 1)  # fmt: skip
    (tmp_path / "odd.py").write_text(text)
    values = values_of(str(tmp_path / "odd.py"), layers=5)
    found = Counter(operators.step(values, 300, "bf16"))
    assert found == all_layers(monkeypatch, values) != Counter()
    assert layers_run[:-1] == ([2, 3, 3, 3] if how == "a setting of its own" else [1, 2, 2, 5])


@pytest.mark.parametrize("name", attention.variants())
def test_on_a_gpu_no_variant_launches_head_by_head(name):
    """A CPU's path may, where a GPU's takes all heads at once: more heads are no more launches there."""
    gpu = roofline.DEVICES["NVIDIA H200"]
    few, many = (values_of(name, layers=1, heads=heads, width=8 * heads) for heads in (4, 8))
    assert roofline.predicted(few, 300, gpu).launches == roofline.predicted(many, 300, gpu).launches


def test_what_a_cpu_does_head_by_head_counts_as_one_head_s_on_a_gpu():
    gpu, cpu = roofline.DEVICES["NVIDIA H200"], roofline.DEVICES["AMD EPYC"]
    one, four = (values_of("lsh", heads=heads, width=8 * heads, precision="fp32") for heads in (1, 4))
    of_one, of_four = (len(operators.step(values, 300, "fp32")) for values in (one, four))
    head = (of_four - of_one) / 3
    found = roofline.predicted(four, 300, gpu).launches
    assert of_one <= found < of_one + head / 2 and head > 20  # a few more, which bring the heads together
    assert roofline.predicted(four, 300, cpu).launches == of_four


def test_a_run_takes_its_steps_of_all_its_epochs_in_its_own_precision():
    gpu = roofline.DEVICES["NVIDIA H200"]
    once, twice = (roofline.predicted(values_of("sdpa", epochs=epochs), 300, gpu) for epochs in (1, 2))
    assert (twice.time_s, twice.energy_j) == pytest.approx((2 * once.time_s, 2 * once.energy_j))
    assert twice.launches == once.launches and twice.flops == once.flops
    full = roofline.predicted(values_of("sdpa", precision="fp32"), 300, gpu)
    assert full.flops["fp32"] > 0 and "bf16" not in full.flops and once.flops["bf16"] > 0  # of auto: the device's


DEVICE = Device(
    precision="bf16", flops_per_s={"bf16": 100.0, "fp32": 10.0}, bytes_per_s=10.0, launch_s=1.0, waits=False,
    idle_w=100.0, limit_w=400.0, flops_w={"bf16": 300.0, "fp32": 200.0}, bytes_w=200.0, seen="", assumed="",
)  # fmt: skip


@pytest.mark.parametrize(
    ("found", "launches", "changes", "expected"),
    [
        # 4 s of arithmetic, in which 1 s of bytes hides: 4 x 100 W idle + 4 x 200 W + 1 x 100 W.
        ([Operator("bf16", 400, 10)], 1, {}, (4.0, 1300.0, 1, "arithmetic")),
        ([Operator("bf16", 100, 40)], 1, {}, (4.0, 1000.0, 1, "memory")),
        # Each operator has its own longer side: 4 + 3 s, 7 x 100 + 4 x 200 + 1 x 100 + 1 x 100 + 3 x 100 J.
        ([Operator("bf16", 400, 10), Operator("fp32", 10, 30)], 2, {}, (7.0, 2000.0, 2, "arithmetic")),
        ([Operator("bf16", 100, 10)], 5, {}, (5.0, 800.0, 5, "launching")),
        # 4 s at 100 + 200 + 100 W would pass a limit of 300 W: 1200 J above idle at 200 W take 6 s.
        ([Operator("bf16", 400, 40)], 1, {"limit_w": 300.0}, (6.0, 1800.0, 1, "the power limit")),
        # What waits for its operators launches between them.
        ([Operator("bf16", 400, 10)], 3, {"waits": True, "idle_w": None}, (7.0, None, 3, "arithmetic")),
    ],
)
def test_the_roofline_is_as_with_a_pencil(found, launches, changes, expected):
    assert roofline.cost(found, launches, DEVICE.model_copy(update=changes)) == expected


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A prediction of two variants, as the command writes it."""
    folder = tmp_path_factory.mktemp("predictions")
    profile = folder / "tiny.yaml"
    profile.write_text("\n".join(f"{name}: {value}" for name, value in TINY.items()))
    words = ["--variants", "sdpa", "gqa", "--vocabulary", "300", "--write", str(folder / "tiny.json")]
    assert roofline.main([str(profile), "--device", "NVIDIA H200", *words]) == 0
    return prediction.load_all(folder)


def runs_of(made, seconds=60, **changes):
    """Runs of what was predicted, which began so many seconds after the prediction and took an hour; None: unknown."""
    one, records = made[0], []
    planned = plan.runs_of(TINY, [said.label for said in one.variants], 1)
    assert {parameters.setting(run["values"]) for run in planned} == {one.setting}
    for said, run in zip(one.variants, planned, strict=True):
        told = {"attention_sha256": said.attention_sha256}
        told["started_at"] = None if seconds is None else one.made_at + timedelta(seconds=seconds)
        told["finished_at"] = one.made_at + timedelta(seconds=(seconds or 0) + 3600)
        told["environment"] = {"device": "cuda", "device_name": "NVIDIA H200", "gpu": {"uuid": "GPU-1"}}
        metrics = {"time_s": 1.25 * said.time_s, "energy_j": 1.5 * said.energy_j}
        records.append(record_of(run, **told | metrics | changes))
    return records


def read(records, folder):
    for one in records:
        record.write(one, folder)
    return compare.groups(record.read(folder))[0].runs


def test_what_was_predicted_before_stands_beside_what_was_measured(made, tmp_path):
    found = predictions.residuals(read(runs_of(made), tmp_path), made)
    assert found["variant"].tolist() == ["sdpa", "gqa"]
    assert found["s, above"].tolist() == pytest.approx([0.25, 0.25])
    assert found["J, above"].tolist() == pytest.approx([0.5, 0.5])
    assert predictions.table(found)["s, above"].tolist() == ["+25%", "+25%"]
    assert predictions.in_words(found) == "Measured above the prediction by 25% to 50%, as above a floor."
    quicker = predictions.in_words(found.assign(**{"s, above": [0.25, -0.4], "J, above": None}))
    assert quicker.startswith(
        "1 of 2 times and joules were measured below the prediction, by up to 40%: it is no floor"
    )
    assert "nothing" in predictions.in_words(found.assign(**{"s, above": None, "J, above": None}))


def test_of_unequal_runs_the_mean_is_compared(made, tmp_path):
    """Three of one variant: 1, 1.5 and 3.5 times what was predicted, in seconds; twice as far off in joules."""
    said, records = made[0].variants[0], []
    for block, times in enumerate((1.0, 1.5, 3.5)):
        run = next(run for run in plan.runs_of(TINY, [said.label], 3) if run["block"] == block)
        told = {"attention_sha256": said.attention_sha256, "started_at": made[0].made_at + timedelta(seconds=9)}
        told["finished_at"] = told["started_at"] + timedelta(seconds=60)
        told["environment"] = {"device": "cuda", "device_name": "NVIDIA H200", "gpu": {"uuid": "GPU-1"}}
        records.append(record_of(run, **told, time_s=times * said.time_s, energy_j=2 * times * said.energy_j))
    (row,) = predictions.residuals(read(records, tmp_path), made).to_dict("records")
    assert (row["s, above"], row["J, above"]) == pytest.approx((1.0, 3.0))
    assert (row["s, measured"], row["J, predicted"]) == pytest.approx((2 * said.time_s, said.energy_j))
    some = read(records, tmp_path).assign(energy_j=[1.0, None, 1.0])
    (row,) = predictions.residuals(some, made).to_dict("records")
    assert row["J, measured"] is None and row["s, above"] == pytest.approx(1.0)  # never the mean of a part


def test_each_variant_s_newest_prediction_counts(made, tmp_path):
    """Somebody predicts one variant later: the others keep theirs."""
    (one,), later = made, made[0].made_at + timedelta(seconds=10)
    again = one.variants[0].model_copy(update={"time_s": 2 * one.variants[0].time_s})
    more = one.model_copy(update={"made_at": later, "variants": [again]})
    found = predictions.residuals(read(runs_of(made), tmp_path), [more, one]).set_index("variant")
    assert found["s, above"].to_dict() == pytest.approx({"sdpa": 1.25 / 2 - 1, "gqa": 0.25})


def test_joules_that_were_not_measured_are_a_dash_beside_those_predicted(made, tmp_path):
    shown = predictions.table(predictions.residuals(read(runs_of(made, energy_j=None), tmp_path), made))
    assert shown["J, measured"].tolist() == shown["J, above"].tolist() == ["–", "–"]
    assert "–" not in shown["J, predicted"].tolist()


def test_what_was_said_of_something_else_is_no_prediction(made, tmp_path):
    runs = read(runs_of(made), tmp_path)
    for other in (runs.assign(setting="other"), runs.assign(device_name="another GPU")):
        assert predictions.residuals(other, made).empty
        assert predictions.why_none(other, made) == "nothing was predicted of these runs"
    changed = runs.assign(attention_sha256=runs["attention_sha256"].where(runs["label"] != "gqa", "changed"))
    assert predictions.residuals(changed, made)["variant"].tolist() == ["sdpa"]
    assert predictions.residuals(runs, []).empty
    assert isinstance(predictions.table(predictions.residuals(runs, [])), pd.DataFrame)


@pytest.mark.parametrize("seconds", [0, -1, -41, -3599])
def test_what_was_said_after_a_run_began_is_no_prediction_though_the_run_still_went_on(seconds, made, tmp_path):
    runs = read(runs_of(made, seconds), tmp_path)
    assert predictions.residuals(runs, made).empty
    assert predictions.why_none(runs, made) == "nothing was predicted before the first of these runs began"
    first = read(runs_of(made), tmp_path / "later")
    first.loc[0, "started_at"] = made[0].made_at - timedelta(seconds=1)  # one run was under way, the other was not
    assert predictions.residuals(first, made).empty


def test_where_nobody_noted_when_a_run_began_no_prediction_counts(made, tmp_path):
    """Its end less its window proves nothing: set-up, warm-up and inference lie outside the window."""
    runs = read(runs_of(made, None, time_s=1.0), tmp_path)
    assert predictions.residuals(runs, made).empty
    assert predictions.why_none(runs, made).startswith("it is unknown when these runs began")
    one_knows = read(runs_of(made), tmp_path / "one")
    one_knows["started_at"] = [one_knows["started_at"].iloc[0], None]
    assert predictions.residuals(one_knows, made).empty


def test_a_run_notes_when_it_began_before_anything_of_it_ran():
    before = record.now()
    trainer = make_trainer()
    assert before <= trainer.started_at <= record.now()
    noted = trainer.started_at
    trainer.warm_up()
    assert trainer.started_at == noted
    with pytest.raises(ValueError, match="cannot have ended before it began"):
        make_record(started_at=record.now() + timedelta(seconds=5))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--device", "NVIDIA H20"],
            "nothing is known of a device 'NVIDIA H20'; known: NVIDIA H200, AMD EPYC. Add yours to DEVICES",
        ),
        (["--device", "AMD EPYC", "--vocabulary", "1"], "vocabulary must be at least 2, not 1"),
        (["--device", "AMD EPYC", "--variants", "spda"], "there is no attention variant 'spda'"),
        (["params/papr.yaml", "--device", "AMD EPYC"], "there is no profile params/papr.yaml"),
    ],
)
def test_a_wrong_word_is_one_sentence(words, says, capsys):
    assert roofline.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"python -m lib.study.roofline: {says}") and len(said.splitlines()) == 1


def test_a_variant_that_looks_at_its_tensors_cannot_be_counted_and_is_told_so(tmp_path, capsys):
    (tmp_path / "looks.py").write_text(
        NINTH.replace("        v, T =", "        hidden_states.sum().item()\n        v, T =")
    )
    words = ["--device", "AMD EPYC", "--vocabulary", "300", "--variants", str(tmp_path / "looks.py")]
    assert roofline.main(words) == 2
    assert "looks.py cannot be predicted: " in (said := capsys.readouterr().err) and len(said.splitlines()) == 1


def test_a_compiled_model_is_not_predicted(tmp_path, capsys):
    (tmp_path / "compiled.yaml").write_text("compile: true\n")
    assert roofline.main([str(tmp_path / "compiled.yaml"), "--device", "AMD EPYC"]) == 2
    assert "compile: false" in capsys.readouterr().err


def test_the_committed_predictions_are_of_profiles_and_variants_as_they_are_now():
    found = prediction.load_all()
    assert {one.profile for one in found} >= {"gpu_512", "gpu_4096"}
    for one in found:
        path = None if one.profile == "quick" else f"params/{one.profile}.yaml"
        runs, _ = plan.chosen(path, attention.STUDY_ORDER, 1)
        assert {parameters.setting(run["values"]) for run in runs} == {one.setting}, one.profile
        known = {name: attention.source_sha256(name) for name in attention.STUDY_ORDER}
        assert {said.label: said.attention_sha256 for said in one.variants} == known, one.profile
        assert one.device == roofline.DEVICES[one.device_name]
