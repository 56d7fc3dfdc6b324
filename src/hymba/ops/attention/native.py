"""Attention in C++ (cpu.cpp) for one query a row, as in decoding; longer calls go to torch's fused kernels."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor

from hymba.ops import native
from hymba.ops.attention import cpu
from hymba.ops.attention.heads import Heads, QuantizedHeads
from hymba.ops.attention.reference import Mask

_NO_WINDOW = torch.iinfo(torch.int64).max
_DECODE = struct.Struct("28q")  # `struct Decode` of cpu.cpp; a ctypes.Structure would take three times as long to fill


def attention(q: Tensor, k: Heads, v: Heads, **mask: Unpack[Mask]) -> Tensor:
    """C++ path for :func:`hymba.ops.attention.attention`, same signature."""
    if q.shape[1] != 1 or mask.get("query_documents") is not None or _unfit(q, k, v):
        return cpu.attention(q, k, v, **mask)
    queries, positions, window = mask["query_positions"].contiguous(), mask["key_positions"], mask["window"]
    if positions.stride(1) != 1:
        positions = positions.contiguous()
    q = q.contiguous()
    (keys, key_scales), (values, value_scales) = _stored(k), _stored(v)
    (rows, _, heads, width), (_, slots, groups, value_width) = q.shape, values.shape
    out = q.new_empty((rows, 1, heads, value_width))
    sizes = rows, heads, groups, slots, width, value_width, _NO_WINDOW if window is None else window, mask["num_meta"]
    strides = heads * width, *keys.stride()[:2], *values.stride()[:2], positions.stride(0)
    scales = (0, 0, 0, 0), (0, 0)
    if key_scales is not None and value_scales is not None:
        scales = (
            (*key_scales.stride()[:2], *value_scales.stride()[:2]),
            (key_scales.data_ptr(), value_scales.data_ptr()),
        )
    tensors = q.data_ptr(), keys.data_ptr(), values.data_ptr(), *scales[1]
    tensors = *tensors, queries.data_ptr(), positions.data_ptr(), out.data_ptr()
    dtype, threads = native.DTYPES.index(q.dtype), torch.get_num_threads()
    _decode(native.library())(_DECODE.pack(*sizes, dtype, threads, *strides, *scales[0], *tensors))
    return out


def _stored(x: Heads) -> tuple[Tensor, Tensor | None]:
    """Return the entries and the scales, if any, as the kernel reads them: heads and their widths dense."""
    if not isinstance(x, QuantizedHeads):
        return (x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous()), None
    entries, scales = x.values, x.scales
    return (
        entries if entries.stride()[2:] == (entries.shape[3], 1) else entries.contiguous(),
        scales if scales.stride(2) == 1 else scales.contiguous(),
    )


def _unfit(q: Tensor, k: Heads, v: Heads) -> bool:
    """Return whether torch's kernels must serve: gradients, no keys, or a dtype that has no kernel."""
    if isinstance(k, QuantizedHeads) and isinstance(v, QuantizedHeads):
        wants_gradient = q.requires_grad
    elif isinstance(k, QuantizedHeads) or isinstance(v, QuantizedHeads) or not q.dtype == k.dtype == v.dtype:
        return True
    else:
        wants_gradient = q.requires_grad or k.requires_grad or v.requires_grad
    return (
        k.shape[1] == 0
        or q.dtype not in native.DTYPES[:2]
        or (wants_gradient and torch.is_grad_enabled())
        or bool(native.why_unfit(q))
    )


@functools.cache
def _decode(library: ctypes.CDLL) -> Callable[[bytes], None]:
    """Return hymba_decode_attention, told that it takes the packed bytes of its argument."""
    function = library.hymba_decode_attention
    function.argtypes, function.restype = (ctypes.c_char_p,), None
    return function
