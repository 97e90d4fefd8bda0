"""Each point comes from a process of its own, in an order that favours none, or says what ran out."""

import json
import subprocess
import sys
import time
from itertools import groupby, pairwise
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from lib import attention, paths, record
from lib.analysis import growth_tables
from lib.attention import STUDY_ORDER
from lib.errors import UsageError
from lib.record import scaling as stored
from lib.study import plan, scaling

DEFAULTS = {name: line.default for name, line in plan.known_parameters("scaling.ipynb").items()}
SMALL = DEFAULTS | {"width": 32, "contexts": [16, 24], "new_tokens": 2, "repeats": 2, "device": "cpu"}


GREEDY = """
import torch
from lib.attention.sdpa import Attention as Sdpa


class Attention(Sdpa):
    def forward(self, hidden_states, **words):
        if hidden_states.shape[1] >= 24:
            torch.empty(2**60, dtype=torch.uint8)
        return super().forward(hidden_states, **words)
"""
SLOW = GREEDY.replace("torch.empty(2**60, dtype=torch.uint8)", "__import__('time').sleep(60)")
DYING = GREEDY.replace("torch.empty(2**60, dtype=torch.uint8)", "__import__('os')._exit(3)")


def measured(folder, **changes):
    said = []
    failed = scaling.measure_all(scaling.checked(SMALL | changes), folder, said.append)
    return failed, said


def test_what_runs_out_of_memory_is_a_point_and_everything_else_is_measured(tmp_path):
    (tmp_path / "greedy.py").write_text(GREEDY)
    failed, _ = measured(tmp_path / "out", variants=["sdpa", str(tmp_path / "greedy.py")], rounds=2)
    assert failed == []
    found = stored.load_all(tmp_path / "out")
    greedy, sdpa = found
    assert (greedy.label, sdpa.label) == ("greedy", "sdpa") and sdpa.attention == "sdpa"
    for part in stored.METRICS:
        lost = greedy.point(part, 24)
        assert lost.outcome == "out_of_memory" and "can't allocate memory" in lost.says and not lost.samples
        assert greedy.point(part, 16).outcome == sdpa.point(part, 24).outcome == "measured"
    layer, model = sdpa.point("layer", 24), sdpa.point("model", 24)
    assert layer.rounds == 2 and len(layer.samples["forward_backward_s"]) == 4
    assert model.samples["cache_bytes"] == [2 * 32 * 26 * 4] * 2  # keys and values, C, T and what was decoded, fp32
    assert model.null_reasons == dict.fromkeys(("prefill_energy_j", "decode_energy_j_per_token"), "no_gpu")
    table = growth_tables.unmeasured(stored.frame(found))
    assert set(table[table["variant"] == "greedy"]["what"]) == {"layer", "model"}
    assert "out of memory" in set(growth_tables.points_table(stored.frame(found)).iloc[3])


