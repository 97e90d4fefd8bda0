"""Linear attention: the chunked, the recurrent and the O(T²) form are one function, whatever the chunk."""

import pytest
import torch
from make import fails
from test_attention import Shapes
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import Cache

from lib import attention, certificate
from lib.model import build_model, gpt2_config, meta_model

FAULTS = {  # what is planted: the right code, the wrong one, the check that is about it
    "scores of later tokens in the chunk": ("scores = scores.tril()", "scores = scores", "causal"),
    "a state that holds its own chunk": ("states[:-1]", "states[1:]", "causal"),
    "a normalizer that holds its own chunk": ("normalizers[:-1, ..., None]", "normalizers[1:, ..., None]", "causal"),
    "normalised over the sequence": ("else scores).sum(-1, keepdim=True)", "else scores).sum(-2)[..., None]", "causal"),
    "chunks filled up in front": ("(0, 0, 0, N * c - T)", "(0, 0, N * c - T, 0)", "prefix_equal"),
    "chunks that do not add up": ("k.mT @ v]).cumsum(0)", "k.mT @ v])", "reference"),
    "another feature map": ("F.elu(qk) + 1", "F.softplus(qk)", "reference"),
    "an epsilon that biases": ("== 0, 1.0)", "== 0, 1.0) + 0.01", "reference"),
    "no normalizer": ("return numerator / ", "return numerator + 0 * ", "reference"),
    "decoding forgets": ("torch.addcmul(state, turned[1].mT, v)", "turned[1].mT @ v", "cached_equal"),
    "decoding does not count": ("normalizer + k.squeeze(2)", "normalizer", "cached_equal"),
    "decoding reads before it updates": ("turned[0] @ state,", "q @ (state - k.mT @ v),", "cached_equal"),
    "cache not written": ("layer.update(*after, tokens=T)", "pass", "cached_equal"),
}


def make_layer(dtype=torch.float64, width=32, heads=4, **options):
    torch.manual_seed(0)
    layer = attention.load("linear")(gpt2_config(2, width, heads, 256, 2), 0, **options).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return layer.to(dtype)


def closed_form(layer, x):
    """The definition, token by token, from sums over s ≤ t."""
    B, T, C = x.shape
    q, k, v = layer.c_attn(x).view(B, T, 3, layer.heads, -1).unbind(2)
    q, k = (torch.where(z > 0, z + 1, z.clamp(max=0).exp()) for z in (q, k))
    rows = []
    for t in range(T):
        weights = [(q[:, t] * k[:, s]).sum(-1, keepdim=True) for s in range(t + 1)]  # (B, H, 1) each
        rows.append(sum(w * v[:, s] for s, w in enumerate(weights)) / sum(weights))  # (B, H, D)
    return layer.c_proj(torch.stack(rows, dim=1).reshape(B, T, C))


