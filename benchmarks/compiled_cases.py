"""The launches that `python -m benchmarks.compiled` compiles: each op's wrappers at the sizes of Hymba-1.5B.

Tensors are on the CPU and hold anything: nothing is run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hymba.ops import probe


def _probe() -> None:
    probe.count(torch.zeros(16, dtype=torch.int32))


CASES: dict[str, Callable[[], None]] = {"probe": _probe}
