"""Linear maps by torch's own products, quantised weights a block of outputs at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.ops.linear.weight import QuantizedWeight, dequantize

BLOCK = 1 << 24  # entries of a weight dequantised together: enough for a fast product, and little memory


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
    size = block_size(weight)
    if size >= weight.out_features:
        return F.linear(x, widen(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    out = x.new_empty(*x.shape[:-1], weight.out_features)
    for start in range(0, weight.out_features, size):
        block = widen(weight.outputs(start, start + size), x.dtype)
        out[..., start : start + size] = F.linear(x, block)
    return out if bias is None else out + bias.to(out.dtype)


def block_size(weight: QuantizedWeight) -> int:
    """Return how many outputs of a weight are widened together."""
    return max(1, BLOCK // max(1, weight.in_features))
