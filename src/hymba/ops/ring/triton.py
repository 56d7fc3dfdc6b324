"""A ring's places in Triton: one launch for what are a dozen small ones in torch, at every decode step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops import gpu
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
    if _unfit(lengths):
        return reference.ring_slots(lengths, counts, steps, ring, num_meta)
    columns = min(steps, ring)
    slots = lengths.new_empty(len(lengths), columns)
    tokens = lengths.new_empty(len(lengths), columns) if steps > ring else None
    real = None if counts is None else lengths.new_empty((len(lengths), columns), dtype=torch.bool)
    block = min(_BLOCK, triton.next_power_of_2(columns))
    arguments = lengths.contiguous(), None if counts is None else counts.contiguous(), slots, tokens, real
    _slots[len(lengths), triton.cdiv(columns, block)](*arguments, steps, columns, ring, num_meta, block=block)
    return slots, tokens, real


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