def test_what_takes_too_long_is_a_point_and_longer_ones_are_not_tried(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    changes = {"variants": [str(tmp_path / "slow.py")], "contexts": [24, 32], "time_limit_s": 1.0}
    assert measured(tmp_path / "out", **changes)[0] == []
    (slow,) = stored.load_all(tmp_path / "out")
    assert [point.outcome for point in slow.points] == ["over_time"] * 4
    assert slow.point("layer", 24).says == "not done within 1 s"
    assert slow.point("layer", 32).says == "not tried: 24 tokens were over the time limit"


def test_a_process_that_dies_is_said_and_leaves_no_point(tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    failed, said = measured(tmp_path / "out", variants=[{"attention": str(tmp_path / "dying.py"), "label": "d"}])
    assert failed == ["d, layer, 24 tokens", "d, model, 24 tokens"]
    assert "FAILED d, layer, 24 tokens: its process ended with 3" in said
    (dying,) = stored.load_all(tmp_path / "out")
    assert [point.context for point in dying.points] == [16, 16]


def test_what_is_there_is_not_measured_again(tmp_path):
    one = {"variants": ["sdpa"], "contexts": [16]}
    assert len(measured(tmp_path, **one)[1]) == 2
    before = (tmp_path / "sdpa.json").read_bytes()
    assert measured(tmp_path, **one)[1] == [] and (tmp_path / "sdpa.json").read_bytes() == before
    said = measured(tmp_path, **one, rounds=2)[1]
    assert [line.split(":")[0] for line in said] == ["round 2"] * 2
    old = json.loads(before)["points"][0]["samples"]["forward_backward_s"]
    assert stored.load(tmp_path / "sdpa.json").point("layer", 16).samples["forward_backward_s"][:2] == old
    with pytest.raises(UsageError, match="another setting, machine or definition; name another folder"):
        measured(tmp_path, **one, layers=2)


POINT = {
    "part": "model", "context": 16, "outcome": "measured", "rounds": 1,
    "samples": {"prefill_s": [1.0], "decode_s_per_token": [1.0], "cache_bytes": [64.0]},
    "null_reasons": {"prefill_energy_j": "no_gpu", "decode_energy_j_per_token": "no_gpu"},
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"outcome": "fine"},
        {"outcome": "out_of_memory"},
        {"outcome": "out_of_memory", "says": "no room"},
        {"outcome": "over_time", "samples": {}, "null_reasons": {}, "rounds": 0},
        {"samples": POINT["samples"] | {"prefill_s": [0.0]}},
        {"samples": POINT["samples"] | {"prefill_s": [float("nan")]}},
        {"samples": POINT["samples"] | {"prefill_s": []}},
        {"samples": POINT["samples"] | {"forward_backward_s": [1.0]}},
        {"null_reasons": {"prefill_energy_j": "no_gpu"}},
        {"null_reasons": POINT["null_reasons"] | {"prefill_energy_j": "tired"}},
        {"rounds": 0},
        {"rounds": 2},
        {"sessions": ["a", "b"]},
        {"context": 1},
        {"extra": 1},
    ],
)
def test_the_schema_refuses_nonsense(change):
    stored.Point(**POINT)
    with pytest.raises(ValidationError):
        stored.Point(**POINT | change)


def made(label="sdpa", **changes):
    values = {
        "provenance": "measured", "finished_at": record.now(), "label": label, "title": label,
        "attention": "sdpa",
        "attention_sha256": "0" * 64, "options": {}, "points": [POINT],
        "setting": {name: SMALL[name] for name in stored.Setting.model_fields},
        "environment": {"device_name": "a machine", "torch_threads": 1, "device": "cpu"},
    }  # fmt: skip
    return stored.Scaling(**values | changes)


def test_a_record_comes_back_as_it_was_and_a_changed_one_does_not(tmp_path):
    path = stored.write(made(), tmp_path)
    assert stored.load(path).points == made().points
    assert stored.frame(stored.load_all(tmp_path)).set_index("metric").loc["cache_bytes", "value"] == pytest.approx(64)
    assert set(growth_tables.unmeasured(stored.frame([made()]))["why"]) == {"the run used no GPU"}
    path.write_text(path.read_text().replace("64.0", "65.0"))
    with pytest.raises(UsageError, match="its checksum does not fit"):
        stored.load(path)
    path.write_text("{")
    with pytest.raises(UsageError, match=r"sdpa\.json cannot be read"):
        stored.load(path)
    with pytest.raises(ValueError, match="each once"):
        made(points=[POINT, POINT])


def test_the_committed_records_are_whole_and_name_no_machine_path():
    newer = {"sdpa", *set(attention.variants()) - set(STUDY_ORDER)}
    for folder, variants, threads in (
        ("scaling-cpu", set(STUDY_ORDER), 1), ("scaling-newer-cpu", newer, 1),
        ("scaling-two-threads-cpu", set(STUDY_ORDER), 2),
    ):  # fmt: skip
        folder = paths.ROOT / "records" / folder
        found = stored.load_all(folder)
        assert {one.environment["torch_threads"] for one in found} == {threads}
        assert {one.label for one in found} == {path.stem for path in folder.glob("*.json")} == variants
        assert len({tuple((p.part, p.context) for p in one.points) for one in found}) == 1  # no gaps
        assert all(
            len(p.samples["forward_backward_s"]) >= 5
            for one in found
            for p in one.points
            if "forward_backward_s" in p.samples
        )
        text = "".join(path.read_text() for path in folder.glob("*.json"))
        assert str(paths.ROOT) not in text and "/tmp/" not in text


