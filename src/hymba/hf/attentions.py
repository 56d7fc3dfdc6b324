"""Attention matrices in the caller's columns: the meta tokens, then those of the whole attention mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hymba.hf.cache import HymbaMemory
from hymba.hf.layout import Layout
from hymba.model import Hymba


@dataclass(frozen=True)
class AttentionColumns:
    """Where the columns of the core's matrices belong, noted before the call changes the cache.

    meta: M. total: the caller's columns, past ones included. windows: (L,), None in a global layer.
    queries, keys: where this call's and all columns have their padding.
    stored: by window, the positions (B, S) of the keys attended to, or None where they stand in order.
    """

    meta: int
    total: int
    windows: tuple[int | None, ...]
    queries: Layout
    keys: Layout
    stored: dict[int | None, Tensor] | None

    @classmethod
    def note(
        cls, core: Hymba, memory: HymbaMemory | None, queries: Layout, mask: Tensor | None, steps: int
    ) -> AttentionColumns:
        """Read the cache as it is before the call; `mask` is the caller's (B, past + T) one."""
        total, stored, keys = steps, None, queries
        windows = tuple(core.config.window(i) for i in range(core.config.num_hidden_layers))
        if memory is not None and memory.core is not None:
            cache = memory.core
            total += memory.width
            keys = Layout.of_mask(mask) if mask is not None and mask.shape[1] == total else Layout()
            offsets = torch.arange(steps, device=cache.lengths.device)
            positions = cache.next_positions(cache.rows)[:, None] + offsets
            positions = torch.where(queries.real(steps, offsets.device), positions, -1)
            stored = {window: cache.key_positions(window, positions) for window in set(windows)}
        return cls(core.config.num_meta_tokens, total, windows, queries, keys, stored)

    def arrange(self, attentions: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return each layer's matrix (B, H, T, S) as (B, H, T, M + total)."""
        layers = zip(attentions, self.windows, strict=True)
        return tuple(self._arrange(weights, window) for weights, window in layers)

    def _arrange(self, weights: Tensor, window: int | None) -> Tensor:
        if self.stored is not None:
            weights = self._by_position(weights, self.stored[window])
        if self.keys.order is not None:
            meta, text = weights.split([self.meta, self.total], dim=3)
            weights = torch.cat((meta, self.keys.restore(text, dim=3)), dim=3)
        return self.queries.restore(weights, dim=2)

    def _by_position(self, weights: Tensor, positions: Tensor) -> Tensor:
        columns = self.meta + self.total
        index = torch.where(positions >= 0, positions, columns)  # empty slots go to a column that is cut off
        ordered = weights.new_zeros(*weights.shape[:3], columns + 1)
        return ordered.scatter(3, index[:, None, None].expand_as(weights), weights)[..., :-1]
