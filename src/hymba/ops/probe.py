"""The smallest Triton kernel: whether it compiles and runs tells whether the others will."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.gpu import interpreted


@triton.jit
def _count(to, size: tl.constexpr):
    places = tl.arange(0, size)
    tl.store(to + places, places)


def count(to: Tensor) -> None:
    """Write 0, 1, 2, … into `to` (n,) int32; n is a power of two."""
    _count[(1,)](to, to.numel())


def run() -> None:
    """Run the kernel once.

    Raises:
        RuntimeError: its result is wrong. Triton raises what it likes when it cannot compile.
    """
    found = torch.zeros(16, dtype=torch.int32, device="cpu" if interpreted() else "cuda")
    count(found)
    if found.tolist() != list(range(16)):
        raise RuntimeError(f"a kernel that counts to 15 gave {found.tolist()}")
