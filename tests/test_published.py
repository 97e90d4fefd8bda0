"""The published definitions compute what the audit found: row by row, to the last parameter and the third digit."""

import inspect
import math

import make
import pandas as pd
import pytest
import torch
from test_certificate import planted
from torch.utils.flop_counter import FlopCounterMode

from lib import attention, training
from lib.analysis import figures, published_flops, replication
from lib.certificate import Setting, variant
from lib.certificate.examinations import receptive_field
from lib.certificate.twins import Twins
from lib.model import build_model, gpt2_config, meta_model
from lib.paths import ROOT
from lib.study import plan

PADDED = {"masked": True}  # a batch with padding, and so with a mask
# name, options, layers -> of the 300 positions before token 300, how many change; and after it; by the audit
MOVES = [
    ("baseline", {}, 2, 0, 211),
    ("sdpa", PADDED, 2, 0, 211),
    ("sdpa", {}, 2, 300, 211),
    ("gqa", {}, 2, 0, 211),
    ("linear", {}, 2, 300, 211),
    ("sliding_window", PADDED, 2, 0, 6),
    ("sliding_window", {}, 1, 3, 3),
    ("sliding_window", {}, 2, 6, 6),
    ("sliding_window", {}, 3, 9, 9),
    ("flash", {}, 2, 0, 0),
    ("mla", {}, 2, 300, 211),
]
PARAMETERS = {
    "baseline": 124_439_808, "sdpa": 117_352_704, "gqa": 117_325_056, "linear": 117_352_704,
    "sliding_window": 117_352_704, "lsh": 117_352_704, "flash": 117_352_704, "mla": 118_741_248,
}  # fmt: skip
FLOPS = {  # x 10¹²: by the audit, and as published
    "baseline": ("1.013", "1.01"), "sdpa": ("1.032", "1.03"), "gqa": ("1.032", "1.03"), "linear": ("1.071", "1.07"),
    "sliding_window": ("1.032", "1.03"), "lsh": ("1.032", "1.03"), "flash": ("0.955", "0.955"),
    "mla": ("0.923", "0.923"),
}  # fmt: skip
GPT2 = gpt2_config(*published_flops.GPT2)
every_definition = pytest.mark.parametrize("name", attention.STUDY_ORDER)


def path(name):
    return replication.published(name)


def layer(name, width=32, **options):
    return attention.load(path(name))(gpt2_config(1, width, 4, 64, 2), 0, **options)


def test_all_eight_are_there_and_no_study_runs_them_unasked():
    found = {file.stem for file in (ROOT / "lib" / "published").glob("*.py")}
    assert found == {*attention.STUDY_ORDER, "__init__"}
    assert {attention.find(name).parent.name for name in attention.variants()} == {"attention"}
    planned = [run["values"]["attention"] for run in plan.runs_of({}, [*attention.variants()], 1)]
    assert not [name for name in planned if name.endswith(".py")]


@pytest.mark.parametrize(("name", "options", "layers", "earlier", "later"), MOVES)
def test_what_another_token_moves(name, options, layers, earlier, later):
    assert replication.moved_by_a_token(path(name), layers=layers, **options) == (earlier, later)


def test_the_width_of_gpt2_moves_the_same():
    assert replication.moved_by_a_token(path("linear"), width=768) == (300, 211)
    assert replication.moved_by_a_token(path("flash"), width=768) == (0, 0)


def test_random_buckets_move_their_own_alone():
    """One layer: of 300 earlier positions about one in `buckets`, with a mask none, whatever the tokens are."""
    for buckets in (4, 16):
        earlier, later = replication.moved_by_a_token(path("lsh"), layers=1, buckets=buckets)
        expected = 300 / buckets
        assert abs(earlier - expected) < 4 * math.sqrt(expected) and later > 0
    earlier, later = replication.moved_by_a_token(path("lsh"), masked=True)
    assert earlier == 0 and later > 0
    drawing = layer("lsh")
    x = torch.randn(1, 40, 32)
    assert not torch.equal(drawing(x)[0], drawing(x)[0])


@pytest.mark.parametrize(
    ("name", "padded"),
    [(name, False) for name in attention.STUDY_ORDER] + [(name, True) for name in ("sdpa", "sliding_window", "lsh")],
)
def test_certificates_agree_with_the_audit(name, padded):
    assert ("masked" in inspect.signature(attention.load(path(name))).parameters) >= padded
    options = PADDED if padded else {}
    measures = variant.examined(path(name), options, Setting(), (*variant.NAMED, "reference"))
    said, field = variant.summary(measures), receptive_field(Twins(path(name), options, Setting(), 0))
    causal = name in ("baseline", "gqa", "flash") or (padded and name != "lsh")  # lsh: no two forwards agree
    assert said["causal"] == said["prefix_equal"] == causal
    assert said["cached_equal"] == (causal and name != "flash")  # whose bf16 weights are not fp32 to rounding
    assert said["mixes"] == (name != "flash")
    assert field == {"sliding_window": 4, "flash": 1}.get(name, 150) or name == "lsh"
    assert said["gpt2_projection"] == (name == "baseline")
    assert not said["gpt2_initialisation"] and not said["passed"]
    assert max(said["reference_difference"], said["reference_gradient_difference"]) < 1e-12


@every_definition
def test_parameters_are_the_audit_s(name):
    assert sum(w.numel() for w in meta_model(path(name), GPT2).parameters()) == PARAMETERS[name]


