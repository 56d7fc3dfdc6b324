"""The rotation in Triton: one pass, and its gradient is the rotation back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops import gpu
from hymba.ops.rotary import reference
from hymba.ops.rotary.rotation import Rotation

_WIDEST = 512  # half a head


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Triton path for :func:`hymba.ops.rotary.apply_rotary`, same signature.

    In 16 bits it rounds each product and each sum as the definition does: to the bit. Tables that want gradients are
    left to the definition.
    """
    if gpu.why_unfit(x) or not _fits(x, cos, sin):
        return reference.apply_rotary(x, cos, sin)
    if x.requires_grad and torch.is_grad_enabled():
        return Rotation.apply(x, cos, sin, _rotate)
    return _rotate(x, cos, sin, 1)


def _fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    rows, steps, _, width = x.shape
    return (
        cos.shape == sin.shape
        and cos.shape in ((1, steps, width / 2), (rows, steps, width / 2))
        and 0 < x.numel() < 2**31 * width  # heads are counted in 32 bits
        and width <= 2 * _WIDEST
        and cos.dtype == sin.dtype
        and cos.dtype in gpu.DTYPES
        and not (cos.requires_grad or sin.requires_grad)
    )


def _tiles(half: int) -> tuple[int, int, int]:
    """Return the heads a program rotates, half a head's columns as a power of two, and warps: 8 of 16 bits a thread."""
    columns = triton.next_power_of_2(half)
    heads = max(512 // columns, 1)
    return heads, columns, max(heads * columns // 256, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Rotate by the tables' angles, or by their negatives where `direction` is −1."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, cos, sin = x if x.stride(3) == 1 else x.contiguous(), cos.contiguous(), sin.contiguous()
    rows, steps, heads, width = x.shape
    many, columns, warps = _tiles(width // 2)
    row_apart = 0 if cos.shape[0] == 1 else steps
    count = rows * steps * heads
    _rotate_kernel[(triton.cdiv(count, many),)](
        *(x, cos, sin, out, count, steps, row_apart, *x.stride()[:3]),
        *(heads, width // 2, direction),
        HEADS=many,
        COLUMNS=columns,
        num_warps=warps,
    )
    return out


@triton.jit
def _rotate_kernel(
    x, cos, sin, out, count, steps, row_apart, x_row, x_step, x_head,
    heads: tl.constexpr, HALF: tl.constexpr, DIRECTION: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rotate HEADS heads of (B, T, heads), counted through; tables (B or 1, T, HALF)."""
    number = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    place, head = number // heads, number % heads
    row, step = (place // steps).to(tl.int64), place % steps
    columns = tl.arange(0, COLUMNS)[None, :]
    mask = (number < count)[:, None] & (columns < HALF)
    dtype = x.dtype.element_ty
    table = (row * row_apart + step)[:, None] * HALF + columns
    c = tl.load(cos + table, mask=mask).to(dtype).to(tl.float32)
    s = tl.load(sin + table, mask=mask).to(dtype).to(tl.float32) * DIRECTION
    start = (row * x_row + step * x_step + head * x_head)[:, None] + columns
    first = tl.load(x + start, mask=mask).to(tl.float32)
    second = tl.load(x + start + HALF, mask=mask).to(tl.float32)
    to = out + number[:, None].to(tl.int64) * (2 * HALF) + columns
    made = (first * c).to(dtype).to(tl.float32) - (second * s).to(dtype).to(tl.float32)
    tl.store(to, made.to(dtype), mask=mask)
    made = (second * c).to(dtype).to(tl.float32) + (first * s).to(dtype).to(tl.float32)
    tl.store(to + HALF, made.to(dtype), mask=mask)
