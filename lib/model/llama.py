"""What makes GPT-2's blocks Llama's: RMSNorm, SwiGLU, rotary positions, no biases (arXiv 2302.13971, section 2.2).

The blocks compute the same either way, x + attention(norm(x)) and x + MLP(norm(x)), so their parts are exchanged.
"""

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

THETA = 10_000.0  # of the rotary positions
STEP, FROM_WIDTH = 8, 128  # an MLP's width is a multiple for the kernels, in models where that is under 1 %


def exchange(transformer, config) -> None:
    """Puts Llama's parts in the place of GPT-2's, all but the attention."""
    width = config.n_embd
    transformer.ln_f = nn.RMSNorm(width, eps=config.layer_norm_epsilon)
    # Of this the MLP alone is made; the default heads would have to divide the width.
    llama = LlamaConfig(
        hidden_size=width, intermediate_size=config.n_inner or swiglu_width(width), num_attention_heads=config.n_head
    )
    for block in transformer.h:
        block.ln_1, block.ln_2 = (nn.RMSNorm(width, eps=config.layer_norm_epsilon) for _ in range(2))
        block.mlp = LlamaMLP(llama)


def without_biases(attention) -> None:
    """Takes an attention's biases away, as Llama has none."""
    for module in attention.modules():
        if isinstance(getattr(module, "bias", None), nn.Parameter):  # added by its own forward: now it is always 0
            bias = torch.zeros_like(module.bias, requires_grad=False)
            del module.bias
            module.register_buffer("bias", bias, persistent=False)


def swiglu_width(width: int) -> int:
    """Hidden units F of a SwiGLU for which a layer has as many weights as GPT-2's, within 1 %.

    3 C F weights instead of 8 C² of two matrices and 11 C of biases and norms: 8 C / 3 and some, to a `multiple`.
    """
    return multiple(width, (8 * width + 11) / 3)


def multiple(width: int, units: float) -> int:
    """The nearest number of hidden units that an MLP may have in a model of a width."""
    step = STEP if width >= FROM_WIDTH else 1
    return step * round(units / step)


def rotary(position_ids, head_width: int, like):
    """(cos, sin), (B or 1, T, D) each, of `position_ids` (B or 1, T), in float32 as transformers' Llama has them.

    `like` is a tensor of the device and precision that is wanted, float32 at least.
    """
    with torch.autocast(position_ids.device.type, enabled=False):
        exponents = torch.arange(0, head_width, 2, device=position_ids.device).float() / head_width
        angles = position_ids[..., None].float() * (1.0 / THETA**exponents)  # (B or 1, T, D/2)
        angles = torch.cat([angles, angles], dim=-1)
        dtype = torch.promote_types(like.dtype, torch.float32)
        return angles.cos().to(dtype), angles.sin().to(dtype)
