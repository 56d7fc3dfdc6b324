"""Linear maps in C++ (cpu.cpp): few rows read each weight once; for many, torch multiplies what C++ dequantises."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hymba.ops import native
from hymba.ops.linear import cpu
from hymba.ops.linear.weight import QuantizedWeight

MOST_ROWS = 16  # beyond, the matrix units of torch's product win


def linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """C++ path for :func:`hymba.ops.linear.linear`, same signature.

    Takes bfloat16 and quantised weights beside bfloat16 or float32 inputs, where no gradient is wanted.
    """
    values, scales, bits = _parts(weight)
    if _unfit(x, values, bias):
        return cpu.linear(x, weight, bias)
    if x.numel() > MOST_ROWS * x.shape[-1]:
        if isinstance(weight, QuantizedWeight):
            buffer = x.new_empty(cpu.block_size(weight), weight.in_features)
            return cpu.by_blocks(x, weight, bias, lambda block, dtype: dequantize(block, dtype, buffer))
        return cpu.linear(x, weight, bias)
    x = x.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    out = x.new_empty((*x.shape[:-1], values.shape[0]))
    _functions(native.library())[0](
        bits,
        values.data_ptr(),
        None if scales is None else scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        out.data_ptr(),
        x.numel() // x.shape[-1],
        x.shape[-1],
        values.shape[0],
        torch.get_num_threads(),
    )
    return out


def dequantize(weight: QuantizedWeight, dtype: torch.dtype, buffer: Tensor | None = None) -> Tensor:
    """C++ path for :func:`hymba.ops.linear.dequantize`, for bfloat16 and float32; written into `buffer` if given."""
    if buffer is None:
        buffer = torch.empty(weight.out_features, weight.in_features, dtype=dtype)
    out = buffer[: weight.out_features]
    _functions(native.library())[1](
        weight.bits,
        weight.values.data_ptr(),
        weight.scales.data_ptr(),
        dtype == torch.bfloat16,
        out.data_ptr(),
        weight.in_features,
        weight.out_features,
        torch.get_num_threads(),
    )
    return out


def _parts(weight: Tensor | QuantizedWeight) -> tuple[Tensor, Tensor | None, int]:
    """Return the values, the scales and the bits of a weight."""
    if isinstance(weight, QuantizedWeight):
        return weight.values, weight.scales, weight.bits
    return weight, None, 16


@functools.cache
def _functions(library: ctypes.CDLL) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return hymba_linear and hymba_dequantize, told what they take: plain numbers then pass as they are."""
    number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    product, widen = library.hymba_linear, library.hymba_dequantize
    product.argtypes = (number, *4 * (pointer,), number, pointer, size, size, size, number)
    widen.argtypes = (number, pointer, pointer, number, pointer, size, size, number)
    product.restype = widen.restype = None
    return product, widen


def _unfit(x: Tensor, values: Tensor, bias: Tensor | None) -> bool:
    """Return whether the torch path must serve: gradients, autocast, or a dtype or layout that has no kernel."""
    wants_gradient = torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    )
    return (
        wants_gradient
        or values.dtype not in (torch.bfloat16, torch.int8, torch.uint8)
        or x.dtype not in ((torch.bfloat16,) if values.dtype == torch.bfloat16 else (torch.bfloat16, torch.float32))
        or not values.is_contiguous()
        or not values.is_cpu
        or x.numel() == 0
        or torch.is_autocast_enabled("cpu")
        or bool(native.why_unfit(x))
    )
