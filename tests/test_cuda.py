"""What only a GPU can show: kernels, no synchronisation in the window, the counter."""

import copy
import time
from types import SimpleNamespace

import pytest
import torch
from test_attention import HASHES
from test_training import P, make_rows
from transformers.cache_utils import Cache

from lib import attention, certificate, training
from lib.certificate import variant
from lib.data import corpus
from lib.measure import kernels
from lib.measure.meter import REFUSED_DISAGREEMENT, Meter
from lib.model import build_model, devices, gpt2_config
from lib.study import steps as study

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda", 0)
FLA = {"kernels": "fla"}
every_variant = pytest.mark.parametrize("name", attention.variants())


def make_trainer(name, **changes):
    p = SimpleNamespace(**P | {"device": "cuda", "precision": "bf16"} | changes)
    model = build_model(name, gpt2_config(2, 64, 4, 64, 30), p.seed)
    return training.Trainer(model, corpus.Corpus(make_rows(), make_rows(9), 30), p)


@every_variant
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("length", [1, 63, 200])
def test_the_gpu_gives_the_reference_s_output_and_gradients(name, dtype, tolerance, length):
    torch.manual_seed(0)
    exact = attention.load(name)(gpt2_config(2, 128, 4, 256, 2), 0).double().eval()
    for parameter in exact.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    x = torch.randn(2, length, 128, dtype=torch.float64, requires_grad=True)
    expected = exact.reference(x)
    expected.square().sum().backward()
    layer = attention.load(name)(gpt2_config(2, 128, 4, 256, 2), 0).eval()
    layer.load_state_dict(exact.state_dict())
    layer = layer.to(CUDA, dtype)
    if name == "flash" and dtype == torch.float32:
        with pytest.raises(ValueError, match="bf16 or fp16"):
            layer(x.detach().to(CUDA, dtype))
        return
    if name in HASHES and dtype == torch.bfloat16:
        pytest.skip("other buckets in bf16; test_lsh.py compares with the buckets given")
    y = x.detach().to(CUDA, dtype).requires_grad_()
    got = layer(y)[0]
    got.square().sum().backward()
    rounded, z = copy.deepcopy(layer).double().cpu(), y.detach().double().cpu().requires_grad_()
    theirs = rounded.reference(z)  # what rounding weights and input alone makes of the definition: norms enlarge it
    theirs.square().sum().backward()
    for ours, alone, right in ((got, theirs, expected), (y.grad, z.grad, x.grad)):
        allowed = max(tolerance, 3 * off(alone, right))
        assert off(ours.cpu(), right) < allowed


def off(found, right):
    return ((found.detach().double() - right.detach()).norm() / right.detach().norm()).item()


@every_variant
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_certificate_passes_on_the_gpu_and_leaves_no_memory_behind(name, precision):
    if name == "flash" and precision == "fp32":
        pytest.skip("its kernel takes bf16 and fp16 only; a run says so")
    before = torch.cuda.memory_reserved(CUDA)
    setting = certificate.Setting(width=64, positions=600, device="cuda", precision=precision)
    said = variant._certificate(name, {}, setting)
    assert said["passed"], [one for one in said["measures"] if one["passed"] is False]
    assert said["tested"]["device"] == "cuda" and torch.cuda.memory_reserved(CUDA) <= before + 2**21


