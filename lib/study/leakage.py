"""Does a model need its future? The loss of a trained model with the whole row in sight, and token by token.

`python -m lib.study.leakage PROFILE --labels LABEL ... --write FILE.csv` trains these runs of a profile and writes
both losses.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from lib import model, parameters, training
from lib.data import corpus
from lib.errors import UsageError
from lib.study import plan


@torch.no_grad()
def teacher_forced_and_autoregressive_loss(gpt2, ids: torch.Tensor, seq_idx=None) -> tuple[float, float]:
    """Mean loss of (B, T) token ids in nats per token: in one pass over all, as in training; and token by token.

    Token by token each prediction is made as in generation, from the tokens before it alone, everything computed
    anew. For a causal model the two are the same; one that was trained to look ahead finds nothing there. `seq_idx`
    (B, T) keeps the documents of a row apart.
    """
    gpt2.eval()

    def log_probabilities(t):
        documents = {} if seq_idx is None else {"seq_idx": seq_idx[:, :t]}
        return gpt2(ids[:, :t], use_cache=False, **documents).logits.log_softmax(-1)

    at_once = log_probabilities(ids.shape[1])
    alone = [log_probabilities(t)[:, -1] for t in range(1, ids.shape[1])]
    next_ids = ids[:, 1:, None]
    losses = (-found.gather(2, next_ids).mean().item() for found in (at_once[:, :-1], torch.stack(alone, dim=1)))
    return tuple(losses)


def prefix_losses(profile: str, labels: Iterable[str], rows: int = 64) -> pd.DataFrame:
    """Trains the runs of a profile that have these labels; both losses on its first `rows` validation rows."""
    overrides, about_study = plan.read_profile(profile)
    planned = {
        parameters.display_name(run["values"]): run for run in plan.runs_of(overrides, about_study["variants"], 1)
    }
    found = []
    for label in labels:
        if label not in planned:
            raise UsageError(f"{profile} has no run {label!r}; it has: {', '.join(planned)}")
        p = SimpleNamespace(**planned[label]["values"])
        data = corpus.load(p)
        config = model.config_of(vars(p), data.vocabulary, p.dropout)
        trainer = training.Trainer(model.build_model(p.attention, config, p.seed, **p.options), data, p)
        trainer.run()
        which = np.arange(min(rows, len(data.validation)))
        ids, seq_idx = data.validation.batch(which)[0], data.validation.seq_idx(which)
        given = (one if one is None else one.to(trainer.device) for one in (ids, seq_idx))
        both = teacher_forced_and_autoregressive_loss(trainer.model, *given)
        found.append({"run": label, **dict(zip(("teacher_forced_loss", "autoregressive_loss"), both, strict=True))})
        print(found[-1], flush=True)
    return pd.DataFrame(found)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.study.leakage", description=prefix_losses.__doc__)
    parser.add_argument("profile", help="a YAML file with study: variants")
    parser.add_argument("--labels", nargs="+", required=True, help="the runs to train, by label")
    parser.add_argument("--write", type=Path, required=True, metavar="CSV", help="the file that the losses go to")
    options = parser.parse_args(words)
    try:
        found = prefix_losses(options.profile, options.labels)
    except UsageError as error:
        print(f"python -m lib.study.leakage: {error}", file=sys.stderr)
        return 2
    found.round(4).to_csv(options.write, index=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
