"""Quantised models: which weights become 8 or 4 bits wide, how their scales are found, and the modules that hold them.

Every projection, the token embedding and the head are quantised. The convolution, A, D, the step sizes' bias, the norms
and the meta tokens are few and stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymba.errors import HymbaError
from hymba.model.hymba import Hymba, Linear, StepProjection
from hymba.ops.linear import GROUP, QuantizedWeight, dequantize, round_to_int4, round_to_int8

# What follows the name of a quantised weight, in a module and in a file: its whole numbers and its scales.
PARTS = ("_packed", "_scale")
CONFIG_KEY = "quantization_config"
# At 8 bits in a 4-bit model too: tables that every token reads, and the small maps that steer the scan.
SENSITIVE = ("embed_tokens", "lm_head", "x_proj", "dt_proj")

# Where the search for a 4-bit scale starts: the largest entry of the group at so many steps from zero.
STARTS = (7.0, 7.5, 8.0, 8.5, 9.0, 9.5, 10.0)
BLOCK = 1 << 17  # entries of a weight searched together: few enough to stay in cache


@dataclass(frozen=True)
class Scheme:
    """How the weights of a model are quantised: 8 bits, or 4 bits where that does little harm.

    Raises:
        HymbaError: `bits` is neither.
    """

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise HymbaError(f"weights can be quantised to 8 or 4 bits, not {self.bits!r}")

    @classmethod
    def from_released(cls, released: Mapping[str, Any]) -> Scheme | None:
        """Read the ``quantization_config`` of a ``config.json``; None if it has none.

        Raises:
            HymbaError: it names a scheme that is not ours.
        """
        found = released.get(CONFIG_KEY)
        if found is None:
            return None
        for bits in (8, 4):
            if found == cls(bits).to_released():
                return cls(bits)
        raise HymbaError(
            f"config key {CONFIG_KEY} is {found!r}: only {cls(4).to_released()!r} and 8 bits are supported"
        )

    def to_released(self) -> dict[str, Any]:
        """Return the ``quantization_config`` of a ``config.json``."""
        group = {"group_size": GROUP} if self.bits == 4 else {}
        return {"quant_method": "hymba", "bits": self.bits, **group}

    def bits_of(self, module: str) -> int:
        """Return the bits of the weight of the module called `module`."""
        return 8 if module.rpartition(".")[2] in SENSITIVE else self.bits


class Rounding(NamedTuple):
    """What quantising one weight did.

    name: of the weight, in the model. bits: 8 or 4. entries: how many numbers it holds. error: ‖W − Ŵ‖ / ‖W‖.
    """

    name: str
    bits: int
    entries: int
    error: float


@torch.no_grad()
def quantize(model: Hymba, bits: int, report: Callable[[Rounding], None] = lambda rounding: None) -> Hymba:
    """Quantise the weights of `model` in place, one after another, and return it, frozen and in evaluation mode.

    Args:
        model: in full precision; the dtype of what is not quantised is kept, and is the dtype of the arithmetic.
        bits: 8 or 4, of the projections; see `Scheme`.
        report: called after each weight.

    Raises:
        HymbaError: `bits` is neither, or the model is quantised already.
    """
    scheme = Scheme(bits)
    if scheme_of(model) is not None:
        raise HymbaError("the model is quantised already: quantise the one that it was made from")
    for name, module in quantizable(model):
        weight, rounding = round_weight(f"{name}.weight", module.weight, scheme.bits_of(name))
        _replace(model, name, weight)
        report(rounding)
    return model.requires_grad_(False).eval()


def quantizable(model: Hymba) -> list[tuple[str, Any]]:
    """Return the modules of a plain model whose weights are to be quantised, and their names."""
    return [(name, module) for name, module in model.named_modules() if type(module) in _QUANTIZED]


def hollow(model: Hymba, scheme: Scheme) -> Hymba:
    """Give `model`, on the meta device, the modules of a quantised model, to be filled with what is loaded."""
    for name, module in quantizable(model):
        rounded = round_to_int8 if scheme.bits_of(name) == 8 else round_to_int4
        _replace(model, name, rounded(module.weight.detach()))
    return model.requires_grad_(False).eval()


def scheme_of(model: Hymba) -> Scheme | None:
    """Return how a model is quantised; None: it is not."""
    found = {module.weight.bits for module in model.modules() if isinstance(module, Quantized)}
    return Scheme(min(found)) if found else None


def count_parameters(model: Hymba) -> int:
    """Return the numbers that a model consists of, a quantised weight counted as the entries it stands for."""
    held = [module.weight for module in model.modules() if isinstance(module, Quantized)]
    return sum(p.numel() for p in model.parameters()) + sum(w.out_features * w.in_features for w in held)


@torch.no_grad()
def round_weight(name: str, weight: Tensor, bits: int) -> tuple[QuantizedWeight, Rounding]:
    """Quantise a matrix (out, in) to 8 or 4 bits, a block of outputs at a time; tell what that did to it.

    Raises:
        HymbaError: an entry is not finite.
    """
    parts, errors, sizes = [], [], []
    for block in weight.split(max(1, BLOCK // weight.shape[1])):
        block = block.float()
        parts.append(round_to_int8(block) if bits == 8 else round_to_int4(block, search_scales(block)))
        errors.append((dequantize(parts[-1], torch.float32) - block).square().sum())
        sizes.append(block.square().sum())
    values, scales = torch.cat([p.values for p in parts]), torch.cat([p.scales for p in parts])
    error = float(torch.stack(errors).sum() / torch.stack(sizes).sum().clamp(min=torch.finfo(torch.float32).tiny))
    if not math.isfinite(error):
        raise HymbaError(f"{name} cannot be quantised: it holds entries that are not finite")
    return QuantizedWeight(values, scales, weight.shape[1]), Rounding(name, bits, weight.numel(), error**0.5)


def search_scales(weight: Tensor) -> Tensor:
    """Return 4-bit scales (out, ⌈in/64⌉) that come close to the least ‖w − ŵ‖ in each group of inputs.

    Once w is rounded to whole numbers q, the best scale is ⟨w, q⟩ / ⟨q, q⟩ and leaves ‖w‖² − ⟨w, q⟩² / ⟨q, q⟩. To round
    and to scale in turn can only improve on a start, but ends in the minimum next to it: hence several starts, of
    both signs, since whole numbers reach to −8 but only to 7.

    Args:
        weight: (out, in) float32.
    """
    w = F.pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    peak, product, rounded = w.abs().amax(2), torch.empty_like(w), torch.empty_like(w)
    best, scales = torch.zeros_like(peak), torch.zeros_like(peak)
    for start in (*STARTS, *(-s for s in STARTS), None):
        inverse = 1 / scales if start is None else start / peak  # the last round goes on from the best so far
        torch.mul(w, inverse[:, :, None], out=rounded).round_().clamp_(-8, 7)
        along = torch.mul(w, rounded, out=product).sum(2)
        across = torch.mul(rounded, rounded, out=product).sum(2)
        gain = along.square() / across
        better = gain > best  # never where a group is all zeros: there the gain is NaN, and the scale stays 0
        best, scales = torch.where(better, gain, best), torch.where(better, along / across, scales)
    return scales


class Quantized(nn.Module):
    """A module whose weight is quantised, in the place of the plain one. It can be moved, not cast and not trained.

    The weight lives in two buffers, its whole numbers and its scales; :attr:`weight` is both together.
    """

    weight_packed: Tensor
    weight_scale: Tensor

    def __init__(self, plain: nn.Linear | nn.Embedding, weight: QuantizedWeight) -> None:
        nn.Module.__init__(self)
        for name in plain.__constants__:
            setattr(self, name, getattr(plain, name))
        self.bias = getattr(plain, "bias", None)
        self.register_buffer("weight_packed", weight.values)
        self.register_buffer("weight_scale", weight.scales)
        self._kept, self.training = weight, False

    @property
    def weight(self) -> QuantizedWeight:
        """What the buffers hold, (out, in)."""
        held: Mapping[str, Any] = self._buffers  # four times faster than attributes, and asked for by every product
        values, scales = held["weight_packed"], held["weight_scale"]
        if self._kept.values is not values or self._kept.scales is not scales:
            self._kept = QuantizedWeight(values, scales, self._kept.in_features)
        return self._kept

    def train(self, mode: bool = True) -> Self:
        """Refuse to be trained."""
        if mode:
            raise HymbaError("a quantised model cannot be trained: train the one that it was made from")
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to a device as any module does, but keep the dtypes, which belong to the format."""
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self


class QuantizedLinear(Quantized, Linear):  # type: ignore[misc]
    """A projection."""


class QuantizedStepProjection(Quantized, StepProjection):  # type: ignore[misc]
    """The projection to step sizes."""


class QuantizedEmbedding(Quantized, nn.Embedding):  # type: ignore[misc]
    """The token embedding, with a scale per token: always 8 bits."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (…) int64 to (…, D) float32."""
        return self.weight_packed[tokens] * self.weight_scale[tokens][..., None]


_QUANTIZED = {Linear: QuantizedLinear, StepProjection: QuantizedStepProjection, nn.Embedding: QuantizedEmbedding}


def _replace(model: Hymba, name: str, weight: QuantizedWeight) -> None:
    parent, _, child = name.rpartition(".")
    plain: Any = model.get_submodule(name)
    setattr(model.get_submodule(parent), child, _QUANTIZED[type(plain)](plain, weight))
