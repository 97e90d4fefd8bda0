"""lsh alone: its rule by hand, transformers' Reformer where the paper's borders are kept, buckets, cache, faults."""

import pytest
import torch
from make import fails
from test_attention import Shapes, lively_model, tiny_config
from transformers import ReformerConfig
from transformers.cache_utils import Cache
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from lib import attention, certificate
from lib.model import GPT2, build_model, gpt2_config

EDGES = [
    {"chunk_length": 2, "n_hashes": 1, "buckets": 2},
    {"chunk_length": 3, "n_hashes": 2, "buckets": 4},
    {"chunk_length": 5, "n_hashes": 3, "buckets": 30},  # more buckets than keep company: many tokens are alone
    {"chunk_length": 100, "n_hashes": 4, "buckets": 6},  # no chunk is ever full
]
every_edge = pytest.mark.parametrize("options", EDGES, ids=str)


def make_layer(positions=256, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = attention.load("lsh")(gpt2_config(2, 32, 4, positions, 2), 0, **options).to(dtype).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return layer


def by_hand(layer, x):
    """The rule as it is written, token by token and round by round, from the buckets."""
    B, T, C = x.shape
    D = C // layer.heads
    qk, v = (y.view(B, T, layer.heads, D).transpose(1, 2) for y in layer.c_attn(x).split(C, dim=2))
    buckets, out = layer.hash(qk).tolist(), torch.zeros_like(v)
    for b in range(B):
        for h in range(layer.heads):
            for t in range(T):
                means, masses = [], []
                for bucket in buckets[b][h]:
                    seen = [j for j in range(t + 1) if bucket[j] == bucket[t]][-layer.chunk_length :]
                    keys = qk[b, h, seen]
                    scores = keys @ qk[b, h, t] / (keys.square().mean(-1) + 1e-6).sqrt() / D**0.5
                    scores[-1] = -1e5
                    means.append(scores.softmax(0) @ v[b, h, seen])
                    masses.append(scores.logsumexp(0))
                out[b, h, t] = torch.stack(masses).softmax(0) @ torch.stack(means)
    return layer.c_proj(out.transpose(1, 2).reshape(B, T, C))


@every_edge
@torch.no_grad()
def test_it_is_the_rule_by_hand(options):
    layer, x = make_layer(**options), torch.randn(1, 29, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], by_hand(layer, x), rtol=1e-12, atol=1e-12)


