"""The float32 islands of the model: norms, softmax, scan and their states run in at least float32."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a float32 island fed with `x`: at least float32, float64 where `x` is float64."""
    return torch.promote_types(x.dtype, torch.float32)
