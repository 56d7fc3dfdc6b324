"""How outputs of kernels are compared."""

from torch import Tensor


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Compare by the largest value of each tensor."""
    for name, expected in theirs.items():
        x, expected = ours[name].detach().double(), expected.detach().double()
        error = (x - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert float(error) <= tolerance, f"{name}: {float(error):.1e}"  # also where it is NaN
