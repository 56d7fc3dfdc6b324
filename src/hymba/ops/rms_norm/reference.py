"""The definition of the norms."""

from __future__ import annotations

import torch
from torch import Tensor

from hymba.ops.precision import accumulate_dtype, result_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Definition of :func:`hymba.ops.rms_norm.rms_norm`, same signature."""
    return _weighed(x, weight, eps).to(result_dtype(x, weight))


def mean_of_norms(x: Tensor, y: Tensor, x_weight: Tensor, y_weight: Tensor, eps: float) -> Tensor:
    """Definition of :func:`hymba.ops.rms_norm.mean_of_norms`, same signature."""
    return ((_weighed(x, x_weight, eps) + _weighed(y, y_weight, eps)) / 2).to(result_dtype(x, x_weight))


def norm_parts(x: Tensor, weights: tuple[Tensor, ...], eps: float) -> tuple[Tensor, ...]:
    """Definition of :func:`hymba.ops.rms_norm.norm_parts`, same signature."""
    parts = x.split([len(weight) for weight in weights], dim=-1)
    return tuple(rms_norm(part, weight, eps) for part, weight in zip(parts, weights, strict=True))


def _weighed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(accumulate_dtype(x))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight
