"""Published as "Scaled Dot-Product". Its name promises softmax(Q Kᵀ / √D) V, head by head and causal.

The audit found one head as wide as the model, scale 1/√C, and no output projection. Causality came with the padding:
in a batch without padding there is no mask and all positions see all (`masked=False`, what our training passes); in
one with padding they see the past (`masked=True`).
"""

import torch

from lib.published import Published


class Attention(Published):
    paper = "Attentions Under the Microscope, Scaled Dot-Product (arXiv 2507.07247), from an audit of its code"

    def __init__(self, config, layer_idx, masked=False):
        super().__init__(config, layer_idx, masked=masked)

    def mix(self, hidden_states, padding_mask):
        q, k, v = self.project(hidden_states)
        scores = q @ k.mT * self.width**-0.5  # (B, T, T)
        return self.hide(scores, padding_mask).softmax(-1) @ v

    def core_flops(self, context, dense=False):
        pairs = context * (context + 1) // 2 if self.masked and not dense else context**2
        return 4 * self.width * pairs

    def reference(self, hidden_states):
        """Query by query over the keys that it sees."""
        q, k, v = self.project(hidden_states)
        rows = []
        for t in range(hidden_states.shape[1]):
            seen = [s for s in range(hidden_states.shape[1]) if self.sees(t, s)]
            weights = ((q[:, t, None] * k[:, seen]).sum(-1) / self.width**0.5).exp()  # (B, seen)
            rows.append((weights[..., None] * v[:, seen]).sum(1) / weights.sum(-1, keepdim=True))
        return torch.stack(rows, dim=1)
