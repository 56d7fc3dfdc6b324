"""Linear maps by torch's own products, quantised weights a block of outputs at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.ops.linear.weight import QuantizedWeight, dequantize

BLOCK = 1 << 22  # entries of a weight dequantised together: few enough to stay in cache, enough for a fast product


def linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Torch path for :func:`hymba.ops.linear.linear`, same signature."""
    if isinstance(weight, QuantizedWeight):
        return by_blocks(x, weight, bias, dequantize)
    return F.linear(x, weight, bias)


def by_blocks(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    widen: Callable[[QuantizedWeight, torch.dtype], Tensor],
) -> Tensor:
    """Return the product with a quantised weight, one block of outputs after another widened by `widen`."""
    size, out = block_size(weight), x.new_empty(*x.shape[:-1], weight.out_features)
    for start in range(0, weight.out_features, size):
        block = widen(weight.outputs(start, start + size), x.dtype)
        out[..., start : start + size] = F.linear(x, block)
    return out if bias is None else out + bias.to(out.dtype)


def block_size(weight: QuantizedWeight) -> int:
    """Return how many outputs of a weight are widened together."""
    return max(1, BLOCK // max(1, weight.in_features))
