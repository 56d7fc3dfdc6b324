"""The float32 islands of the model: norms, softmax, scan and their states run in at least float32."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a float32 island fed with `x`: at least float32, float64 where `x` is float64."""
    return torch.promote_types(x.dtype, torch.float32)


def result_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of `x` scaled by `weight`: the promoted one, or autocast's where that reigns.

    Linear maps read the result, and under autocast they would round it to that very dtype.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return torch.promote_types(x.dtype, weight.dtype)
