"""Root-mean-square normalisation (arXiv 1910.07467): alone, as the mean of two, and of the parts of one tensor."""

from __future__ import annotations

from torch import Tensor

from hymba.ops import gpu
from hymba.ops.backend import choose
from hymba.ops.rms_norm import native, reference

_TRITON = "hymba.ops.rms_norm.triton"
IMPLEMENTATIONS = {
    "reference": reference.rms_norm,
    "cpu": reference.rms_norm,
    "native": native.rms_norm,
    "triton": gpu.deferred(_TRITON, "rms_norm"),
}
MEANS = {
    "reference": reference.mean_of_norms,
    "cpu": reference.mean_of_norms,
    "native": native.mean_of_norms,
    "triton": gpu.deferred(_TRITON, "mean_of_norms"),
}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale `x` to a root mean square of one over its last axis, then by `weight`.

    The released model normalises in float32, casts back to the dtype of `x`, and only then multiplies by the weight;
    the order matters in bfloat16.

    Args:
        x: (..., width), any floating dtype.
        weight: (width,).
        eps: added to the mean square.

    Returns:
        (..., width), in the promoted dtype of `x` and `weight`; under autocast in autocast's, rounded at the end.
    """
    return choose(IMPLEMENTATIONS, x)(x, weight, eps)


def mean_of_norms(x: Tensor, y: Tensor, x_weight: Tensor, y_weight: Tensor, eps: float) -> Tensor:
    """Return the mean of two norms, (rms_norm(x) + rms_norm(y)) / 2, as Hymba fuses the two branches of a mixer.

    Args:
        x, y: (..., width), of one dtype.
        x_weight, y_weight: (width,), of one dtype.
        eps: added to either mean square.

    Returns:
        (..., width), in the dtype that :func:`rms_norm` gives.
    """
    return choose(MEANS, x)(x, y, x_weight, y_weight, eps)


def norm_parts(x: Tensor, weights: tuple[Tensor, ...], eps: float) -> tuple[Tensor, ...]:
    """Norm adjacent parts of the last axis, each by itself, as Hymba does Mamba's δ, B and C.

    Args:
        x: (..., sum of widths).
        weights: (width,) each, of one dtype: a part is as wide as its weight.
        eps: added to each mean square.

    Returns:
        For each part (..., width), what :func:`rms_norm` makes of it.
    """
    return choose(PARTS, x)(x, weights, eps)


def _norm_each(x: Tensor, weights: tuple[Tensor, ...], eps: float) -> tuple[Tensor, ...]:
    """Norm each part by the implementation in force."""
    norm = choose(IMPLEMENTATIONS, x)
    parts = x.split([len(weight) for weight in weights], dim=-1)
    return tuple(norm(part, weight, eps) for part, weight in zip(parts, weights, strict=True))


PARTS = {
    "reference": reference.norm_parts,
    "cpu": _norm_each,
    "triton": gpu.deferred(_TRITON, "norm_parts"),
}

__all__ = ["IMPLEMENTATIONS", "MEANS", "PARTS", "mean_of_norms", "norm_parts", "rms_norm"]
