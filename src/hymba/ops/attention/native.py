"""Attention in C++ (cpu.cpp) for one query a row, as in decoding; longer calls go to torch's fused kernels."""

from __future__ import annotations

import ctypes
from typing import Unpack

import torch
from torch import Tensor

from hymba.ops import native
from hymba.ops.attention import cpu
from hymba.ops.attention.heads import Heads, QuantizedHeads
from hymba.ops.attention.reference import Mask

_NO_WINDOW = torch.iinfo(torch.int64).max


def attention(q: Tensor, k: Heads, v: Heads, **mask: Unpack[Mask]) -> Tensor:
    """C++ path for :func:`hymba.ops.attention.attention`, same signature."""
    if (
        isinstance(k, QuantizedHeads)
        or isinstance(v, QuantizedHeads)
        or mask.get("query_documents") is not None
        or _unfit(q, k, v)
    ):
        return cpu.attention(q, k, v, **mask)
    query_positions, key_positions, window = mask["query_positions"], mask["key_positions"], mask["window"]
    q, k, v = (x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous() for x in (q, k, v))
    keys = key_positions if key_positions.stride(1) == 1 else key_positions.contiguous()
    queries = query_positions.contiguous()
    out = q.new_empty(*q.shape[:3], v.shape[3])
    sizes = (
        *q.shape[::2],
        *k.shape[2:0:-1],
        q.shape[3],
        v.shape[3],
        _NO_WINDOW if window is None else window,
        mask["num_meta"],
    )
    strides = (q.stride(0), *k.stride()[:2], *v.stride()[:2], keys.stride(0))
    tensors = (x.data_ptr() for x in (q, k, v, queries, keys, out))
    arguments = _Arguments(*sizes, native.DTYPES.index(q.dtype), torch.get_num_threads(), *strides, *tensors)
    native.library().hymba_decode_attention(ctypes.byref(arguments))  # type: ignore[union-attr]
    return out


def _unfit(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether torch's kernels must serve: several queries, gradients, or a dtype that has no kernel."""
    return (
        q.shape[1] != 1
        or k.shape[1] == 0
        or not q.dtype == k.dtype == v.dtype
        or q.dtype not in native.DTYPES[:2]
        or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        or bool(native.why_unfit(q))
    )


class _Arguments(ctypes.Structure):
    """`struct Decode` of cpu.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "heads", "groups", "slots", "key_width", "value_width")),
        *((name, ctypes.c_int64) for name in ("window", "num_meta", "dtype", "threads")),
        *((name, ctypes.c_int64) for name in ("q_row", "k_row", "k_slot", "v_row", "v_slot", "positions_row")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "query_positions", "key_positions", "out")),
    )
