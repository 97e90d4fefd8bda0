"""Published as "Flash". Its name promises FlashAttention-2: the same function as GPT-2's own, in tiles.

The audit found queries, keys and values laid out (B, H, T, D) and handed to a kernel that reads (B, T, H, D). What it
takes for the sequence are the heads: each token attends over its own H heads and sees no other token. The layer's
weights are bfloat16 without a float32 master, so that small updates round away. There is no output projection.
Taken: a head sees all heads, not only those before it.
"""

import torch

from lib.published import Published


class Attention(Published):
    paper = "Attentions Under the Microscope, Flash (arXiv 2507.07247), from an audit of its code"
    reads_padding = False
    counted = False

    def __init__(self, config, layer_idx):
        if config.n_embd % config.n_head:
            raise ValueError(f"heads must divide width: {config.n_head} heads do not divide {config.n_embd}")
        super().__init__(config, layer_idx)
        self.heads = config.n_head  # H
        self.to(torch.bfloat16)

    def mix(self, hidden_states, padding_mask):
        own = hidden_states.to(self.query.weight.dtype)
        q, k, v = (x.unflatten(2, (self.heads, -1)) for x in self.project(own))  # (B, T, H, D)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)  # (B, T, H, H)
        return (weights @ v).flatten(2).to(hidden_states.dtype)

    def core_flops(self, context, dense=False):
        return 4 * self.width * self.heads * context

    def reference(self, hidden_states):
        """Token by token and head by head."""
        tokens = []
        for token in hidden_states.unbind(1):  # (B, C)
            q, k, v = (x.chunk(self.heads, dim=1) for x in self.project(token.to(self.query.weight.dtype)))
            for head in q:
                weights = torch.stack([(head * other).sum(-1) for other in k]) / head.shape[-1] ** 0.5  # (H, B)
                weights = weights.exp() / weights.exp().sum(0)
                tokens.append(sum(w[:, None] * value for w, value in zip(weights, v, strict=True)))
        return torch.stack(tokens, dim=1).view_as(hidden_states).to(hidden_states.dtype)
