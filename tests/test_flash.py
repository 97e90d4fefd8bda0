"""Flash attention is the baseline's function on the flash kernel alone."""

import pytest
import torch
from test_attention import tiny_config

from lib import attention
from lib.measure import kernels
from lib.model import build_model, devices, gpt2_config


def test_it_is_the_baseline():
    ids = torch.randint(0, 50, (2, 65))
    baseline, flash = (build_model(n, tiny_config(), seed=1).double() for n in ("baseline", "flash"))
    ours, theirs = flash(ids, labels=ids), baseline(ids, labels=ids)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-9, atol=1e-9)
    ours.loss.backward()
    theirs.loss.backward()
    for a, b in zip(flash.parameters(), baseline.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


def test_the_kernel_that_runs_is_flash_forward_and_backward():
    model = build_model("flash", gpt2_config(1, 32, 4, 64, 50))
    names = kernels.names(model, 32, devices.autocast("fp32", torch.device("cpu")))
    assert any("flash_attention" in name for name in names["forward"])
    assert any("flash_attention" in name and "backward" in name for name in names["backward"])


def test_what_the_kernel_cannot_take_is_said_and_never_falls_back():
    layer = attention.load("flash")(gpt2_config(1, 32, 4, 64, 2, dropout=0.1), 0).train()
    with pytest.raises(ValueError, match="no dropout"):
        layer(torch.randn(1, 8, 32))
    layer.eval()(torch.randn(1, 8, 32))
