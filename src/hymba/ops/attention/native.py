"""Attention in C++: by cpu.cpp, or on matrix units by decode_tiles.cpp and blocks.cpp; the rest by torch's kernels."""

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

MOST_POSITIONS = 1 << 22  # of a text, as in cpu.cpp
_NO_WINDOW = torch.iinfo(torch.int64).max
_ATTENTION = struct.Struct("30q")  # `struct Attention` of parts.h; a ctypes.Structure takes three times as long to fill


def attention(q: Tensor, k: Heads, v: Heads, **mask: Unpack[Mask]) -> Tensor:
    """C++ path for :func:`hymba.ops.attention.attention`, same signature.

    Without matrix units, without gradients and documents, an output depends bit for bit on its
    query and on the keys and values it sees alone, however many queries the call has.
    """
    if _unfit(q, k, v):
        return cpu.attention(q, k, v, **mask)
    in_blocks = blocks.fits(q)
    packed, gradient = mask.get("query_documents") is not None, _wants_gradient(q, k, v)
    takes_many = not in_blocks and native.level() != "portable"
    if not packed and not gradient and (q.shape[1] == 1 or takes_many):
        out = _attend(q, k, v, mask)
        if out is not None:
            return out
    return blocks.attention(q, k, v, mask) if in_blocks else cpu.attention(q, k, v, **mask)


def _attend(q: Tensor, k: Heads, v: Heads, mask: Mask) -> Tensor | None:
    """Run the kernel of cpu.cpp; None where it does not take these positions."""
    queries, positions, window = mask["query_positions"].contiguous(), mask["key_positions"], mask["window"]
    if positions.stride(1) != 1:
        positions = positions.contiguous()
    q = q if q.stride()[2:] == (q.shape[3], 1) else q.contiguous()
    (keys, key_scales), (values, value_scales) = blocks.stored(k), blocks.stored(v)
    (rows, steps, heads, width), (_, slots, groups, value_width) = q.shape, values.shape
    out = q.new_empty((rows, steps, heads, value_width))
    sizes = rows, steps, heads, groups, slots, width, value_width, _NO_WINDOW if window is None else window
    strides = *q.stride()[:2], *keys.stride()[:2], *values.stride()[:2], positions.stride(0)
    scale_strides: tuple[int, ...] = (0, 0, 0, 0)
    scale_pointers = 0, 0
    if key_scales is not None and value_scales is not None:
        scale_strides = *key_scales.stride()[:2], *value_scales.stride()[:2]
        scale_pointers = key_scales.data_ptr(), value_scales.data_ptr()
    pointers = q.data_ptr(), keys.data_ptr(), values.data_ptr(), *scale_pointers
    tables = queries.data_ptr(), positions.data_ptr(), out.data_ptr()
    others = mask["num_meta"], native.DTYPES.index(q.dtype), torch.get_num_threads()
    run = _function(native.library())
    return out if run(_ATTENTION.pack(*sizes, *others, *strides, *scale_strides, *pointers, *tables)) else None


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
def _function(library: ctypes.CDLL) -> Callable[[bytes], int]:
    """Return hymba_attention, declared to take the packed bytes of its argument."""
    function = library.hymba_attention
    function.argtypes, function.restype = (ctypes.c_char_p,), ctypes.c_int
    return function
