"""Projections together with what stands before and behind them in a layer: one launch a row on a GPU.

A decode step on a GPU is short enough that each launch counts, so a norm, a gate or an addition is done by the kernel
of the product next to it. Each op is defined as a composition of others and rounds where they round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hymba.ops import gpu
from hymba.ops.backend import choose
from hymba.ops.linear import QuantizedWeight
from hymba.ops.projection import cpu, reference


def _implementations(name: str) -> dict[str, Callable[..., Any]]:
    return {
        "reference": getattr(reference, name),
        "cpu": getattr(cpu, name),
        "triton": gpu.deferred("hymba.ops.projection.triton", name),
    }


IMPLEMENTATIONS = _implementations("norm_linear")
GATED = _implementations("norm_gated_linear")
RESIDUAL = _implementations("linear_residual")
MEANS = _implementations("mean_of_norms_linear")


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor | QuantizedWeight) -> Tensor:
    """Return linear(rms_norm(x), weight): the norm and the input projection of a mixer.

    Args:
        x: (…, in).
        norm_weight: (in,).
        eps: added to the mean square.
        weight: (out, in), in the dtype of `x`, or quantised.

    Returns:
        (…, out) in the dtype of the norm.
    """
    return choose(IMPLEMENTATIONS, x)(x, norm_weight, eps, weight)


def norm_gated_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate_weight: Tensor | QuantizedWeight,
    up_weight: Tensor | QuantizedWeight,
) -> Tensor:
    """Return gated_silu(linear(n, gate_weight), linear(n, up_weight)), n = rms_norm(x): an MLP up to its last product.

    Args:
        x: (…, in).
        norm_weight: (in,).
        eps: added to the mean square.
        gate_weight, up_weight: (out, in), in the dtype of `x`, or quantised.

    Returns:
        (…, out) in the dtype of the norm.
    """
    return choose(GATED, x)(x, norm_weight, eps, gate_weight, up_weight)


def linear_residual(x: Tensor, weight: Tensor | QuantizedWeight, residual: Tensor) -> Tensor:
    """Return residual + linear(x, weight): a projection back to the stream.

    Args:
        x: (…, in).
        weight: (out, in), in the dtype of `x`, or quantised.
        residual: (…, out).

    Returns:
        (…, out). The product is rounded to its dtype before the sum.
    """
    return choose(RESIDUAL, x)(x, weight, residual)


def mean_of_norms_linear(
    x: Tensor,
    y: Tensor,
    x_weight: Tensor,
    y_weight: Tensor,
    eps: float,
    weight: Tensor | QuantizedWeight,
    residual: Tensor,
) -> Tensor:
    """Return residual + linear(mean_of_norms(x, y), weight): both branches of a mixer, back on the stream.

    Args:
        x, y: (…, in), of one dtype.
        x_weight, y_weight: (in,), of the norms.
        eps: added to either mean square.
        weight: (out, in), in the dtype of `x`, or quantised.
        residual: (…, out).

    Returns:
        (…, out). The product is rounded to its dtype before the sum.
    """
    return choose(MEANS, x)(x, y, x_weight, y_weight, eps, weight, residual)


__all__ = [
    "GATED",
    "IMPLEMENTATIONS",
    "MEANS",
    "RESIDUAL",
    "linear_residual",
    "mean_of_norms_linear",
    "norm_gated_linear",
    "norm_linear",
]
