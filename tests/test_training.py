"""The loop: what it trains, and that neither warm-up nor looking at it leaves a trace."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lib import attention, training
from lib.data import corpus
from lib.errors import LossNotFinite, UsageError
from lib.model import build_model, gpt2_config

P = {
    "seed": 0, "context": 16, "batch_size": 4, "accumulation": 1, "steps_per_epoch": 5, "epochs": 2, "dropout": 0.0,
    "learning_rate": 1e-2, "lr_warmup_steps": 2, "schedule": "cosine", "weight_decay": 0.1, "clip_norm": 1.0,
    "warmup_steps": 3, "device": "cpu", "precision": "fp32", "compile": False, "validation_sequences": 6,
}  # fmt: skip


def make_rows(count=40, context=16, ragged=True):
    random = np.random.default_rng(1)
    lengths = random.integers(3, context + 1, count) if ragged else np.full(count, context)
    starts = np.cumsum(lengths) - lengths
    return corpus.Rows(random.integers(1, 30, lengths.sum()).astype(np.uint32), starts, lengths, context, 0)


def make_trainer(name="sdpa", ragged=True, dtype=torch.float64, **changes):
    p = SimpleNamespace(**P | changes)
    model = build_model(name, gpt2_config(2, 32, 4, 32, 30, p.dropout), p.seed).to(dtype)
    data = corpus.Corpus(make_rows(ragged=ragged), make_rows(9, ragged=ragged), 30)
    return training.Trainer(model, data, p)


@pytest.mark.parametrize("name", attention.variants())
def test_documents_that_are_kept_apart_are_trained_on_as_if_alone(name):
    """Each token after a document's first counts once, whatever row and part of the step it is in."""
    trainer = make_trainer(name, ragged=False, batch_size=2, accumulation=2)
    train = trainer.corpus.train
    train.ends = np.unique([*range(5, len(train.tokens), 7), len(train.tokens)])
    loss = trainer.forward_backward(0)
    gradients = [weight.grad.clone() for weight in trainer.model.parameters()]
    trainer.model.zero_grad()
    alone = []
    for row in np.concatenate(trainer.rows[0]):
        first, last = row * train.context, (row + 1) * train.context
        borders = [first, *(end for end in train.ends if first < end < last), last]
        for begin, end in pairwise(borders):
            ids = torch.from_numpy(train.tokens[begin:end].astype(np.int64))[None]
            alone.append((trainer.model(ids, labels=ids, num_items_in_batch=1).loss, end - begin - 1))
    expected = sum(one for one, _ in alone) / sum(count for _, count in alone)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for got, weight in zip(gradients, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(got, weight.grad, rtol=1e-5, atol=1e-7)


def run(**changes):
    trainer = make_trainer(**changes)
    trainer.warm_up()
    trainer.run()
    return trainer


def test_warm_up_leaves_no_trace():
    warm, cold = make_trainer(dropout=0.1), make_trainer(dropout=0.1, warmup_steps=1)
    assert len(warm.warm_up()) == 3
    for trainer in (warm, cold):
        trainer.run()
    assert torch.equal(warm.losses, cold.losses) or torch.allclose(warm.losses, cold.losses, atol=0)
    for one, other in zip(warm.model.parameters(), cold.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("named", "error"), [("kda", UsageError), ("x/mine.py", ValueError)])
def test_what_a_variant_of_ours_refuses_is_one_sentence_and_another_s_error_its_own(named, error):
    p = SimpleNamespace(**P | {"attention": named})
    model = build_model("kda", gpt2_config(2, 32, 4, 32, 30), p.seed, kernels="fla")
    trainer = training.Trainer(model, corpus.Corpus(make_rows(), make_rows(9), 30), p)
    with pytest.raises(error, match="need CUDA and fla-core") as raised:
        trainer.warm_up()
    assert str(raised.value).startswith("kda refuses this run: ") == (error is UsageError)


def test_on_a_cpu_warm_up_is_as_long_as_it_was_asked_to_be_and_says_so():
    trainer = make_trainer(warmup_steps=2)
    seconds = trainer.warm_up()
    assert len(seconds) == 2
    assert trainer.warmed == {"steps": 2, "seconds": sum(seconds), "steady": None, "temperature_c": None}


def test_on_a_gpu_warm_up_goes_on_until_it_rests_and_takes_the_rows_again(monkeypatch):
    class Slow:
        def __init__(self, device):
            self.left, self.steady, self.temperature_c = 30, True, 54

        def look(self):
            self.left -= 1

        def rising(self):
            return self.left > 0

    monkeypatch.setattr(training, "Warmth", Slow)
    trainer, cold = make_trainer(dropout=0.1), make_trainer(dropout=0.1, warmup_steps=1)
    assert len(trainer.warm_up()) == 30 > len(trainer.rows)
    assert trainer.warmed["steps"] == 30 and trainer.warmed["steady"]
    for one in (trainer, cold):
        one.run()
    assert torch.equal(trainer.losses, cold.losses)


def test_pinned_memory_for_batches_is_there_before_the_window(monkeypatch):
    """Without a GPU nothing can be pinned: what would be is noted instead."""
    trainer, pinned = make_trainer(accumulation=2), []
    monkeypatch.setattr(trainer, "pin_buffers", lambda: pinned.append(trainer.meter.windows))
    trainer.warm_up()
    assert pinned == [[]]
    trainer, pinned = make_trainer(accumulation=2), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor)
    trainer.device = torch.device("cuda")
    trainer.pin_buffers()
    whole = [shape for shape in pinned if shape]
    assert whole == [(4, 16)] * 2 * 2 * training.AHEAD_STEPS and len(pinned) == len(whole) * 3 / 2


