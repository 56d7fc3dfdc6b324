"""The model and the cache that the engine's sequences share: every call of the one on rows of the other."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from hymba.inference.step import DecodeStep
from hymba.model import Cache, Hymba
from hymba.model.rows import Snapshot, Undo, clear_row, copy_row, restore_row, save_row, view_rows

DRAFTED = 8  # tokens of a row in a step that checks drafts


class Runner:
    """Runs prompts on single rows, and the first rows of the cache together, a token or a checked draft each.

    Args:
        rows, max_length, cache_bits: of the cache, as in :meth:`hymba.model.Hymba.allocate_cache`.
    """

    def __init__(self, model: Hymba, rows: int, max_length: int, cache_bits: int | None = None) -> None:
        self.model = model
        with torch.no_grad():
            self.cache: Cache = model.allocate_cache(rows, max_length, cache_bits)
            self._prefix = model.prefix()
        self._steps: dict[tuple[int, int], DecodeStep] = {}

    @torch.no_grad()
    def prefill(self, row: int, held: int, tokens: Items[int], every: bool = False) -> Tensor:
        """Run tokens into a row that holds `held`; return logits (1, vocab) behind the last, or `every` (T, vocab)."""
        view = view_rows(self.cache, row, 1, held)
        hidden = self.model(self._tensor([tokens]), cache=view).hidden[0]
        return self.model.logits(hidden if every else hidden[-1:])

    def decode(self, tokens: Items[int], longest: int) -> Tensor:
        """Run one token into each of the first rows, none of which holds more than `longest`; return (B, vocab) until
        the next call."""
        return self._step(len(tokens), 1, longest)(self._tensor(tokens))

    def check(self, tokens: Items[Items[int]], longest: int) -> Tensor:
        """Run up to DRAFTED tokens into each of the first rows; return (B, DRAFTED, vocab) until the next call."""
        padded = [[*row, *[0] * (DRAFTED - len(row))] for row in tokens]
        step = self._step(len(tokens), DRAFTED, longest)
        return step(self._tensor(padded), self._tensor([len(row) for row in tokens]))

    def clear(self, row: int) -> None:
        """Let a row hold no text."""
        clear_row(self.cache, row, self._prefix)

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy a row of `tokens` tokens into another."""
        copy_row(self.cache, source, target, tokens)

    def save(self, row: int, tokens: int, logits: Tensor | None = None) -> Snapshot:
        """Return a copy of a row of `tokens` tokens."""
        return save_row(self.cache, row, tokens, logits)

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Let a row hold what a snapshot says."""
        restore_row(self.cache, row, snapshot)

    def undo(self, row: int, tokens: int) -> Undo:
        """Return what takes a checked draft back out of a row of `tokens` tokens."""
        return Undo(self.cache, row, tokens, DRAFTED)

    def _step(self, rows: int, steps: int, longest: int) -> DecodeStep:
        step = self._steps.get((rows, steps))
        if step is None:
            step = self._steps[rows, steps] = DecodeStep(self.model, view_rows(self.cache, 0, rows, 0), steps)
        step.cache.longest = longest
        return step

    def _tensor(self, numbers: Items[int] | Items[Items[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.model.device)
