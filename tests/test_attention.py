"""Each variant is what its name says: like its reference, causal, prefix-equal, in training and in decoding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel
from transformers.cache_utils import Cache

from lib import attention
from lib.model import build_model, gpt2_config, meta_model

LENGTHS = (1, 2, 63, 64, 65, 200)
MATERIALISES_SCORES = {"baseline"}
IN_PAIRS = {"differential"}  # its heads
HASHES = {"lsh"}  # in bf16 some buckets are others; test_lsh.py compares with the buckets given

every_variant = pytest.mark.parametrize("name", attention.variants())


def make_layer(name, width=32, heads=4, positions=256, dtype=torch.float64):
    """A layer with weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    layer = attention.load(name)(gpt2_config(2, width, heads, positions, 2), 0).to(dtype).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return layer


def tiny_config():
    return gpt2_config(layers=2, width=32, heads=4, positions=128, vocabulary=50)


def lively_model(name):
    """In float64, with weights so large that greedy decoding wanders instead of repeating one token."""
    model = build_model(name, tiny_config(), seed=1).double().eval()
    for parameter in model.parameters():
        parameter.data *= 12 if parameter.dim() >= 2 else 1
    return model


def decode(model, ids, **options):
    """Greedy: the new tokens, and the logits that chose them."""
    given = {"do_sample": False, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True} | options
    out = model.generate(ids, **given)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


@every_variant
@pytest.mark.parametrize("length", LENGTHS)
def test_output_and_gradients_are_the_reference_s(name, length):
    layer = make_layer(name)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, length, 32, dtype=torch.float64)

    def outcome(output):
        wanted = [x, *layer.parameters()]
        return [output, *torch.autograd.grad((output * weight).sum(), wanted)]

    for ours, theirs in zip(outcome(layer(x)[0]), outcome(layer.reference(x)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_baseline_is_gpt2_to_the_last_bit():
    config = tiny_config()
    ours = build_model("baseline", config, seed=3)
    config._attn_implementation = "eager"
    theirs = GPT2LMHeadModel(config)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 50, (3, 77))
    expected = theirs(ids, labels=ids)
    got = ours(ids, labels=ids)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)


@every_variant
@given(batch=st.integers(1, 3), length=st.integers(2, 70), heads=st.sampled_from([1, 2, 4]), data=st.data())
@settings(max_examples=15, deadline=None)
def test_no_output_depends_on_what_follows(name, batch, length, heads, data):
    layer = make_layer(name, heads=max(heads, 2) if name in IN_PAIRS else heads)
    x = torch.randn(batch, length, 32, dtype=torch.float64)
    out = layer(x)[0]
    t = data.draw(st.integers(1, length - 1), label="prefix")
    torch.testing.assert_close(layer(x[:, :t].contiguous())[0], out[:, :t], rtol=1e-9, atol=1e-9)
    changed = x.clone()
    changed[:, t:] = torch.randn_like(changed[:, t:]) * 9
    torch.testing.assert_close(layer(changed)[0][:, :t], out[:, :t], rtol=1e-9, atol=1e-9)


@every_variant
def test_no_gradient_reaches_back_from_a_later_token(name):
    layer = make_layer(name)
    x = torch.randn(1, 40, 32, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0][:, 20].sum(), x)
    assert gradient[:, 21:].abs().max() == 0
    assert gradient[:, :21].abs().amax(dim=(0, 2)).min() > 0 or name not in ("baseline", "sdpa", "flash", "gqa", "mla")


@every_variant
@pytest.mark.parametrize("prompt", [1, 7])
def test_cached_decoding_is_the_uncached_one(name, prompt):
    model, ids = lively_model(name), torch.randint(1, 50, (3, prompt))  # 0 is padding to `generate`
    tokens, logits = decode(model, ids, max_new_tokens=90, use_cache=True)
    expected_tokens, expected_logits = decode(model, ids, max_new_tokens=90, use_cache=False)
    assert tokens.unique().numel() > 5
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-9, atol=1e-9)


