"""GPT-2 124M at T = 512 on real conversations with GPT-2's tokenizer, where they lie beside the project."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib import corpus, training
from lib.model import build_model, gpt2_config
from lib.record import ROOT

SHARED = Path(os.environ.get("ATTENTION_STUDY_SHARED", ROOT.parent / "shared"))
TALKS, TOKENIZER = SHARED / "data" / "tulu_v2_components.parquet", SHARED / "tokenizers" / "gpt2"
needs_real_data = pytest.mark.skipif(
    not (TALKS.exists() and TOKENIZER.exists()),
    reason="no real conversations here; name them by ATTENTION_STUDY_SHARED",
)


@needs_real_data
def test_both_variants_start_at_chance_and_fall_alike():
    torch.set_num_threads(os.cpu_count())
    data = corpus.load(str(TALKS), str(TOKENIZER), 512, packing=False, validation_share=0.02)
    assert data.vocabulary == 50257 and data.facts["conversations"] == 38_971
    p = SimpleNamespace(
        seed=0, batch_size=1, accumulation=1, steps_per_epoch=4, epochs=1, learning_rate=1e-3, lr_warmup_steps=0,
        schedule="constant", weight_decay=0.0, clip_norm=1.0, warmup_steps=1, device="cpu", precision="fp32",
        compile=False, validation_rows=1,
    )  # fmt: skip
    losses = {}
    for name in ("baseline", "sdpa"):
        trainer = training.Trainer(build_model(name, gpt2_config(12, 768, 12, 1024, 50257)), data, p)
        trainer.run()
        losses[name] = torch.cat([trainer.losses, torch.tensor([point["loss"] for point in trainer.validation])])
    torch.set_num_threads(1)
    assert losses["sdpa"][0].item() == pytest.approx(math.log(50257), abs=0.5)  # one row of few tokens
    assert losses["sdpa"][-1] < losses["sdpa"][-2] - 1.0  # validation, before and after the steps
    torch.testing.assert_close(losses["baseline"], losses["sdpa"], rtol=1e-4, atol=1e-4)
