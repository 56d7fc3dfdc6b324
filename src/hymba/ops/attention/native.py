"""Attention in C++: one query a row, as in decoding, by cpu.cpp, more by blocks.cpp; the rest by torch's kernels."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor

from hymba.ops import native
from hymba.ops.attention import blocks, cpu
from hymba.ops.attention.heads import Heads, QuantizedHeads
from hymba.ops.attention.reference import Mask

_NO_WINDOW = torch.iinfo(torch.int64).max
_DECODE = struct.Struct("28q")  # `struct Decode` of cpu.cpp; a ctypes.Structure would take three times as long to fill


def attention(q: Tensor, k: Heads, v: Heads, **mask: Unpack[Mask]) -> Tensor:
    """C++ path for :func:`hymba.ops.attention.attention`, same signature."""
    if _unfit(q, k, v):
        return cpu.attention(q, k, v, **mask)
    if q.shape[1] == 1 and mask.get("query_documents") is None and not _wants_gradient(q, k, v):
        return _decode(q, k, v, mask)
    return blocks.attention(q, k, v, mask) if blocks.fits(q) else cpu.attention(q, k, v, **mask)


def _decode(q: Tensor, k: Heads, v: Heads, mask: Mask) -> Tensor:
    queries, positions, window = mask["query_positions"].contiguous(), mask["key_positions"], mask["window"]
    if positions.stride(1) != 1:
        positions = positions.contiguous()
    q = q.contiguous()
    (keys, key_scales), (values, value_scales) = blocks.stored(k), blocks.stored(v)
    (rows, _, heads, width), (_, slots, groups, value_width) = q.shape, values.shape
    out = q.new_empty((rows, 1, heads, value_width))
    sizes = rows, heads, groups, slots, width, value_width, _NO_WINDOW if window is None else window, mask["num_meta"]
    strides = heads * width, *keys.stride()[:2], *values.stride()[:2], positions.stride(0)
    scale_strides: tuple[int, ...] = (0, 0, 0, 0)
    scale_pointers = 0, 0
    if key_scales is not None and value_scales is not None:
        scale_strides = *key_scales.stride()[:2], *value_scales.stride()[:2]
        scale_pointers = key_scales.data_ptr(), value_scales.data_ptr()
    pointers = q.data_ptr(), keys.data_ptr(), values.data_ptr(), *scale_pointers
    tables = queries.data_ptr(), positions.data_ptr()
    dtype, threads = native.DTYPES.index(q.dtype), torch.get_num_threads()
    _function(native.library())(
        _DECODE.pack(*sizes, dtype, threads, *strides, *scale_strides, *pointers, *tables, out.data_ptr())
    )
    return out


def _unfit(q: Tensor, k: Heads, v: Heads) -> bool:
    """Return whether torch's kernels must serve: no keys, or dtypes that have no kernel."""
    quantized = isinstance(k, QuantizedHeads), isinstance(v, QuantizedHeads)
    if quantized == (False, False) and not q.dtype == k.dtype == v.dtype:  # type: ignore[union-attr]
        return True
    return (
        quantized[0] != quantized[1] or k.shape[1] == 0 or q.dtype not in native.DTYPES[:2] or bool(native.why_unfit(q))
    )


def _wants_gradient(q: Tensor, k: Heads, v: Heads) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (q, k, v))


@functools.cache
def _function(library: ctypes.CDLL) -> Callable[[bytes], None]:
    """Return hymba_decode_attention, told that it takes the packed bytes of its argument."""
    function = library.hymba_decode_attention
    function.argtypes, function.restype = (ctypes.c_char_p,), None
    return function
