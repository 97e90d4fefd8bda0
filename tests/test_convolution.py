"""A short convolution before every variant's attention: torch's own, and every promise of what stands behind it."""

import copy
import inspect
import itertools
import textwrap
from types import SimpleNamespace

import pytest
import torch
from make import TINY
from surface import lively
from test_transformers import uninitialised_memory
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lib import attention, parameters
from lib.certificate import Setting, show, variant
from lib.certificate.twins import Twins
from lib.errors import UsageError
from lib.measure import assemble, flops, inference
from lib.model import GPT2, build_model, config_of, convolution, gpt2_config, meta_model
from lib.model.caches import branched, roomy_cache
from lib.study import plan

CONFIG = gpt2_config(2, 32, 4, 160, 50, convolution=4)
IDS = torch.randint(0, 50, (3, 90), generator=torch.Generator().manual_seed(0))
every_variant = pytest.mark.parametrize("name", attention.variants())


def near(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-7 * expected.abs().max().item())


@every_variant
def test_it_is_torch_s_depthwise_convolution_and_then_the_variant(name):
    layer = lively(name, config=CONFIG).transformer.h[1].attn
    x = torch.randn(2, 70, 32, dtype=torch.float64)
    taps = layer.short_convolution.T.flip(1)[:, None]  # (C, 1, K), the oldest token first
    past = F.conv1d(F.pad(x.mT, (3, 0)), taps, groups=32).mT
    near(layer(x)[0], convolution.bare(layer)(x + past)[0])
    near(layer.reference(x), convolution.bare(layer).reference(x + past))
    assert layer.cache_bytes(70, 2) == convolution.bare(layer).cache_bytes(70, 2) + 3 * 32 * 2


@every_variant
@torch.no_grad()
def test_decoded_and_padded_and_packed_it_is_one_pass(name):
    model = lively(name, config=CONFIG)
    expected = model(IDS).logits
    cache, got = roomy_cache(model, 90), []
    for piece in IDS.split([1, 1, 1, 2, 40, 1, 1, 43], dim=1):
        got.append(model(piece.contiguous(), past_key_values=cache).logits)
    near(torch.cat(got, dim=1), expected)
    cache = model(IDS[:, :50], use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    branch = branched(cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 4]))
    for kept, rows in ((cache, [2, 0]), (branch, [2, 0, 0])):
        near(model(IDS[rows, 50:53].contiguous(), past_key_values=kept).logits, expected[rows, 50:53])
    left, right, within = (torch.ones(3, 90, dtype=torch.long) for _ in range(3))
    left[1, :7] = left[2, :60] = right[1, 83:] = right[2, 1:] = within[1, 4:30] = 0
    within[2, ::2] = 0
    for mask in (left, right, within):
        padded = model(IDS, attention_mask=mask, use_cache=True)
        more = torch.cat([mask, torch.ones_like(mask[:, :2])], dim=1)
        new = model(IDS[:, :2].contiguous(), attention_mask=more, past_key_values=padded.past_key_values).logits
        for row, real in enumerate(mask.bool()):
            alone = model(torch.cat([IDS[row, real], IDS[row, :2]])[None]).logits[0]
            near(torch.cat([padded.logits[row, real], new[row]]), alone)
    if model.keeps_documents:  # also where padding lies among them
        of = torch.tensor([[0] * 30 + [1] * 60])
        mask = torch.ones(1, 90, dtype=torch.long)
        mask[:, 30:33] = mask[:, 50] = 0
        packed = model(IDS[:1], seq_idx=of, attention_mask=mask, use_cache=False).logits[0]
        for document in range(2):
            real = mask[0].bool() & (of[0] == document)
            near(packed[real], model(IDS[:1, real]).logits[0])
        borders = torch.tensor([0, 1, 2, 30, 64, 90])
        of = torch.repeat_interleave(torch.arange(5), borders.diff())[None]
        packed = model(IDS[:1], seq_idx=of, use_cache=False).logits[0]
        near(packed, torch.cat([model(IDS[:1, a:b]).logits[0] for a, b in itertools.pairwise(borders.tolist())]))


@every_variant
@torch.no_grad()
def test_its_cache_holds_three_tokens_more_and_lets_none_be_taken_back(name):
    model, plain = build_model(name, CONFIG), build_model(name, gpt2_config(2, 32, 4, 160, 50))
    held = [inference.cache_bytes(of(IDS, use_cache=True).past_key_values) for of in (model, plain)]
    assert held[0] - held[1] == 2 * 3 * 3 * 32 * 4  # layers, rows, tokens, channels, bytes
    cache = model(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="read the shorter text anew"):
        cache.crop(-2)
    cache.crop(90)
    assert cache.get_seq_length() == 90
    cache.reset()
    assert torch.equal(model(IDS, past_key_values=cache).logits, model(IDS).logits)
    assert model._is_stateful