@pytest.mark.parametrize("length", [1, 9, 23])
def test_both_forms_are_the_definition(length):
    layer, x = make_layer(chunk=4), torch.randn(2, length, 32, dtype=torch.float64)
    expected = closed_form(layer, x)
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.reference(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("length", [1, 7, 64, 130])
def test_the_chunk_changes_neither_output_nor_gradients(chunk, length):
    layer = make_layer(chunk=chunk)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)

    def outcome(output):
        return [output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])]

    for ours, theirs in zip(outcome(layer(x)[0]), outcome(layer.reference(x)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("heads", [1, 32])
def test_one_head_and_heads_of_width_one(heads):
    layer, x = make_layer(heads=heads, chunk=8), torch.randn(2, 21, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], layer.reference(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [0, -64, 64.0, "64", None])
def test_a_bad_chunk_is_said_in_one_sentence(chunk):
    with pytest.raises(ValueError, match="chunk must be a whole number of tokens, at least 1") as error:
        make_layer(chunk=chunk)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("chunk", [1, 8])
def test_the_certificate_passes_between_chunks_too(chunk):
    certified = certificate.certify("linear", {"chunk": chunk})
    assert certified["passed"] and certified["reference_difference"] < 1e-12, certified


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, tmp_path):
    right, wrong, check = FAULTS[fault]
    source = attention.find("linear").read_text()
    assert source.count(right) == 1
    (tmp_path / "planted.py").write_text(source.replace(right, wrong))
    assert fails(tmp_path / "planted.py", {"chunk": 8}, check)


def test_memory_grows_with_the_length_alone():
    """Neither T x T scores nor a state per token, forward or backward."""
    T, c, D = 200, 16, 8
    layer, x = make_layer(chunk=c), torch.randn(1, T, 32, dtype=torch.float64, requires_grad=True)
    with Shapes() as shapes:
        layer(x)[0].sum().backward()
    assert not [shape for shape in shapes.seen if sum(side >= T for side in shape) > 1]
    largest = max(torch.Size(shape).numel() for shape in shapes.seen)
    assert largest <= 13 * c * max(3 * 32, 4 * c) < 4 * T * D * D  # 13 chunks; qkv or scores


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_cache_is_the_state_alone_and_does_not_grow(dtype):
    layer = make_layer(dtype)
    cache = Cache(layers=[layer.new_cache()])
    (held,) = cache.layers
    for length in (200, 1, 30):
        layer(torch.randn(1, length, 32, dtype=dtype), past_key_values=cache)
        storages = [tensor.untyped_storage().nbytes() for tensor in (held.state, held.normalizer)]
        assert sum(storages) == layer.cache_bytes(length, dtype.itemsize) == 4 * (8 * 8 + 8) * max(dtype.itemsize, 4)
    assert cache.get_seq_length() == 231 and cache.get_mask_sizes(3, 0) == (234, 0)
    assert held.state.dtype == held.normalizer.dtype == torch.promote_types(dtype, torch.float32)


def test_gpt2_small_caches_2_4_mb():
    blocks = meta_model("linear", gpt2_config(12, 768, 12, 1024, 50257)).transformer.h
    for context in (1, 100_000):
        assert sum(block.attn.cache_bytes(context, 2) for block in blocks) == 12 * 12 * (64 * 64 + 64) * 4 == 2_396_160


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_sums_over_many_tokens_in_fp32(autocast):
    """Queries, keys and values are bf16's; from there on nothing is rounded to it."""
    layer = make_layer(torch.float32 if autocast else torch.bfloat16)
    x = torch.randn(1, 2000, 32, dtype=layer.c_attn.weight.dtype)
    cache = Cache(layers=[layer.new_cache()])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(x, past_key_values=cache)
        qkv = layer.c_attn(x)
    assert qkv.dtype == torch.bfloat16
    _, k, v = qkv.double().view(1, 2000, 3, 4, 8).unbind(2)
    k = torch.where(k > 0, k + 1, k.exp())
    for ours, theirs in (
        (cache.layers[0].state, torch.einsum("bthd,bthe->bhde", k, v)),
        (cache.layers[0].normalizer, k.sum(1)),
    ):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (2, 64), (64, 64), (65, 64), (100, 7)])
def test_flops_are_what_runs_and_what_the_definition_needs(length, chunk):
    layer = make_layer(chunk=chunk)
    C, H, D = 32, 4, 8
    assert layer.core_flops(length) == length * H * (2 * D * D + 2 * D * D + 2 * D)
    if length > 1:  # the counter does not see the outer product of the recurrent form
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(torch.randn(1, length, C, dtype=torch.float64))
        assert counter.get_total_flops() == 2 * 4 * C * C * length + layer.core_flops(length, dense=True)
    assert layer.core_flops(length, dense=True) >= layer.core_flops(length)


@pytest.mark.parametrize("chunk", [3, 64])
def test_left_padding_adds_nothing_and_leaves_nothing_undefined(chunk):
    """Seven padded places: whole chunks of the short kind, rows without a key."""
    layer, x = make_layer(chunk=chunk), torch.randn(2, 20, 32, dtype=torch.float64)
    padding_mask = torch.ones(2, 20, dtype=torch.bool)
    padding_mask[0, :7] = False
    cache = Cache(layers=[layer.new_cache()])
    steps = [(0, 4), (4, 5), (5, 12), (12, 13), (13, 20)]
    parts = [
        layer(x[:, a:b].contiguous(), past_key_values=cache, padding_mask=padding_mask[:, :b])[0] for a, b in steps
    ]
    alone = layer(x[:1, 7:])[0]
    for out in (layer(x, padding_mask=padding_mask)[0], torch.cat(parts, dim=1)):
        assert out.isfinite().all()
        torch.testing.assert_close(out[:1, 7:], alone, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out[1:], layer(x[1:])[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [1, 50])
def test_features_that_underflow_give_no_nan(length):
    layer, x = make_layer(torch.float32), torch.randn(2, length, 32, requires_grad=True)
    layer.c_attn.bias.data[:64] = -1e4  # elu + 1 is 0 in float32
    out = layer(x)[0]
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all() and layer.c_attn.weight.grad.isfinite().all()


def test_beam_search_and_a_reset_cache():
    config = gpt2_config(layers=2, width=32, heads=4, positions=128, vocabulary=50)
    model = build_model("linear", config, seed=1, chunk=4).double().eval()
    for parameter in model.parameters():
        parameter.data *= 12 if parameter.dim() >= 2 else 1
    ids = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    options = {"num_beams": 4, "do_sample": False, "max_new_tokens": 25, "pad_token_id": 0}
    cache = model.new_cache()
    tokens = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(tokens, model.generate(ids, use_cache=False, **options))
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, rtol=1e-9, atol=1e-9)