@every_variant
def test_nothing_synchronises_inside_a_step(name):
    trainer = make_trainer(name)
    trainer.warm_up()
    trainer.model.train()
    watch = training.LossWatch(trainer.losses, report=lambda *_: None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            trainer.take_step(step)
            trainer.meter.mark(step + 1)
            watch.look(step + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_variant
@pytest.mark.parametrize("compile", [False, True])
def test_a_run_trains_and_measures_on_the_gpu(name, compile):
    trainer = make_trainer(name, compile=compile)
    trainer.warm_up()
    trainer.run()
    assert torch.isfinite(trainer.losses).all()
    values, reasons = trainer.meter.metrics()
    assert values["peak_memory_bytes"] > 0 and values["peak_resident_bytes"] is None
    assert values["energy_j"] is None and reasons["energy_j"] in ("window_too_short", "mig", "counter_unsupported")


def test_compiled_baseline_keeps_its_scores():
    model = build_model("baseline", gpt2_config(2, 128, 2, 256, 30)).to(CUDA).train()
    model.transformer.h[0].attn.compile()
    names = kernels.names(model, 128, devices.autocast("bf16", CUDA))
    assert not [kernel for kernel in names["forward"] if "flash" in kernel.lower() or "fmha" in kernel.lower()]


@every_variant
def test_kernels_are_named_forward_and_backward(name):
    model = build_model(name, gpt2_config(2, 128, 2, 256, 30)).to(CUDA)
    names = kernels.names(model, 128, devices.autocast("bf16", CUDA))
    assert names["forward"] and names["backward"]


@pytest.mark.parametrize("square", [False, True], ids=["constant", "square"])
def test_the_counter_agrees_with_the_power_trace(square):
    """Eleven seconds of matrix products, without and with pauses of half a second in each."""
    meter = Meter(CUDA)
    if meter.gpu_counter.monitor is None:
        pytest.skip(f"no energy counter: {meter.gpu_counter.reason}")
    a = torch.randn(4096, 4096, device=CUDA, dtype=torch.bfloat16)
    with meter.watching(), meter.window():
        begin = time.perf_counter()
        while (passed_s := time.perf_counter() - begin) < 11:
            if square and passed_s % 1 > 0.5:
                time.sleep(0.5)
            a @ a
            meter.mark(1)
            torch.cuda.synchronize()
    counted = meter.gpu_counter.reading(meter.window_s)
    print(f"{counted.joules:.1f} J by the counter, the trace {meter.disagreement:+.2%} against it")
    assert counted.reason is None and 20 < counted.joules / meter.window_s < 2000
    assert abs(meter.disagreement) < REFUSED_DISAGREEMENT
    assert meter.log()[-1]["time_s"] == pytest.approx(meter.window_s, abs=0.6) and meter.states[-1]["sm_clock_mhz"] > 0
    assert len(meter.inside) > 20 and meter.utilization().joules > 0  # clock and heat, by a process of its own
    print(f"after the window {meter.gpu_counter.after_w} W, taken off {meter.gpu_counter.edges_j} J")


def test_turns_of_training_steps_are_measured_and_what_needs_the_gpu_alone_comes_back(tmp_path, monkeypatch):
    tiny = {"layers": 2, "width": 64, "heads": 2, "vocabulary": 64, "rounds": 2, "window_s": 2.0, "device": "cuda"}
    tiny |= {"variants": ["sdpa", "linear"], "sizes": [{"context": 64, "batch_size": 4}]}
    prepare, tried = study.Bench.prepare, []

    def hungry(bench, context, window_s):
        tried.append(bench.entry.label)
        if tried.count("linear") == 1 and bench.entry.label == "linear":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        prepare(bench, context, window_s)

    monkeypatch.setattr(study.Bench, "prepare", hungry)
    monkeypatch.setattr(study.Warmth, "rising", lambda self: False)
    found = study.measure(study.Plan(**tiny), tmp_path / "steps.json")
    turns = [turn for one in found.rounds for turn in one.turns]
    assert [turn.label for turn in turns if turn.alone] == ["linear", "linear"]
    assert all(turn.peak_memory_bytes > 0 and turn.time_s >= 1.8 for turn in turns)
    assert all(turn.energy_j or turn.energy_null_reason for turn in turns)
    assert 0 < found.busy["sdpa"][64] <= 1


@every_variant
def test_the_gpu_s_busy_fraction_is_a_share_and_leaves_no_trace(name):
    trainer = make_trainer(name)
    trainer.warm_up()
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    assert 0 < trainer.busy_fraction().joules <= 1
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["gated_deltanet", "kda", "mamba2", "retention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [2, 64, 200])
def test_fla_s_kernels_give_what_the_chunks_in_float64_give(name, dtype, length):
    """Output, gradients and the state behind a text that is read in two pieces, left padding in it."""
    pytest.importorskip("fla")
    torch.manual_seed(0)
    plain, fused = (attention.load(name)(gpt2_config(1, 128, 2, 512, 2), 0, **own).to(CUDA) for own in ({}, FLA))
    for weight in plain.parameters():
        torch.nn.init.normal_(weight, 0.0, 0.1)
    fused.load_state_dict(plain.state_dict())
    plain, fused = plain.double(), fused.to(dtype)
    x = torch.randn(3, length + 65, 128, device=CUDA)
    padding = torch.ones(3, length + 65, dtype=torch.bool, device=CUDA)
    padding[1, : length // 2] = False
    found = []
    for layer in (plain, fused):
        y = x.to(next(layer.parameters()).dtype).requires_grad_()
        cache = Cache(layers=[layer.new_cache()])
        pieces = [
            layer(piece.contiguous(), past_key_values=cache, padding_mask=padding[:, :end])[0]
            for piece, end in ((y[:, :length], length), (y[:, length:], length + 65))
        ]
        out = torch.cat(pieces, dim=1) * padding[..., None]
        out.square().sum().backward()
        found.append((out, y.grad, cache.layers[0].state, *(weight.grad for weight in layer.parameters())))
    for theirs, ours in zip(*found, strict=True):
        assert (ours.double() - theirs).norm() <= {torch.bfloat16: 0.03, torch.float32: 0.005}[dtype] * theirs.norm()
