"""Where tokens lie in a buffer `[meta tokens | ring]`: text token p in slot M + p mod ring."""

from __future__ import annotations

from torch import Tensor

from hymba.ops import gpu
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


__all__ = ["POSITIONS", "SLOTS", "ring_positions", "ring_slots"]
