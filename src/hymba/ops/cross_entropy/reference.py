"""The definition of the loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hymba.ops.precision import accumulate_dtype


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Definition of :func:`hymba.ops.cross_entropy.linear_cross_entropy`, same signature."""
    logits = F.linear(x, weight).flatten(0, -2)
    wide = logits.to(accumulate_dtype(logits))
    return F.cross_entropy(wide, targets.flatten().clamp(min=-1), ignore_index=-1, reduction="sum")
