"""The definition of a ring's places, and of writing into them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hymba.ops.attention.heads import Heads, QuantizedHeads, round_heads


def ring_positions(held: Tensor, used: int, ring: int, num_meta: int) -> Tensor:
    """Definition of :func:`hymba.ops.ring.ring_positions`, same signature."""
    slots = torch.arange(used, device=held.device)
    # Slot j of a ring that has taken n tokens holds the newest token p < n with p = j (mod ring).
    last = held[:, None] - 1
    tokens = last - (last - slots) % ring
    positions = torch.where(tokens >= 0, tokens + num_meta, -1)
    metas = torch.arange(num_meta, device=held.device).expand(len(held), -1)
    return torch.cat((metas, positions), dim=1)


def ring_slots(
    lengths: Tensor, counts: Tensor | None, steps: int, ring: int, num_meta: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Definition of :func:`hymba.ops.ring.ring_slots`, same signature."""
    tokens = torch.arange(min(steps, ring), device=lengths.device)
    first = lengths[:, None] + tokens
    if counts is None and steps <= ring:
        return num_meta + first % ring, None, None
    # The last `ring` real tokens of each row; consecutive tokens never share a slot.
    real = lengths.new_full((len(lengths),), steps) if counts is None else counts
    skipped = (real - ring).clamp(min=0)[:, None]
    tokens = skipped + tokens
    is_real = None if counts is None else tokens < real[:, None]
    return num_meta + (first + skipped) % ring, tokens if steps > ring else None, is_real


def write_ring(
    rows: Tensor,
    slots: Tensor,
    tokens: Tensor | None,
    real: Tensor | None,
    own: Sequence[Heads],
    stored: Sequence[Heads],
) -> None:
    """Definition of :func:`hymba.ops.ring.write_ring`, same signature."""
    for new, buffer in zip(own, stored, strict=True):
        if not isinstance(buffer, QuantizedHeads):
            assert isinstance(new, Tensor)
            _write(rows, slots, tokens, real, new.detach().to(buffer.dtype), buffer)
            continue
        new = new if isinstance(new, QuantizedHeads) else round_heads(new.detach())
        _write(rows, slots, tokens, real, new.values, buffer.values)
        _write(rows, slots, tokens, real, new.scales, buffer.scales)


def _write(
    rows: Tensor, slots: Tensor, tokens: Tensor | None, real: Tensor | None, new: Tensor, buffer: Tensor
) -> None:
    """Write one tensor (B, T, …) into its buffer."""
    if tokens is not None:
        new = new[rows, tokens]
    if real is not None:  # padding puts back what its slot holds
        new = torch.where(real.view(*real.shape, *[1] * (new.ndim - 2)), new, buffer[rows, slots])
    buffer[rows, slots] = new
