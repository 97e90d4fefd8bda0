"""How the published FLOPs were counted, and what that convention gives for any attention.

An fvcore trace of one forward over a batch of 16 rows of 512 tokens through GPT-2 124M, all scores included:

- a matrix product counts once per multiply-add (we and torch count two: a multiply and an add);
- a layer norm counts five per number that it normalises; softmax, GELU, sums and look-ups count nothing;
- a fused attention kernel counts nothing.

The 25 norms are 25 x 5 x 16 x 512 x 768 = 0.0008 x 10¹². The matrices are, per token, 8 C² a block for the MLP, 4 C²
for attention (3 C² without the output projection) and 768 x 50,257 for the head: 1.0120 x 10¹², or 0.9540 without.
Attention core of all T x T pairs are 2 T² C a block and row, 0.0773 x 10¹²; a C x C state instead, made and read,
2 T C² and T C for the divisor, 0.1160; twelve heads instead of T tokens 2 x 12 T C, 0.0018, or 0 in a fused kernel.
`derived` adds these up from what each file says of itself, `observed` runs the modules and counts.
"""

from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.measure import flops
from lib.model import gpt2_config, meta_model

BATCH, CONTEXT = 16, 512
LAYERS, WIDTH, HEADS, POSITIONS, VOCABULARY = GPT2 = (12, 768, 12, 1024, 50257)
PER_NORMALISED_NUMBER = 5
UNSEEN = {flops.CPU_FLASH: lambda *_, **__: 0}


def derived(attention: str, counted: bool | None = None, **options) -> float:
    """Published FLOPs of a definition in `lib.published`, by arithmetic from its `projection_flops` and `core_flops`.

    `counted`: whether the counter saw attention core; None: as the definition says of its kernel.
    """
    model = meta_model(attention, gpt2_config(*GPT2), **options)
    layers = [block.attn for block in model.transformer.h]
    total = flops.analytic(model, CONTEXT)["forward_flops_full"]
    if not (layers[0].counted if counted is None else counted):
        total -= sum(layer.core_flops(CONTEXT, dense=True) for layer in layers)
    return BATCH * (total / 2 + _norms())


@cache
def observed(attention: str, **options) -> float:
    """The same for any variant, from the products that one block really computes; fused kernels are not seen."""
    vocabulary = 2
    model = meta_model(attention, gpt2_config(1, WIDTH, HEADS, POSITIONS, vocabulary), **options).eval()
    model = model.to_empty(device="cpu")  # with any weights: products are counted, not looked at
    ids = torch.zeros(1, CONTEXT, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=UNSEEN) as counter:
        model(ids, use_cache=False)
    block = counter.get_total_flops() / 2 - CONTEXT * WIDTH * vocabulary
    return BATCH * (LAYERS * block + CONTEXT * WIDTH * VOCABULARY + _norms())


def _norms() -> int:
    return (2 * LAYERS + 1) * CONTEXT * WIDTH * PER_NORMALISED_NUMBER