def test_losses_fall_and_every_step_has_one():
    trainer = run(ragged=False, epochs=8)
    losses = trainer.losses.numpy()
    assert len(losses) == 40 and np.isfinite(losses).all()
    assert losses[0] == pytest.approx(math.log(30), rel=0.1)
    assert losses[-5:].mean() < losses[:5].mean()
    assert [point["non_padding_tokens"] for point in trainer.validation] == [0, *np.cumsum([5 * 4 * 16] * 8)]


def test_variants_of_the_same_function_train_alike_step_by_step():
    losses = [run(name=name).losses for name in ("baseline", "sdpa")]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)


def test_accumulation_is_one_large_batch_though_rows_differ_in_length():
    whole, parts = run(batch_size=8), run(batch_size=2, accumulation=4)
    torch.testing.assert_close(whole.losses, parts.losses, rtol=1e-6, atol=1e-6)
    assert np.array_equal(whole.non_padding_tokens, parts.non_padding_tokens)


def test_a_run_is_reproduced_by_its_seed_alone():
    torch.manual_seed(99)
    first = run(dropout=0.2)
    torch.manual_seed(7)
    assert torch.equal(first.losses, run(dropout=0.2).losses)
    assert not torch.equal(first.losses, run(dropout=0.2, seed=1).losses)


def test_padding_is_neither_trained_on_nor_counted():
    trainer = run()
    rows = trainer.rows[:10].reshape(10, -1)
    assert np.array_equal(trainer.non_padding_tokens, trainer.corpus.train.lengths[rows].sum(1))
    ids, labels = trainer.corpus.train.batch(rows[0])
    ids[labels == -100] = 29  # another token in the padding
    trainer.model.eval()
    assert trainer.model(ids, labels=labels).loss == trainer.model(labels.clamp(min=0), labels=labels).loss


def losses_of(trainer, part, rows):
    """The loss of each token that counts in some rows, a list each, and which of them end a bigram seen before: each
    row alone, without padding, by PyTorch's own cross-entropy."""
    found = []
    for row in np.ravel(rows):
        ids = part.batch(np.array([row]))[0][:, : int(part.lengths[row])]
        with torch.no_grad():
            logits = trainer.model.eval()(ids).logits[0, :-1]
        said = ids[0].tolist()
        seen = [(a, b) in set(pairwise(said[: place + 1])) for place, (a, b) in enumerate(pairwise(said))]
        found.append((F.cross_entropy(logits, ids[0, 1:], reduction="none").tolist(), seen))
    return found


@pytest.mark.parametrize("batch_size", [2, 4])
def test_validation_is_the_mean_over_its_tokens(batch_size):
    """Of six rows of nine, the last batch a smaller one; without dropout, the kinds of tokens told apart."""
    trainer = make_trainer(batch_size=batch_size, dropout=0.5)
    trainer.corpus.validation.tokens %= 6  # so that bigrams repeat
    found = losses_of(trainer, trainer.corpus.validation, np.arange(6))
    trainer.model.train()
    said = trainer.validate(7)
    kinds = {"loss": (True, False), "repeated_bigram_loss": (True,), "other_loss": (False,)}
    for name, which in kinds.items():
        of_kind = [loss for losses, seen in found for loss, one in zip(losses, seen, strict=True) if one in which]
        assert said[name] == pytest.approx(np.mean(of_kind), rel=1e-6), name
    assert said["non_padding_tokens"] == 7 and said["repeated_bigram_loss"] != said["other_loss"]


def test_a_step_s_loss_is_the_mean_over_the_tokens_of_all_its_parts():
    trainer = make_trainer(batch_size=2, accumulation=3)
    rows = trainer.rows[0]
    expected = np.mean([loss for losses, _ in losses_of(trainer, trainer.corpus.train, rows) for loss in losses])
    trainer.model.train()
    trainer.take_step(0)
    assert trainer.losses[0].item() == pytest.approx(expected, rel=1e-6)


