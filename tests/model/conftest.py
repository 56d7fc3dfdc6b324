"""A micro model, and the outputs of the official code."""

from pathlib import Path

import pytest
import torch
from micro import micro_model
from safetensors.torch import load_file

from hymba.model import Hymba

TINY_A = Path(__file__).parent.parent / "fixtures" / "tiny_a"


@pytest.fixture(scope="session")
def tiny_a() -> Path:
    """The directory of an official checkpoint with random weights."""
    return TINY_A


@pytest.fixture(scope="session")
def expected() -> dict[str, torch.Tensor]:
    """What the official code computes with it."""
    return load_file(TINY_A / "expected.safetensors")


@pytest.fixture(scope="session")
def model() -> Hymba:
    """One micro model for all tests of this folder; nobody changes it."""
    return micro_model().requires_grad_(False)