@every_variant
@given(pieces=st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=15, deadline=None)
def test_a_sequence_fed_in_pieces_gives_what_one_pass_gives(name, pieces):
    layer = make_layer(name)
    x = torch.randn(2, sum(pieces), 32, dtype=torch.float64)
    cache = Cache(layers=[layer.new_cache()])
    parts = [layer(piece.contiguous(), past_key_values=cache)[0] for piece in x.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x)[0], rtol=1e-9, atol=1e-9)


@every_variant
@pytest.mark.parametrize(("heads", "head_width"), [(2, 1), (2, 3), (1, 2)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])  # with it the kernel is another, and its output otherwise in memory
def test_heads_may_be_as_narrow_or_as_few_as_can_be(name, heads, head_width, dropout):
    if (name in IN_PAIRS and heads % 2) or (name == "flash" and dropout):
        return  # refused
    width = heads * head_width
    torch.manual_seed(0)
    layer = attention.load(name)(gpt2_config(2, width, heads, 64, 2, dropout), 0)
    real = torch.arange(20) >= torch.tensor([[0], [5]])  # (B, T)
    for low in (False, True):
        for padding_mask in (None, real):
            x = torch.randn(2, 20, width, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                layer.train()(x, padding_mask=padding_mask)[0].float().square().sum().backward()
            assert x.grad.isfinite().all()
            cache, past = Cache(layers=[layer.eval().new_cache()]), 0
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
                for piece in x.split([7, 1, 1, 5, 6], dim=1):
                    past += piece.shape[1]
                    mask = None if padding_mask is None else padding_mask[:, :past]
                    layer(piece.contiguous(), past_key_values=cache, padding_mask=mask)
    layer = layer.double()
    x = x.detach().double()
    torch.testing.assert_close(layer(x)[0], layer.reference(x), rtol=1e-9, atol=1e-9)


@every_variant
def test_left_padding_changes_nothing(name):
    model = lively_model(name)
    short, long = torch.randint(1, 50, (1, 5)), torch.randint(1, 50, (1, 9))
    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1), long])
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    alone = (short, long)
    forward = model(padded, attention_mask=mask).logits
    tokens, logits = decode(model, padded, attention_mask=mask, max_new_tokens=20)
    for row, ids in enumerate(alone):
        torch.testing.assert_close(forward[row, -ids.shape[1] :], model(ids).logits[0], rtol=1e-9, atol=1e-9)
        expected_tokens, expected_logits = decode(model, ids, max_new_tokens=20)
        assert torch.equal(tokens[row], expected_tokens[0])
        torch.testing.assert_close(logits[row], expected_logits[0], rtol=1e-9, atol=1e-9)


@every_variant
def test_right_padding_changes_no_real_token(name):
    model = build_model(name, tiny_config(), seed=1).double().eval()
    ids = torch.randint(1, 50, (1, 20))
    padded = torch.cat([ids, torch.zeros(1, 11, dtype=torch.long)], dim=1)
    mask = (torch.arange(31) < 20)[None].long()
    for attention_mask in (None, mask):
        out = model(padded, attention_mask=attention_mask).logits[:, :20]
        torch.testing.assert_close(out, model(ids).logits, rtol=1e-9, atol=1e-9)


@every_variant
def test_gradient_checkpointing_gives_the_same_gradients(name):
    config, ids = tiny_config(), torch.randint(0, 50, (2, 33))

    def gradients(checkpointing):
        model = build_model(name, config, seed=2).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("name", [name for name in attention.variants() if name not in HASHES])
def test_bf16_autocast_stays_near_fp32(name):
    layer = make_layer(name, dtype=torch.float32)
    x = torch.randn(2, 65, 32)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)[0]
    high = layer(x)[0]
    assert (low.float() - high).norm() / high.norm() < 0.02


