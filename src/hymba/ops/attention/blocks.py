"""Attention of many queries in C++ on the matrix unit (blocks.cpp), with its backward pass."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba.ops import native
from hymba.ops.attention.heads import Heads, QuantizedHeads
from hymba.ops.attention.reference import Mask

_NO_WINDOW = torch.iinfo(torch.int64).max
_BLOCKS = struct.Struct("35q")  # `struct Blocks` of blocks.cpp


def attention(q: Tensor, k: Heads, v: Heads, mask: Mask) -> Tensor:
    """Attention as :func:`hymba.ops.attention.attention` has it, of what :func:`why_unfit` has nothing against."""
    (keys, key_scales), (values, value_scales) = stored(k), stored(v)
    q = q if q.stride()[2:] == (q.shape[3], 1) else q.contiguous()
    positions = mask["query_positions"].contiguous(), mask["key_positions"].contiguous()
    of_queries, of_keys = mask.get("query_documents"), mask.get("key_documents")
    documents = (
        None if of_queries is None else of_queries.contiguous(),
        None if of_keys is None else of_keys.contiguous(),
    )
    seen = mask["window"], mask["num_meta"]
    inputs = _Inputs(q, keys, values, key_scales, value_scales, *positions, *documents, *seen)
    if torch.is_grad_enabled() and (q.requires_grad or keys.requires_grad or values.requires_grad):
        return _Attention.apply(*inputs)
    return _forward(inputs, None)


def fits(q: Tensor) -> bool:
    """Return whether the kernel serves queries `q`: bfloat16, on a processor with matrix units."""
    return (
        q.dtype == torch.bfloat16
        and q.shape[1] > 0
        and not native.why_unfit(q)
        and _functions(native.library()) is not None
    )


def stored(x: Heads) -> tuple[Tensor, Tensor | None]:
    """Return the entries and the scales, if any, as kernels read them: heads and their widths dense."""
    if not isinstance(x, QuantizedHeads):
        return (x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous()), None
    entries, scales = x.values, x.scales
    return (
        entries if entries.stride()[2:] == (entries.shape[3], 1) else entries.contiguous(),
        scales if scales.stride(2) == 1 else scales.contiguous(),
    )


class _Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    k_scales: Tensor | None
    v_scales: Tensor | None
    query_positions: Tensor
    key_positions: Tensor
    query_documents: Tensor | None
    key_documents: Tensor | None
    window: int | None
    num_meta: int


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x = _Inputs(*inputs)
        lse = x.q.new_empty(x.q.shape[:3], dtype=torch.float32)
        out = _forward(x, lse)
        ctx.library, ctx.window = native.library(), inputs[9:]
        ctx.save_for_backward(*inputs[:9], out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        x = _Inputs(*inputs, *ctx.window)
        grads = [torch.empty_like(y, memory_format=torch.contiguous_format) for y in x[:3]]
        grad_out = grad_out.contiguous()
        _functions(ctx.library)[1](_pack(x, out, lse, grad_out, *grads))  # type: ignore[index]
        return *grads, *[None] * 8


def _forward(x: _Inputs, lse: Tensor | None) -> Tensor:
    out = x.q.new_empty((*x.q.shape[:3], x.v.shape[3]))
    _functions(native.library())[0](_pack(x, out, lse, *[None] * 4))  # type: ignore[index]
    return out


def _pack(x: _Inputs, *outputs: Tensor | None) -> bytes:
    (rows, steps, heads, key_width), (_, slots, groups, value_width) = x.q.shape, x.v.shape
    sizes = rows, steps, slots, heads, groups, key_width, value_width
    window = _NO_WINDOW if x.window is None else x.window
    strided = (x.q, x.k, x.v, x.k_scales, x.v_scales)
    strides = [stride for y in strided for stride in ((0, 0) if y is None else y.stride()[:2])]
    tensors = (*strided, *x[5:9], *outputs)
    pointers = [0 if y is None else y.data_ptr() for y in tensors]
    return _BLOCKS.pack(*sizes, window, x.num_meta, torch.get_num_threads(), *strides, *pointers)


@functools.cache
def _functions(library: ctypes.CDLL) -> tuple[Callable[[bytes], None], Callable[[bytes], None]] | None:
    """Return hymba_attention_forward and _backward, told that they take packed bytes, or None without matrix units."""
    if not native.has_matrix_units():
        return None
    functions = library.hymba_attention_forward, library.hymba_attention_backward
    for function in functions:
        function.argtypes, function.restype = (ctypes.c_char_p,), None
    return functions
