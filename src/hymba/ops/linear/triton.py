"""Linear maps of few rows in Triton: bound by reading the weights, which are read once for all rows.

:func:`product` is the one way in: it starts a kernel that can take a norm of its input on the way in, and gate its
result or add it to a stream on the way out (:mod:`hymba.ops.projection`). A program has a block of outputs and all
inputs, so that nothing is summed across programs. One row is multiplied and summed in float32; several meet the weights
in the matrix units, padded to 16 or 32. Weights in 8 or 4 bits are widened in registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops import gpu
from hymba.ops.linear import cpu
from hymba.ops.linear.weight import QuantizedWeight

MOST_ROWS = 32  # beyond, torch's product wins: it shares the reading of weights among more rows
DTYPES = (torch.bfloat16, torch.float16)  # of the inputs: float32 has no fast product of its own
INTERPRETED = tl.constexpr(gpu.interpreted())  # the interpreter does not multiply in bfloat16
BITS = {torch.bfloat16: 16, torch.float16: 16, torch.int8: 8, torch.uint8: 4}  # of an entry, by a weight's values


class Tiles(NamedTuple):
    """How a product is cut: outputs of a program, inputs of a step, warps, and steps whose weights are under way."""

    outputs: int
    inputs: int
    warps: int
    stages: int = 1


def linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Triton path for :func:`hymba.ops.linear.linear`, same signature.

    Takes up to ``MOST_ROWS`` rows in bfloat16 or float16, weights in the same dtype or quantised, where no gradient is
    wanted. The rest is torch's product, for which quantised weights are written out, a block of outputs at a time.
    """
    if not why_unfit(x, weight, bias):
        return product(x, weight, bias=bias)
    if isinstance(weight, Tensor) or gpu.why_unfit(x) or weight.values.device != x.device:
        return cpu.linear(x, weight, bias)
    return cpu.by_blocks(x, weight, bias, dequantize)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Triton path for :func:`hymba.ops.linear.dequantize`, for the dtypes of :mod:`hymba.ops.gpu`."""
    values, scales = weight.values.contiguous(), weight.scales.contiguous()
    out = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=values.device)
    grid = (weight.out_features, triton.cdiv(weight.in_features, 1024))
    _dequantize[grid](values, scales, out, K=weight.in_features, BITS=weight.bits, BLOCK_K=1024)
    return out


def why_unfit(x: Tensor, weight: Tensor | QuantizedWeight, *others: Tensor | None) -> str:
    """Return in one line why :func:`product` does not take this, or "" if it does. `others`: norms, bias, stream."""
    values = weight if isinstance(weight, Tensor) else weight.values
    tensors = [x, values, *(v for v in others if v is not None)]
    if x.dtype not in DTYPES or any(v.dtype != x.dtype for v in tensors if v is not values):
        return f"no kernel for {x.dtype}, or for several dtypes at once"
    if BITS.get(values.dtype) is None or (values is weight and values.dtype != x.dtype):
        return f"no kernel for weights in {values.dtype}"
    if torch.is_grad_enabled() and any(v.requires_grad for v in tensors):
        return "gradients are wanted"
    if not 0 < x.numel() <= MOST_ROWS * x.shape[-1]:
        return f"only 1 to {MOST_ROWS} rows"
    if not values.is_contiguous() or any(v.device != x.device for v in tensors):
        return "the weight is not dense, or on another device"
    if values.element_size() == 1 and (values.shape[1] % 4 or values.data_ptr() % 4):
        return "quantised weights are read in words of 4 bytes"
    return "autocast" if torch.is_autocast_enabled(x.device.type) else gpu.why_unfit(x)


def product(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    *,
    bias: Tensor | None = None,
    y: Tensor | None = None,
    norms: tuple[Tensor, ...] = (),
    eps: float = 0.0,
    up: Tensor | QuantizedWeight | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Multiply few rows by a weight in one launch. Every part is rounded to the dtype of `x`, as if it stood alone.

    Args:
        x: (…, in), what :func:`why_unfit` has nothing against.
        weight: (out, in).
        bias: (out,).
        y: (…, in): the input is the mean of the norms of `x` and `y`.
        norms: one weight (in,) for the norm of `x`, two with `y`, none: the input is `x` itself.
        eps: of the norms.
        up: (out, in), of the kind of `weight`: the result is SiLU(input Wᵀ) · (input Uᵀ).
        residual: (…, out), added to the result.

    Returns:
        (…, out).
    """
    values, scales = _parts(weight)
    up_values, up_scales = (None, None) if up is None else _parts(up)
    outputs, inputs, bits = len(values), x.shape[-1], BITS[values.dtype]
    shape = (*x.shape[:-1], outputs)
    x, y = _rows(x), None if y is None else _rows(y)
    residual = None if residual is None else _rows(residual.expand(shape))
    norms = tuple(v.contiguous() for v in norms)
    out = x.new_empty(shape)
    one = len(x) == 1
    padded = 1 if one else 16 if len(x) <= 16 else 32
    tiles = _tiles_of_one(bits, outputs, inputs, len(norms), up is not None)
    if not one:
        tiles = _tiles_of_several(bits, outputs, inputs, 1 + (y is not None), up is not None, padded)
    arguments: tuple[Any, ...] = (
        *(x, y, *norms, *(None,) * (2 - len(norms)), eps, values, scales, up_values, up_scales),
        *(None if bias is None else bias.contiguous(), residual, out, outputs),
    )
    keywords = {"K": inputs, "BITS": bits, "BLOCK_N": tiles.outputs, "BLOCK_K": tiles.inputs, "num_warps": tiles.warps}
    grid = (triton.cdiv(outputs, tiles.outputs),)
    if one:
        _one_row[grid](*arguments, **keywords)
    else:
        strides = x.stride(0), 0 if y is None else y.stride(0), 0 if residual is None else residual.stride(0)
        _several_rows[grid](*arguments, len(x), *strides, ROWS=padded, num_stages=tiles.stages, **keywords)
    return out


