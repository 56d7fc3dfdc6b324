"""The loss a block of rows at a time, in torch: each block's logits exist once, and not for long.

Gradients are computed with the loss; the backward pass only scales them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba.ops.cross_entropy import reference
from hymba.ops.precision import accumulate_dtype, result_dtype

# Logits at once: few enough to stay near a processor, enough for fast products; a GPU needs more to be busy.
BLOCK, GPU_BLOCK = 1 << 22, 1 << 26

# Turns logits (rows, vocabulary) and targets (rows,) into losses (rows,), written into the third argument, and the
# logits into their gradients if the last is true.
Turn = Callable[[Tensor, Tensor, Tensor, bool], None]


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Torch path for :func:`hymba.ops.cross_entropy.linear_cross_entropy`, same signature."""
    if torch.compiler.is_compiling() or not x.numel():
        return reference.linear_cross_entropy(x, weight, targets)
    return by_blocks(x, weight, targets, _turn)


def by_blocks(x: Tensor, weight: Tensor, targets: Tensor, turn: Turn) -> Tensor:
    """Return the loss, block by block, torch multiplying and `turn` doing the rest."""
    dtype = result_dtype(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Loss.apply(x, weight, targets, dtype, turn)
    return _run(x, weight, targets, dtype, turn, (False, False))[0]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, turn: Turn) -> Tensor:
        loss, *grads = _run(x, weight, targets, dtype, turn, ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads)
        ctx.dtypes = x.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = (None if v is None else (v * grad).to(dtype) for v, dtype in grads)
        return *scaled, None, None, None


def _run(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, turn: Turn, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the loss, and the gradients of `x` and `weight` if they are wanted. Products are of `dtype`."""
    shape, (vocabulary, width) = x.shape, weight.shape
    x, weight = x.reshape(-1, width).to(dtype), weight.to(dtype)
    targets = targets.reshape(-1).to(torch.int64)
    wide = accumulate_dtype(x)
    losses = x.new_empty(len(x), dtype=wide)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    step = max(1, (GPU_BLOCK if x.is_cuda else BLOCK) // vocabulary)
    with torch.no_grad():
        for start in range(0, len(x), step):
            rows = x[start : start + step]
            logits = rows @ weight.t()
            turn(logits, targets[start : start + step], losses[start : start + step], any(wanted))
            if grad_x is not None:
                torch.mm(logits, weight, out=grad_x[start : start + step])
            if grad_weight is not None:
                grad_weight += logits.t() @ rows
        return losses.sum(), None if grad_x is None else grad_x.view(shape), grad_weight


def _turn(logits: Tensor, targets: Tensor, losses: Tensor, wanted: bool) -> None:
    wide, ignored, places = logits.to(losses.dtype), targets < 0, targets.clamp(min=0)[:, None]
    normalizer, chosen = wide.logsumexp(1, keepdim=True), wide.gather(1, places)
    losses.copy_((normalizer - chosen)[:, 0]).masked_fill_(ignored, 0)
    if wanted:
        grads = (wide - normalizer).exp_()
        grads.scatter_(1, places, grads.gather(1, places) - 1)
        logits.copy_(grads.masked_fill_(ignored[:, None], 0))
