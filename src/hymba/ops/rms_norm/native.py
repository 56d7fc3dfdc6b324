"""The norms in C++ (cpu.cpp): one pass, float32 inside, rounded where the definition rounds."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba.ops import native
from hymba.ops.precision import result_dtype
from hymba.ops.rms_norm import reference

# The dtypes of input, weight and result that cpu.cpp is compiled for, in its order.
_F32, _BF16, _F64 = native.DTYPES
_TYPES = (
    (_F32, _F32, _F32),
    (_BF16, _BF16, _BF16),
    (_BF16, _F32, _F32),
    (_BF16, _F32, _BF16),
    (_F32, _F32, _BF16),
    (_F64, _F64, _F64),
)
_NUMBERS = {types: number for number, types in enumerate(_TYPES)}


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
    number = _NUMBERS.get((x.dtype, weight.dtype, result_dtype(x, weight)))
    fits = weight.shape == x.shape[-1:] and x.numel() and weight.is_contiguous() and weight.is_cpu
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
        inputs, grad = ctx.saved_tensors, native.as_rows(grad)
        x, y = native.as_rows(inputs[0]), None if inputs[1] is None else native.as_rows(inputs[1])
        grads = [None if v is None else torch.empty_like(v, memory_format=torch.contiguous_format) for v in inputs]
        pointers = (_pointer(v) for v in (x, y, *inputs[2:], grad, *grads))
        strides = x.stride(0), 0 if y is None else y.stride(0), grad.stride(0)
        run = _functions(ctx.library)[1]
        run(ctx.types, *pointers, *x.shape, *strides, ctx.eps, torch.get_num_threads())
        return None, None, *grads


def _forward(types: int, eps: float, x: Tensor, y: Tensor | None, weight: Tensor, y_weight: Tensor | None) -> Tensor:
    out = x.new_empty(x.shape, dtype=_TYPES[types][2])
    x, y = native.as_rows(x), None if y is None else native.as_rows(y)
    pointers = (_pointer(v) for v in (x, y, weight, y_weight, out))
    strides = x.stride(0), 0 if y is None else y.stride(0)
    _functions(native.library())[0](types, *pointers, *x.shape, *strides, eps, torch.get_num_threads())
    return out


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


@functools.cache
def _functions(library: ctypes.CDLL) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return the forward and the backward pass, told what they take."""
    number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    forward, backward = library.hymba_rms_norm_forward, library.hymba_rms_norm_backward
    forward.argtypes = (number, *5 * (pointer,), *4 * (size,), ctypes.c_double, number)
    backward.argtypes = (number, *9 * (pointer,), *5 * (size,), ctypes.c_double, number)
    forward.restype = backward.restype = None
    return forward, backward
