"""The definitions of the joined projections: the references of their parts, one after another."""

from __future__ import annotations

from torch import Tensor

from hymba.ops.gated import reference as gated
from hymba.ops.linear import QuantizedWeight
from hymba.ops.linear import reference as linear
from hymba.ops.rms_norm import reference as norms


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor | QuantizedWeight) -> Tensor:
    """Definition of :func:`hymba.ops.projection.norm_linear`, same signature."""
    return linear.linear(norms.rms_norm(x, norm_weight, eps), weight)


def norm_gated_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate_weight: Tensor | QuantizedWeight,
    up_weight: Tensor | QuantizedWeight,
) -> Tensor:
    """Definition of :func:`hymba.ops.projection.norm_gated_linear`, same signature."""
    normed = norms.rms_norm(x, norm_weight, eps)
    return gated.gated_silu(linear.linear(normed, gate_weight), linear.linear(normed, up_weight))


def linear_residual(x: Tensor, weight: Tensor | QuantizedWeight, residual: Tensor) -> Tensor:
    """Definition of :func:`hymba.ops.projection.linear_residual`, same signature."""
    return residual + linear.linear(x, weight)


def mean_of_norms_linear(
    x: Tensor,
    y: Tensor,
    x_weight: Tensor,
    y_weight: Tensor,
    eps: float,
    weight: Tensor | QuantizedWeight,
    residual: Tensor,
) -> Tensor:
    """Definition of :func:`hymba.ops.projection.mean_of_norms_linear`, same signature."""
    return residual + linear.linear(norms.mean_of_norms(x, y, x_weight, y_weight, eps), weight)
