"""Where kernels of GPUs are tested, and how outputs of kernels are compared."""

import torch
from torch import Tensor

# Where Triton kernels run; on the CPU they are interpreted.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Compare by the largest value of each tensor."""
    for name, expected in theirs.items():
        x, expected = ours[name].detach().cpu().double(), expected.detach().cpu().double()
        error = (x - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert float(error) <= tolerance, f"{name}: {float(error):.1e}"  # also where it is NaN
