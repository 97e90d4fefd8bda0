"""Published as "Multi-Head Latent". Its name promises keys and values rebuilt from one small latent, alone cached.

The audit found the idea of a set of latents instead (as in Perceiver): 64 learned queries read all positions, those to
come included, and a matrix that is the same for every text spreads their 64 answers over the model's positions. So each
position can be told what comes after it, and its loss under that of any causal model is no gain in modelling. A padding
mask is honoured. Taken: one head as wide as the model, scale 1/√C, latents from N(0, 1).
"""

import torch
from torch import nn

from lib.published import Published

LATENTS = 64


class Attention(Published):
    paper = "Attentions Under the Microscope, Multi-Head Latent (arXiv 2507.07247), from an audit of its code"

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.positions = config.n_positions  # P
        self.latents = nn.Parameter(torch.randn(LATENTS, self.width))
        self.spread = nn.Linear(LATENTS, self.positions)

    def mix(self, hidden_states, padding_mask):
        B, T, C = hidden_states.shape
        # Copies: a view of a weight asks for a gradient even under no_grad, at which torch's FLOP counter gives up.
        q = self.query(self.latents.repeat(B, 1, 1))  # (B, 64, C)
        scores = q @ self.key(hidden_states).mT * C**-0.5  # (B, 64, T)
        if padding_mask is not None:
            scores = scores.masked_fill(~padding_mask[:, None], torch.finfo(scores.dtype).min)
        answers = scores.softmax(-1) @ self.value(hidden_states)  # (B, 64, C)
        return self.spread(answers.mT).mT[:, :T]  # all P positions, of which T are kept

    def projection_flops(self, context):
        met = 2 * context + LATENTS  # vectors that meet a C x C matrix: keys and values, and the latents
        return 2 * self.width * (self.width * met + LATENTS * self.positions)

    def core_flops(self, context, dense=False):
        return 4 * self.width * LATENTS * context

    def reference(self, hidden_states):
        """Latent by latent over all keys; position by position over all answers."""
        k, v = self.key(hidden_states), self.value(hidden_states)
        answers = []
        for latent in self.query(self.latents):  # (C,)
            weights = (k @ latent / self.width**0.5).exp()  # (B, T)
            answers.append((weights[..., None] * v).sum(1) / weights.sum(-1, keepdim=True))
        parts = zip(self.spread.weight[: hidden_states.shape[1]], self.spread.bias, strict=False)
        return torch.stack(
            [sum(w * answer for w, answer in zip(row, answers, strict=True)) + bias for row, bias in parts], dim=1
        )
