"""The certificate passes what is right, and each planted fault fails the check that is about it."""

import pytest

from lib import attention, certificate

VISIBLE = "torch.ones(T, S, dtype=torch.bool, device=k.device)"
FAULTS = {  # what is planted: the right code, the wrong one, the check that is about it
    "mask one token ahead": (".tril(S - T)", ".tril(S - T + 1)", "causal"),
    "no mask": (f"{VISIBLE}.tril(S - T)", VISIBLE, "causal"),
    "each token alone": (".tril(S - T)", ".tril(S - T).triu(S - T)", "mixes"),
    "scale taken from the length": ("* q.shape[-1] ** -0.5", "* T ** -0.5", "prefix_equal"),
    "normalised over time": ("scores.softmax(-1)", "scores.softmax(-2)", "causal"),
    "heads and tokens swapped": ("(weights @ v).transpose(1, 2)", "(weights @ v)", "causal"),
    "no output projection": ("self.residual_dropout(self.c_proj(out))", "out", "reference_difference"),
    "cache not read": ("k, v = past_key_values.layers", "_ = past_key_values.layers", "cached_equal"),
}


@pytest.mark.parametrize("name", attention.variants())
def test_every_variant_passes(name):
    certified = certificate.certify(name, {})
    assert certified["passed"], certified
    assert certified["reference_difference"] < 1e-9


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, tmp_path):
    right, wrong, check = FAULTS[fault]
    source = attention.find("baseline").read_text()
    assert right in source
    (tmp_path / "planted.py").write_text(source.replace(right, wrong))
    certified = certificate.certify(str(tmp_path / "planted.py"), {})
    assert not certified["passed"]
    if check == "reference_difference":
        assert certified[check] > certificate.TOLERANCE
    else:
        assert certified[check] is False, certified
