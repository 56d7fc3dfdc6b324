"""The definition of a linear map: the whole matrix in the dtype of the input, and one product."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hymba.ops.linear.weight import QuantizedWeight, dequantize


def linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Reference for :func:`hymba.ops.linear.linear`, same signature."""
    return F.linear(x, dequantize(weight, x.dtype) if isinstance(weight, QuantizedWeight) else weight, bias)
