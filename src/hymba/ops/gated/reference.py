"""The definition of the gate."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Definition of :func:`hymba.ops.gated.gated_silu`, same signature."""
    return F.silu(gate) * up
