"""GPT-2 with another attention is GPT-2 in everything else."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel

from lib import attention
from lib.model import GPT2, build_model, devices, gpt2_config, meta_model


def test_gpt2_small_has_the_published_number_of_parameters():
    config = gpt2_config(layers=12, width=768, heads=12, positions=1024, vocabulary=50257)
    for name in ("baseline", "sdpa"):
        assert sum(p.numel() for p in meta_model(name, config).parameters()) == 124_439_808


class Seen(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", attention.variants())
def test_a_model_without_weights_draws_none_and_has_those_of_one_with_them(name):
    config = gpt2_config(2, 32, 4, 64, 50)
    with Seen() as seen:
        bare = meta_model(name, config)
    assert "normal_" not in seen.names  # which is slow where nothing is held
    both = [
        [(key, one.shape, one.dtype) for key, one in m.named_parameters()] for m in (bare, build_model(name, config))
    ]
    assert both[0] == both[1] and bare.lm_head.weight is bare.transformer.wte.weight


def test_what_a_constructor_draws_elsewhere_is_drawn_and_what_is_refused_stays_so_without_weights():
    normal = torch.nn.init.normal_
    with devices.without_weights():
        assert torch.nn.init.constant_(torch.empty(4, device="cpu"), 0.75).tolist() == [0.75] * 4
        for drawn in (normal(torch.zeros(9, device="cpu")), torch.zeros(9, device="cpu").normal_()):
            assert drawn.all()
        for wrong in (
            lambda: normal(torch.empty(2), std=-1.0),
            lambda: normal(torch.empty(2, dtype=torch.long)),
            lambda: torch.nn.Parameter(torch.empty(2)).normal_(),
            lambda: torch.nn.init.kaiming_uniform_(torch.empty(2)),
        ):
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                wrong()


@pytest.mark.parametrize("more", [{}, {"architecture": "llama"}, {"convolution": 4}], ids=str)
def test_a_seed_gives_every_variant_the_same_shared_weights(more):
    config = gpt2_config(2, 32, 4, 64, 50, **more)
    models = {name: dict(build_model(name, config, seed=7).named_parameters()) for name in attention.variants()}
    for name, parameters in models.items():
        for key, value in parameters.items():
            twin = models["baseline"].get(key)
            if twin is not None and twin.shape == value.shape:
                assert torch.equal(value, twin), f"{name} {key}"
    other = dict(build_model("sdpa", config, seed=8).named_parameters())
    assert not torch.equal(
        other["transformer.h.0.attn.c_attn.weight"], models["sdpa"]["transformer.h.0.attn.c_attn.weight"]
    )


@pytest.mark.parametrize("name", attention.variants())
def test_initialisation_is_gpt2_s(name):
    config = gpt2_config(layers=3, width=256, heads=4, positions=64, vocabulary=50)
    for key, value in build_model(name, config).named_parameters():
        if ".attn." in key and value.dim() >= 2:
            std = 0.02 / math.sqrt(2 * 3) if key.endswith("c_proj.weight") else 0.02
            by_chance = 5 / math.sqrt(2 * value.numel())
            assert value.std().item() == pytest.approx(std, rel=max(0.02, by_chance)), key
        elif ".attn." in key and key.endswith("bias"):
            assert not value.any(), key


def test_building_leaves_the_random_state_and_the_config_alone():
    config, before = gpt2_config(1, 32, 4, 64, 50), torch.get_rng_state()
    build_model("sdpa", config)
    assert torch.equal(torch.get_rng_state(), before)
    assert not hasattr(config, "attention")


@pytest.mark.parametrize("name", attention.variants())
def test_a_saved_model_comes_back(name, tmp_path):
    model = build_model(name, gpt2_config(2, 32, 4, 64, 50), seed=1).eval()
    model.save_pretrained(tmp_path)
    again = GPT2.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 50, (2, 17))
    assert again.config.attention == name
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_transformers_itself_reads_what_keeps_gpt2_s_weights(tmp_path):
    model = build_model("sdpa", gpt2_config(2, 32, 4, 64, 50), seed=1).eval()
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 50, (2, 17))
    torch.testing.assert_close(GPT2LMHeadModel.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


def test_the_fused_gelu_is_gpt2_s_to_rounding():
    config = gpt2_config(2, 32, 4, 64, 50)
    ours = build_model("sdpa", config, seed=1).double()
    config.activation_function = "gelu_new"
    theirs = GPT2LMHeadModel(config).double()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 50, (2, 17))
    outcomes = []
    for model in (ours, theirs):
        model.transformer.h[0].mlp.c_fc.weight.data.mul_(50)  # so that the activation bends
        loss = model(ids, labels=ids).loss
        outcomes.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_a_saved_folder_cannot_choose_what_file_is_run(tmp_path):
    ninth = tmp_path / "ninth.py"
    ninth.write_text(attention.find("sdpa").read_text())
    model = build_model(str(ninth), gpt2_config(1, 32, 4, 64, 50))
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="pass attention="):
        GPT2.from_pretrained(tmp_path / "saved")
    assert GPT2.from_pretrained(tmp_path / "saved", attention=str(ninth)).config.attention == str(ninth)
