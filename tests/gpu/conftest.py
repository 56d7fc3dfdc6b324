"""What runs on an NVIDIA GPU: the model, generation, the engine and training there, with every kernel in its place.

Without a GPU nothing here is collected; the kernels themselves are tested in tests/ops, interpreted where need be. A
file that is named on the command line runs anywhere.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hymba.ops import use_backend

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]

TINY_A = Path(__file__).parent.parent / "fixtures" / "tiny_a"


@pytest.fixture(params=["triton", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels, and the torch path in their place."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def tiny_a() -> Path:
    """The directory of an official checkpoint with random weights."""
    return TINY_A


@pytest.fixture(scope="session")
def expected() -> dict[str, torch.Tensor]:
    """What the official code computes with it, on the CPU."""
    return load_file(TINY_A / "expected.safetensors")


@pytest.fixture(autouse=True)
def exact_products() -> None:
    """Products of float32 are float32's, not TF32's."""
    assert not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