def timed(label, ms, threads, contexts=(16, 32), **changes):
    """A record of prefill that takes `ms` times its tokens."""
    points = [
        POINT | {"context": at, "samples": POINT["samples"] | {"prefill_s": [ms * at / 1e3]}} for at in contexts
    ]  # fmt: skip
    facts = {"device_name": "a machine", "torch_threads": threads, "device": "cpu"} | changes
    return made(label, points=points, environment=facts)


def test_times_of_two_threads_stand_beside_those_of_one_of_the_same_machine_alone():
    one = [timed("sdpa", 2, 1), timed("b", 4, 1), timed("c", 1, 1)]
    two = [timed("sdpa", 1, 2, (16,)), timed("b", 3, 2, (16,))]
    table = growth_tables.threads_table(one, two, "prefill_s")
    assert list(table.columns) == ["variant, at 16 tokens", "1 thread, ms", "2 threads, ms", "÷"]  # the longest of both
    assert table.to_numpy().tolist() == [["sdpa", "32", "16", "2.00"], ["b", "64", "48", "1.33"]]
    for other in ([timed("sdpa", 1, 1)], [timed("sdpa", 1, 2, device_name="another")]):
        assert "not side by side" in growth_tables.threads_table(one, other, "prefill_s")
    assert "no length in common" in growth_tables.threads_table(one, [timed("sdpa", 1, 2, (64,))], "prefill_s")


def test_records_of_two_machines_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no record"):
        stored.load_all(tmp_path)
    stored.write(made(), tmp_path)
    stored.write(made("b", environment={"device_name": "another", "torch_threads": 1, "device": "cpu"}), tmp_path)
    with pytest.raises(UsageError, match="differ in setting or machine"):
        stored.load_all(tmp_path)


def test_synthetic_points_are_no_part_of_a_frame(tmp_path):
    stored.write(made(provenance="synthetic"), tmp_path)
    with pytest.raises(UsageError, match="there is no record"):
        stored.load_all(tmp_path)
    stored.write(made("b"), tmp_path)
    assert [one.label for one in stored.load_all(tmp_path)] == ["b"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"contexts": [32, 16]}, "lengths must ascend"),
        ({"contexts": []}, "contexts"),
        ({"rounds": 0}, "rounds"),
        ({"device": "tpu"}, "device"),
        ({"time_limit_s": 1e9}, "time_limit_s: .* less than or equal to 604800"),
        ({"time_limit_s": float("inf")}, "time_limit_s"),
        ({"heads": 3}, "heads must divide width"),
        ({"variants": ["sdpa", "sdpa"]}, "two variants have the same label"),
        ({"variants": ["spda"]}, "Did you mean 'sdpa'"),
        ({"variants": [{"attention": "sdpa", "option": {}}]}, "did you mean 'options'"),
        ({"variants": [{"attention": "sdpa", "label": 3}]}, "label must be str, not 3"),
        ({"variants": [{"attention": ["sdpa"]}]}, r"attention must be str, not \['sdpa'\]"),
        ({"variants": [{"attention": "sdpa", "options": [1]}]}, r"options must be dict, not \[1\]"),
        ({"variants": [{"attention": "sliding_window", "options": {"windo": 2}}]}, "did you mean 'window'"),
    ],
)
def test_a_plan_that_cannot_be_measured_is_refused_before_anything_runs(change, says):
    with pytest.raises(UsageError, match=says):
        scaling.checked(SMALL | change)


def test_the_command_says_what_it_lacks(capsys, tmp_path):
    assert scaling.main([]) == 2 and "--write FOLDER" in capsys.readouterr().err
    (tmp_path / "odd.yaml").write_text("context: [16]\n")
    assert scaling.main([str(tmp_path / "odd.yaml"), "--write", str(tmp_path)]) == 2
    assert "did you mean 'contexts'?" in capsys.readouterr().err


