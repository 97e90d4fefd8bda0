"""Published as "Linear". Its name promises Σ over the past of φ(k) vᵀ, read by φ(q), at a cost linear in the length.

The audit found one head as wide as the model, φ(x) = relu(x) + 1, and one sum over all positions, those to come
included, so that every position learns what is later in the text. A state of C x C numbers costs more than the scores
that it replaces as long as T < C. Taken: divided by φ(q)·Σ φ(k); no mask and no padding has a say.
"""

import torch

from lib.published import Published


class Attention(Published):
    paper = "Attentions Under the Microscope, Linear (arXiv 2507.07247), from an audit of its code"
    reads_padding = False

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)

    def mix(self, hidden_states, padding_mask):
        q, k, v = self.project(hidden_states)
        q, k = q.relu() + 1, k.relu() + 1
        state = k.mT @ v  # (B, C, C)
        return q @ state / (q @ k.sum(1)[..., None])  # (B, T, C) over (B, T, 1)

    def core_flops(self, context, dense=False):
        return 2 * self.width * (2 * self.width + 1) * context

    def reference(self, hidden_states):
        """All T x T weights, no state."""
        q, k, v = self.project(hidden_states)
        q, k = (torch.where(x > 0, x, 0) + 1 for x in (q, k))
        weights = torch.einsum("btc,bsc->bts", q, k)
        return torch.einsum("bts,bsc->btc", weights / weights.sum(-1, keepdim=True), v)
