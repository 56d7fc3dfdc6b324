"""The angles of rotary position embedding, with Hymba's NTK-scaled base."""

from __future__ import annotations

import torch
from torch import Tensor

# The released code writes this factor of the NTK formula as a literal.
NTK_FACTOR = 2.0


def ntk_base(theta: float, length: int, trained_length: int, width: int) -> float:
    """Return the base that stretches rotary embeddings from `trained_length` to `length` positions.

    base' = theta · (2·length/trained_length − 1)^(width/(width − 2)), "NTK-aware" scaling; the released model uses it
    statically with length = max_position_embeddings, which gives 74,534.83 for 10000, 8192, 2048 and 64.
    """
    return theta * (NTK_FACTOR * length / trained_length - 1.0) ** (width / (width - 2))


def rotary_tables(positions: Tensor, width: int, base: float | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine tables for `positions`.

    Args:
        positions: (B, T) or any other shape: integer positions, meta tokens counted.
        width: K, the width of a key head.
        base: rotary base, after scaling; one for all positions, or (B,) with one per row.
        dtype: dtype of the result; angles are computed in at least float32.

    Returns:
        Two tensors (..., K/2) of `dtype`: angle i is position · base^(−2i/K).
    """
    wide = torch.promote_types(dtype, torch.float32)
    if isinstance(base, Tensor):
        base = base.to(wide).to(positions.device)[:, None, None]
    exponents = torch.arange(0, width, 2, dtype=torch.int64, device=positions.device).to(wide) / width
    angles = positions.to(wide)[..., None] * (1.0 / base**exponents)
    return angles.cos().to(dtype), angles.sin().to(dtype)