def test_training_is_what_a_plain_loop_of_pytorch_does():
    """Over four steps: all rows of a step at once, the mean over their tokens, clipping, AdamW, and fresh gradients."""
    trainer, steps = make_trainer(batch_size=2, accumulation=2, clip_norm=0.5), 4
    twin = build_model("sdpa", gpt2_config(2, 32, 4, 32, 30), 0).double()
    matrices = [w for w in twin.parameters() if w.dim() > 1]
    vectors = [w for w in twin.parameters() if w.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer, losses = torch.optim.AdamW(groups, betas=(0.9, 0.95)), []
    rates = [5e-3, 1e-2] + [1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * n / 7))) for n in range(2)]
    for rows, rate in zip(trainer.rows[:steps], rates, strict=True):
        ids, labels = trainer.corpus.train.batch(rows.ravel())
        logits = twin(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        for weight, gradient in zip(twin.parameters(), gradients, strict=True):
            weight.grad = gradient * min(1.0, 0.5 / norm.item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    for step in range(steps):
        trainer.take_step(step)
    assert trainer.losses[:steps].tolist() == pytest.approx(losses, rel=1e-5)
    for ours, theirs in zip(trainer.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_seed_is_that_of_rows_and_of_dropout():
    one, other, third = make_trainer(dropout=0.3), make_trainer(dropout=0.3), make_trainer(seed=5)
    assert np.array_equal(one.rows, other.rows) and not np.array_equal(one.rows, third.rows)
    other.p.seed = 5  # the same weights and rows
    for trainer in (one, other):
        trainer.run()
    assert not torch.equal(one.losses, other.losses)


def test_every_step_has_its_own_rate_and_rows_and_trains_while_validations_do_not(monkeypatch):
    """Over both epochs; what is looked at is what stands there when the optimizer steps."""
    trainer, steps, modes = make_trainer(dropout=0.1, accumulation=2), [], []
    step = trainer.optimizer.step

    def watched():
        steps.append([(group["lr"], group["betas"]) for group in trainer.optimizer.param_groups])
        step()

    def looked_at(module, words, given):
        of = trainer.corpus.train if "labels" in given else trainer.corpus.validation
        modes.append((of is trainer.corpus.train, module.training, words[0].clone()))

    trainer.optimizer.step = watched
    trainer.model.register_forward_pre_hook(looked_at, with_kwargs=True)
    trainer.model.eval()
    trainer.warm_up()
    assert {mode for *_, mode, _ in modes} == {True} and len(modes) == 2 * 3
    steps.clear(), modes.clear()
    trainer.run()
    falling = [1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * n / 7))) for n in range(8)]
    rates = [5e-3, 1e-2, *falling]  # two steps up, then to a tenth at the last of ten
    assert [rate for groups in steps for rate, _ in groups] == pytest.approx([rate for rate in rates for _ in range(2)])
    assert {betas for groups in steps for _, betas in groups} == {(0.9, 0.95)}  # GPT-3's
    validation = [(False, False)] * 2  # six rows in batches of four
    epoch = [(True, True)] * 5 * 2
    assert [one[:2] for one in modes] == [*validation, *epoch, *validation, *epoch, *validation]
    trained = [ids for is_train, _, ids in modes if is_train]
    for ids, rows in zip(trained, trainer.rows[:10].reshape(20, -1), strict=True):
        assert torch.equal(ids, trainer.corpus.train.batch(rows)[0])
    tokens = trainer.corpus.train.lengths[trainer.rows[:10]].sum((1, 2))
    assert [one["non_padding_tokens"] for one in trainer.validation] == [0, tokens[:5].sum(), tokens.sum()]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_rate_rises_then_keeps_or_falls_to_a_tenth(schedule):
    p = SimpleNamespace(learning_rate=1.0, lr_warmup_steps=10, schedule=schedule)
    rates = [training.learning_rate(step, p, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert all(a >= b for a, b in pairwise(rates[9:]))


def test_clipping_bounds_the_gradient():
    trainer, norms = make_trainer(clip_norm=0.01), []
    step = trainer.optimizer.step

    def watched():
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        norms.append(torch.cat(gradients).norm().item())
        step()

    trainer.optimizer.step = watched
    trainer.run()
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


def test_weight_decay_is_for_matrices_alone():
    decayed, others = make_trainer().optimizer.param_groups
    assert all(p.dim() >= 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.1
    assert all(p.dim() < 2 for p in others["params"]) and others["weight_decay"] == 0.0


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step():
    trainer = make_trainer(learning_rate=1e18, lr_warmup_steps=0, clip_norm=0.0, dtype=torch.float32)
    with pytest.raises(UsageError, match=r"not finite from step \d+ on; lower learning_rate"):
        trainer.run()


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_last_step_that_diverges_is_seen_though_its_own_loss_was_finite(clip_norm):
    one = {"steps_per_epoch": 1, "epochs": 1, "lr_warmup_steps": 0, "clip_norm": clip_norm, "dtype": torch.float32}
    trainer = make_trainer(learning_rate=1e38, **one)
    with pytest.raises(LossNotFinite, match="the validation loss is not finite after step 1; lower learning_rate"):
        trainer.run()
    assert trainer.losses.isfinite().all()


def test_a_run_that_was_broken_off_is_not_taken_up_again():
    """Its cell may be run a second time: the record would hold more seconds and joules than steps."""

    def interrupted(*_):
        raise KeyboardInterrupt

    trainer = make_trainer()
    with pytest.raises(KeyboardInterrupt):
        trainer.run(interrupted)
    with pytest.raises(UsageError, match="trained already, at least in part; run all cells from the first on"):
        trainer.run()


def test_what_is_reported_is_what_was_finished():
    seen, trainer = [], make_trainer()
    trainer.run(lambda steps, losses: seen.append((steps, losses.copy())), reports=10)
    assert seen[-1][0] == 10
    for steps, losses in seen:
        assert len(losses) == steps
        assert np.array_equal(losses, trainer.losses[:steps].numpy())


def test_the_window_holds_training_and_not_validation(monkeypatch):
    trainer, inside = make_trainer(), []
    validate, step = trainer.validate, trainer.take_step

    def is_open():
        return trainer.meter.open

    monkeypatch.setattr(trainer, "validate", lambda tokens: inside.append(("validate", is_open())) or validate(tokens))
    monkeypatch.setattr(trainer, "take_step", lambda *words: inside.append(("step", is_open())) or step(*words))
    trainer.run()
    assert {state for what, state in inside if what == "validate"} == {False}
    assert {state for what, state in inside if what == "step"} == {True}
    assert len(trainer.meter.windows_s) == 2


class Watch(TorchDispatchMode):
    """Notes, inside the measured window alone, what would make the host wait for the device."""

    def __init__(self, trainer):
        super().__init__()
        self.trainer, self.seen = trainer, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.trainer.meter.open and function is torch.ops.aten._local_scalar_dense.default:
            self.seen.append(function)
        return function(*args, **kwargs or {})


def waits(trainer, monkeypatch):
    watch = Watch(trainer)
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        asked = getattr(torch.Tensor, name)

        def noted(tensor, *words, name=name, asked=asked):
            watch.seen += [name] if trainer.meter.open else []
            return asked(tensor, *words)

        monkeypatch.setattr(torch.Tensor, name, noted)
    with watch:
        trainer.run()
    monkeypatch.undo()
    return watch.seen


@pytest.mark.parametrize("name", attention.variants())
def test_nothing_in_the_window_waits_for_a_value(name, monkeypatch):
    """`aten::_local_scalar_dense` is what `.item()`, `bool()` and an index by a tensor come down to."""
    assert waits(make_trainer(name, steps_per_epoch=2), monkeypatch) == []


def test_a_step_that_asks_for_its_loss_is_seen_to_wait(monkeypatch):
    trainer = make_trainer(steps_per_epoch=2)
    step = trainer.take_step
    trainer.take_step = lambda *words: (step(*words), trainer.losses[0].item())
    assert "item" in waits(trainer, monkeypatch)


def test_steps_that_are_profiled_after_the_run_leave_no_trace():
    trainer = run(dropout=0.1)
    states = [t for state in trainer.optimizer.state.values() for t in state.values()]
    random = torch.get_rng_state()
    tensors = [*trainer.model.parameters(), *states, trainer.losses]
    before = [tensor.detach().clone() for tensor in tensors]
    non_padding_tokens = trainer.non_padding_tokens.copy()
    with trainer.snapshot_and_restore():
        for step in range(3):
            trainer.take_step(step)
        assert not torch.equal(before[0], tensors[0])
    assert all(torch.equal(one, other) for one, other in zip(before, tensors, strict=True))
    assert np.array_equal(non_padding_tokens, trainer.non_padding_tokens) and torch.equal(random, torch.get_rng_state())
    assert trainer.busy_fraction() == trainer.busy == (None, "no_gpu")


def test_every_log_point_is_a_step_at_its_moment_of_the_window():
    trainer = run(steps_per_epoch=7)
    log = trainer.meter.log()
    assert [point["step"] for point in log] == list(range(1, 15))
    times = [point["time_s"] for point in log]
    assert times == sorted(times) and times[-1] <= trainer.meter.window_s
