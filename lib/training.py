"""The training loop: warm-up, then a measured window in which nothing synchronises and nothing is measured."""

import contextlib
import math
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from lib import attention, record
from lib.data import corpus, ngrams
from lib.errors import LossNotFinite, UsageError, one_sentence_when_out_of_memory
from lib.measure import environment, kernels
from lib.measure.energy import Reading
from lib.measure.meter import Meter
from lib.measure.warmth import Warmth
from lib.model import devices

BETAS = (0.9, 0.95)  # GPT-3's (Brown et al. 2020, appendix B)
AHEAD_STEPS = 4  # that the host may be ahead of a GPU: a thousand launches fit its queue, a step of GPT-2 has more
FINAL_RATE = 0.1  # where the cosine ends, as a share of the peak rate (Hoffmann et al. 2022, section 3)
Report = Callable[[int, np.ndarray], None]  # (steps finished so far, their losses)


def learning_rate(step: int, p, steps: int) -> float:
    """Rate of one step: linear from 0 over `lr_warmup_steps`, then constant, or a cosine down to a tenth."""
    if step < p.lr_warmup_steps:
        return p.learning_rate * (step + 1) / p.lr_warmup_steps
    if p.schedule == "constant":
        return p.learning_rate
    progress = (step - p.lr_warmup_steps) / max(1, steps - 1 - p.lr_warmup_steps)
    return p.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Trainer:
    """Trains one model by parameters `p` (`lib.parameters.resolve`) on the rows of a corpus."""

    def __init__(self, model, corpus: corpus.Corpus, p):
        self.started_at = record.now()  # what is predicted from now on is no prediction of this run
        self.p, self.corpus = p, corpus
        self.device = devices.choose(p.device)
        facts = environment.describe(self.device)  # the commit of the code that runs, not of what it is edited to
        self.commit = {name: value for name, value in facts.items() if name.startswith("commit")}
        self.model = model.to(self.device)
        self.forward = torch.compile(self.model) if p.compile else self.model
        self.precision = devices.resolve_precision(p.precision, self.device)
        self.autocast = devices.autocast(self.precision, self.device)
        self.steps = p.steps_per_epoch * p.epochs
        self.meter = Meter(self.device)
        self.losses = torch.full((self.steps,), math.nan, device=self.device)
        self.non_padding_tokens = np.zeros(self.steps, dtype=np.int64)
        self.validation: list[dict] = []
        self.busy = Reading(None, "not_asked_for" if self.device.type == "cuda" else "no_gpu")
        self.warmed: dict | None = None  # how warm-up ended

        decayed = [w for w in model.parameters() if w.dim() >= 2]
        others = [w for w in model.parameters() if w.dim() < 2]
        groups = [{"params": decayed, "weight_decay": p.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=p.learning_rate, betas=BETAS, fused=True)
        self.rows_per_step = p.batch_size * p.accumulation
        rows = corpus.train.order(self.rows_per_step * max(self.steps, p.warmup_steps), p.seed)
        self.rows = rows.reshape(-1, p.accumulation, p.batch_size)  # (steps, accumulation, B)

    @one_sentence_when_out_of_memory()
    def warm_up(self) -> list[float]:
        """Some steps that leave no trace but compiled kernels, allocated memory and heat; returns the seconds of each.

        `warmup_steps`, and on a GPU as many more as its heat and clock need to come to rest, within the limits of
        `lib.measure.warmth`; `warmed` says how that ended. Weights, optimizer and random state are as before when it
        returns, so the window begins at token 0 of training. Raises UsageError for what the variant refuses.
        """
        seconds = []
        with self.snapshot_and_restore():
            self.model.train()
            warmth = Warmth(self.device)
            while len(seconds) < self.p.warmup_steps or warmth.rising():
                begin = time.perf_counter()
                with self._refusal_in_one_sentence():
                    self.take_step(len(seconds) % len(self.rows))
                warmth.look()  # while the GPU works
                devices.synchronize(self.device)
                seconds.append(time.perf_counter() - begin)
        self.pin_buffers()
        self.warmed = {"steps": len(seconds), "seconds": sum(seconds)}
        self.warmed |= {"steady": warmth.steady, "temperature_c": warmth.temperature_c}
        return seconds

    @contextlib.contextmanager
    def _refusal_in_one_sentence(self):
        """What a variant of ours says of a precision, device or row that it cannot take; another's error is its own."""
        try:
            yield
        except ValueError as error:
            name = getattr(self.p, "attention", "")
            if not attention.is_ours(name):
                raise
            raise UsageError(f"{name} refuses this run: {error}") from error

    def pin_buffers(self) -> None:
        """Lets PyTorch's cache of pinned memory hold what the batches of `AHEAD_STEPS` steps need, and lets go of it:
        warm-up waits for each step and so never has more than one there, and pinning memory stops the GPU."""
        batches = [(*self.corpus.train.batch(rows), torch.tensor(0)) for rows in self.rows[0]] * AHEAD_STEPS
        held = [tensor.pin_memory() for batch in batches for tensor in batch if self.device.type == "cuda"]
        del held

    def busy_fraction(self, steps: int = 5) -> Reading:
        """Share of the time of some steps, of which no trace is left, in which the GPU computes; None on a CPU."""

        def some_steps():
            for step in range(min(steps, len(self.rows))):
                self.take_step(step)

        with self.snapshot_and_restore():
            self.model.train()
            self.busy = kernels.busy_fraction(self.device, some_steps)
        return self.busy

    @contextlib.contextmanager
    def snapshot_and_restore(self):
        """Steps taken inside leave weights, optimizer, random state and the run's series as they were before."""
        weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.model.state_dict().items()}
        moments = {
            weight: {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
            for weight, state in self.optimizer.state.items()
        }
        series = self.losses.clone(), self.non_padding_tokens.copy()
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                yield
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.model.load_state_dict(weights)
            with torch.no_grad():
                for weight, state in self.optimizer.state.items():
                    for name, tensor in state.items():  # in place, so that memory stays where it is
                        # AdamW's state starts from zeros.
                        tensor.copy_(moments[weight][name]) if weight in moments else tensor.zero_()
            self.losses.copy_(series[0])
            self.non_padding_tokens[:] = series[1]

    @one_sentence_when_out_of_memory()
    def run(self, report: Report | None = None, reports: int = 50) -> None:
        """The measured window: every step of every epoch, a validation after each, outside the window.

        `report` is told of the losses that are finished by then, without waiting for any. Raises LossNotFinite as soon
        as one of them, or of a validation, is seen not to be, OutOfMemory where memory runs out, UsageError where a run
        has begun before: it would go on from there.
        """
        if self.meter.open or self.meter.windows:
            raise UsageError("this model has been trained already, at least in part; run all cells from the first on")
        torch.manual_seed(self.p.seed)
        watch = LossWatch(self.losses, report)
        self.validation = [self.validate(0)]
        every = max(1, self.steps // reports)
        for epoch in range(self.p.epochs):
            self.model.train()
            with self.meter.window():
                for step in range(epoch * self.p.steps_per_epoch, (epoch + 1) * self.p.steps_per_epoch):
                    self.take_step(step)
                    if (step + 1) % every == 0:
                        self.meter.mark(step + 1)
                        watch.look(step + 1)
            watch.look(step + 1, wait=True)
            self.validation.append(self.validate(int(self.non_padding_tokens[: step + 1].sum())))
            if not math.isfinite(self.validation[-1]["loss"]):  # the last step alone can end it, behind its own loss
                raise LossNotFinite(
                    f"the validation loss is not finite after step {step + 1}; lower learning_rate, or raise "
                    "lr_warmup_steps"
                )

    def take_step(self, step: int) -> None:
        """One optimizer step over `accumulation` batches; the loss stays on the device."""
        total = self.forward_backward(step)
        if self.p.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.p.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.p, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses[step % self.steps] = total

    def forward_backward(self, step: int, backward: bool = True) -> torch.Tensor:
        """Forward and backward over the batches of one step; returns its loss, on the device."""
        train = self.corpus.train
        batches = [(*train.batch(rows), train.seq_idx(rows)) for rows in self.rows[step]]
        # The loss of a batch of `accumulation` parts is the mean over all their tokens, not the mean of means.
        # Where there is none to predict, the sum is 0 and so is the loss.
        predicted = torch.tensor(max(1, sum(_labelled(labels[:, 1:]) for _, labels, _ in batches)))
        self.non_padding_tokens[step % self.steps] = self.corpus.train.lengths[self.rows[step]].sum()
        predicted = self._to_device(predicted)
        total = 0.0
        for ids, labels, seq_idx in batches:
            with self.autocast():
                loss = self.forward(
                    self._to_device(ids), labels=self._to_device(labels), use_cache=False,
                    num_items_in_batch=predicted, **self._documents(seq_idx),
                ).loss  # fmt: skip
            if backward:
                loss.backward()
            total = total + loss.detach()
        return total

    def _documents(self, seq_idx: torch.Tensor | None) -> dict:
        """The argument that keeps the documents of a row apart, where they are."""
        return {} if seq_idx is None else {"seq_idx": self._to_device(seq_idx)}

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    @torch.no_grad()
    def validate(self, non_padding_tokens: int) -> dict:
        """Mean loss in nats per token over the first `validation_sequences` rows of the validation part.

        `loss` of all tokens; `repeated_bigram_loss` of those that end a bigram which their row has held before
        (`lib.data.ngrams.repeated_bigrams`), which a model can recall, and `other_loss` of the rest. None of no token.
        """
        self.model.eval()
        count = min(self.p.validation_sequences, len(self.corpus.validation))
        totals, tokens = torch.zeros(2, device=self.device), np.zeros(2, dtype=np.int64)  # repeated bigrams, others
        for first in range(0, count, self.p.batch_size):
            rows = np.arange(first, min(first + self.p.batch_size, count))
            (ids, labels), seq_idx = self.corpus.validation.batch(rows), self.corpus.validation.seq_idx(rows)
            counts = labels[:, 1:] != corpus.IGNORED  # (B, T - 1)
            repeated = counts & torch.from_numpy(ngrams.repeated_bigrams(ids.numpy(), seq_idx))
            kinds = torch.stack([repeated, counts & ~repeated])  # (2, B, T - 1)
            with self.autocast():
                documents = self._documents(seq_idx)
                logits = self.model(self._to_device(ids), use_cache=False, **documents).logits  # (B, T, V)
            logits, wanted = logits[:, :-1].float().flatten(0, 1), self._to_device(labels)[:, 1:].flatten()
            losses = F.cross_entropy(logits, wanted, ignore_index=corpus.IGNORED, reduction="none")  # (B (T - 1))
            totals += (self._to_device(kinds).flatten(1) * losses).sum(1)
            tokens += kinds.sum((1, 2)).numpy()
        again, others = (total / n if n else None for total, n in zip(totals.tolist(), tokens.tolist(), strict=True))
        loss = totals.sum().item() / tokens.sum().item()
        found = {"non_padding_tokens": non_padding_tokens, "loss": loss}
        return found | {"repeated_bigram_loss": again, "other_loss": others}


def _labelled(labels: torch.Tensor) -> int:
    """Tokens that the loss counts, on the host, where the labels are."""
    return int(np.count_nonzero(labels.numpy() != corpus.IGNORED))


class LossWatch:
    """Reads the losses off the device without waiting for it: each look starts a copy and shows the last that ended."""

    def __init__(self, losses: torch.Tensor, report: Report | None):
        self.losses, self.report = losses, report
        self.on_gpu = losses.is_cuda
        self.host = torch.empty(losses.shape, pin_memory=self.on_gpu)
        self.copied = torch.cuda.Event() if self.on_gpu else None
        self.pending = 0  # steps in the copy under way

    def look(self, steps: int, wait: bool = False) -> None:
        if self.pending and (not self.on_gpu or self.copied.query()):
            self._show()
        if not self.pending or wait:
            self.host.copy_(self.losses, non_blocking=not wait)
            if self.on_gpu:
                self.copied.record()
            self.pending = steps
            if wait or not self.on_gpu:
                self._show()

    def _show(self) -> None:
        steps, self.pending = self.pending, 0
        values = self.host[:steps].numpy()
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise LossNotFinite(
                f"the loss is not finite from step {bad[0] + 1} on; lower learning_rate, or raise lr_warmup_steps"
            )
        if self.report is not None:
            self.report(steps, values)
