"""Root-mean-square normalisation (arXiv 1910.07467), alone and as the mean of two."""

from __future__ import annotations

from torch import Tensor

from hymba.ops.backend import choose
from hymba.ops.rms_norm import native, reference

IMPLEMENTATIONS = {"reference": reference.rms_norm, "cpu": reference.rms_norm, "native": native.rms_norm}
MEANS = {"reference": reference.mean_of_norms, "cpu": reference.mean_of_norms, "native": native.mean_of_norms}


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


__all__ = ["IMPLEMENTATIONS", "MEANS", "mean_of_norms", "rms_norm"]
