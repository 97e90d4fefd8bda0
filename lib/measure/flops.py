"""FLOPs: by arithmetic, as torch counts them, and as a share of what the device could do."""

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.measure import energy


def analytic(model, context: int) -> dict:
    """FLOPs of one forward over one sequence of `context` tokens, analytically, and the core's share.

    `causal` honours causality, windows and buckets, `full` counts every score. A matrix product counts two per weight
    and token (Kaplan et al. 2020, section 2.1); norms, activations and the embedding look-up are left out, as usual.
    """
    blocks = model.transformer.h
    projections = 2 * context * (_matrix_weights(blocks) + model.lm_head.weight.numel())
    for attn in (b.attn for b in blocks if hasattr(b.attn, "projection_flops")):
        projections += attn.projection_flops(context) - 2 * context * _matrix_weights(attn)
    core, core_dense = (sum(b.attn.core_flops(context, dense=dense) for b in blocks) for dense in (False, True))
    return {
        "forward_flops_causal": projections + core,
        "forward_flops_full": projections + core_dense,
        "attention_core_share": core / (projections + core),
    }


def non_padding(model, lengths) -> int:
    """Causal FLOPs of one forward over rows that hold so many tokens each, their padding left out."""
    return sum(
        int(rows) * analytic(model, int(tokens))["forward_flops_causal"]
        for tokens, rows in zip(*np.unique(lengths, return_counts=True), strict=True)
        if tokens
    )


def _matrix_weights(module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() >= 2)


def counted(model, context: int, autocast) -> int:
    """FLOPs of the same forward as torch's `FlopCounterMode` counts them: fused kernels dense."""
    ids = torch.zeros(1, context, dtype=torch.long, device=model.device)
    counter = FlopCounterMode(display=False, custom_mapping={CPU_FLASH: _fused_attention_flops})
    with torch.no_grad(), autocast(), counter:
        model(ids, use_cache=False)
    return counter.get_total_flops()


CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _fused_attention_flops(query_shape, key_shape, value_shape, *_, **__) -> int:
    """torch counts its CPU flash kernel as nothing; this is the formula that it has for the CUDA ones."""
    batch, heads, queries, width = query_shape
    return 2 * batch * heads * queries * key_shape[2] * (width + value_shape[3])


# Dense peaks in FLOP/s (no sparsity) by the name that CUDA gives a GPU: bf16 on tensor cores, fp32 on the others, as
# PyTorch multiplies float32 unless TF32 is asked for. From NVIDIA's data sheets of H100 and H200 (SXM), A100 and L40S,
# and the Ada whitepaper's table of the RTX 4090 (bf16 with fp32 accumulation).
PEAK_FLOPS_PER_S = {
    "NVIDIA H200": {"bf16": 989.4e12, "fp32": 66.9e12},
    "NVIDIA H100 80GB HBM3": {"bf16": 989.4e12, "fp32": 66.9e12},
    "NVIDIA A100-SXM4-40GB": {"bf16": 312e12, "fp32": 19.5e12},
    "NVIDIA A100-SXM4-80GB": {"bf16": 312e12, "fp32": 19.5e12},
    "NVIDIA A100-PCIE-40GB": {"bf16": 312e12, "fp32": 19.5e12},
    "NVIDIA A100 80GB PCIe": {"bf16": 312e12, "fp32": 19.5e12},
    "NVIDIA L40S": {"bf16": 362.05e12, "fp32": 91.6e12},
    "NVIDIA GeForce RTX 4090": {"bf16": 165.2e12, "fp32": 82.6e12},
}


def mfu(model_flops_per_s: float, device_name: str, precision: str) -> energy.Reading:
    """Model FLOPs utilization (Chowdhery et al. 2022, appendix B): model FLOP/s over the device's dense peak.

    Model FLOPs are those of `non_padding`, three forwards to a step: what the device computes of padding, or of scores
    that causality hides, trains nothing. `precision` is bf16 or fp32. Where the peak is not in the table, a CPU's too:
    None and `peak_unknown`.
    """
    if device_name not in PEAK_FLOPS_PER_S:
        return energy.Reading(None, "peak_unknown")
    return energy.Reading(model_flops_per_s / PEAK_FLOPS_PER_S[device_name][precision])
