"""The eight published definitions of "Attentions Under the Microscope" (arXiv 2507.07247), to be set beside ours.

They are re-written from an audit of what the published code computes (its parameters, FLOPs and which positions move
which), not copied from it. Where the audit leaves a detail open, the file says what was taken. They keep the contract
of `lib.attention` and are reached by path, `-p attention lib/published/linear.py`; no study runs them unasked.

What seven of them share is here, what only one knows is in its file. Queries, keys and values are three `nn.Linear`
with that class's uniform initialisation; there is no output projection and no dropout; and since no cache worked, the
cache keeps a layer's inputs and everything is computed anew for each token. A layer that looks ahead then still lacks
what comes later: it can be trained on the future, it cannot be given one.
"""

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

import lib.errors  # noqa: F401 it refuses to be part of another `lib`


class Published(nn.Module):
    """A published layer; its file adds `mix` and `reference`, (B, T, C) -> (B, T, C), `core_flops` and `paper`.

    `masked`: as in a batch that holds padding, with which came a causal mask. Without padding there was no mask.
    """

    own_initialisation = True
    causal = False  # most see what is to come, so that padding behind all tokens moves them too
    reads_padding = True
    counted = True  # whether the published counter saw its attention core: a fused kernel it counts as nothing

    def __init__(self, config, layer_idx, bias=True, masked=False):
        super().__init__()
        self.layer_idx = layer_idx
        self.masked = masked
        self.width = config.n_embd  # C
        self.query, self.key, self.value = (nn.Linear(self.width, self.width, bias=bias) for _ in range(3))

    def forward(self, hidden_states, past_key_values=None, padding_mask=None, **_):
        T = hidden_states.shape[1]
        if padding_mask is not None and not self.reads_padding:
            raise ValueError("this published definition reads no padding mask; give rows of one length")
        if past_key_values is not None:
            nothing = hidden_states[..., :0]
            hidden_states, _ = past_key_values.layers[self.layer_idx].update(hidden_states, nothing)  # (B, S, C)
        return self.mix(hidden_states, padding_mask)[:, -T:], None

    def project(self, hidden_states):
        """Queries, keys and values, (B, T, C) each."""
        return self.query(hidden_states), self.key(hidden_states), self.value(hidden_states)

    def hide(self, scores, padding_mask):
        """(B, T, T) scores without those that a mask hides, where one comes."""
        if padding_mask is None and not self.masked:
            return scores
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if padding_mask is not None:
            visible = visible & padding_mask[:, None]  # (B, T, T)
        return scores.masked_fill(~visible, torch.finfo(scores.dtype).min)

    def sees(self, query, key):
        """Whether the mask, where one comes, lets a query see a key: for `reference`, which takes no padding."""
        return key <= query or not self.masked

    def new_cache(self):
        return DynamicLayer()  # its keys are our inputs, its values nothing

    def cache_bytes(self, context, element_bytes):
        return self.width * context * element_bytes
