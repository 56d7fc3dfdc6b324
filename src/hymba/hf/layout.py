"""Between the caller's columns, padded anywhere, and the core's rows, padded on the right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.errors import HymbaError
from hymba.model import Cache


@dataclass(frozen=True)
class Layout:
    """Which columns of a (B, T) input hold real tokens.

    lengths: (B,) real tokens per row, or None where all T are real.
    order: (B, T) the columns: real ones, padding behind them, padding before or between them, each part in its
        old order; None where that changes nothing.
    """

    lengths: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def of_mask(cls, mask: Tensor | None) -> Layout:
        """Read a (B, T) mask, non-zero at real tokens. None: all are real."""
        if mask is None:
            return cls()
        real = mask.bool()
        if not torch.compiler.is_compiling():  # a graph has one path for all values
            if bool(real.all()):
                return cls()
            if bool((real[:, 1:] <= real[:, :-1]).all()):
                return cls(real.sum(1))
        # Padding behind a row's last token stays next to it, so that what stands before the row changes no output.
        before = real.flip(1).cumsum(1).flip(1) > 0
        return cls(real.sum(1), torch.argsort(~real * (1 + before), dim=1, stable=True))

    def real(self, steps: int, device: torch.device) -> Tensor:
        """Return (B or 1, T): which of the compacted columns are real."""
        columns = torch.arange(steps, device=device)[None]
        return columns >= 0 if self.lengths is None else columns < self.lengths[:, None]

    def compact(self, x: Any) -> Any:
        """Move the real tokens of `x` (B, T, ...) to the left; None stays None."""
        if x is None or self.order is None:
            return x
        return _take(x.expand(self.order.shape[0], *x.shape[1:]), self.order, dim=1)

    def restore(self, x: Tensor, dim: int = 1) -> Tensor:
        """Move back what :meth:`compact` has moved, on dimension `dim` of `x` (B, ...)."""
        return x if self.order is None else _take(x, self.order.argsort(dim=1), dim)


def _take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gather `x` (B, ...) along `dim` by `index` (B, x.shape[dim])."""
    shape = [x.shape[0]] + [1] * (x.dim() - 1)
    shape[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand_as(x))


def last_columns(mask: Tensor | None, steps: tuple[int, int]) -> Tensor | None:
    """Return the part of `attention_mask` (B, past + T) that belongs to this call's T columns.

    Raises:
        HymbaError: the mask is not two-dimensional, or too short.
    """
    if mask is None:
        return None
    rows, columns = steps
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < columns:
        raise HymbaError(f"attention_mask must be a 0 or 1 for each of {rows} rows and {columns} columns or more")
    return mask[:, mask.shape[1] - columns :]


def packed_documents(
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens: Tensor | None,
    layout: Layout,
    steps: tuple[int, int],
) -> Tensor | None:
    """Return (B, T) document numbers, compacted, if the rows are packed with several documents, else None.

    Packing is told by `seq_idx` (B, T), by `cu_seq_lens` (documents + 1,) of one row, or by `position_ids`
    (B, T) that restart at 0, as transformers' `DataCollatorWithFlattening` writes them.
    """
    rows, columns = steps
    if seq_idx is not None:
        return layout.compact(seq_idx.to(torch.int64)).expand(rows, -1)
    if cu_seq_lens is not None:
        column = torch.arange(columns, device=cu_seq_lens.device)
        return torch.searchsorted(cu_seq_lens[1:].to(torch.int64), column, right=True).expand(rows, -1)
    if position_ids is None or columns == 1:
        return None
    positions = layout.compact(position_ids)
    padding = ~layout.real(columns, positions.device)[:, 1:]
    starts = (positions[:, 1:] == 0) & ~padding
    steady = (positions[:, 1:] == positions[:, :-1] + 1) | padding
    packed = (starts | steady).all()
    if not torch.compiler.is_compiling() and not (bool(packed) and bool(starts.any())):
        return None
    return F.pad((starts & packed).cumsum(1), (1, 0)).expand(rows, -1)


def rotary_positions(
    position_ids: Tensor | None,
    cache: Cache | None,
    layout: Layout,
    steps: tuple[int, int],
    documents: Tensor | None,
) -> Tensor | None:
    """Return `position_ids` (B, T), compacted, unless every real token's is where the cache's count leads.

    Packed `documents` count their own.
    """
    if position_ids is None:
        return None
    rows, columns = steps
    positions = layout.compact(position_ids).expand(rows, -1)
    if torch.compiler.is_compiling():
        return positions
    if documents is not None:
        return None
    held = 0 if cache is None else cache.lengths[:, None]
    natural = held + torch.arange(columns, device=positions.device)
    unnatural = (positions != natural) & layout.real(columns, positions.device)
    return positions if bool(unnatural.any()) else None