@every_edge
def test_outputs_gradients_prefixes_and_pieces_at_the_options_edges(options):
    layer = make_layer(**options)
    x = torch.randn(2, 37, 32, dtype=torch.float64, requires_grad=True)
    out = layer(x)[0]
    weight = torch.randn_like(out)
    inputs = [x, *layer.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((out * weight).sum(), inputs),
        torch.autograd.grad((layer.reference(x) * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for t in (1, 2, 18, 36):
        torch.testing.assert_close(layer(x[:, :t].contiguous())[0], out[:, :t], rtol=1e-12, atol=1e-12)
    cache = Cache(layers=[layer.new_cache()])
    pieces = [layer(piece.contiguous(), past_key_values=cache)[0] for piece in x.split([7, 1, 1, 20, 1, 7], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("length", "chunk", "rounds", "buckets"), [(64, 16, 2, 8), (96, 8, 3, 12), (64, 32, 1, 4)])
def test_the_paper_s_chunk_boundaries_are_transformers_reformer(length, chunk, rounds, buckets):
    layer = make_layer(chunk_length=chunk, n_hashes=rounds, buckets=buckets, chunk_boundaries="reformer")
    theirs = LSHSelfAttention(reformer_config(chunk, rounds, buckets)).double().eval()
    with torch.no_grad():
        layer.c_attn.bias.zero_()
        layer.c_proj.bias.zero_()
        layer.c_proj.weight.copy_(torch.eye(32))
        theirs.query_key.weight.copy_(layer.c_attn.weight[:, :32].T)
        theirs.value.weight.copy_(layer.c_attn.weight[:, 32:].T)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)
    hashed = layer.hash(theirs.query_key(x).view(2, length, 4, 8).transpose(1, 2)).long()
    hashed = hashed + torch.arange(rounds)[:, None] * buckets
    ours, expected = layer(x)[0], theirs(x, buckets=hashed.contiguous()).hidden_states
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((out * weight).sum(), x)[0] for out in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_the_hash_is_transformers():
    layer = make_layer(chunk_length=8, n_hashes=3, buckets=6, dtype=torch.float32)
    theirs = LSHSelfAttention(reformer_config(8, 3, 6))
    theirs.hash_seed = 5
    vectors = torch.randn(2, 4, 40, 8)
    with torch.random.fork_rng(devices=[]):  # theirs reseeds the global generator
        expected = theirs._hash_vectors(vectors, 3, None).view(2, 4, 3, 40) - 6 * torch.arange(3)[:, None]
        torch.manual_seed(5)
        layer.rotations.copy_(torch.randn(4, 8, 3, 3).flatten(2))
    assert torch.equal(layer.hash(vectors).long(), expected)


def reformer_config(chunk, rounds, buckets):
    return ReformerConfig(
        hidden_size=32, num_attention_heads=4, attention_head_size=8, is_decoder=True, num_hashes=rounds,
        num_buckets=buckets, lsh_attn_chunk_length=chunk, lsh_num_chunks_before=1, lsh_num_chunks_after=0,
        lsh_attention_probs_dropout_prob=0.0, max_position_embeddings=256,
    )  # fmt: skip


def test_the_paper_s_chunk_boundaries_fail_the_certificate():
    for check in ("causal", "prefix_equal"):
        assert fails("lsh", {"chunk_boundaries": "reformer", "chunk_length": 4}, check)
    assert fails("lsh", {"chunk_boundaries": "reformer"}, "causal")


@pytest.mark.parametrize(
    "options", [{"chunk_length": 2}, {"chunk_length": 5, "n_hashes": 1}, {"chunk_length": 4, "buckets": 16}], ids=str
)
def test_other_options_pass_the_certificate(options):
    assert certificate.certify("lsh", options)["passed"]


FAULTS = {  # what is planted: the right code, the wrong one, the check that is about it
    "buckets from the length": (
        "rotated = rotated.unflatten(-1, (self.n_hashes, self.buckets // 2))",
        "rotated = rotated.unflatten(-1, (self.n_hashes, self.buckets // 2))[..., : 1 + qk.shape[2] // 9]",
        "prefix_equal",
    ),
    "newer members of the bucket": ("(distance >= 0) & ", "", "causal"),
    "older than the chunk": (" & (distance < K)", "", "reference_difference"),
    "other buckets": (" & (label[..., None] == labels[..., None, :])", "", "causal"),
    "rounds share their buckets": ("* span  #", "* 0  #", "prefix_equal"),
    "the last block before the first": ("labels[:, :, 0, :K] = -2", "", "causal"),
    "own block only": ("torch.cat([x.roll(1, 2), x]", "torch.cat([x, x]", "reference_difference"),
    "itself as any key": ("ALONE = -1e5", "ALONE = 1.0", None),
    "rounds averaged": ("(top + mass.log()).softmax(2)", "1 / R", "reference_difference"),
    "keys not to length 1": ("unit(qk), v]", "qk, v]", "reference_difference"),
    "unsorted by the order itself": (
        "place = torch.empty_like(time).scatter_(",
        "place = time.clone(); time.scatter(",
        "causal",
    ),
    "sort by nothing": ("buckets.sort(dim=-1, stable=True)", "buckets.flip(-1).sort(dim=-1, stable=True)", "causal"),
    "decoding sees one key more": (
        "topk(min(self.chunk_length, S))",
        "topk(min(self.chunk_length + 1, S))",
        "cached_equal",
    ),
    "decoding counts itself": ("time == S - 1, ALONE", "time == S, ALONE", "cached_equal"),
    "cached buckets forgotten": ("self.buckets = buckets if", "self.buckets = buckets * 0 if", "cached_equal"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, tmp_path):
    right, wrong, check = FAULTS[fault]
    source = attention.find("lsh").read_text()
    assert source.count(right) == 1
    (tmp_path / "planted.py").write_text(source.replace(right, wrong))
    # Where one block holds everything, its own copy stands before it.
    options = (
        {"chunk_length": 160, "n_hashes": 1}
        if "before the first" in fault
        else {"chunk_length": 4, "buckets": 4, "n_hashes": 3}
    )
    if check is None:  # in form and reference alike, so the certificate cannot see it: the rule by hand does
        torch.manual_seed(0)
        layer = attention.load(str(tmp_path / "planted.py"))(gpt2_config(1, 32, 4, 64, 2), 0, **options).double()
        x = torch.randn(1, 20, 32, dtype=torch.float64)
        assert (layer(x)[0] - by_hand(layer, x)).abs().max() > 1e-6
        return
    assert fails(tmp_path / "planted.py", options, "reference" if check == "reference_difference" else check)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_hashes": 0}, "n_hashes must be at least 1"),
        ({"chunk_length": 1}, "chunk_length must be at least 2"),
        ({"buckets": 3}, "buckets must be even"),
        ({"buckets": 0}, "buckets must be even"),
        ({"buckets": 2**15}, "2 to 32766"),
        ({"chunk_boundaries": "paper"}, "chunk_boundaries must be 'causal' or 'reformer'"),
    ],
)
def test_a_bad_option_is_said_in_one_sentence(options, said):
    with pytest.raises(ValueError, match=said):
        make_layer(**options)


@pytest.mark.parametrize(
    ("positions", "chunk", "buckets"),
    [(1024, 64, 16), (512, 64, 8), (66, 64, 2), (200, 64, 2), (4096, 64, 64), (8, 64, 2)],
)
def test_buckets_come_from_the_positions(positions, chunk, buckets):
    assert make_layer(positions, chunk_length=chunk).buckets == buckets


def test_padding_takes_no_place_in_a_bucket_and_the_paper_s_chunk_boundaries_refuse_it():
    layer = make_layer(chunk_length=3, buckets=2)
    x, fill = torch.randn(1, 30, 32, dtype=torch.float64), torch.randn(1, 11, 32, dtype=torch.float64)
    padded, mask = torch.cat([fill, x], dim=1), (torch.arange(41) >= 11)[None]
    expected = layer(x)[0]
    torch.testing.assert_close(layer(padded, padding_mask=mask)[0][:, 11:], expected, rtol=1e-12, atol=1e-12)
    cache, done, out = Cache(layers=[layer.new_cache()]), 0, []
    for piece in padded.split([5, 9, 1, 12, 1, 1, 12], dim=1):  # the first is padding alone
        done += piece.shape[1]
        out.append(layer(piece.contiguous(), past_key_values=cache, padding_mask=mask[:, :done])[0])
    assert torch.cat(out, dim=1).isfinite().all()
    torch.testing.assert_close(torch.cat(out, dim=1)[:, 11:], expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="takes no padding"):
        make_layer(chunk_boundaries="reformer")(padded, padding_mask=mask)


@pytest.mark.parametrize("borders", ["causal", "reformer"])
def test_memory_grows_with_the_length_not_with_its_square(borders):
    layer = make_layer(chunk_length=8, chunk_boundaries=borders, dtype=torch.float32).train()
    largest = []
    for length in (120, 240):
        x = torch.randn(1, length, 32, requires_grad=True)
        with Shapes() as shapes:
            layer(x)[0].sum().backward()
        assert not any(shape[-2:].count(length) == 2 for shape in shapes.seen)
        largest.append(max(torch.Size(shape).numel() for shape in shapes.seen))
    assert largest[1] == 2 * largest[0]


def test_decoding_scores_a_chunk_a_round_however_long_the_cache():
    layer = make_layer(chunk_length=4, n_hashes=2)
    cache = Cache(layers=[layer.new_cache()])
    layer(torch.randn(1, 90, 32, dtype=torch.float64), past_key_values=cache)
    with Shapes() as shapes:
        layer(torch.randn(1, 1, 32, dtype=torch.float64), past_key_values=cache)
    assert (1, 4, 1, 2 * 4) in shapes.seen and (1, 4, 1, 91) not in shapes.seen


def test_beam_search_with_the_cache_is_without():
    model, ids = lively_model("lsh"), torch.randint(0, 50, (2, 7))
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 25, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_rotations_are_drawn_from_the_seed_and_saved_with_the_weights(tmp_path):
    before = torch.get_rng_state()
    model, again, other = (build_model("lsh", tiny_config(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    first, second = (block.attn.rotations for block in model.transformer.h)
    assert torch.equal(first, again.transformer.h[0].attn.rotations)
    assert not torch.equal(first, other.transformer.h[0].attn.rotations)
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    model.save_pretrained(tmp_path)
    loaded, ids = GPT2.from_pretrained(tmp_path), torch.randint(0, 50, (2, 40))
    assert torch.equal(loaded.transformer.h[1].attn.rotations, second)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_the_cache_can_be_cut_chosen_from_and_emptied():
    layer, x = make_layer(chunk_length=3), torch.randn(3, 20, 32, dtype=torch.float64)
    cache = Cache(layers=[layer.new_cache()])
    layer(x, past_key_values=cache)
    cache.crop(-5)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rows = x[[2, 2, 0, 0]]
    again = layer(rows[:, 15:].contiguous(), past_key_values=cache)[0]
    torch.testing.assert_close(again, layer(rows)[0][:, 15:], rtol=1e-12, atol=1e-12)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(layer(x, past_key_values=cache)[0], layer(x)[0])


def test_bf16_keeps_most_buckets_and_given_the_same_stays_near():
    layer, x = make_layer(dtype=torch.float32), torch.randn(2, 200, 32)
    hashed, fresh = [], layer.hash
    layer.hash = lambda qk: hashed.append(fresh(qk)) or hashed[0]
    high = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)[0]
    share = (hashed[0] == hashed[1]).float().mean().item()
    assert 0.98 < share < 1  # what bf16 moves across a border of buckets meets other keys, and no tolerance covers that
    assert (low.float() - high).norm() / high.norm() < 0.02


def test_hashing_is_in_float32_and_takes_no_gradient():
    layer = make_layer(dtype=torch.float32)
    qk = torch.randn(1, 4, 50, 8, requires_grad=True)
    plain = layer.hash(qk)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.hash(qk), plain)
    assert not plain.requires_grad and plain.dtype == torch.int16 and plain.shape == (1, 4, 4, 50)
    assert plain.min() >= 0 and plain.max() < layer.buckets


def test_flops_are_the_pairs_that_meet_where_buckets_fill_evenly():
    layer, T = make_layer(1024, chunk_length=8, n_hashes=4), 1024
    assert layer.buckets == 128
    bucket = torch.arange(T) % 128
    newest = (bucket[:, None] == bucket).tril()
    pairs = (newest & (newest.flip(1).cumsum(1).flip(1) <= 8)).sum().item()
    hashing = 2 * 32 * 4 * 64 * T
    assert layer.core_flops(T) == 4 * 4 * 32 * pairs + hashing
    assert layer.core_flops(T, dense=True) == 4 * 4 * 32 * T * T + hashing


@pytest.mark.parametrize("length", [256, 1024])
def test_the_pairs_that_meet_at_gpt2_s_head_width_are_about_those_counted(length):
    torch.manual_seed(0)
    layer = attention.load("lsh")(gpt2_config(1, 128, 2, length, 2), 0)
    drawn = layer.hash(torch.randn(1, 2, length, 64))
    newest = (drawn[..., None] == drawn[..., None, :]).tril()
    met = (newest & (newest.flip(-1).cumsum(-1).flip(-1) <= 64)).sum().item() / (2 * 4)  # per head and round
    counted = (layer.core_flops(length) / (4 * 128) - layer.buckets * length) / 4
    assert 0.8 < met / counted < 1.2
