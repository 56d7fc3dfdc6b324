"""The gate in Triton: one pass over both inputs, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba.ops import gpu, native
from hymba.ops.gated import reference

_BLOCK, _WARPS = 1024, 4  # values a program, 8 a thread: 16 bytes in 16 bits


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Triton path for :func:`hymba.ops.gated.gated_silu`, same signature, rounded where the definition rounds."""
    if gpu.why_unfit(gate) or up.dtype != gate.dtype or up.shape != gate.shape or not gate.numel():
        return reference.gated_silu(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Gate.apply(gate, up)
    return _forward(gate, up)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up)]
        (gate, gate_row), (up, up_row), (grad, grad_row) = map(native.as_rows, (gate, up, grad))
        grid, width = _grid(gate, up, grad)
        apart = gate_row, up_row, grad_row
        _backward_kernel[grid](gate, up, grad, *grads, width, *apart, BLOCK=_BLOCK, num_warps=_WARPS)
        return grads[0], grads[1]


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    (gate, gate_row), (up, up_row) = map(native.as_rows, (gate, up))
    grid, width = _grid(gate, up)
    _forward_kernel[grid](gate, up, out, width, gate_row, up_row, BLOCK=_BLOCK, num_warps=_WARPS)
    return out


def _grid(*inputs: Tensor) -> tuple[tuple[int], int]:
    """Return how many programs run, and the width of a row; dense inputs are one long row."""
    width = inputs[0].numel() if all(x.is_contiguous() for x in inputs) else inputs[0].shape[-1]
    return (inputs[0].numel() // width * triton.cdiv(width, _BLOCK),), width


@triton.jit
def silu(x):
    """Return SiLU of float32 values, as torch computes it."""
    return x / (1 + tl.exp(-x))


@triton.jit
def _place(width, BLOCK: tl.constexpr):
    """Return the row of a program (int64) and its columns."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    return row, (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _forward_kernel(gate, up, out, width, gate_row, up_row, BLOCK: tl.constexpr):
    row, columns = _place(width, BLOCK)
    inside = columns < width
    x = tl.load(gate + row * gate_row + columns, mask=inside).to(tl.float32)
    y = tl.load(up + row * up_row + columns, mask=inside).to(tl.float32)
    dtype = out.dtype.element_ty
    tl.store(out + row * width + columns, (silu(x).to(dtype).to(tl.float32) * y).to(dtype), mask=inside)


@triton.jit
def _backward_kernel(
    gate, up, grad, grad_gate, grad_up, width, gate_row, up_row, grad_row, BLOCK: tl.constexpr
):  # fmt: skip
    row, columns = _place(width, BLOCK)
    inside = columns < width
    x = tl.load(gate + row * gate_row + columns, mask=inside).to(tl.float32)
    y = tl.load(up + row * up_row + columns, mask=inside).to(tl.float32)
    g = tl.load(grad + row * grad_row + columns, mask=inside).to(tl.float32)
    dtype = grad_gate.dtype.element_ty
    sigmoid = 1 / (1 + tl.exp(-x))
    to_silu = (g * y).to(dtype).to(tl.float32)
    to_gate = to_silu * sigmoid * (1 + x * (1 - sigmoid))
    tl.store(grad_gate + row * width + columns, to_gate.to(dtype), mask=inside)
    tl.store(grad_up + row * width + columns, (g * silu(x).to(dtype).to(tl.float32)).to(dtype), mask=inside)