class Multiplied(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.flops += 2 * out.numel() if func.overloadpacket is torch.ops.aten.addcmul else 0
        return out


@pytest.mark.parametrize("name", ["sdpa", "linear"])
@torch.no_grad()
def test_model_and_cache_are_copied_and_pickled_and_a_cache_of_another_length_is_refused(name, tmp_path):
    model = build_model(name, CONFIG).eval()
    torch.save((model, model(IDS, use_cache=True).past_key_values), tmp_path / "both.pt")
    again, cache = torch.load(tmp_path / "both.pt", weights_only=False)
    expected = model(torch.cat([IDS, IDS[:, :2]], dim=1)).logits[:, -2:]
    for one in (copy.deepcopy(again), again):
        kept = copy.deepcopy(cache)
        torch.testing.assert_close(one(IDS[:, :2], past_key_values=kept).logits, expected)
    other = build_model(name, gpt2_config(2, 32, 4, 160, 50, convolution=3))
    with pytest.raises(ValueError, match=r"use model\.new_cache"):
        other(IDS[:, :1], past_key_values=cache)


def test_a_variant_needs_no_names_for_it_and_may_not_have_its(tmp_path):
    source = attention.find("sdpa").read_text()
    (tmp_path / "place.py").write_text(source.replace("self.layer_idx", "self.place"))
    model = build_model(str(tmp_path / "place.py"), CONFIG).eval()
    assert model(IDS, use_cache=True).past_key_values.layers[1].convolution_tail is not None
    (tmp_path / "mine.py").write_text(source.replace("self.heads = ", "self.short_convolution = None; self.heads = "))
    with pytest.raises(ValueError, match="an attribute of this variant; call its own otherwise"):
        build_model(str(tmp_path / "mine.py"), CONFIG)


def test_its_flops_and_weights_are_in_the_model_s_and_in_the_table():
    behind, plain = (meta_model("sdpa", of) for of in (CONFIG, gpt2_config(2, 32, 4, 160, 50)))
    weights = [sum(weight.numel() for weight in of.parameters()) for of in (behind, plain)]
    assert weights[0] - weights[1] == 2 * 4 * 32
    counted = [flops.analytic(of, 90)["forward_flops_causal"] for of in (behind, plain)]
    with Multiplied() as multiplied:
        build_model("sdpa", CONFIG)(IDS[:1])
    assert counted[0] - counted[1] == multiplied.flops == 2 * 90 * 2 * 4 * 32
    table = assemble.costs(behind, SimpleNamespace(context=90, attention="sdpa", label="", options={}))
    assert table.loc["parameters", "sdpa"] == table.loc["parameters", "GPT-2's own"] == f"{weights[0]:,}"
    published = meta_model("lib/published/mla.py", gpt2_config(1, 64, 4, 64, 50, convolution=4)).transformer.h[0].attn
    alone = convolution.bare(published)
    assert published.projection_flops(10) == alone.projection_flops(10) + 2 * 10 * 4 * 64


@pytest.mark.parametrize("name", ["sdpa", "linear", "sliding_window,mla"])
def test_a_saved_model_has_it_again(name, tmp_path):
    made = build_model(name, CONFIG, seed=2).eval()
    assert made.transformer.h[0].attn.short_convolution.std().item() == pytest.approx(0.02, rel=0.2)
    made.save_pretrained(tmp_path)
    with uninitialised_memory():
        loaded = GPT2.from_pretrained(tmp_path)
    assert loaded.config.convolution == 4
    torch.testing.assert_close(loaded(IDS).logits, made(IDS).logits)


PLANTED = {  # what is written instead of what, and the check that is about it
    "it sees the next token": ("kept[:, first :", "kept.roll(-1, 1)[:, first :", "causal"),
    "it forgets its past": ("before = kept.new_zeros(B, K - 1, C) if before is None else before",
                            "before = kept.new_zeros(B, K - 1, C)", "cached_equal"),
    "padding is read": ("if padding_mask is not None:", "if False:", "padding_equal"),
    "documents run into each other": ("if seq_idx is not None and i:", "if False:", "documents_equal"),
    "the prompt is kept": (".clone() if", " if", "cache_bytes"),
    "in decoding its taps are turned round": ("enumerate(weights)",
        "enumerate(weights if T > 1 else weights.flip(0))", "cached_equal"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_a_mistake_in_it_is_found_by_the_certificate(fault, monkeypatch):
    wrong, written, check = PLANTED[fault]
    source = textwrap.dedent(inspect.getsource(convolution.convolved))
    assert wrong in source
    names = dict(vars(convolution))
    exec(source.replace(wrong, written), names)
    monkeypatch.setattr(convolution, "convolved", names["convolved"])
    found = variant.examined("sdpa", {}, Setting(convolution=4, precision="bf16"), checks=(check,))
    assert any(one.passed is False and one.check == check for one in found)


def test_the_certificate_says_that_it_was_there():
    setting = Setting(architecture="llama", convolution=4)
    said = show.scope({"tested": setting.values() | Twins("sdpa", {}, setting, 0).where()})
    assert "with 4 heads, as Llama's, behind a convolution over 4 tokens, fp32" in said[0]


def test_runs_with_it_are_apart_and_those_without_keep_their_names():
    values = {of: plan.runs_of(TINY | {"convolution": of}, ["sdpa"], 1)[0]["values"] for of in (0, 4)}
    before = {name: value for name, value in values[0].items() if name != "convolution"}
    assert parameters.run_name(before) == parameters.run_name(values[0])
    assert len({parameters.setting(one) for one in values.values()}) == 2
    assert config_of(values[4], 50).convolution == 4
    for wrong, says in ((1, "at least 2"), (-1, "at least 0, not -1"), (1000, "at most 64"), (4.0, "must be int")):
        with pytest.raises(UsageError, match=says):
            plan.runs_of(TINY | {"convolution": wrong}, ["sdpa"], 1)
    with pytest.raises(ValueError, match="at least 2 tokens, not 1"):
        build_model("sdpa", gpt2_config(2, 32, 4, 16, 50, convolution=1))
