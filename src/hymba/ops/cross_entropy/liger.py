"""The loss by Liger's fused kernel (arXiv 2410.10989), the optional package ``liger-kernel``."""

from __future__ import annotations

import torch
from torch import Tensor

from hymba.ops import gpu
from hymba.ops.cross_entropy import cpu


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger's path for :func:`hymba.ops.cross_entropy.linear_cross_entropy`, same signature.

    Takes one dtype, without autocast, and no gradient for the head alone; the rest goes to torch.
    """
    unfit = x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type) or gpu.why_unfit(x)
    if unfit or not x.numel() or (weight.requires_grad and not x.requires_grad):
        return cpu.linear_cross_entropy(x, weight, targets)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        x.reshape(-1, x.shape[-1]),
        weight,
        targets.reshape(-1).clamp(min=-1),
        ignore_index=-1,
        reduction="sum",
        accum_dtype=torch.float32,
    )
