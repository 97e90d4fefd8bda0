"""Published as "Group Query". Its name promises key/value heads that are fewer than query heads and shared by them.

The audit found eight full heads of queries, keys and values, so nothing is shared and nothing saved. There are no
biases and no output projection. It is always causal and ignores padding. Taken: scale 1/√D of the eight heads.
"""

import torch

from lib.published import Published

HEADS = 8


class Attention(Published):
    paper = "Attentions Under the Microscope, Group Query (arXiv 2507.07247), from an audit of its code"
    reads_padding = False

    def __init__(self, config, layer_idx):
        if config.n_embd % HEADS:
            raise ValueError(f"the published module has {HEADS} heads, which do not divide a width of {config.n_embd}")
        super().__init__(config, layer_idx, bias=False, masked=True)

    def mix(self, hidden_states, padding_mask):
        q, k, v = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in self.project(hidden_states))  # (B, H, T, D)
        scores = self.hide(q @ k.mT * q.shape[-1] ** -0.5, None)  # (B, H, T, T)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def core_flops(self, context, dense=False):
        return 4 * self.width * (context**2 if dense else context * (context + 1) // 2)

    def reference(self, hidden_states):
        """Head by head and query by query over the keys up to it."""
        heads = []
        for q, k, v in zip(*(x.chunk(HEADS, dim=2) for x in self.project(hidden_states)), strict=True):
            rows = []
            for t in range(hidden_states.shape[1]):
                weights = ((q[:, t, None] * k[:, : t + 1]).sum(-1) / q.shape[-1] ** 0.5).exp()  # (B, t+1)
                rows.append((weights[..., None] * v[:, : t + 1]).sum(1) / weights.sum(-1, keepdim=True))
            heads.append(torch.stack(rows, dim=1))
        return torch.cat(heads, dim=2)
