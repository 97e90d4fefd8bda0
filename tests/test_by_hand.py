"""Every count against arithmetic that a reader can follow with a pencil.

The model: T = 16 tokens, C = 32 wide, H = 4 heads of D = 8, L = 3 layers, 50 words, 64 positions. A product of (a, b)
by (b, c) is a b c multiplications and as many additions, 2 a b c FLOPs.
"""

import os
import time

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib import attention
from lib.measure import assemble, energy, flops, inference
from lib.measure import meter as instruments
from lib.measure.meter import Meter
from lib.model import build_model, devices, gpt2_config, meta_model

CPU = torch.device("cpu")
fp32 = devices.autocast("fp32", CPU)
CONFIG = gpt2_config(layers=3, width=32, heads=4, positions=64, vocabulary=50)
T, C, H, D, L, WORDS, POSITIONS = 16, 32, 4, 8, 3, 50, 64

KNOBS = {
    "linear": {"chunk": 4},
    "sliding_window": {"window": 5},
    "lsh": {"n_hashes": 2, "chunk_length": 4, "buckets": 4},
}

# Weights of one layer's attention: matrices, then vectors.
GPT2_ATTENTION = (C * 3 * C + C * C, 3 * C + C)  # queries, keys, values; output. A bias each
ATTENTION = dict.fromkeys(("baseline", "sdpa", "flash", "linear", "sliding_window"), GPT2_ATTENTION) | {
    "gqa": (C * (C + 2 * D) + C * C, C + 2 * D + C),  # H/4 = 1 head of keys and one of values
    "lsh": (C * 2 * C + C * C, 2 * C + C),  # queries are keys
    # Queries of H (8 + 4); latent of 4 D = 32 and a rotary key of 4; keys and values from the latent; output. The
    # latent's norm and the output's bias are its only vectors.
    "mla": (C * H * (8 + 4) + C * (32 + 4) + 32 * H * 2 * D + C * C, 32 + C),
}
MLP = (C * 4 * C + 4 * C * C, 4 * C + C)
NORMS = 2 * 2 * C  # two in a block, scale and shift

# FLOPs of one layer between the projections: useful, dense, and as torch counts what runs on a CPU.
PAIRS = 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9 + 10 + 11 + 12 + 13 + 14 + 15 + 16  # query t sees t keys
FULL = (4 * C * PAIRS, 4 * C * T * T, 4 * C * T * T)  # scores 2 D a pair and head, mixing as much: 4 C over the heads
CORE = dict.fromkeys(("baseline", "sdpa", "flash", "gqa"), FULL) | {
    "sliding_window": (
        4 * C * (1 + 2 + 3 + 4 + 12 * 5),
        4 * C * T * T,
        4 * C * (4 * 5) * (2 * 5),  # 4 blocks of 5 queries, the last one filled up, beside 2 x 5 keys each
    ),
    "linear": (
        # A token and head: D x D terms into the state, D x D to read it, D to read the normaliser.
        T * H * 2 * (D * D + D * D + D),
        # Beside these, scores and values inside chunks of 4.
        T * H * 2 * (D * D + D * D + D) + T * H * 2 * (4 * D + 4 * D),
        T * H * 2 * (D * D + D * D + D) + T * H * 2 * (4 * D + 4 * D),
    ),
    "lsh": (
        # Buckets of T / 4: queries 1 to 4 find one key, 5 to 8 two, 9 to 12 three, the others the 4 that a chunk
        # holds, in each of 2 rounds; hashing by 2 directions (and their opposites) a round.
        2 * (4 * C * (4 * 1 + 4 * 2 + 4 * 3 + 4 * 4) + 2 * T * C * 2),
        2 * (4 * C * T * T + 2 * T * C * 2),
        2 * (4 * C * T * (2 * 4) + 2 * T * C * 2),  # each query beside its chunk and the one before
    ),
    "mla": (
        H * 2 * (8 + 4 + 8) * PAIRS,  # scores over 8 + 4 numbers, mixing over 8
        H * 2 * (8 + 4 + 8) * T * T,
        H * 2 * (12 + 12) * T * T,  # the CPU's kernel wants values as wide as keys
    ),
}

# Bytes of one layer's cache in fp32 after N tokens.
CACHE = dict.fromkeys(("baseline", "sdpa", "flash"), lambda n: 4 * 2 * C * n) | {
    "gqa": lambda n: 4 * 2 * D * n,
    "sliding_window": lambda n: 4 * 2 * C * 4,  # the 4 tokens that the next one will see beside itself
    "linear": lambda n: 4 * H * (D * D + D),  # state and normaliser, at any length
    "lsh": lambda n: 4 * 2 * C * n + 2 * H * 2 * n,  # and a bucket of 2 bytes a head and round
    "mla": lambda n: 4 * (32 + 4) * n,
}


