"""Published as "LSH". Its name promises that tokens whose vectors are alike meet in a bucket, and only they are scored.

The audit found buckets drawn at random, whatever the vectors are, and the scores of all T x T pairs, of which those of
two buckets are hidden: the cost of full attention with one head for a view of a few tokens picked by chance. What
causality there is came with the padding's mask (`masked=True`); without padding a token sees its whole bucket
(`masked=False`, what our training passes). Two forwards of one input draw other buckets and differ.
Taken: a draw per sequence and forward, eight buckets, scale 1/√C; the audit tells neither.
"""

import torch

from lib.published import Published


class Attention(Published):
    paper = "Attentions Under the Microscope, LSH (arXiv 2507.07247), from an audit of its code"

    def __init__(self, config, layer_idx, buckets=8, masked=False):
        super().__init__(config, layer_idx, masked=masked)
        if buckets < 1:
            raise ValueError(f"buckets must be at least 1, not {buckets}")
        self.buckets = buckets
        self.drawn = None  # the last forward's buckets, (B, T): `reference` has no other way to them

    def mix(self, hidden_states, padding_mask):
        q, k, v = self.project(hidden_states)
        self.drawn = torch.randint(self.buckets, hidden_states.shape[:2], device=hidden_states.device)
        scores = q @ k.mT * self.width**-0.5  # (B, T, T)
        met = self.drawn[:, :, None] == self.drawn[:, None]
        return self.hide(scores, padding_mask).masked_fill(~met, torch.finfo(scores.dtype).min).softmax(-1) @ v

    def core_flops(self, context, dense=False):
        # As if the buckets filled evenly: a token, and its share of the others.
        others = context * (context - 1) // (2 if self.masked else 1) // self.buckets
        return 4 * self.width * (context**2 if dense else context + others)

    def reference(self, hidden_states):
        """Row by row and query by query over the bucket that the last forward drew."""
        (B, T, _), (q, k, v) = hidden_states.shape, self.project(hidden_states)
        rows = []
        for b in range(B):
            bucket = self.drawn[b].tolist()
            for t in range(T):
                seen = [s for s in range(T) if bucket[s] == bucket[t] and self.sees(t, s)]
                weights = (k[b, seen] @ q[b, t] / self.width**0.5).exp()  # (seen,)
                rows.append(weights @ v[b, seen] / weights.sum())
        return torch.stack(rows).unflatten(0, (B, T))
