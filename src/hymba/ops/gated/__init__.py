"""The gate of a gated MLP (SwiGLU, arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor

from hymba.ops import gpu
from hymba.ops.backend import choose
from hymba.ops.gated import native, reference

IMPLEMENTATIONS = {
    "reference": reference.gated_silu,
    "cpu": reference.gated_silu,
    "native": native.gated_silu,
    "triton": gpu.deferred("hymba.ops.gated.triton", "gated_silu"),
}


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Return SiLU(gate) · up.

    Args:
        gate, up: (..., width), of one dtype; parts of one wider tensor are not copied.

    Returns:
        (..., width) in that dtype; SiLU is computed in at least float32 and rounded to it before the product.
    """
    return choose(IMPLEMENTATIONS, gate)(gate, up)


__all__ = ["IMPLEMENTATIONS", "gated_silu"]
