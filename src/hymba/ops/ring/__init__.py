"""Where tokens lie in a buffer `[meta tokens | ring]`, text token p in slot M + p mod ring, and how they get there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hymba.ops import gpu
from hymba.ops.attention.heads import Heads
from hymba.ops.backend import choose
from hymba.ops.ring import reference

POSITIONS = {
    "reference": reference.ring_positions,
    "cpu": reference.ring_positions,
    "triton": gpu.deferred("hymba.ops.ring.triton", "ring_positions"),
}
SLOTS = {
    "reference": reference.ring_slots,
    "cpu": reference.ring_slots,
    "triton": gpu.deferred("hymba.ops.ring.triton", "ring_slots"),
}
WRITES = {
    "reference": reference.write_ring,
    "cpu": reference.write_ring,
    "triton": gpu.deferred("hymba.ops.ring.triton", "write_ring"),
}


def ring_positions(held: Tensor, used: int, ring: int, num_meta: int) -> Tensor:
    """Return the positions of what lies in a buffer.

    Args:
        held: (B,) int64, the text tokens that each row has taken.
        used: slots of the ring to tell of, from its first.
        ring: slots of the ring.
        num_meta: M.

    Returns:
        (B, M + used) int64: 0 … M − 1, then of each slot the position, meta tokens counted, of the newest token that
        went there; −1 where none did.
    """
    return choose(POSITIONS, held)(held, used, ring, num_meta)


def ring_slots(
    lengths: Tensor, counts: Tensor | None, steps: int, ring: int, num_meta: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return where a call's newest tokens go: C of each row, all T if they fit the ring, else the last `ring` ones.

    Args:
        lengths: (B,) int64, the text tokens held before.
        counts: (B,) int64, how many of the call's tokens are real; None: all of them.
        steps: T.
        ring: slots of the ring.
        num_meta: M.

    Returns:
        slots: (B, C) int64, of the buffer.
        tokens: (B, C) int64, which of the call's tokens go there; None if they are all of them in order.
        real: (B, C) bool, False where there is only padding; None if there is none.
    """
    return choose(SLOTS, lengths)(lengths, counts, steps, ring, num_meta)


def write_ring(
    rows: Tensor,
    slots: Tensor,
    tokens: Tensor | None,
    real: Tensor | None,
    own: Sequence[Heads],
    stored: Sequence[Heads],
) -> None:
    """Write a call's own keys and values into the buffers that hold them, each token into its slot.

    Args:
        rows: (B, 1) int64, 0 … B − 1.
        slots, tokens, real: as :func:`ring_slots` returns them. Padding changes nothing.
        own: (B, T, G, width) each, tensors or quantised; no gradient flows through.
        stored: (B, M + ring, G, width) each, written in place; a tensor for a buffer in 8 bits is rounded by
            :func:`hymba.ops.attention.round_heads`, for another cast to its dtype.
    """
    choose(WRITES, slots)(rows, slots, tokens, real, own, stored)


__all__ = ["POSITIONS", "SLOTS", "WRITES", "ring_positions", "ring_slots", "write_ring"]