def test_a_process_finds_its_libraries_loaded():
    """Else every sample would import PyTorch and transformers for seconds. The module itself is not among them: it may
    be the main one, of which Python would warn at every sample."""
    code = (
        f"import sys; [__import__(name) for name in {scaling.PRELOADED}]; before = set(sys.modules); "
        "assert 'lib.study.scaling' not in before; import lib.study.scaling; "
        "print({name.split('.')[0] for name in set(sys.modules) - before} - {'lib'} - sys.stdlib_module_names)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=paths.ROOT, capture_output=True, encoding="utf-8", check=True
    )
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize("variants", [1, 2, 3, 5, 8, 9])
def test_the_order_of_the_variants_favours_none(variants):
    """Two rounds take a steady drift away; a whole square every place, and every neighbour."""
    square = variants * (1 + variants % 2) if variants > 1 else 1
    orders = scaling.orders(variants, 2 * square + 1)
    assert all(sorted(order) == list(range(variants)) for order in orders)
    for order, after in zip(orders[: 2 * square : 2], orders[1 : 2 * square : 2], strict=True):
        assert after == order[::-1]
    for rounds in (orders[:square], orders[square : 2 * square]):
        for place in range(variants):
            standing = [order[place] for order in rounds]
            assert len({standing.count(variant) for variant in range(variants)}) == 1
        follows = [pair for order in rounds for pair in pairwise(order)]
        assert len({follows.count((a, b)) for a in range(variants) for b in range(variants) if a != b}) <= 1


def test_rounds_go_through_the_variants_in_turns_at_each_length(tmp_path, monkeypatch):
    """Read off the lines that the study writes, whose points are made up."""
    made_up = {"outcome": "measured", "rounds": 1, "null_reasons": {}}
    answer = {part: made_up | {"samples": {name: [1.0] for name in names}} for part, names in stored.METRICS.items()}
    facts = {"environment": {"device_name": "a machine", "torch_threads": 1, "device": "cpu"}, "provenance": "measured"}
    facts["setting"] = {"device": "cpu", "precision": "fp32"}

    def stub(work, *words, limit_s):
        return dict(facts) if work is scaling._facts else answer[words[2]]

    monkeypatch.setattr(scaling, "_apart", stub)
    names = ["sdpa", "linear", "gqa", "mla"]
    _, said = measured(tmp_path, variants=names, rounds=4)
    lines = [line.split(": ")[:2] for line in said]
    order = {}
    for turn, what in lines:
        label, part, context = what.split(", ")
        order.setdefault((turn, part, context), []).append(label)
    expected = [[names[place] for place in row] for row in scaling.orders(4, 4)]
    assert len(lines) == 4 * 4 * 2 * 2 and len(order) == 16
    for (turn, *_), labels in order.items():
        assert labels == expected[int(turn.split()[-1]) - 1]
    assert len({tuple(labels) for labels in order.values()}) == 4
    assert len([key for key, _ in groupby((turn, *what.split(", ")[1:]) for turn, what in lines)]) == 16  # one by one
    assert [turn for turn, _ in lines] == sorted(turn for turn, _ in lines)
    # All of one session, so that rounds may be paired; a later call is another.
    sessions = {label: stored.load(tmp_path / f"{label}.json").point("layer", 16).sessions for label in names}
    assert len(set(sessions["sdpa"])) == 1 and len(sessions["sdpa"]) == 4
    assert all(found == sessions["sdpa"] for found in sessions.values())
    measured(tmp_path, variants=names, rounds=5)
    found = [stored.load(tmp_path / f"{label}.json").point("model", 24).sessions for label in names]
    assert found == [found[0]] * 4 and len(set(found[0])) == 2 and found[0][4] != found[0][0]


def test_sessions_that_are_not_all_known_are_unknown():
    old, new = stored.Point(**POINT), stored.Point(**POINT, sessions=["b"])
    assert old.joined(new).sessions == new.joined(old).sessions == [] and old.joined(new).rounds == 2
    assert new.joined(new).sessions == ["b", "b"]


# What is timed: a clock that only the attention moves.

CLOCK = """
import time

import torch
from lib.attention.sdpa import Attention as Sdpa


class Ticks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.perf_counter.seconds += 2.0
        return gradient


class Attention(Sdpa):
    def forward(self, hidden_states, **words):
        time.perf_counter.seconds += 1.0 if hidden_states.shape[1] > 1 else 0.25
        output, weights = super().forward(hidden_states, **words)
        return Ticks.apply(output), weights
"""


