"""The rotation for autograd, whichever kernel does it: its gradient is the rotation back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rotates x by the tables' angles, or by their negatives where the last argument is −1.
Rotate = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class Rotation(torch.autograd.Function):
    """``Rotation.apply(x, cos, sin, rotate)``: `rotate` as it is, differentiable in `x` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rotate: Rotate) -> Tensor:  # noqa: D102
        ctx.rotate = rotate
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: D102
        cos, sin = ctx.saved_tensors
        return ctx.rotate(grad, cos, sin, -1), None, None, None
