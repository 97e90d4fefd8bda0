"""The training loop: warm-up, then a measured window in which nothing synchronises and nothing is measured."""

import contextlib
import math
import time
from collections.abc import Callable

import numpy as np
import torch

from lib.data import corpus
from lib.errors import LossNotFinite, UsageError, one_sentence_when_out_of_memory
from lib.measure import kernels
from lib.measure.energy import Reading
from lib.measure.meter import Meter
from lib.model import devices

BETAS = (0.9, 0.95)  # GPT-3's (Brown et al. 2020, appendix B)
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
        self.p, self.corpus = p, corpus
        self.device = devices.choose(p.device)
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

        decayed = [w for w in model.parameters() if w.dim() >= 2]
        others = [w for w in model.parameters() if w.dim() < 2]
        groups = [{"params": decayed, "weight_decay": p.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=p.learning_rate, betas=BETAS, fused=True)
        self.rows_per_step = p.batch_size * p.accumulation
        rows = corpus.train.order(self.rows_per_step * max(self.steps, p.warmup_steps), p.seed)
        self.rows = rows.reshape(-1, p.accumulation, p.batch_size)  # (steps, accumulation, B)

    @one_sentence_when_out_of_memory()
    def warm_up(self) -> list[float]:
        """Some steps that leave no trace but compiled kernels and allocated memory; returns the seconds of each.

        Weights, optimizer and random state are as before when it returns, so the window begins at token 0 of training.
        """
        seconds = []
        with self.snapshot_and_restore():
            self.model.train()
            for step in range(self.p.warmup_steps):
                begin = time.perf_counter()
                self.take_step(step)
                devices.synchronize(self.device)
                seconds.append(time.perf_counter() - begin)
        return seconds

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
        batches = [self.corpus.train.batch(rows) for rows in self.rows[step]]
        # The loss of a batch of `accumulation` parts is the mean over all their tokens, not the mean of means.
        predicted = torch.tensor(sum(_labelled(labels[:, 1:]) for _, labels in batches))
        self.non_padding_tokens[step % self.steps] = self.corpus.train.lengths[self.rows[step]].sum()
        predicted = self._to_device(predicted)
        total = 0.0
        for ids, labels in batches:
            with self.autocast():
                loss = self.forward(
                    self._to_device(ids), labels=self._to_device(labels), use_cache=False, num_items_in_batch=predicted
                ).loss
            if backward:
                loss.backward()
            total = total + loss.detach()
        return total

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    @torch.no_grad()
    def validate(self, non_padding_tokens: int) -> dict:
        """Mean loss in nats per token over the first `validation_sequences` rows of the validation part."""
        self.model.eval()
        count = min(self.p.validation_sequences, len(self.corpus.validation))
        total, predicted = torch.zeros((), device=self.device), 0
        for first in range(0, count, self.p.batch_size):
            ids, labels = self.corpus.validation.batch(np.arange(first, min(first + self.p.batch_size, count)))
            tokens = _labelled(labels[:, 1:])
            with self.autocast():
                loss = self.model(self._to_device(ids), labels=self._to_device(labels), use_cache=False).loss
            total += loss.float() * tokens
            predicted += tokens
        return {"non_padding_tokens": non_padding_tokens, "loss": total.item() / predicted}


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
