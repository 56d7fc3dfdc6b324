"""Joined projections of few rows in one launch (:func:`hymba.ops.linear.triton.product`); the rest part by part."""

from __future__ import annotations

from torch import Tensor

from hymba.ops.linear import QuantizedWeight
from hymba.ops.linear.triton import product, why_unfit
from hymba.ops.projection import cpu
from hymba.ops.rms_norm import mean_of_norms


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor | QuantizedWeight) -> Tensor:
    """Triton path for :func:`hymba.ops.projection.norm_linear`, same signature."""
    if why_unfit(x, weight, norm_weight):
        return cpu.norm_linear(x, norm_weight, eps, weight)
    return product(x, weight, norms=(norm_weight,), eps=eps)


def norm_gated_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate_weight: Tensor | QuantizedWeight,
    up_weight: Tensor | QuantizedWeight,
) -> Tensor:
    """Triton path for :func:`hymba.ops.projection.norm_gated_linear`, same signature."""
    if why_unfit(x, gate_weight, norm_weight) or why_unfit(x, up_weight) or not _alike(gate_weight, up_weight):
        return cpu.norm_gated_linear(x, norm_weight, eps, gate_weight, up_weight)
    return product(x, gate_weight, norms=(norm_weight,), eps=eps, up=up_weight)


def linear_residual(x: Tensor, weight: Tensor | QuantizedWeight, residual: Tensor) -> Tensor:
    """Triton path for :func:`hymba.ops.projection.linear_residual`, same signature."""
    if why_unfit(x, weight, residual):
        return cpu.linear_residual(x, weight, residual)
    return product(x, weight, residual=residual)


def mean_of_norms_linear(
    x: Tensor,
    y: Tensor,
    x_weight: Tensor,
    y_weight: Tensor,
    eps: float,
    weight: Tensor | QuantizedWeight,
    residual: Tensor,
) -> Tensor:
    """Triton path for :func:`hymba.ops.projection.mean_of_norms_linear`, same signature.

    The norms of several rows have a launch of their own: every program would have to compute all of them.
    """
    if x.numel() > x.shape[-1]:
        return linear_residual(mean_of_norms(x, y, x_weight, y_weight, eps), weight, residual)
    if x.shape != y.shape or why_unfit(x, weight, y, x_weight, y_weight, residual):
        return cpu.mean_of_norms_linear(x, y, x_weight, y_weight, eps, weight, residual)
    return product(x, weight, y=y, norms=(x_weight, y_weight), eps=eps, residual=residual)


def _alike(gate: Tensor | QuantizedWeight, up: Tensor | QuantizedWeight) -> bool:
    """Return whether two weights are of one kind and size, so that one kernel takes both."""
    if isinstance(gate, Tensor) or isinstance(up, Tensor):
        return isinstance(gate, Tensor) and isinstance(up, Tensor) and gate.shape == up.shape
    return (gate.bits, gate.values.shape) == (up.bits, up.values.shape)
