"""Drawing in C++ (cpu.cpp), which sorts only where the cut lies."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hymba.ops import native
from hymba.ops.draw import reference


def draw_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    indices: Tensor,
) -> Tensor:
    """C++ path for :func:`hymba.ops.draw.draw_tokens`, same signature; takes float32 and bfloat16."""
    if logits.dtype == torch.float64 or not logits.numel() or native.why_unfit(logits):
        return reference.draw_tokens(logits, temperature, top_k, top_p, min_p, seeds, indices)
    logits = logits.float().contiguous()
    chosen = torch.empty(len(logits), dtype=torch.int64)
    temperature, top_p, min_p = (x.double().contiguous() for x in (temperature, top_p, min_p))
    top_k, seeds, indices = (x.long().contiguous() for x in (top_k, seeds, indices))
    tensors = logits, temperature, top_k, top_p, min_p, seeds, indices, chosen
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in tensors)
    sizes = (ctypes.c_int64(size) for size in logits.shape)
    native.library().hymba_draw(*pointers, *sizes, torch.get_num_threads())  # type: ignore[union-attr]
    return chosen