@every_variant
def test_cache_bytes_are_the_formula_s(name):
    layer = make_layer(name)
    cache = Cache(layers=[layer.new_cache()])
    layer(torch.randn(1, 50, 32, dtype=torch.float64), past_key_values=cache)
    tensors = [value for value in vars(cache.layers[0]).values() if isinstance(value, torch.Tensor)]
    assert sum(t.numel() * t.element_size() for t in tensors) == layer.cache_bytes(50, 8)


class Shapes(TorchDispatchMode):
    """Collects the shapes of everything that operators give."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for t in (out if isinstance(out, tuple | list) else [out]) if hasattr(t, "shape")}
        return out


@every_variant
def test_no_scores_or_mask_reach_memory_but_baseline_s(name):
    model, ids = build_model(name, tiny_config(), seed=2).train(), torch.randint(0, 50, (2, 61))
    with Shapes() as shapes:
        model(ids, labels=ids, use_cache=False).loss.backward()
    square = any(shape[-2:] == (61, 61) for shape in shapes.seen)
    assert square == (name in MATERIALISES_SCORES)


WITHOUT_WEIGHTS = {  # sums over keys, in which no single weight can be dropped: their cache is a state
    name for name in attention.variants() if not attention.load(name)(tiny_config(), 0).new_cache().is_croppable
}
NORMED = {"differential"}  # behind the weights, so that what dropout leaves is scaled anew
REFUSES_DROPOUT = {"flash"}  # on a CPU; with attention's own alone


def layer_with(name, attention_dropout=0.0, residual_dropout=0.0):
    config = gpt2_config(1, 32, 4, 64, 2)
    config.attn_pdrop, config.resid_pdrop = attention_dropout, residual_dropout
    torch.manual_seed(0)
    return attention.load(name)(config, 0)


@every_variant
@pytest.mark.parametrize("what", ["attention_dropout", "residual_dropout"])
@pytest.mark.parametrize("decoding", [False, True])
def test_dropout_is_in_training_alone_and_each_has_its_own_rate(name, what, decoding):
    """Two passes with the same weights: in training they differ, by this dropout alone; in evaluation they do not."""
    layer, x = layer_with(name, **{what: 0.5}), torch.randn(2, 30, 32)

    def output():
        if not decoding:
            return layer(x)[0]
        cache = Cache(layers=[layer.new_cache()])
        layer.eval()(x[:, :-1].contiguous(), past_key_values=cache)
        return layer.train(training)(x[:, -1:].contiguous(), past_key_values=cache)[0]

    training = True
    if what == "attention_dropout" and name in REFUSES_DROPOUT:
        with pytest.raises(ValueError, match="has no dropout"):
            layer.train()(x)
    else:
        layer.train()
        acts = what == "residual_dropout" or name not in WITHOUT_WEIGHTS
        assert torch.equal(output(), output()) is not acts
        if what == "residual_dropout":
            assert 0.3 < (output() == 0).float().mean() < 0.7  # what is dropped behind the projection is 0
    training = False
    layer.eval()
    assert torch.equal(output(), output())
    torch.testing.assert_close(layer(x)[0], layer_with(name).eval()(x)[0])


@every_variant
def test_attention_s_dropout_leaves_the_mean_where_it_was(name):
    """Weights that stay are raised by as much as others are lost: 1 / (1 - rate)."""
    if name in WITHOUT_WEIGHTS | NORMED | REFUSES_DROPOUT:
        return
    layer, x = layer_with(name, attention_dropout=0.3).train(), torch.randn(1, 6, 32)
    mean = layer(x.repeat(400, 1, 1))[0].mean(0, keepdim=True)
    expected = layer.eval()(x)[0]
    assert (mean - expected).norm() < 0.15 * expected.norm()


def test_a_run_s_dropout_is_that_of_attention_of_both_branches_and_of_embeddings():
    config = gpt2_config(1, 32, 4, 64, 2, dropout=0.25)
    assert (config.attn_pdrop, config.resid_pdrop, config.embd_pdrop) == (0.25, 0.25, 0.25)


def test_names_stand_in_study_order_and_each_has_a_paper():
    names = attention.variants()
    assert names[:2] == ("baseline", "sdpa")
    assert all(attention.load(name).paper for name in names)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("spda", "Did you mean 'sdpa'?"),
        ("nothing_like_it", "known: baseline, sdpa"),
        ("no/file.py", "no attention file"),
    ],
)
def test_an_unknown_variant_is_said_in_one_sentence(name, said):
    with pytest.raises(ValueError, match="there is no attention") as error:
        attention.load(name)
    assert said in str(error.value)


def test_a_class_that_is_no_module_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("class Attention:\n    paper = 'mine'\n")
    with pytest.raises(ValueError, match=r"mine.py's class `Attention` is no torch.nn.Module: .*sdpa.py"):
        attention.load(str(file))


ODD = ("a", "", 1.5, 4.0, None, [2], [], True, False, {}, -1, 1)


@every_variant
def test_an_option_of_another_kind_is_refused_by_its_name_or_stands_for_what_it_is(name):
    """By the constructor, so that a study, the certificate and a notebook say the same."""
    variant = attention.load(name)
    for option, default in attention.defaults(variant).items():
        for value in ODD:
            try:
                with torch.device("meta"):
                    variant(gpt2_config(2, 32, 4, 64, 2), 0, **{option: value})
            except ValueError as error:
                assert str(error).startswith(f"{option} must ") and "\n" not in str(error)
                assert repr(value) in str(error), "says what was given"
            else:
                kind = int if default is None else type(default)
                assert type(value) is kind or value is default, (option, value)


@pytest.mark.parametrize("name", ["gated_deltanet", "kda", "mamba2", "retention"])
def test_kernels_that_are_not_there_are_one_sentence_and_never_another_form_in_their_stead(name):
    """test_cuda.py holds what they compute. In float64, which they lack, and in counts the chunks stand for them."""
    own, fused = (attention.load(name)(gpt2_config(1, 32, 4, 64, 2), 0, kernels=kind) for kind in ("torch", "fla"))
    assert fused.title == f"{own.title}, fla kernels"
    x = torch.randn(2, 20, 32)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match=r"need CUDA and fla-core \(pip install fla-core einops\); else leave"):
            fused.to(dtype)(x.to(dtype))
    fused.double().load_state_dict(own.double().state_dict())
    assert torch.equal(fused(x.double())[0], own(x.double())[0])
    with pytest.raises(ValueError, match="kernels must be 'torch', or 'fla' for fla-core's on CUDA, not 'triton'"):
        attention.load(name)(gpt2_config(1, 32, 4, 64, 2), 0, kernels="triton")


def test_a_file_without_the_class_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="defines no class `Attention`"):
        attention.load(str(tmp_path / "empty.py"))


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch is built without CUDA")
@every_variant
def test_a_gpu_s_run_has_all_its_tensors_on_the_gpu(name):
    """Training, prefill, decoding and padded rows. No GPU is needed: fake tensors have a device and no content."""
    model = meta_model(name, tiny_config())
    held = [*model.named_parameters(), *model.named_buffers()]
    with FakeTensorMode():
        weights = {n: torch.empty(x.shape, dtype=torch.bfloat16, device="cuda") for n, x in held}  # all are floats
        ids = torch.zeros(2, 100, dtype=torch.long, device="cuda")

        def run(ids, **more):
            return functional_call(model, weights, (ids,), more)

        try:
            assert run(ids, labels=ids, use_cache=False).loss.device.type == "cuda"
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            pytest.skip("the kernel that it asks for is offered on a GPU alone")
        model.eval()
        cache = run(ids, use_cache=True).past_key_values
        assert run(ids[:, :1], past_key_values=cache).logits.shape == (2, 1, 50)
        padded = torch.ones(2, 100, dtype=torch.bool, device="cuda")
        assert run(ids, padding_mask=padded).logits.device.type == "cuda"
