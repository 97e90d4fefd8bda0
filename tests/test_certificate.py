"""The certificate passes what is right, and each planted fault fails the check that is about it."""

import pytest

from lib import attention, certificate

VISIBLE = "torch.ones(T, S, dtype=torch.bool, device=k.device)"
NO_PROJECTION = ("self.residual_dropout(self.c_proj(out))", "out", "gpt2_projection")
BASELINE = {  # what is planted: the right code, the wrong one, the check that is about it
    "mask one token ahead": (".tril(S - T)", ".tril(S - T + 1)", "causal"),
    "no mask": (f"{VISIBLE}.tril(S - T)", VISIBLE, "causal"),
    "each token alone": (".tril(S - T)", ".tril(S - T).triu(S - T)", "mixes"),
    "scale taken from the length": ("* q.shape[-1] ** -0.5", "* T ** -0.5", "prefix_equal"),
    "normalised over time": ("scores.softmax(-1)", "scores.softmax(-2)", "causal"),
    "heads and tokens swapped": ("(weights @ v).transpose(1, 2)", "(weights @ v)", "causal"),
    "no output projection": NO_PROJECTION,
    "cache not read": ("k, v = past_key_values.layers", "_ = past_key_values.layers", "cached_equal"),
}
ORDERS = {  # where the heads are joined, and the same without turning heads and tokens
    "(weights @ v).transpose(1, 2).reshape(B, T, C)": "(weights @ v).reshape(B, T, C)",
    "out = out.transpose(1, 2).reshape(B, T, C)": "out = out.reshape(B, T, C)",
    "out = out.reshape(B, T, C)": "out = out.transpose(1, 2).reshape(B, T, C)",
    "mask).reshape(B, T, C)": "mask).transpose(1, 2).reshape(B, T, C)",
}
FUSED = {  # for sdpa, gqa and flash
    "no mask": ("is_causal=T > 1 and mask is None", "is_causal=False", "causal"),
    "heads and tokens swapped": ("out.transpose(1, 2).reshape(B, T, C)", "out.reshape(B, T, C)", "causal"),
    "no output projection": NO_PROJECTION,
    "mask aligned at the upper left": ("is_causal=T > 1 and mask is None", "is_causal=mask is None", "cached_equal"),
}


def planted(name, right, wrong, folder):
    """The path of a variant's file with one thing wrong in it."""
    source = attention.find(name).read_text()
    assert right in source
    path = folder / "planted.py"
    path.write_text(source.replace(right, wrong))
    return str(path)


@pytest.mark.parametrize("name", attention.variants())
def test_every_variant_passes(name):
    said = certificate.certify(name, {})
    assert said["passed"], said
    assert max(said["reference_difference"], said["reference_gradient_difference"]) < 1e-9


@pytest.mark.parametrize(
    ("name", "fault"),
    [("baseline", fault) for fault in BASELINE.items()]
    + [(name, fault) for name in ("sdpa", "gqa", "flash") for fault in FUSED.items()],
    ids=lambda value: value if isinstance(value, str) else value[0].replace(" ", "_"),
)
def test_a_planted_fault_is_caught(name, fault, tmp_path):
    _, (right, wrong, check) = fault
    said = certificate.certify(planted(name, right, wrong, tmp_path), {})
    assert not said["passed"]
    assert said[check] is False, said


every_variant = pytest.mark.parametrize("name", attention.variants())


@every_variant
def test_no_output_projection_is_caught_in_each(name, tmp_path):
    said = certificate.certify(planted(name, *NO_PROJECTION[:2], tmp_path), {})
    assert said["gpt2_projection"] is False and not said["passed"]


@every_variant
def test_heads_and_tokens_swapped_is_caught_in_each(name, tmp_path):
    """Heads laid out where tokens belong: what the published flash module did."""
    source = attention.find(name).read_text()
    right = next(line for line in ORDERS if line in source)
    said = certificate.certify(planted(name, right, ORDERS[right], tmp_path), {})
    assert not said["causal"] and not said["passed"]


@every_variant
def test_weights_that_start_otherwise_than_gpt2_s_are_caught_in_each(name, monkeypatch):
    monkeypatch.setattr("lib.model._initialise", lambda *_: None)
    said = certificate.certify(name, {})
    assert said["gpt2_initialisation"] is False and not said["passed"]


def test_memory_and_flops_grow_as_they_should():
    said = {name: certificate.certify(name, {}) for name in ("baseline", "sdpa", "sliding_window")}
    assert said["baseline"]["memory_growth"] == pytest.approx(2, abs=0.1)
    assert said["sdpa"]["memory_growth"] == pytest.approx(1, abs=0.1)
    assert [round(one["flops_growth"]) for one in said.values()] == [2, 2, 1]


def test_the_table_says_no_where_a_check_fails(tmp_path):
    wrong = planted("baseline", *BASELINE["no mask"][:2], tmp_path)
    table = certificate.table({"sdpa": certificate.certify("sdpa", {}), "wrong": certificate.certify(wrong, {})})
    assert list(table.loc["no output depends on a later token"]) == ["yes", "NO"]
    assert list(table.loc["passed"]) == ["yes", "NO"]