def _parts(weight: Tensor | QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    return (weight.values, weight.scales) if isinstance(weight, QuantizedWeight) else (weight, None)


def _rows(x: Tensor) -> Tensor:
    """Return (…, width) as (rows, width) with dense rows."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _tiles_of_one(bits: int, outputs: int, inputs: int, norms: int, pairs: bool) -> Tiles:
    """Return the tiles of one row.

    A program asks for the weights of a step at once, 16 bytes a lane and output: those of some 8 programs are to be
    under way in a multiprocessor. Fewer outputs a program keep more multiprocessors at work; more of them share the
    reading of the inputs, and their norms, which cost as much as two or three outputs each.
    """
    step = max(128, min(triton.next_power_of_2(inputs), 4096 if norms else 2048))
    if step <= 512:
        return Tiles(max(1, 4096 // step), step, 4)
    share = 2 * norms + (2 if bits < 16 else 0) + (4 if bits == 4 else 0)
    outputs *= 2 if pairs else 1
    fill = max(1, triton.next_power_of_2(outputs // 1024 + 1) // 2)  # 1 for x_proj and out_proj, 8 for in_proj
    block = min(8 if outputs < 16384 or bits > 4 else 16, fill + share if outputs > 1024 else 1)
    block = triton.next_power_of_2(block + 1) // 2 // (2 if pairs else 1)
    return Tiles(max(1, block), step, 8 if step > 2048 and bits == 16 else 4 if bits > 4 or step > 2048 else 2)


def _tiles_of_several(bits: int, outputs: int, inputs: int, sources: int, pairs: bool, rows: int) -> Tiles:
    """Return the tiles of several rows, `sources` of inputs and one or two weights.

    What a result is depends on outputs and inputs of a step, so these depend on the weight alone.
    """
    block = 32 if outputs > 4096 and not pairs else 16
    step = max(64, min(triton.next_power_of_2(inputs), 128 if bits == 16 else 256))
    held = step * (block * bits // 8 * (2 if pairs else 1) + rows * 2 * sources)  # bytes of a step
    return Tiles(block, step, 4, min(6, max(2, (64 << 10) // held + 1)))


@triton.jit
def _dequantize(values, scales, out, K: tl.constexpr, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """A stretch of the inputs of one output."""
    n, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_K
    if BITS == 8:
        k = start + tl.arange(0, BLOCK_K)
        value = tl.load(values + n * K + k, mask=k < K, other=0).to(tl.float32)
        tl.store(out + n * K + k, (value * tl.load(scales + n)).to(out.dtype.element_ty), mask=k < K)
    else:
        WIDTH: tl.constexpr = (K + 63) // 64 * 32
        byte = start // 2 + tl.arange(0, BLOCK_K // 2)
        halves = tl.load(values + n * WIDTH + byte, mask=byte < WIDTH, other=0)
        scale = tl.load(scales + n * (WIDTH // 32) + byte // 32, mask=byte < WIDTH, other=0.0).to(tl.float32)
        k = byte // 32 * 64 + byte % 32
        low, high = (halves & 15).to(tl.float32) - 8, (halves >> 4).to(tl.float32) - 8
        tl.store(out + n * K + k, (low * scale).to(out.dtype.element_ty), mask=k < K)
        tl.store(out + n * K + k + 32, (high * scale).to(out.dtype.element_ty), mask=k + 32 < K)


@triton.jit
def _one_row(
    x,
    y,
    x_norm,
    y_norm,
    eps,
    weight,
    scales,
    up,
    up_scales,
    bias,
    residual,
    out,
    N,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A block of outputs of one row. The first weights are asked for before the norm is computed."""
    base = tl.program_id(0) * BLOCK_N
    n, left = tl.arange(0, BLOCK_N), N - base
    first, first_scale = _weights_of_one(weight, scales, base, n, left, 0, K, BITS, BLOCK_K)
    first_up, first_up_scale = first, first_scale
    if up is not None:
        first_up, first_up_scale = _weights_of_one(up, up_scales, base, n, left, 0, K, BITS, BLOCK_K)
    scale, up_scale = _scales(scales, up_scales, base + n, n < left, BITS)
    offset, stream = _around(bias, residual, base + n, base + n, n < left)
    x_factor, y_factor = 1.0, 1.0
    if x_norm is not None:
        tl.debug_barrier()  # which no load is moved across: those of the weights stay in front of the norm's
        x_factor = _factor_of_one(x, eps, K)
    if y is not None:
        y_factor = _factor_of_one(y, eps, K)
    for start in tl.static_range(0, K, BLOCK_K):
        low, high = _inputs_of_one(x, y, x_norm, y_norm, x_factor, y_factor, start, K, BITS, BLOCK_K)
        if start == 0:
            total = _products_of_one(first, first_scale, low, high, BITS)
            if up is not None:
                up_total = _products_of_one(first_up, first_up_scale, low, high, BITS)
        else:
            w, group_scale = _weights_of_one(weight, scales, base, n, left, start, K, BITS, BLOCK_K)
            total += _products_of_one(w, group_scale, low, high, BITS)
            if up is not None:
                w, group_scale = _weights_of_one(up, up_scales, base, n, left, start, K, BITS, BLOCK_K)
                up_total += _products_of_one(w, group_scale, low, high, BITS)
    result = tl.sum(total, 1) * scale
    if up is not None:
        result = _gated(result, tl.sum(up_total, 1) * up_scale, out)
    tl.store(out + base + n, _finished(result, offset, stream, out), mask=n < left)


@triton.jit
def _weights_of_one(weight, scales, base, n, left, start, K: tl.constexpr, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Entries (BLOCK_N, BLOCK_K) as they are stored, those of 8 and 4 bits as words of 4 and 8; and at 4 bits the
    scales of half groups (BLOCK_N, BLOCK_K / 32)."""
    EACH: tl.constexpr = 1 if BITS == 16 else 32 // BITS
    WIDTH: tl.constexpr = (K + 63) // 64 * 8 if BITS == 4 else K // EACH
    if BITS != 16:
        weight = weight.to(tl.pointer_type(tl.int32))
    at = start // EACH + tl.arange(0, BLOCK_K // EACH)
    pointers = weight + base.to(tl.int64) * WIDTH + n[:, None] * WIDTH + at[None, :]
    w = tl.load(pointers, mask=(n < left)[:, None] & (at < WIDTH)[None, :], other=0)
    if BITS == 4:
        GROUPS: tl.constexpr = (K + 63) // 64
        group = start // 64 + tl.arange(0, BLOCK_K // 32) // 2
        at = scales + base.to(tl.int64) * GROUPS + n[:, None] * GROUPS + group[None, :]
        return w, tl.load(at, mask=(n < left)[:, None] & (group < GROUPS)[None, :], other=0.0).to(tl.float32)
    else:
        return w, 1.0


@triton.jit
def _inputs_of_one(
    x,
    y,
    x_norm,
    y_norm,
    x_factor,
    y_factor,
    start,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Inputs (BLOCK_K,) in float32, twice; at 8 and 4 bits (…, 16), those of 16 bytes in a row: of bytes or of their
    low halves, and of high halves."""
    if BITS == 16:
        k = start + tl.arange(0, BLOCK_K)
        low = _inputs(x, y, x_norm, y_norm, x_factor, y_factor, k, k, k, k < K).to(tl.float32)
        return low, low
    else:
        piece, byte = tl.arange(0, BLOCK_K * BITS // 128)[:, None], tl.arange(0, 16)[None, :]
        k = start + byte + (piece * 16 if BITS == 8 else piece // 2 * 64 + piece % 2 * 16)
        low = _inputs(x, y, x_norm, y_norm, x_factor, y_factor, k, k, k, k < K).to(tl.float32)
        high = low
        if BITS == 4:
            k += 32
            high = _inputs(x, y, x_norm, y_norm, x_factor, y_factor, k, k, k, k < K).to(tl.float32)
        return low, high


@triton.jit
def _products_of_one(w, scale, low, high, BITS: tl.constexpr):
    """Products with the inputs; at 8 and 4 bits their sums over 16 bytes, at 4 bits times their scale.

    Bits moved to their place in the mantissa of 1.0 make a float without a conversion, which is slower: 1 + q / 256 of
    a byte q + 128; 1 + q / 256 and 1 + q / 16 of its halves. What they have too much is taken off the sums.
    """
    if BITS == 16:
        return w.to(tl.float32) * low[None, :]
    else:
        one = 0x3F800000 | tl.program_id(1)  # 1.0; not known to the compiler, it goes with a mask in one instruction
        byte = tl.join(tl.join(w << 15, w >> 1), tl.join(w << 7, w >> 9))
        byte = tl.reshape(byte, (w.shape[0], w.shape[1] // 4, 16))
        if BITS == 8:
            value = ((byte & 0x7F8000) ^ (one | 0x400000)).to(tl.float32, bitcast=True)
            return 256 * tl.sum(value * low[None, :, :], 2) - 384 * tl.sum(low, 1)[None, :]
        else:
            low_half = ((byte & 0x78000) | one).to(tl.float32, bitcast=True)
            high_half = ((byte & 0x780000) | one).to(tl.float32, bitcast=True)
            low *= 16
            products = tl.sum(low_half * low[None, :, :], 2) + tl.sum(high_half * high[None, :, :], 2)
            return (16 * products - tl.sum(16.5 * low + 24 * high, 1)[None, :]) * scale


@triton.jit
def _factor_of_one(x, eps, K: tl.constexpr):
    """What the norm multiplies a row by: one over its root mean square."""
    k = tl.arange(0, triton.next_power_of_2(K))
    wide = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide, 0) / K + eps)


@triton.jit
def _several_rows(
    x,
    y,
    x_norm,
    y_norm,
    eps,
    weight,
    scales,
    up,
    up_scales,
    bias,
    residual,
    out,
    N,
    M,
    x_stride,
    y_stride,
    residual_stride,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A block of outputs of all rows. Rows behind the last repeat it and are not written."""
    base = tl.program_id(0) * BLOCK_N
    n, left = tl.arange(0, BLOCK_N), N - base
    rows = tl.arange(0, ROWS)[:, None]
    row = tl.minimum(rows, M - 1)
    place, there = (base + n)[None, :], (n < left)[None, :]
    scale, up_scale = _scales(scales, up_scales, place, there, BITS)
    offset, stream = _around(bias, residual, place, row * residual_stride + place, there)
    x_factor, y_factor = 1.0, 1.0
    if x_norm is not None:
        x_factor = _factor(x + row * x_stride, eps, K, ROWS)
    if y is not None:
        y_factor = _factor(y + row * y_stride, eps, K, ROWS)
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    up_total = total
    for start in range(0, K, BLOCK_K):
        low, high = _inputs_of_several(
            x, y, x_norm, y_norm, x_factor, y_factor, row * x_stride, row * y_stride, start, K, BITS, BLOCK_K
        )
        total = _multiply(total, weight, scales, base, n, left, low, high, start, K, BITS, BLOCK_N, BLOCK_K)
        if up is not None:
            up_total = _multiply(up_total, up, up_scales, base, n, left, low, high, start, K, BITS, BLOCK_N, BLOCK_K)
    result = total * scale
    if up is not None:
        result = _gated(result, up_total * up_scale, out)
    tl.store(out + rows * N + place, _finished(result, offset, stream, out), mask=there & (rows < M))


@triton.jit
def _inputs_of_several(
    x,
    y,
    x_norm,
    y_norm,
    x_factor,
    y_factor,
    x_row,
    y_row,
    start,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Inputs (ROWS, BLOCK_K), twice; at 4 bits those of the low and of the high halves (ROWS, BLOCK_K / 2)."""
    if BITS == 4:
        byte = tl.arange(0, BLOCK_K // 2)[None, :]
        k = start + byte // 32 * 64 + byte % 32
        low = _inputs(x, y, x_norm, y_norm, x_factor, y_factor, x_row + k, y_row + k, k, k < K)
        k += 32
        return low, _inputs(x, y, x_norm, y_norm, x_factor, y_factor, x_row + k, y_row + k, k, k < K)
    else:
        k = start + tl.arange(0, BLOCK_K)[None, :]
        low = _inputs(x, y, x_norm, y_norm, x_factor, y_factor, x_row + k, y_row + k, k, k < K)
        return low, low


@triton.jit
def _multiply(
    total,
    weight,
    scales,
    base,
    n,
    left,
    low,
    high,
    start,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add the products of a step. Weights of 4 bits are rounded to the inputs' dtype, as the definition has them."""
    if BITS == 4:
        WIDTH: tl.constexpr = (K + 63) // 64 * 32
        byte = start // 2 + tl.arange(0, BLOCK_K // 2)
        at = weight + base.to(tl.int64) * WIDTH + n[:, None] * WIDTH + byte[None, :]
        word = tl.load(at, mask=(n < left)[:, None] & (byte < WIDTH)[None, :], other=0)
        group = start // 64 + tl.arange(0, BLOCK_K // 64)
        at = scales + base.to(tl.int64) * (WIDTH // 32) + n[:, None] * (WIDTH // 32) + group[None, :]
        scale = tl.load(at, mask=(n < left)[:, None] & (group < WIDTH // 32)[None, :], other=0.0)
        low_half = _widened(word & 15, scale, low.dtype, BLOCK_N, BLOCK_K)
        high_half = _widened(word >> 4, scale, low.dtype, BLOCK_N, BLOCK_K)
        return _dot(high, high_half, _dot(low, low_half, total))
    else:
        k = start + tl.arange(0, BLOCK_K)
        at = weight + base.to(tl.int64) * K + n[:, None] * K + k[None, :]
        w = tl.load(at, mask=(n < left)[:, None] & (k < K)[None, :], other=0)
        return _dot(low, w, total)


@triton.jit
def _dot(x, w, total):
    """Add x wᵀ."""
    if INTERPRETED:
        return tl.dot(x.to(tl.float32), tl.trans(w.to(tl.float32)), total)
    else:
        return tl.dot(x, tl.trans(w.to(x.dtype)), total)


@triton.jit
def _widened(half, scale, dtype: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return 4-bit weights (BLOCK_N, BLOCK_K / 2) times the scales (BLOCK_N, BLOCK_K / 64) of their groups."""
    wide = tl.reshape(half.to(tl.float32) - 8, (BLOCK_N, BLOCK_K // 64, 32)) * scale.to(tl.float32)[:, :, None]
    return tl.reshape(wide.to(dtype), (BLOCK_N, BLOCK_K // 2))


@triton.jit
def _factor(x, eps, K: tl.constexpr, ROWS: tl.constexpr):
    """What the norm multiplies rows (ROWS, 1) by: one over their root mean squares."""
    total = tl.zeros((ROWS, 256), tl.float32)
    for start in tl.range(0, K, 256):
        k = start + tl.arange(0, 256)[None, :]
        wide = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        total += wide * wide
    return tl.rsqrt(tl.sum(total, 1) / K + eps)[:, None]


@triton.jit
def _inputs(x, y, x_norm, y_norm, x_factor, y_factor, x_at, y_at, k, there):
    """The product's inputs: `x`, or its norm, or the mean of the norms of `x` and `y`."""
    value = tl.load(x + x_at, mask=there, other=0.0)
    if x_norm is not None:
        value = _weighed(value, x_factor, tl.load(x_norm + k, mask=there, other=0.0))
    if y is not None:
        other = tl.load(y + y_at, mask=there, other=0.0)
        other = _weighed(other, y_factor, tl.load(y_norm + k, mask=there, other=0.0))
        both = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
        value = (both.to(tl.float32) / 2).to(value.dtype)
    return value


@triton.jit
def _weighed(value, factor, weight):
    """A norm's value, rounded before its weight as the definition does."""
    normed = (value.to(tl.float32) * factor).to(value.dtype)
    return (normed.to(tl.float32) * weight.to(tl.float32)).to(value.dtype)


@triton.jit
def _scales(scales, up_scales, place, there, BITS: tl.constexpr):
    """What sums of products with 8-bit weights are multiplied by, for both weights; asked for early."""
    scale, up_scale = 1.0, 1.0
    if BITS == 8:
        scale = tl.load(scales + place, mask=there, other=0.0)
        if up_scales is not None:
            up_scale = tl.load(up_scales + place, mask=there, other=0.0)
    return scale, up_scale


@triton.jit
def _around(bias, residual, place, residual_at, there):
    """The bias and the stream, or zeros."""
    offset, stream = 0.0, 0.0
    if bias is not None:
        offset = tl.load(bias + place, mask=there, other=0.0).to(tl.float32)
    if residual is not None:
        stream = tl.load(residual + residual_at, mask=there, other=0.0).to(tl.float32)
    return offset, stream


@triton.jit
def _gated(gate, up, out):
    """SiLU(gate) · up, each part rounded."""
    gate = gate.to(out.dtype.element_ty).to(tl.float32)
    activated = (gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    return activated * up.to(out.dtype.element_ty).to(tl.float32)


@triton.jit
def _finished(result, bias, stream, out):
    """The result with its bias, rounded, and added to the stream."""
    result = (result + bias).to(out.dtype.element_ty)
    return (stream + result.to(tl.float32)).to(out.dtype.element_ty)
