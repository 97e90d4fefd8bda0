"""Published as "Sliding Window". Its name promises that each query reads a window of keys, at the cost of the window.

The audit found the scores of all T x T pairs, of which those more than three tokens apart are hidden: the cost of full
attention for the view of a window. The window reaches three tokens into the future too; what causality there is came
with the padding's mask (`masked=True`), and without padding there was none (`masked=False`, what our training passes).
Taken: one head as wide as the model, scale 1/√C.
"""

import torch

from lib.published import Published

REACH = 3


class Attention(Published):
    paper = "Attentions Under the Microscope, Sliding Window (arXiv 2507.07247), from an audit of its code"

    def __init__(self, config, layer_idx, masked=False):
        super().__init__(config, layer_idx, masked=masked)

    def mix(self, hidden_states, padding_mask):
        q, k, v = self.project(hidden_states)
        scores = q @ k.mT * self.width**-0.5  # (B, T, T)
        near = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(-REACH).tril(REACH)
        return self.hide(scores, padding_mask).masked_fill(~near, torch.finfo(scores.dtype).min).softmax(-1) @ v

    def core_flops(self, context, dense=False):
        before = sum(min(REACH, t) for t in range(context))  # as many as after, were none hidden
        pairs = context**2 if dense else context + before + (0 if self.masked else before)
        return 4 * self.width * pairs

    def reference(self, hidden_states):
        """Query by query over the keys near it alone."""
        q, k, v = self.project(hidden_states)
        rows = []
        for t in range(hidden_states.shape[1]):
            near = range(max(0, t - REACH), min(hidden_states.shape[1], t + REACH + 1))
            seen = [s for s in near if self.sees(t, s)]
            weights = ((q[:, t, None] * k[:, seen]).sum(-1) / self.width**0.5).exp()  # (B, seen)
            rows.append((weights[..., None] * v[:, seen]).sum(1) / weights.sum(-1, keepdim=True))
        return torch.stack(rows, dim=1)
