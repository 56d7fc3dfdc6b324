"""Keys and values in 8 bits: how they are stored, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hymba.errors import HymbaError


@dataclass(frozen=True)
class QuantizedHeads:
    """Keys or values (B, S, G, width) in 8 bits, with a scale per row, slot and head.

    `values` (B, S, G, width) int8 and `scales` (B, S, G) bfloat16; an entry is value · scale.

    Raises:
        HymbaError: dtypes or shapes are not these.
    """

    values: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        values, scales = self.values, self.scales
        if values.dtype != torch.int8 or scales.dtype != torch.bfloat16 or values.shape[:-1] != scales.shape:
            raise HymbaError(
                f"not quantised heads: values {tuple(values.shape)} {values.dtype} "
                f"with scales {tuple(scales.shape)} {scales.dtype}"
            )

    @property
    def shape(self) -> torch.Size:
        """(B, S, G, width)."""
        return self.values.shape

    def slots(self, start: int, stop: int) -> QuantizedHeads:
        """Return the slots from `start` to `stop`, without a copy."""
        return QuantizedHeads(self.values[:, start:stop], self.scales[:, start:stop])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the heads (B, S, G, width) that this stands for, their float32 entries rounded to `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        return (self.values.to(wide) * self.scales[..., None].to(wide)).to(dtype)


Heads = Tensor | QuantizedHeads


def round_heads(x: Tensor) -> QuantizedHeads:
    """Round keys or values (B, S, G, width) to 8 bits; the largest of a head becomes ±127.

    The scale is rounded to bfloat16 first and the integers are the nearest under that, so that it adds no error.
    """
    wide = x.float()
    scales = (wide.abs().amax(dim=-1) / 127).bfloat16()
    safe = torch.where(scales == 0, 1.0, scales.float())
    return QuantizedHeads((wide / safe[..., None]).round_().to(torch.int8), scales)


def widen(x: Heads, dtype: torch.dtype) -> Tensor:
    """Return keys or values as a tensor of `dtype`."""
    return x.dequantize(dtype) if isinstance(x, QuantizedHeads) else x.to(dtype)
