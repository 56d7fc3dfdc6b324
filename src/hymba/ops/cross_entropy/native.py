"""The loss a block of rows at a time: torch multiplies, C++ (cpu.cpp) turns logits into losses and gradients in place.

Gradients are computed with the loss, so that each block's logits exist once and not for long; the backward pass only
scales them.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba.ops import native
from hymba.ops.cross_entropy import reference
from hymba.ops.precision import accumulate_dtype, result_dtype

BLOCK = 1 << 22  # logits at once: few enough to stay near the processor, enough for fast products

_pack = struct.Struct("8q").pack  # `struct Loss` of cpu.cpp


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """C++ path for :func:`hymba.ops.cross_entropy.linear_cross_entropy`, same signature.

    Takes what :func:`hymba.ops.native.why_unfit` has nothing against, and leaves the rest to the definition.
    """
    dtype = result_dtype(x, weight)
    if native.why_unfit(x) or native.why_unfit(weight) or dtype not in native.DTYPES or not x.numel():
        return reference.linear_cross_entropy(x, weight, targets)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Loss.apply(x, weight, targets, dtype)
    return _run(x, weight, targets, dtype, (False, False))[0]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        loss, *grads = _run(x, weight, targets, dtype, ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads)
        ctx.dtypes = x.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = (None if v is None else (v * grad).to(dtype) for v, dtype in grads)
        return *scaled, None, None


def _run(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the loss, and the gradients of `x` and `weight` if they are wanted. Products are of `dtype`."""
    shape, (vocabulary, width) = x.shape, weight.shape
    x, weight = x.reshape(-1, width).to(dtype), weight.to(dtype)
    targets = targets.reshape(-1).to(torch.int64)
    wide = accumulate_dtype(x)
    losses = torch.empty(len(x), dtype=wide)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else None
    grad_weight = torch.zeros(weight.shape, dtype=wide) if wanted[1] else None
    step = max(1, BLOCK // vocabulary)
    for start in range(0, len(x), step):
        rows = x[start : start + step]
        logits = rows @ weight.t()
        numbers = native.DTYPES.index(dtype), *logits.shape, torch.get_num_threads(), any(wanted)
        pointers = (v.data_ptr() for v in (logits, targets[start:], losses[start:]))
        native.library().hymba_cross_entropy(_pack(*numbers, *pointers))  # type: ignore[union-attr]
        if grad_x is not None:
            torch.mm(logits, weight, out=grad_x[start : start + step])
        if grad_weight is not None:
            grad_weight += logits.t() @ rows
    return losses.sum(), None if grad_x is None else grad_x.view(shape), grad_weight
