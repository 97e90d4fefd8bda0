"""The small net in which a variant is asked what it can do: mixers between an embedding and a tied head.

x = E[ids] (+ positions); every part is a residual branch behind a layer norm: a causal convolution of width 3 times a
projection (zoology's BaseConv, Arora et al. 2023, arXiv 2312.04927, appendix C), then each mixer of `pattern` and,
where asked for, an MLP behind it; logits = norm(x) Eᵀ.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config

from lib import attention

CONVOLUTION = 3  # tokens that the convolution sees, itself included


class BaseConv(nn.Module):
    """(B, T, C) -> (B, T, C): a causal depthwise convolution of the last three tokens, times a projection."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, CONVOLUTION, groups=width)
        self.projection = nn.Linear(width, width)

    def forward(self, x):
        past = F.pad(x.transpose(1, 2), (CONVOLUTION - 1, 0))  # (B, C, T + 2)
        return self.conv(past).transpose(1, 2) * self.projection(x)


class Mixer(nn.Module):
    """A variant's attention, which returns its output first."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class ProbeNet(nn.Module):
    """`pattern`: the mixers, (name or path, options) each. `width` C = `heads` x head width; `context` T at most.

    Matrices start as N(0, 1/√C), the embedding as N(0, 0.02), whatever a variant's own constructor draws.
    """

    def __init__(
        self, pattern, vocabulary: int, width: int, heads: int, context: int, convolution: bool, mlp: bool,
        positions: bool,
    ):  # fmt: skip
        super().__init__()
        config = GPT2Config(
            n_embd=width, n_head=heads, n_positions=context, n_layer=len(pattern), vocab_size=vocabulary,
            attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width) if positions else None
        self.mixers = [attention.load(name)(config, layer, **options) for layer, (name, options) in enumerate(pattern)]
        parts = [BaseConv(width)] if convolution else []
        for mixer in self.mixers:
            parts += [Mixer(mixer), *([self._mlp(width)] if mlp else [])]
        self.parts = nn.ModuleList(parts)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(len(parts) + 1))
        self._initialise(width)

    @staticmethod
    def _mlp(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    @torch.no_grad()
    def _initialise(self, width: int):
        for module in self.modules():
            kept = getattr(module, "own_initialisation", False)
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 2 and not kept:
                    parameter.normal_(0.0, 1 / math.sqrt(width))
                elif name == "bias":
                    parameter.zero_()
        for embedding in (self.embedding, self.positions):
            if embedding is not None:
                embedding.weight.normal_(0.0, 0.02)

    def forward(self, ids, asked=None):
        """(B, T) token ids -> (B, T, vocabulary) logits; where `asked`, (B, T) bool, is true: (N, vocabulary)."""
        x = self.embedding(ids)  # (B, T, C)
        if self.positions is not None:
            x = x + self.positions.weight[: ids.shape[1]]
        for norm, part in zip(self.norms, self.parts, strict=False):
            x = x + part(norm(x))
        if asked is not None:  # most positions of a task ask for nothing, and the head is a quarter of recall's step
            x = x[asked]
        return self.norms[-1](x) @ self.embedding.weight.T

    def state_bytes(self, context: int, element_bytes: int = 4) -> int:
        """What all mixers remember of one sequence of `context` tokens, by their own count."""
        return sum(mixer.cache_bytes(context, element_bytes) for mixer in self.mixers)
