"""Published as "Baseline". Its name promises GPT-2's own attention, and that is what it computes.

The audit found transformers' GPT-2 attention behind it, by its FLOPs with the fused kernel: what we call `sdpa`. Only
its weights start otherwise. The module was put in after GPT-2's own initialisation, so the output projection is not
scaled down by 1/√(2 L).
"""

from lib.attention import sdpa


class Attention(sdpa.Attention):
    paper = "Attentions Under the Microscope, Baseline (arXiv 2507.07247), from an audit of its code"
    own_initialisation = True  # Conv1D's N(0, 0.02)
    counted = False
