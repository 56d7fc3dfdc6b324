"""How many threads a command runs on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hymba.model import Hymba

# Below this many parameters the operations of a step are shorter than the wait for a second thread.
SMALL = 50_000_000


def spare_threads(model: Hymba) -> None:
    """Let a small model decode on one thread, unless OMP_NUM_THREADS says how many to take."""
    import torch

    from hymba.model import count_parameters

    if "OMP_NUM_THREADS" not in os.environ and count_parameters(model) < SMALL:
        torch.set_num_threads(1)
