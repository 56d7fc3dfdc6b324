"""Weights in 8 or 4 bits: how they are stored, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.errors import HymbaError

GROUP = 64  # inputs that share a scale at 4 bits


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix (out, in) in 8 bits with a scale per output, or in 4 bits with a scale per output and 64 inputs.

    8 bits: `values` (out, in) int8 and `scales` (out,) float32; an entry is value · scale.
    4 bits: `values` (out, ⌈in/64⌉ · 32) uint8 and `scales` (out, ⌈in/64⌉) bfloat16. The 32 bytes of a group of 64
    inputs hold input j in the low half of byte j and input 32 + j in its high half; an entry is (half − 8) · scale,
    and the halves behind the last input are 8.

    Raises:
        HymbaError: dtypes or shapes are not these.
    """

    values: Tensor
    scales: Tensor
    in_features: int

    def __post_init__(self) -> None:
        groups, out = -(-self.in_features // GROUP), self.values.shape[0]
        eight = (out, self.in_features), torch.int8, (out,), torch.float32
        four = (out, groups * GROUP // 2), torch.uint8, (out, groups), torch.bfloat16
        found = tuple(self.values.shape), self.values.dtype, tuple(self.scales.shape), self.scales.dtype
        if found not in (eight, four):
            raise HymbaError(
                f"not a quantised weight of {self.in_features} inputs: values {tuple(self.values.shape)} "
                f"{self.values.dtype} with scales {tuple(self.scales.shape)} {self.scales.dtype}"
            )

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 8 if self.values.dtype == torch.int8 else 4

    @property
    def out_features(self) -> int:
        """The rows of the matrix."""
        return self.values.shape[0]

    @property
    def shape(self) -> torch.Size:
        """(out, in), of the matrix."""
        return torch.Size((self.out_features, self.in_features))

    def outputs(self, start: int, stop: int) -> QuantizedWeight:
        """Return the outputs from `start` to `stop`, without a copy."""
        return QuantizedWeight(self.values[start:stop], self.scales[start:stop], self.in_features)


def round_to_int8(weight: Tensor, scales: Tensor | None = None) -> QuantizedWeight:
    """Round a matrix (out, in) to 8 bits, to the nearest under `scales` (out,); by default the largest becomes ±127."""
    wide = weight.float()
    if scales is None:
        scales = wide.abs().amax(dim=1) / 127
    safe = torch.where(scales == 0, 1.0, scales.float())
    values = (wide / safe[:, None]).round().clamp(-127, 127).to(torch.int8)
    return QuantizedWeight(values, scales.float().contiguous(), weight.shape[1])


def round_to_int4(weight: Tensor, scales: Tensor | None = None) -> QuantizedWeight:
    """Round a matrix (out, in) to 4 bits, to the nearest under `scales` (out, ⌈in/64⌉), which are taken in bfloat16.

    A scale may be negative. By default its sign lets the largest entry of the group become −8.
    """
    grouped = F.pad(weight.float(), (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    if scales is None:
        scales = grouped.gather(2, grouped.abs().argmax(dim=2, keepdim=True))[:, :, 0] / -8
    scales = scales.bfloat16().contiguous()
    safe = torch.where(scales == 0, 1.0, scales.float())
    halves = ((grouped / safe[:, :, None]).round().clamp(-8, 7) + 8).to(torch.uint8)
    low, high = halves.chunk(2, dim=2)
    return QuantizedWeight((low | high << 4).flatten(1), scales, weight.shape[1])


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return the matrix (out, in) that `weight` stands for, its float32 entries rounded to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    if weight.bits == 8:
        return (weight.values.to(wide) * weight.scales[:, None]).to(dtype)
    packed = weight.values.unflatten(1, (-1, GROUP // 2))
    halves = torch.cat((packed & 15, packed >> 4), dim=2).to(wide) - 8
    return (halves * weight.scales[:, :, None].to(wide)).flatten(1)[:, : weight.in_features].to(dtype)
