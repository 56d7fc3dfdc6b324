"""What tests of C++ kernels share: every level of instructions, and memory that is full of NaN."""

import ctypes
from collections.abc import Iterator

import pytest
import torch

from hymba.ops import native


@pytest.fixture(params=native.available())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.use_level(request.param):
        yield request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN in tensors and huge numbers in the kernels' own buffers, not zeros by luck."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    torch.use_deterministic_algorithms(True, warn_only=True)  # on a GPU some operations of torch cannot be
    torch.utils.deterministic.fill_uninitialized_memory = True
    if mallopt is not None:
        mallopt(-6, 0x80)  # M_PERTURB: fill with 0x7f7f…
    yield
    torch.use_deterministic_algorithms(False)
    if mallopt is not None:
        mallopt(-6, 0)