@every_definition
def test_weights_make_the_published_model_size(name):
    """Flash among them: only bfloat16 without a float32 master gives its 407 MB."""
    size = sum(w.numel() * w.element_size() for w in meta_model(path(name), GPT2).parameters()) / 2**20
    published = pd.read_csv(figures.PUBLISHED).set_index("variant").loc[name, "model_size_mb"]
    assert abs(size - published) < 1


@every_definition
def test_flops_are_re_derived(name):
    audited, published = FLOPS[name]
    derived = published_flops.derived(path(name)) / 1e12
    assert f"{derived:.3f}" == audited
    assert pd.read_csv(figures.PUBLISHED).set_index("variant").loc[name, "flops_e12"] == float(published)
    assert f"{derived:.{len(published) - 2}f}" == published


def test_with_their_kernels_work_two_come_to_more():
    """The audit's own figures, of a stand-in for the flash kernel and of the eager baseline."""
    assert f"{published_flops.derived(path('flash'), counted=True) / 1e12:.3f}" == "0.957"
    assert f"{published_flops.derived(path('baseline'), counted=True) / 1e12:.3f}" == "1.090"


@every_definition
def test_the_arithmetic_is_what_runs(name):
    """The matrix products that torch sees are those that the arithmetic adds up."""
    counted = True if name == "flash" else None  # ours spells the kernel out
    assert published_flops.observed(path(name)) == published_flops.derived(path(name), counted=counted)


@pytest.mark.parametrize("length", [1, 33, 64])
def test_projection_flops_are_those_of_the_products(length):
    """The part of `lib.measure.flops` that a definition may take over from the shared count."""
    module = layer("mla")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.randn(1, length, 32))
    assert counter.get_total_flops() == module.projection_flops(length) + module.core_flops(length)


@every_definition
def test_weights_start_as_the_constructor_draws_them(name):
    model = build_model(path(name), gpt2_config(2, 128, 4, 64, 50), seed=3)
    again, other = (build_model(path(name), gpt2_config(2, 128, 4, 64, 50), seed=seed) for seed in (3, 4))
    attn = model.transformer.h[1].attn
    if name == "baseline":
        assert attn.c_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)  # not over √(2 L)
    else:
        bound = 1 / math.sqrt(128)
        for linear in (attn.query, attn.key, attn.value):
            assert 0.95 * bound < linear.weight.abs().max().float() <= 1.01 * bound
            assert linear.weight.float().std().item() * math.sqrt(3) == pytest.approx(bound, rel=0.05)
    shared = build_model("sdpa", gpt2_config(2, 128, 4, 64, 50), seed=3)
    assert torch.equal(model.transformer.h[1].mlp.c_fc.weight, shared.transformer.h[1].mlp.c_fc.weight)
    for (key, weight), same, else_ in zip(
        model.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(weight, same), key
        assert ".attn." not in key or weight.dim() < 2 or not torch.equal(weight, else_), key


def test_flash_trains_bfloat16_weights_that_have_no_master():
    """An update under half a step of bfloat16 is lost; the other weights are float32 and keep it."""
    model = build_model(path("flash"), gpt2_config(1, 32, 4, 64, 50))
    assert {w.dtype for w in model.transformer.h[0].attn.parameters()} == {torch.bfloat16}
    assert model.transformer.h[0].mlp.c_fc.weight.dtype == torch.float32
    weight = model.transformer.h[0].attn.query.weight
    with torch.no_grad():
        weight.fill_(0.03)
        before = weight.clone()
        weight -= 1e-5 * torch.ones_like(weight)
    assert torch.equal(weight, before)


def test_gqa_wants_its_eight_heads():
    with pytest.raises(ValueError, match="8 heads, which do not divide a width of 36"):
        layer("gqa", width=36)


@pytest.mark.parametrize("name", ["sdpa", "sliding_window", "lsh", "mla"])
def test_a_padding_mask_hides_padding(name):
    module, x = layer(name), torch.randn(2, 12, 32)
    if name == "lsh":
        module = layer(name, buckets=1)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :4] = False
    other = x.clone()
    other[0, :4] += 1
    one, two = (module(given, padding_mask=mask)[0] for given in (x, other))
    torch.testing.assert_close(one[:, 4:], two[:, 4:])
    assert not torch.allclose(module(x)[0][0, 4:], module(other)[0][0, 4:])


@every_definition
def test_each_trains_and_generates_in_the_shared_model(name):
    model = build_model(path(name), gpt2_config(2, 32, 4, 64, 50))
    ids = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=training.BETAS, fused=True)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert model.eval().generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0).shape == (2, 21)
    cache = model.new_cache()
    model(ids, past_key_values=cache)
    if name != "baseline":
        assert cache.layers[0].keys.numel() * 4 == 2 * model.transformer.h[0].attn.cache_bytes(16, 4)


def test_a_definition_that_is_wrong_is_seen(tmp_path):
    """The rows above can fail: a window of another reach, a mask that is always there, a batch of other heads."""
    wrong = planted(path("sliding_window"), "REACH = 3", "REACH = 4", tmp_path)
    assert replication.moved_by_a_token(wrong) == (8, 8)
    wrong = planted(path("linear"), "state = k.mT @ v", "state = k[:, :1].mT @ v[:, :1]", tmp_path)
    assert make.fails(wrong, {}, "reference")
    wrong = planted(path("flash"), "x.unflatten(2, (self.heads, -1))", "x.unflatten(2, (-1, self.heads))", tmp_path)
    assert published_flops.derived(wrong, counted=True) != published_flops.observed(wrong)
