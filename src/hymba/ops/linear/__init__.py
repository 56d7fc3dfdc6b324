"""Linear maps, y = x Wᵀ + b, with the weight in full precision, in 8 bits or in 4."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hymba.errors import HymbaError
from hymba.ops import gpu
from hymba.ops.backend import choose
from hymba.ops.linear import cpu, native, reference
from hymba.ops.linear.weight import GROUP, QuantizedWeight, dequantize, round_to_int4, round_to_int8

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.linear,
    "cpu": cpu.linear,
    "native": native.linear,
    "triton": gpu.deferred("hymba.ops.linear.triton", "linear"),
}


def linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Multiply by a matrix and add a bias.

    Differentiable in `x`, and in a weight that is a tensor.

    Args:
        x: (…, in).
        weight: (out, in), a tensor in the dtype of `x`, or quantised.
        bias: (out,).

    Returns:
        (…, out) in the dtype of `x`. Sums are taken in at least float32.

    Raises:
        HymbaError: `weight` takes another number of inputs than `x` has.
    """
    inputs = weight.in_features if isinstance(weight, QuantizedWeight) else weight.shape[1]
    if x.shape[-1] != inputs:
        raise HymbaError(f"linear: the weight takes {inputs} inputs, x has {x.shape[-1]}")
    return choose(IMPLEMENTATIONS, x)(x, weight, bias)


__all__ = ["GROUP", "IMPLEMENTATIONS", "QuantizedWeight", "dequantize", "linear", "round_to_int4", "round_to_int8"]
