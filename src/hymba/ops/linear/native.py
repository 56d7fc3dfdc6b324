"""Linear maps in C++ (cpu.cpp): few rows read each weight once; for many, torch multiplies what C++ dequantizes.

A row's result does not depend on how many others are decoded with it: inputs of one token a row are always multiplied
in C++. Without matrix units it does not depend on them in prefill either (`hymba.ops.native.is_batch_invariant`).
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from hymba.ops import native
from hymba.ops.linear import cpu
from hymba.ops.linear.weight import QuantizedWeight

MOST_ROWS = 16  # beyond, torch's product is faster where a processor has matrix units
# Bits of an entry, by the dtype of a weight's values.
BITS = {torch.float32: 32, torch.bfloat16: 16, torch.int8: 8, torch.uint8: 4}


class _Kept(threading.local):
    """A thread's memory for widened weights, kept from one product to the next: fresh pages would cost as much as the
    widening."""

    memory: Tensor | None = None

    def take(self, outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
        """Return (outputs, inputs) of a dtype, uninitialised, until the next call."""
        if self.memory is None or self.memory.dtype != dtype or self.memory.numel() < outputs * inputs:
            self.memory = torch.empty(outputs * inputs, dtype=dtype)
        return self.memory[: outputs * inputs].view(outputs, inputs)


_kept = _Kept()


def linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """C++ path for :func:`hymba.ops.linear.linear`, same signature.

    Takes weights in the dtype of the input, float32 or bfloat16, or quantized, where no gradient is wanted, and up to
    ``MOST_ROWS`` rows or any number of rows (B, 1, in) of one token each.
    """
    values, scales = (weight, None) if isinstance(weight, Tensor) else (weight.values, weight.scales)
    bits, shape = BITS.get(values.dtype), x.shape
    if bits is None or _unfit(x, values, bias, bits):
        return cpu.linear(x, weight, bias)
    inputs = shape[-1]
    rows = x.numel() // inputs
    if rows > MOST_ROWS and not is_decode(x) and not native.is_batch_invariant(x.dtype, bits < 16):
        if isinstance(weight, QuantizedWeight):
            buffer = _kept.take(min(cpu.block_size(weight), weight.out_features), inputs, x.dtype)
            return cpu.by_blocks(x, weight, bias, lambda block, dtype: dequantize(block, dtype, buffer))
        return cpu.linear(x, weight, bias)
    if not x.is_contiguous():
        x = x.contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    outputs = values.shape[0]
    out = x.new_empty((*shape[:-1], outputs))
    _functions(native.library())[0](
        bits,
        values.data_ptr(),
        None if scales is None else scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        x.dtype is torch.bfloat16,
        out.data_ptr(),
        rows,
        inputs,
        outputs,
        torch.get_num_threads(),
    )
    return out


def is_decode(x: Tensor) -> bool:
    """Return whether inputs (B, T, in) are one token each of several rows."""
    return x.dim() == 3 and x.shape[1] == 1


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


@functools.cache
def _functions(library: ctypes.CDLL) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return hymba_linear and hymba_dequantize, told what they take: plain numbers then pass as they are."""
    number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    product, widen = library.hymba_linear, library.hymba_dequantize
    product.argtypes = (number, *4 * (pointer,), number, pointer, size, size, size, number)
    widen.argtypes = (number, pointer, pointer, number, pointer, size, size, number)
    product.restype = widen.restype = None
    return product, widen


def _unfit(x: Tensor, values: Tensor, bias: Tensor | None, bits: int) -> bool:
    """Return whether the torch path must serve: gradients, autocast, or a dtype or layout that has no kernel."""
    return (
        (
            torch.is_grad_enabled()
            and (x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad))
        )
        or not (x.dtype == values.dtype if bits > 8 else x.dtype in (torch.bfloat16, torch.float32))
        or not values.is_contiguous()
        or not values.is_cpu
        or x.numel() == 0
        or torch.is_autocast_enabled("cpu")
        or bool(native.why_unfit(x))
    )
