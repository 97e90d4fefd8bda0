"""GPT-2 124M at T = 512 on real conversations with GPT-2's tokenizer, where they lie beside the project."""

import functools
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib import attention, training
from lib.data import corpus
from lib.model import build_model, gpt2_config

SHARED = Path(os.environ.get("ATTENTION_STUDY_SHARED", "nowhere"))
TALKS, TOKENIZER = SHARED / "data" / "tulu_v2_components.parquet", SHARED / "tokenizers" / "gpt2"
needs_real_data = pytest.mark.skipif(
    not (TALKS.exists() and TOKENIZER.exists()),
    reason="takes minutes, and real conversations: name their folder by ATTENTION_STUDY_SHARED",
)


P = SimpleNamespace(
    seed=0, batch_size=1, accumulation=1, steps_per_epoch=4, epochs=1, learning_rate=3e-4, lr_warmup_steps=0,
    schedule="constant", weight_decay=0.0, clip_norm=1.0, warmup_steps=1, device="cpu", precision="fp32",
    compile=False, validation_sequences=1, dataset=str(TALKS), dataset_revision="", tokenizer=str(TOKENIZER),
    context=512, turns="roles", packing=False, train_on_padding=False, validation_share=0.02,
)  # fmt: skip
EXACT = ("sdpa", "flash")  # other kernels for the same function as baseline


@pytest.fixture(scope="module")
def talks():
    return corpus.load(P)


@pytest.fixture(scope="module")
def losses_of(talks):
    @functools.cache
    def train(name):
        torch.set_num_threads(os.cpu_count())
        trainer = training.Trainer(build_model(name, gpt2_config(12, 768, 12, 1024, 50257)), talks, P)
        trainer.run()
        torch.set_num_threads(1)
        return torch.cat([trainer.losses, torch.tensor([point["loss"] for point in trainer.validation])])

    return train


@needs_real_data
def test_the_real_conversations_are_all_there(talks):
    assert talks.vocabulary == 50257 and talks.facts["conversations"] == 38_971


@needs_real_data
@pytest.mark.parametrize("name", attention.STUDY_ORDER)
def test_gpt2_124m_starts_at_chance_and_its_loss_falls(name, losses_of):
    losses = losses_of(name)
    print(name, [round(loss, 3) for loss in losses.tolist()])
    assert losses[0].item() == pytest.approx(math.log(50257), abs=0.5)  # one row of few tokens
    assert losses[-1] < losses[-2] - 1.0  # validation, before and after the steps
    if name in EXACT:
        torch.testing.assert_close(losses, losses_of("baseline"), rtol=1e-4, atol=1e-4)
