"""Root-mean-square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor

from hymba.ops.precision import accumulate_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale `x` to a root mean square of one over its last axis, then by `weight`.

    The released model normalises in float32, casts back to the dtype of `x`, and only then multiplies by the weight;
    the order matters in bfloat16.

    Args:
        x: (..., width), any floating dtype.
        weight: (width,).
        eps: added to the mean square.

    Returns:
        (..., width), in the promoted dtype of `x` and `weight`.
    """
    wide = x.to(accumulate_dtype(x))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight
