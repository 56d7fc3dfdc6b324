"""The loss a block of rows at a time, C++ (cpu.cpp) turning logits into losses and gradients in place."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from hymba.ops import native
from hymba.ops.cross_entropy import cpu, reference
from hymba.ops.precision import result_dtype

_pack = struct.Struct("8q").pack  # `struct Loss` of cpu.cpp


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """C++ path for :func:`hymba.ops.cross_entropy.linear_cross_entropy`, same signature.

    Takes what :func:`hymba.ops.native.why_unfit` has nothing against, and leaves the rest to the definition.
    """
    unfit = native.why_unfit(x) or native.why_unfit(weight) or result_dtype(x, weight) not in native.DTYPES
    if unfit or not x.numel():
        return reference.linear_cross_entropy(x, weight, targets)
    return cpu.by_blocks(x, weight, targets, _turn)


def _turn(logits: Tensor, targets: Tensor, losses: Tensor, wanted: bool) -> None:
    numbers = native.DTYPES.index(logits.dtype), *logits.shape, torch.get_num_threads(), wanted
    pointers = (v.data_ptr() for v in (logits, targets, losses))
    native.library().hymba_cross_entropy(_pack(*numbers, *pointers))  # type: ignore[union-attr]
