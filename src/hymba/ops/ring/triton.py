"""A ring's places in Triton: one launch for what are a dozen small ones in torch, at every decode step; and one that
writes a layer's keys and values there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops import gpu
from hymba.ops.attention.heads import Heads, QuantizedHeads
from hymba.ops.ring import reference

_BLOCK = 1024  # slots of a program


def ring_positions(held: Tensor, used: int, ring: int, num_meta: int) -> Tensor:
    """Triton path for :func:`hymba.ops.ring.ring_positions`, same signature."""
    if _unfit(held) or num_meta + used == 0:
        return reference.ring_positions(held, used, ring, num_meta)
    held = held.contiguous()
    positions = held.new_empty(len(held), num_meta + used)
    grid = len(held), triton.cdiv(num_meta + used, _BLOCK)
    _positions[grid](held, positions, num_meta + used, ring, num_meta, block=_BLOCK)
    return positions


def ring_slots(
    lengths: Tensor, counts: Tensor | None, steps: int, ring: int, num_meta: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Triton path for :func:`hymba.ops.ring.ring_slots`, same signature."""
    if _unfit(lengths) or not steps:
        return reference.ring_slots(lengths, counts, steps, ring, num_meta)
    columns = min(steps, ring)
    slots = lengths.new_empty(len(lengths), columns)
    tokens = lengths.new_empty(len(lengths), columns) if steps > ring else None
    real = None if counts is None else lengths.new_empty((len(lengths), columns), dtype=torch.bool)
    block = min(_BLOCK, triton.next_power_of_2(columns))
    arguments = lengths.contiguous(), None if counts is None else counts.contiguous(), slots, tokens, real
    _slots[len(lengths), triton.cdiv(columns, block)](*arguments, steps, columns, ring, num_meta, block=block)
    return slots, tokens, real


def write_ring(
    rows: Tensor,
    slots: Tensor,
    tokens: Tensor | None,
    real: Tensor | None,
    own: Sequence[Heads],
    stored: Sequence[Heads],
) -> None:
    """Triton path for :func:`hymba.ops.ring.write_ring`, same signature; takes two kinds of heads, as keys and values.

    Tensors for buffers in 8 bits are rounded as the definition does on a CPU, to the bit.
    """
    if _unfit(slots) or len(own) != 2 or not slots.numel() or not all(map(_fits, own, stored)):
        reference.write_ring(rows, slots, tokens, real, own, stored)
        return
    index = (None if x is None else x.contiguous() for x in (slots, tokens, real))
    keys, values = map(_heads, own, stored)
    _write[(slots.numel(),)](*index, slots.shape[1], *keys, *values, num_warps=2)


def _fits(own: Heads, stored: Heads) -> bool:
    """Return whether the kernel writes the one into the other."""
    (new, scales), (buffer, buffer_scales) = _parts(own), _parts(stored)
    known = new.dtype in gpu.DTYPES if scales is None else buffer_scales is not None
    known = known and (buffer_scales is not None or buffer.dtype in gpu.DTYPES)
    dense = buffer[0, 0].is_contiguous() and (buffer_scales is None or buffer_scales[0, 0].is_contiguous())
    return known and dense and new.shape[2:] == buffer.shape[2:] and buffer.numel() > 0


def _heads(own: Heads, stored: Heads) -> tuple[Any, ...]:
    """Return what the kernel is told of keys or of values: tensors, how far rows and tokens lie apart in each, and the
    number of heads and their width."""
    (new, scales), (buffer, buffer_scales) = _parts(own), _parts(stored)
    new = new if new[0, 0].is_contiguous() else new.contiguous()
    scales = None if scales is None else scales.contiguous()
    tensors = new, scales, buffer, buffer_scales
    apart = (stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2]))
    return *tensors, *apart, *new.shape[2:]


def _parts(heads: Heads) -> tuple[Tensor, Tensor | None]:
    return (heads.values, heads.scales) if isinstance(heads, QuantizedHeads) else (heads.detach(), None)


