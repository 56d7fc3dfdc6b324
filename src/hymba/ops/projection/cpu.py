"""Joined projections part by part, each by the implementation that suits it."""

from __future__ import annotations

from torch import Tensor

from hymba.ops.gated import gated_silu
from hymba.ops.linear import QuantizedWeight, linear
from hymba.ops.rms_norm import mean_of_norms, rms_norm


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor | QuantizedWeight) -> Tensor:
    """Torch path for :func:`hymba.ops.projection.norm_linear`, same signature."""
    return linear(rms_norm(x, norm_weight, eps), weight)


def norm_gated_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate_weight: Tensor | QuantizedWeight,
    up_weight: Tensor | QuantizedWeight,
) -> Tensor:
    """Torch path for :func:`hymba.ops.projection.norm_gated_linear`, same signature."""
    normed = rms_norm(x, norm_weight, eps)
    return gated_silu(linear(normed, gate_weight), linear(normed, up_weight))


def linear_residual(x: Tensor, weight: Tensor | QuantizedWeight, residual: Tensor) -> Tensor:
    """Torch path for :func:`hymba.ops.projection.linear_residual`, same signature."""
    return residual + linear(x, weight)


def mean_of_norms_linear(
    x: Tensor,
    y: Tensor,
    x_weight: Tensor,
    y_weight: Tensor,
    eps: float,
    weight: Tensor | QuantizedWeight,
    residual: Tensor,
) -> Tensor:
    """Torch path for :func:`hymba.ops.projection.mean_of_norms_linear`, same signature."""
    return residual + linear(mean_of_norms(x, y, x_weight, y_weight, eps), weight)
