"""The norms in Triton: one pass, float32 inside, rounded where the definition rounds.

A row is normed by one program, so its result does not depend on its neighbours. Gradients of weights are summed over
stretches of rows by a program each, then over the programs: the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba.ops import gpu, native
from hymba.ops.precision import result_dtype
from hymba.ops.rms_norm import reference

_PARTS = 3  # as many as a kernel takes
_WIDEST = 8192  # a row lies in registers
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Triton path for :func:`hymba.ops.rms_norm.rms_norm`, same signature."""
    if not _fits(x, (weight,)):
        return reference.rms_norm(x, weight, eps)
    return _run(False, eps, x, None, weight)[0]


def norm_parts(x: Tensor, weights: tuple[Tensor, ...], eps: float) -> tuple[Tensor, ...]:
    """Triton path for :func:`hymba.ops.rms_norm.norm_parts`, same signature; takes up to three parts."""
    if len(weights) > _PARTS or not _fits(x, weights):
        return reference.norm_parts(x, weights, eps)
    return _run(False, eps, x, None, *weights)


def mean_of_norms(x: Tensor, y: Tensor, x_weight: Tensor, y_weight: Tensor, eps: float) -> Tensor:
    """Triton path for :func:`hymba.ops.rms_norm.mean_of_norms`, same signature."""
    alike = x.shape == y.shape and x.dtype == y.dtype and x_weight.dtype == y_weight.dtype
    if not (alike and _fits(x, (x_weight,)) and _fits(y, (y_weight,))):
        return reference.mean_of_norms(x, y, x_weight, y_weight, eps)
    return _run(True, eps, x, y, x_weight, y_weight)[0]


def _fits(x: Tensor, weights: tuple[Tensor, ...]) -> bool:
    width = sum(weight.shape[0] for weight in weights if weight.ndim == 1)
    if gpu.why_unfit(x) or x.shape[-1:] != (width,) or not x.numel() > 0 or width > _WIDEST:
        return False
    dtype = weights[0].dtype
    return all(w.ndim == 1 and w.is_contiguous() and w.dtype == dtype and w.dtype in _TYPES for w in weights)