def small(name):
    return build_model(name, CONFIG, **KNOBS.get(name, {}))


every_variant = pytest.mark.parametrize("name", attention.STUDY_ORDER)


@every_variant
def test_flops_three_ways(name):
    model = small(name)
    matrices = 2 * T * (L * (ATTENTION[name][0] + MLP[0]) + C * WORDS)
    useful, dense, counted = (matrices + L * core for core in CORE[name])
    found = flops.analytic(model, T)
    assert (found["forward_flops_causal"], found["forward_flops_full"]) == (useful, dense)
    assert found["attention_core_share"] == pytest.approx(L * CORE[name][0] / useful)
    assert flops.counted(model, T, fp32) == counted


@every_variant
def test_parameters(name):
    blocks = L * (sum(ATTENTION[name]) + sum(MLP) + NORMS)
    assert sum(p.numel() for p in small(name).parameters()) == WORDS * C + POSITIONS * C + blocks + 2 * C


@every_variant
def test_cache_bytes_from_the_cache_itself(name):
    rows = inference.measured(small(name), [8, 20], new_tokens=4, repeats=1, autocast=fp32)
    for row in rows:
        by_hand = L * CACHE[name](row["context"] + 4)
        assert row["cache_bytes"] == row["cache_bytes_analytic"] == by_hand