class Clock:
    """`time.perf_counter` of a world in which nothing takes time but what says so."""

    seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def layer_setting(tmp_path, monkeypatch):
    """The setting, and a variant whose prefill takes 1 s, a token 0.25 s, and its backward 2 s."""
    monkeypatch.setattr(time, "perf_counter", Clock())
    (tmp_path / "clock.py").write_text(CLOCK)
    setting = stored.Setting(**{n: SMALL[n] for n in stored.Setting.model_fields} | {"device": "cpu", "repeats": 3})
    return setting, SimpleNamespace(attention=str(tmp_path / "clock.py"), options={})


def test_a_layer_is_timed_forward_and_backward(layer_setting):
    """A version that forgets one, times the warm-up with it or adds its repetitions reads 1, 2, 6 or 9 s."""
    found, _ = scaling._layer(*layer_setting, 24, torch.device("cpu"))
    assert found["forward_backward_s"] == [3.0] * 3


def test_decoding_is_per_token_and_without_the_prefill(layer_setting):
    setting, entry = layer_setting
    for new_tokens in (2, 4):
        changed = setting.model_copy(update={"new_tokens": new_tokens})
        found, _ = scaling._model(changed, entry, 24, torch.device("cpu"))
        assert found["prefill_s"] == [1.0] * 3 and found["decode_s_per_token"] == [0.25] * 3


def test_the_reciprocal_of_a_known_rate(monkeypatch):
    """A model that decodes 4 tokens a second, whatever they are timed with."""
    runs = [{"prefill_s": 7.0, "decode_s": 16 / 4, "cache": SimpleNamespace(layers=[])}] * 2
    monkeypatch.setattr(scaling.inference, "generations", lambda *_: runs)
    setting = stored.Setting(**{name: SMALL[name] for name in stored.Setting.model_fields} | {"new_tokens": 16})
    entry = SimpleNamespace(attention="sdpa", options={})
    found, _ = scaling._model(setting, entry, 24, torch.device("cpu"))
    assert found["decode_s_per_token"] == [0.25] * 2 and found["prefill_s"] == [7.0] * 2


MIB = 2**20


@pytest.mark.parametrize(("peak", "expected", "reason"), [(900, 300, None), (600, None, "peak_not_above")])
def test_memory_is_without_what_is_there_before(layer_setting, monkeypatch, peak, expected, reason):
    """Weights, inputs and libraries hold 600 MiB when the layer begins; before they were there, it was 100."""
    setting, entry = layer_setting
    held = iter([600])

    def process():
        return SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=next(held) * MIB))

    class Peaked(scaling.Meter):
        def metrics(self):
            values, reasons = super().metrics()
            return values | {"peak_resident_bytes": peak * MIB}, reasons

    monkeypatch.setattr(scaling.psutil, "Process", process)
    monkeypatch.setattr("lib.measure.meter._disk_bytes", lambda: None)
    monkeypatch.setattr(scaling, "Meter", Peaked)
    found, reasons = scaling._layer(setting, entry, 24, torch.device("cpu"))
    assert reasons.get("peak_activation_bytes") == reason
    if expected:
        assert found["peak_activation_bytes"] == [expected * MIB]


HEAVY = """
import torch
from lib.attention.sdpa import Attention as Sdpa


class Attention(Sdpa):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.more = torch.nn.Parameter(torch.ones(64 * 2**20 // 4))  # 64 MiB
"""


def test_weights_are_no_activations(tmp_path):
    (tmp_path / "heavy.py").write_text(HEAVY)
    measured(tmp_path / "out", variants=[str(tmp_path / "heavy.py"), "sdpa"], contexts=[256])
    heavy, sdpa = (stored.load(tmp_path / "out" / f"{label}.json") for label in ("heavy", "sdpa"))
    (with_weights,), (without,) = (one.point("layer", 256).samples["peak_activation_bytes"] for one in (heavy, sdpa))
    assert abs(with_weights - without) < 16 * MIB