def _unfit(counts: Tensor) -> bool:
    """Return whether torch must serve; kernels of whole numbers fit whatever the model's dtype is."""
    return counts.dtype != torch.int64 or bool(gpu.why_unfit(counts.new_empty(0, dtype=torch.float32)))


@triton.jit
def _positions(held, positions, columns, ring, num_meta, block: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    last = tl.load(held + row) - 1
    past = (last - (column - num_meta)) % ring
    tokens = last - (past + ring) % ring  # the remainder of a negative number is one, in C
    found = tl.where(column < num_meta, column, tl.where(tokens >= 0, tokens + num_meta, -1))
    tl.store(positions + row * columns + column, found, column < columns)


@triton.jit
def _slots(lengths, counts, slots, tokens, real, steps, columns, ring, num_meta, block: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    length = tl.load(lengths + row)
    count = length * 0 + steps
    if counts is not None:
        count = tl.load(counts + row)
    token = tl.maximum(count - ring, 0) + column
    to = row * columns + column
    tl.store(slots + to, num_meta + (length + token) % ring, column < columns)
    if tokens is not None:
        tl.store(tokens + to, token, column < columns)
    if real is not None:
        tl.store(real + to, token < count, column < columns)


@triton.jit
def _nearest(x):
    """Return float32 values below 2²² rounded to whole numbers, halves to the even one."""
    return (x + 12582912.0) - 12582912.0  # 1.5 · 2²³, beyond which floats are whole


@triton.jit
def _copy(
    new, scales, to, to_scales, row, token, slot,
    n_row, n_token, s_row, s_token, t_row, t_slot, u_row, u_slot, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Copy one token's heads, rounded to 8 bits where those of the buffer are and its own are not."""
    heads, columns = tl.arange(0, triton.next_power_of_2(HEADS)), tl.arange(0, triton.next_power_of_2(WIDTH))
    there = heads < HEADS
    mask = there[:, None] & (columns < WIDTH)[None, :]
    place = heads[:, None] * WIDTH + columns[None, :]
    x = tl.load(new + row * n_row + token * n_token + place, mask=mask, other=0)
    if scales is not None:
        scale = tl.load(scales + row * s_row + token * s_token + heads, mask=there)
        tl.store(to_scales + row * u_row + slot * u_slot + heads, scale, mask=there)
    elif to_scales is not None:
        wide = x.to(tl.float32)
        scale = tl.div_rn(tl.max(tl.abs(wide), axis=1), tl.full(heads.shape, 127.0, tl.float32)).to(tl.bfloat16)
        tl.store(to_scales + row * u_row + slot * u_slot + heads, scale, mask=there)
        divisor = scale.to(tl.float32)
        divisor = tl.where(divisor == 0, 1.0, divisor)
        x = _nearest(tl.div_rn(wide, tl.broadcast_to(divisor[:, None], wide.shape)))
    tl.store(to + row * t_row + slot * t_slot + place, x.to(to.dtype.element_ty), mask=mask)


@triton.jit
def _write(
    slots, tokens, real, columns,
    k, ks, k_to, ks_to, k0, k1, k2, k3, k4, k5, k6, k7, K_HEADS: tl.constexpr, K_WIDTH: tl.constexpr,
    v, vs, v_to, vs_to, v0, v1, v2, v3, v4, v5, v6, v7, V_HEADS: tl.constexpr, V_WIDTH: tl.constexpr,
):  # fmt: skip
    """Write one token's keys and values; the numbers after the tensors tell how far rows and tokens lie apart."""
    n = tl.program_id(0)
    row, column = (n // columns).to(tl.int64), n % columns
    token = row * 0 + column
    if tokens is not None:
        token = tl.load(tokens + n)
    is_real = row >= 0
    if real is not None:
        is_real = tl.load(real + n) != 0
    slot = tl.load(slots + n)
    if is_real:
        _copy(k, ks, k_to, ks_to, row, token, slot, k0, k1, k2, k3, k4, k5, k6, k7, K_HEADS, K_WIDTH)
        _copy(v, vs, v_to, vs_to, row, token, slot, v0, v1, v2, v3, v4, v5, v6, v7, V_HEADS, V_WIDTH)