def _tiles(width: int) -> tuple[int, int, int]:
    """Return the rows of a tile, its columns and the warps over it: 8 values a thread, 16 bytes in 16 bits."""
    columns = max(triton.next_power_of_2(width), 16)
    rows = max(1024 // columns, 1) if columns <= 128 else 1
    return rows, columns, min(max(rows * columns // 256, 1), 16)


def _rows_each(rows: int) -> int:
    """Return over how many rows a program of the backward pass sums gradients of weights."""
    return max(triton.cdiv(rows, 528), min(rows, 8))  # 528: four times an H200's processors


def _run(is_mean: bool, eps: float, x: Tensor, y: Tensor | None, *weights: Tensor) -> tuple[Tensor, ...]:
    inputs = [v for v in (x, y, *weights) if v is not None]
    dtype = result_dtype(x, weights[0])
    if torch.is_grad_enabled() and any(v.requires_grad for v in inputs):
        return _Norms.apply(is_mean, eps, dtype, x, y, *weights)
    return _forward(is_mean, eps, dtype, x, y, *weights)


class _Norms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, is_mean: bool, eps: float, dtype: torch.dtype, x: Tensor, y: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.is_mean, ctx.eps = is_mean, eps
        ctx.save_for_backward(x, y, *weights)
        return _forward(is_mean, eps, dtype, x, y, *weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *weights = ctx.saved_tensors
        to_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        to_y = None if y is None else torch.empty_like(y, memory_format=torch.contiguous_format)
        to_weights = _backward(ctx.is_mean, ctx.eps, (x, y, weights), grads, (to_x, to_y))
        sums = (s.sum(0).to(weight.dtype) for s, weight in zip(to_weights, weights, strict=True))
        return None, None, None, to_x, to_y, *sums


def _forward(
    is_mean: bool, eps: float, dtype: torch.dtype, x: Tensor, y: Tensor | None, *weights: Tensor
) -> tuple[Tensor, ...]:
    widths = [x.shape[-1]] if is_mean else [weight.shape[0] for weight in weights]
    outs = tuple(x.new_empty(*x.shape[:-1], width, dtype=dtype) for width in widths)
    rows, columns, warps = _tiles(max(widths))
    count = x.numel() // x.shape[-1]
    (x, x_row), promoted = native.as_rows(x), _TYPES[torch.promote_types(x.dtype, weights[0].dtype)]
    grid = (triton.cdiv(count, rows),)
    if y is not None:
        y, y_row = native.as_rows(y)
        pointers = x, y, *weights, *outs
        _mean_kernel[grid](
            *pointers, count, x_row, y_row, eps, widths[0], promoted, ROWS=rows, COLUMNS=columns, num_warps=warps
        )
        return outs
    _parts_kernel[grid](
        x, *_three(weights), *_three(outs), count, x_row, eps, *_three(widths, 0), promoted, ROWS=rows, num_warps=warps
    )  # fmt: skip
    return outs


def _backward(
    is_mean: bool,
    eps: float,
    inputs: tuple[Tensor, Tensor | None, list[Tensor]],
    grads: tuple[Tensor, ...],
    to: tuple[Tensor, Tensor | None],
) -> list[Tensor]:
    """Write the gradients of the inputs in `to`; return those of the weights, (programs, width) each, to be summed."""
    x, y, weights = inputs
    widths = [weight.shape[0] for weight in weights]
    rows, columns, warps = _tiles(max(widths))
    count = x.numel() // x.shape[-1]
    each = triton.cdiv(_rows_each(count), rows) * rows
    programs = triton.cdiv(count, each)
    sums = [x.new_empty(programs, width, dtype=torch.float32) for width in widths]
    x, x_row = native.as_rows(x)
    flat = [native.as_rows(grad) for grad in grads]
    sizes: dict[str, Any] = {"ROWS": rows, "num_warps": warps}
    if is_mean and y is not None:
        (y, y_row), (grad, grad_row) = native.as_rows(y), flat[0]
        rows_of = count, each, x_row, y_row, grad_row, eps, widths[0]
        _mean_backward_kernel[(programs,)](x, y, *weights, grad, *to, *sums, *rows_of, COLUMNS=columns, **sizes)
        return sums
    rows_of = x_row, to[0].shape[-1], *_three([row for _, row in flat], 0)
    pointers = x, *_three(weights), *_three([grad for grad, _ in flat]), to[0], *_three(sums)
    _parts_backward_kernel[(programs,)](*pointers, count, each, *rows_of, eps, *_three(widths, 0), **sizes)
    return sums


def _three(values: Any, missing: Any = None) -> list[Any]:
    return [*values, *[missing] * (_PARTS - len(values))]


@triton.jit
def _weighed(x, weight, width, eps, DTYPE: tl.constexpr, PROMOTED: tl.constexpr):
    """Return rows x (ROWS, COLUMNS) normed and weighed in float32, rounded to DTYPE, then to PROMOTED."""
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    return ((x * scale[:, None]).to(DTYPE).to(tl.float32) * weight[None, :]).to(PROMOTED)


@triton.jit
def _part(
    x, weight, out, rows, inside, x_row, start: tl.constexpr, eps, WIDTH: tl.constexpr, PROMOTED: tl.constexpr
):  # fmt: skip
    """Norm the WIDTH columns from `start` of some rows."""
    COLUMNS: tl.constexpr = triton.next_power_of_2(WIDTH)
    columns = tl.arange(0, COLUMNS)
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    w = tl.load(weight + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    values = tl.load(x + rows[:, None] * x_row + start + columns[None, :], mask=mask, other=0)
    made = _weighed(values.to(tl.float32), w, WIDTH, eps, x.dtype.element_ty, PROMOTED)
    tl.store(out + rows[:, None] * WIDTH + columns[None, :], made.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _parts_kernel(
    x, w0, w1, w2, out0, out1, out2, count, x_row, eps,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr, PROMOTED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    _part(x, w0, out0, rows, inside, x_row, 0, eps, WIDTH0, PROMOTED)
    if WIDTH1 > 0:
        _part(x, w1, out1, rows, inside, x_row, WIDTH0, eps, WIDTH1, PROMOTED)
    if WIDTH2 > 0:
        _part(x, w2, out2, rows, inside, x_row, WIDTH0 + WIDTH1, eps, WIDTH2, PROMOTED)


@triton.jit
def _mean_kernel(
    x, y, x_weight, y_weight, out, count, x_row, y_row, eps,
    WIDTH: tl.constexpr, PROMOTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (rows < count)[:, None] & (columns < WIDTH)[None, :]
    a = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=mask, other=0).to(tl.float32)
    b = tl.load(y + rows[:, None] * y_row + columns[None, :], mask=mask, other=0).to(tl.float32)
    v = tl.load(x_weight + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    w = tl.load(y_weight + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    a = _weighed(a, v, WIDTH, eps, x.dtype.element_ty, PROMOTED).to(tl.float32)
    b = _weighed(b, w, WIDTH, eps, x.dtype.element_ty, PROMOTED).to(tl.float32)
    mean = ((a + b).to(PROMOTED).to(tl.float32) * 0.5).to(PROMOTED)
    tl.store(out + rows[:, None] * WIDTH + columns[None, :], mean.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _back(x, weight, grad, width, eps):
    """Return the gradient of rows x (ROWS, COLUMNS) in float32, and what they add to that of the weight."""
    to_normed = grad * weight[None, :]
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    along = tl.sum(to_normed * x, axis=1) / width * scale * scale
    return scale[:, None] * (to_normed - x * along[:, None]), grad * x * scale[:, None]


@triton.jit
def _part_back(
    x, weight, grad, to_x, sums, program, end, x_row, to_row, grad_row, start: tl.constexpr, eps,
    WIDTH: tl.constexpr, EACH, ROWS: tl.constexpr,
):  # fmt: skip
    """Pass back through the norm of WIDTH columns from `start` for a program's rows."""
    COLUMNS: tl.constexpr = triton.next_power_of_2(WIDTH)
    columns = tl.arange(0, COLUMNS)
    w = tl.load(weight + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(program * EACH, end, ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < end)[:, None] & (columns < WIDTH)[None, :]
        values = tl.load(x + rows[:, None] * x_row + start + columns[None, :], mask=mask, other=0).to(tl.float32)
        g = tl.load(grad + rows[:, None] * grad_row + columns[None, :], mask=mask, other=0).to(tl.float32)
        made, added = _back(values, w, g, WIDTH, eps)
        tl.store(to_x + rows[:, None] * to_row + start + columns[None, :], made.to(to_x.dtype.element_ty), mask=mask)
        total += added
    tl.store(sums + program.to(tl.int64) * WIDTH + columns, tl.sum(total, axis=0), mask=columns < WIDTH)


@triton.jit
def _parts_backward_kernel(
    x, w0, w1, w2, grad0, grad1, grad2, to_x, sums0, sums1, sums2,
    count, each, x_row, to_row, row0, row1, row2, eps,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    end = tl.minimum((n + 1) * each, count)
    _part_back(x, w0, grad0, to_x, sums0, n, end, x_row, to_row, row0, 0, eps, WIDTH0, each, ROWS)
    if WIDTH1 > 0:
        _part_back(x, w1, grad1, to_x, sums1, n, end, x_row, to_row, row1, WIDTH0, eps, WIDTH1, each, ROWS)
    if WIDTH2 > 0:
        _part_back(x, w2, grad2, to_x, sums2, n, end, x_row, to_row, row2, WIDTH0 + WIDTH1, eps, WIDTH2, each, ROWS)


@triton.jit
def _mean_backward_kernel(
    x, y, x_weight, y_weight, grad, to_x, to_y, x_sums, y_sums, count, each, x_row, y_row, grad_row, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    n, columns = tl.program_id(0), tl.arange(0, COLUMNS)
    end = tl.minimum((n + 1) * each, count)
    v = tl.load(x_weight + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    w = tl.load(y_weight + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    x_total = tl.zeros((ROWS, COLUMNS), tl.float32)
    y_total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(n * each, end, ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < end)[:, None] & (columns < WIDTH)[None, :]
        a = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=mask, other=0).to(tl.float32)
        b = tl.load(y + rows[:, None] * y_row + columns[None, :], mask=mask, other=0).to(tl.float32)
        g = tl.load(grad + rows[:, None] * grad_row + columns[None, :], mask=mask, other=0).to(tl.float32) * 0.5
        to_a, a_added = _back(a, v, g, WIDTH, eps)
        to_b, b_added = _back(b, w, g, WIDTH, eps)
        place = rows[:, None] * WIDTH + columns[None, :]
        tl.store(to_x + place, to_a.to(to_x.dtype.element_ty), mask=mask)
        tl.store(to_y + place, to_b.to(to_y.dtype.element_ty), mask=mask)
        x_total += a_added
        y_total += b_added
    place = n.to(tl.int64) * WIDTH + columns
    tl.store(x_sums + place, tl.sum(x_total, axis=0), mask=columns < WIDTH)
    tl.store(y_sums + place, tl.sum(y_total, axis=0), mask=columns < WIDTH)
