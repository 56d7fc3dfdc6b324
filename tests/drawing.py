"""What the tests of drawing share."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from hymba.ops.draw import reference

SETTINGS = tuple[float, int, float, float, int, int]

ROWS = st.tuples(
    st.sampled_from([0.0, 1e-30, 0.3, 1.0, 2.5, 40.0]),
    st.sampled_from([1, 2, 7, 100, 10**9]),
    st.sampled_from([1e-9, 0.3, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0]),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**20),
)


def settings(rows: list[SETTINGS], device: torch.device | None = None) -> tuple[Tensor, ...]:
    """Temperature, top_k, top_p, min_p, seed and index of each row."""
    dtypes = (torch.float64, torch.int64, torch.float64, torch.float64, torch.int64, torch.int64)
    columns = zip(*rows, strict=True)
    return tuple(torch.tensor(x, dtype=dtype, device=device) for x, dtype in zip(columns, dtypes, strict=True))


def near(logits: Tensor, row: SETTINGS) -> set[int]:
    """What the definition draws from one row if a probability meets `top_p` or `min_p` to rounding."""
    temperature, top_k, top_p, min_p, *counts = row
    moved = [(top_p * p, min_p * m) for p in (1 - 1e-6, 1 + 1e-6) for m in (1 - 1e-6, 1 + 1e-6)]
    return {
        int(reference.draw_tokens(logits, *settings([(temperature, top_k, p, m, *counts)], logits.device)))
        for p, m in moved
    }


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic of counts against what was expected of them."""
    expected = probabilities.double() * int(counts.sum())
    return float(((counts - expected) ** 2 / expected).sum())