@every_variant
def test_checkpoint_bytes(name):
    """Four bytes a parameter, tied embeddings once, lsh's rotations, and a header that names the tensors."""
    model = small(name)
    buffers = 4 * L * H * D * (2 * 4 // 2) if name == "lsh" else 0
    extra = assemble.checkpoint_bytes(model) - 4 * sum(p.numel() for p in model.parameters()) - buffers
    tensors = len({tensor.data_ptr() for tensor in model.state_dict().values()})
    assert 8 + 60 * tensors < extra < 8 + 200 * tensors


def test_the_core_s_share_of_gpt2_124m():
    model = meta_model("sdpa", gpt2_config(12, 768, 12, 4096, 50257))
    per_token = 2 * (12 * 12 * 768**2 + 768 * 50257)  # 12 C² weights a block
    for context, share, dense_share in ((512, 3.7, 7.1), (4096, 23.4, 37.9)):
        core, dense = (12 * 4 * 768 * pairs for pairs in (context * (context + 1) // 2, context**2))
        found = flops.analytic(model, context)
        assert found["forward_flops_causal"] == per_token * context + core
        assert found["forward_flops_full"] == per_token * context + dense
        assert round(100 * found["attention_core_share"], 1) == share
        assert round(100 * dense / found["forward_flops_full"], 1) == dense_share


@pytest.mark.parametrize(("queries", "keys", "value_width"), [(16, 16, 8), (3, 16, 8), (1, 7, 8)])
def test_the_fused_cpu_kernel_s_formula(queries, keys, value_width):
    shapes = (2, 4, queries, 8), (2, 4, keys, 8), (2, 4, keys, value_width)
    by_hand = 2 * 4 * (2 * queries * 8 * keys + 2 * queries * keys * value_width)
    assert flops._fused_attention_flops(*shapes) == by_hand


def test_cpu_time_is_what_the_process_computed_not_what_it_waited():
    meter = Meter(CPU)
    with meter.window():
        begin = time.process_time()
        while time.process_time() - begin < 0.3:
            pass
        time.sleep(0.3)
    values, _ = meter.metrics()
    assert 0.3 <= values["cpu_time_s"] < 0.4
    assert values["time_s"] >= 0.6
    assert values["cpu_cores_used"] == pytest.approx(values["cpu_time_s"] / values["time_s"])


def test_the_peak_rises_by_what_is_allocated():
    def peak(megabytes):
        meter = Meter(CPU)
        with meter.window():
            held = torch.ones(megabytes << 18)  # fp32
            del held
        values, reasons = meter.metrics()
        if values["peak_resident_bytes"] is None:
            pytest.skip(reasons["peak_resident_bytes"])
        return values["peak_resident_bytes"]

    peak(200)  # the first pays for the allocator itself
    assert peak(200) - peak(100) == pytest.approx(100 << 20, rel=0.05)


def test_disk_bytes_are_what_is_written_inside(tmp_path):
    def write(name):
        with (tmp_path / name).open("wb") as file:
            file.write(os.urandom(8 << 20))
            file.flush()
            os.fsync(file.fileno())

    before = psutil.Process().io_counters() if hasattr(psutil.Process, "io_counters") else None
    write("before")
    meter = Meter(CPU)
    with meter.window():
        write("inside")
    write("after")
    values, reasons = meter.metrics()
    if before is None:
        assert values["disk_bytes"] is None and reasons["disk_bytes"] == "not_counted_here"
    elif psutil.Process().io_counters().write_bytes - before.write_bytes < 24 << 20:
        pytest.skip("the folder lies in memory")
    else:
        assert values["disk_bytes"] == pytest.approx(8 << 20, rel=0.05)


def test_disk_bytes_that_are_not_counted_are_null(monkeypatch):
    monkeypatch.setattr(
        instruments.psutil.Process, "io_counters", lambda _: (_ for _ in ()).throw(psutil.AccessDenied())
    )
    meter = Meter(CPU)
    with meter.window():
        pass
    values, reasons = meter.metrics()
    assert values["disk_bytes"] is None and reasons["disk_bytes"] == "not_counted_here"


def test_latencies_are_medians_after_a_warm_up_at_the_same_length_and_decoding_is_per_token(monkeypatch):
    """A clock that says 100 s for a first call, then prefills of 9, 1 and 2 s and tokens of 3, 1/4 and 1/2 s."""
    model, clock, calls = small("sdpa"), [0.0], []
    prefills, tokens = iter([100.0, 9.0, 1.0, 2.0] * 2), iter([50.0, *[3.0] * 4, *[0.25] * 4, *[0.5] * 4] * 2)

    def count(module, words, given):
        is_prefill = words[0].shape[1] > 1
        clock[0] += next(prefills if is_prefill else tokens, 0.0)  # joules prefill once more, and time nothing
        calls.append((words[0].clone(), module.training, given["past_key_values"]))

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    monkeypatch.setattr(inference.time, "perf_counter", lambda: clock[0])
    model.train()
    rows = inference.measured(model, [8, 20], new_tokens=4, repeats=3, autocast=fp32)
    assert [row["context"] for row in rows] == [8, 20] and not any(training for _, training, _ in calls)
    assert [row["prefill_latency_s"] for row in rows] == [2.0, 2.0]
    assert [row["decode_latency_s_per_token"] for row in rows] == [0.5, 0.5]
    lengths = [ids.shape[1] for ids, *_ in calls]
    assert lengths == [n for context in (8, 20) for n in (context, 1, *[context, 1, 1, 1, 1] * 3)] + [8, 20]
    said = torch.cat([ids for ids, *_ in calls[2:7]], dim=1)  # the prompt, and each token that was most likely
    hook.remove()
    with torch.no_grad():
        assert torch.equal(model(said).logits[:, 7:-1].argmax(-1), said[:, 8:])
    cache = calls[2][2]
    assert all(given is cache for *_, given in calls[3:7]) and cache.layers[0].reserved == 8 + 4


class Counter(energy.Counter):
    """A counter that moves by 5 J with every token that the model reads."""

    read = 0

    def __init__(self):
        super().__init__("gpu_energy", monitor="there is one")

    def begin(self):
        self.began = Counter.read

    def end(self):
        self.windows_j.append(5.0 * (Counter.read - self.began))


@pytest.fixture
def metered(monkeypatch):
    model, clock = small("sliding_window"), [0.0]
    monkeypatch.setattr(Counter, "read", 0)

    def count(_, words):
        Counter.read += words[0].shape[1]
        clock[0] += 1.0 if words[0].shape[1] > 1 else 0.25

    model.register_forward_pre_hook(count)
    monkeypatch.setattr(instruments.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(instruments.energy, "gpu_counter", lambda _: Counter())
    monkeypatch.setattr(instruments.energy, "foreign_processes", lambda _: 0)
    return model


def test_joules_of_a_prefill_and_of_a_decoded_token(metered):
    rows = inference.joules(metered, [8, 20], new_tokens=4, window_s=12.0, autocast=fp32)
    assert [(row["context"], row["prefill_energy_j"]) for row in rows] == [(8, 40.0), (20, 100.0)]
    assert [row["decode_energy_j_per_token"] for row in rows] == [5.0, 5.0]
    assert [row["energy_null_reason"] for row in rows] == [None, None]


def test_every_decoding_starts_from_the_prompt_s_own_cache(metered, monkeypatch):
    lengths, decode = [], inference._decode

    def watched(model, out, new_tokens):
        lengths.append(out.past_key_values.get_seq_length())
        return decode(model, out, new_tokens)

    monkeypatch.setattr(inference, "_decode", watched)
    inference.joules(metered, [20], new_tokens=4, window_s=12.0, autocast=fp32)
    assert len(lengths) == 13 and set(lengths) == {20}  # 12 repetitions of 1 s after the first, untimed one


@pytest.mark.parametrize(
    ("window_s", "others", "reason"),
    [(0.0, 0, "not_asked_for"), (1.0, 0, "window_too_short"), (12.0, 2, "foreign_process")],
)
def test_joules_that_cannot_be_had_are_null_with_the_reason(metered, monkeypatch, window_s, others, reason):
    monkeypatch.setattr(instruments.energy, "foreign_processes", lambda _: others)
    (row,) = inference.joules(metered, [8], new_tokens=4, window_s=window_s, autocast=fp32)
    assert row["prefill_energy_j"] is None and row["decode_energy_j_per_token"] is None
    assert row["energy_null_reason"] == reason


def test_nothing_is_repeated_where_nothing_counts():
    model, calls = small("sdpa"), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    (row,) = inference.joules(model, [8], new_tokens=4, window_s=60.0, autocast=fp32)
    assert row["energy_null_reason"] == "no_gpu" and len(calls) == 1


MOVING = {"cat", "stack", "copy_", "clone", "_to_copy", "index_select", "repeat", "constant_pad_nd", "roll"}


class Moved(TorchDispatchMode):
    """Bytes that operators which only move what they are given have written."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function._overloadpacket.__name__ in MOVING:
            moved = args[1] if function._overloadpacket.__name__ == "copy_" else out
            self.bytes += moved.numel() * moved.element_size()
        return out


@torch.no_grad()
def moved_by_a_token(model, cache, context):
    out = model(torch.arange(context)[None] % 50, past_key_values=cache, use_cache=True, logits_to_keep=1)
    with Moved() as moved:
        inference._decode(model, out, 1)
    return moved.bytes


@pytest.mark.parametrize("name", attention.variants())
def test_no_operator_but_attention_moves_the_cache_while_decoding_is_timed(name):
    """Far beyond every window and bucket, so that what does not grow with the context is the same at both lengths."""
    model = build_model(name, gpt2_config(2, 32, 4, 600, 50)).eval()
    by_context = [moved_by_a_token(model, inference.roomy_cache(model, 600), context) for context in (300, 500)]
    assert by_context[0] == by_context[1]


def test_a_cache_that_joins_its_tokens_anew_is_seen_to_move_them():
    model = build_model("sdpa", gpt2_config(2, 32, 4, 600, 50)).eval()
    by_context = [moved_by_a_token(model, model.new_cache(), context) for context in (300, 500)]
    assert by_context[1] - by_context[0] == 2 * 2 * 32 * 4 * 200  # keys and values of two layers


@pytest.mark.parametrize("name", attention.variants())
@torch.no_grad()
def test_a_roomy_cache_holds_what_the_variant_s_own_does_and_branches(name):
    torch.manual_seed(0)
    model = build_model(name, gpt2_config(2, 32, 4, 64, 50)).eval()
    ids = torch.randint(0, 50, (2, 40))
    cache = inference.roomy_cache(model, 38)  # less than comes: it grows beyond as any other
    for part in (ids[:, :20], *ids[:, 20:30].split(1, dim=1)):
        model(part, past_key_values=cache, use_cache=True)
    branch = inference.branched(cache)
    other = model((ids[:, 30:] + 1) % 50, past_key_values=branch, use_cache=True).logits
    for part in (ids[:, 30:37], *ids[:, 37:].split(1, dim=1)):
        last = model(part, past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(last, model(ids).logits[:, -1], rtol=1e-4, atol=1e-5)
    twice = inference.roomy_cache(model, 64)
    model(ids[:, :39], past_key_values=twice, use_cache=True)
    twice.reorder_cache(torch.tensor([1, 0]))
    swapped = model(ids[[1, 0], 39:], past_key_values=twice, use_cache=True).logits[:, -1]
    torch.testing.assert_close(swapped, last[[1, 0]], rtol=1e-4, atol=1e-5)
    expected = model(torch.cat([ids[:, :30], (ids[:, 30:] + 1) % 50], dim=1)).logits[:, 30:]
    torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)
    assert inference.cache_bytes(cache) == sum(block.attn.cache_bytes(40, 4) * 2 for block in model.transformer.h)
