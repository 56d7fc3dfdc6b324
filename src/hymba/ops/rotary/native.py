"""The rotation in C++ (cpu.cpp): one pass, and its gradient is the rotation back."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from hymba.ops import native
from hymba.ops.rotary import reference
from hymba.ops.rotary.rotation import Rotation

# The dtypes of input and tables that cpu.cpp is compiled for, by their numbers there.
_F32, _BF16, _F64 = native.DTYPES
_NUMBERS = {(_F32, _F32): 0, (_BF16, _BF16): 1, (_BF16, _F32): 2, (_F64, _F64): 3}

_pack = struct.Struct("15q").pack  # `struct Rotary` of cpu.cpp


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """C++ path for :func:`hymba.ops.rotary.apply_rotary`, same signature.

    Takes what :func:`hymba.ops.native.why_unfit` has nothing against; leaves the rest to the definition, as it does
    tables that want gradients.
    """
    if _unfit(x, cos, sin):
        return reference.apply_rotary(x, cos, sin)
    if x.requires_grad and torch.is_grad_enabled():
        return Rotation.apply(x, cos, sin, _rotate)
    return _rotate(x, cos, sin, 1)


def _unfit(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    rows, steps, _, width = x.shape
    return (
        (x.dtype, cos.dtype) not in _NUMBERS
        or cos.dtype != sin.dtype
        or cos.shape != sin.shape
        or cos.shape not in ((1, steps, width / 2), (rows, steps, width / 2))
        or not x.numel()
        or cos.requires_grad
        or sin.requires_grad
        or bool(native.why_unfit(x))
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Rotate by the tables' angles, or by their negatives where `direction` is −1."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, cos, sin = x if x.stride(3) == 1 else x.contiguous(), cos.contiguous(), sin.contiguous()
    numbers = _NUMBERS[x.dtype, cos.dtype], direction, torch.get_num_threads()
    pointers = x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr()
    kernel = native.library().hymba_rotary  # type: ignore[union-attr]
    kernel(_pack(*numbers, *x.shape, *x.stride()[:3], cos.shape[0], *pointers))
    return out
