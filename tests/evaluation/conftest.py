"""One micro checkpoint for all tests of this folder."""

from pathlib import Path

import pytest
from checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that `--model` takes; nobody changes it."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "micro")
