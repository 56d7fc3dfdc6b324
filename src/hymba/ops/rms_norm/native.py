"""The norms in C++ (cpu.cpp): one pass, float32 inside, rounded where the definition rounds."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba.ops import native
from hymba.ops.rms_norm import reference

# What cpu.cpp is compiled for: by its number, the dtype of the result; by the dtypes of input, weight and autocast, the
# number. Under autocast the result is rounded to autocast's dtype.
_F32, _BF16, _F64 = native.DTYPES
_RESULTS = (_F32, _BF16, _F32, _BF16, _BF16, _F64)
_NUMBERS = {
    (_F32, _F32, None): 0,
    (_BF16, _BF16, None): 1,
    (_BF16, _BF16, _BF16): 1,
    (_BF16, _F32, None): 2,
    (_BF16, _F32, _BF16): 3,
    (_F32, _F32, _BF16): 4,
    (_F64, _F64, None): 5,
    (_F64, _F64, _BF16): 5,
}

_pack = struct.Struct("4qd13q").pack  # `struct Norms` of cpu.cpp


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """C++ path for :func:`hymba.ops.rms_norm.rms_norm`, same signature.

    Takes the dtypes that the model has, and leaves the rest to the definition.
    """
    types = _types(x, weight)
    if types is None:
        return reference.rms_norm(x, weight, eps)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Norms.apply(types, eps, x, None, weight, None)
    return _forward(types, eps, x, None, weight, None)


def mean_of_norms(x: Tensor, y: Tensor, x_weight: Tensor, y_weight: Tensor, eps: float) -> Tensor:
    """C++ path for :func:`hymba.ops.rms_norm.mean_of_norms`, same signature."""
    types = _types(x, x_weight)
    if types is None or types != _types(y, y_weight) or x.shape != y.shape:
        return reference.mean_of_norms(x, y, x_weight, y_weight, eps)
    if torch.is_grad_enabled() and any(v.requires_grad for v in (x, y, x_weight, y_weight)):
        return _Norms.apply(types, eps, x, y, x_weight, y_weight)
    return _forward(types, eps, x, y, x_weight, y_weight)


def _types(x: Tensor, weight: Tensor) -> int | None:
    """Return the number by which the kernel knows the dtypes, or None where it does not fit."""
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    number = _NUMBERS.get((x.dtype, weight.dtype, autocast))
    fits = weight.shape == x.shape[-1:] and weight.is_contiguous() and weight.is_cpu and x.numel() > 0
    return number if fits and not native.why_unfit(x) else None


class _Norms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, types: int, eps: float, *inputs: Any) -> Tensor:
        ctx.library, ctx.types, ctx.eps = native.library(), types, eps
        ctx.save_for_backward(*inputs)
        return _forward(types, eps, *inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, x_weight, y_weight = inputs = ctx.saved_tensors  # to be read once, for gradient checkpointing
        grads = [None if v is None else torch.empty_like(v, memory_format=torch.contiguous_format) for v in inputs]
        to_x, to_y, to_x_weight, to_y_weight = (0 if v is None else v.data_ptr() for v in grads)
        rows, stride = native.as_rows(grad)
        count, width, threads = x.numel() // x.shape[-1], x.shape[-1], torch.get_num_threads()
        sizes = ctx.types, count, width, threads, ctx.eps, 0, rows.data_ptr(), stride
        x, stride = native.as_rows(x)
        first = x.data_ptr(), x_weight.data_ptr(), stride, to_x, to_x_weight
        second = (0, 0, 0, 0, 0)
        if y is not None:
            y, stride = native.as_rows(y)
            second = y.data_ptr(), y_weight.data_ptr(), stride, to_y, to_y_weight
        ctx.library.hymba_rms_norm_backward(_pack(*sizes, *first, *second))
        return None, None, *grads


def _forward(types: int, eps: float, x: Tensor, y: Tensor | None, weight: Tensor, y_weight: Tensor | None) -> Tensor:
    out = torch.empty_like(x, dtype=_RESULTS[types], memory_format=torch.contiguous_format)
    kernel = native.library().hymba_rms_norm_forward  # type: ignore[union-attr]
    width, threads = x.shape[-1], torch.get_num_threads()
    x, stride = native.as_rows(x)
    first = x.data_ptr(), weight.data_ptr(), stride, 0, 0
    second = (0, 0, 0, 0, 0)
    if y is not None:
        y, stride = native.as_rows(y)
        second = y.data_ptr(), y_weight.data_ptr(), stride, 0, 0  # type: ignore[union-attr]
    kernel(_pack(types, x.numel() // width, width, threads, eps, out.data_ptr(), 0, 0, *first, *second))
    return out
