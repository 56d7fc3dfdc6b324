"""The launches that `python -m benchmarks.compiled` compiles: each op's wrappers at the sizes of Hymba-1.5B.

Tensors are on the CPU and hold anything: nothing is run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hymba.ops import probe
from hymba.ops.ring.triton import ring_positions, ring_slots


def _probe() -> None:
    probe.count(torch.zeros(16, dtype=torch.int32))


def _ring() -> None:
    lengths = torch.zeros(8, dtype=torch.int64)
    ring_positions(lengths, 1025, 1025, 128)
    ring_slots(lengths, None, 1, 1025, 128)
    ring_slots(lengths, lengths, 8, 1025, 128)


CASES: dict[str, Callable[[], None]] = {"probe": _probe, "ring": _ring}
