"""Rotary position embedding (arXiv 2104.09864) in the half-split layout."""

from __future__ import annotations

from torch import Tensor

from hymba.ops import gpu
from hymba.ops.backend import choose
from hymba.ops.rotary import native, reference
from hymba.ops.rotary.tables import ntk_base, rotary_tables

IMPLEMENTATIONS = {
    "reference": reference.apply_rotary,
    "cpu": reference.apply_rotary,
    "native": native.apply_rotary,
    "triton": gpu.deferred("hymba.ops.rotary.triton", "apply_rotary"),
}


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of every head of `x` by its position's angles ("rotate_half" layout).

    Args:
        x: (B, T, heads, K); a part of a wider projection is not copied.
        cos, sin: (B or 1, T, K/2), in the dtype of `x` or a wider one; rounded to that of `x` first.

    Returns:
        (B, T, heads, K), in the dtype of `x`.
    """
    return choose(IMPLEMENTATIONS, x)(x, cos, sin)


__all__ = ["IMPLEMENTATIONS", "apply_rotary", "ntk_base", "rotary_tables"]
