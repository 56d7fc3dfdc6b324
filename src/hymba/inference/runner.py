"""The model and the cache that the engine's sequences share: every call of the one on rows of the other."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from hymba.inference.step import DecodeStep
from hymba.model import Cache, Hymba
from hymba.model.rows import Snapshot, Undo, clear_row, copy_row, restore_row, save_row, view_rows

DRAFTED = 8  # tokens of a row in a step that checks drafts
BUCKET = 8  # on a GPU, rows of a step are rounded up to a multiple of this, or to 1, 2 or 4: each is a graph to capture
WARM = 256  # tokens of the prompt that has the kernels compiled


class Runner:
    """Runs prompts on single rows, and the first rows of the cache together, a token or a checked draft each.

    The model's weights must not change meanwhile: the meta tokens' state is computed once, and steps are recorded.

    Args:
        rows, max_length, cache_bits: of the cache, as in :meth:`hymba.model.Hymba.allocate_cache`.
    """

    def __init__(self, model: Hymba, rows: int, max_length: int, cache_bits: int | None = None) -> None:
        self.model = model
        with torch.no_grad():
            self._prefix = model.prefix()
            self.cache: Cache = model.allocate_cache(rows, max_length, cache_bits, self._prefix)
        self._steps: dict[tuple[int, int], DecodeStep] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.cache.lengths.is_cuda else None

    def warm(self) -> None:
        """On a GPU, run a prompt and some steps: no text then waits while kernels are compiled. No row may be used."""
        room = min(WARM, self.cache.max_length - 3)
        if self._pool is None or room < 1:
            return
        self.prefill(0, 0, [0] * room)
        for held in range(room, room + 3):  # plainly, captured, replayed
            self.decode([0], held)
        self.clear(0)

    @torch.no_grad()
    def prefill(self, row: int, held: int, tokens: Items[int], every: bool = False) -> Tensor:
        """Run tokens into a row that holds `held`; return logits (1, vocab) behind the last, or `every` (T, vocab)."""
        view = view_rows(self.cache, row, 1, held)
        hidden = self.model(self._tensor([tokens]), cache=view).hidden[0]
        logits = self.model.logits(hidden if every else hidden[-1:])
        if logits.is_cuda:
            torch.cuda.current_stream(logits.device).synchronize()  # whoever paces prompts reads the clock
        return logits

    def decode(self, tokens: Items[int], longest: int) -> Tensor:
        """Run one token into each of the first rows, none of which holds more than `longest`; return (B, vocab) until
        the next call."""
        rows = self._bucket(len(tokens))
        if rows is None:
            return self._step(len(tokens), 1, longest)(self._tensor(tokens))
        spare = rows - len(tokens)
        lengths = self._tensor([1] * len(tokens) + [0] * spare)  # the rows beyond, whatever they hold, stand still
        return self._step(rows, 1, longest)(self._tensor([*tokens, *[0] * spare]), lengths)[: len(tokens)]

    def check(self, tokens: Items[Items[int]], longest: int) -> Tensor:
        """Run up to DRAFTED tokens into each of the first rows; return (B, DRAFTED, vocab) until the next call."""
        rows = self._bucket(len(tokens)) or len(tokens)
        fed = [*tokens, *[()] * (rows - len(tokens))]
        padded = [[*row, *[0] * (DRAFTED - len(row))] for row in fed]
        step = self._step(rows, DRAFTED, longest)
        return step(self._tensor(padded), self._tensor([len(row) for row in fed]))[: len(tokens)]

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
            view = view_rows(self.cache, 0, rows, 0)
            step = self._steps[rows, steps] = DecodeStep(self.model, view, steps, pool=self._pool)
        step.cache.longest = longest
        return step

    def _bucket(self, rows: int) -> int | None:
        """Return how many rows to run in place of `rows`; None where every number of them costs the same to begin."""
        if self._pool is None:
            return None
        wanted = rows if rows in (1, 2, 4) else 4 if rows == 3 else -(-rows // BUCKET) * BUCKET
        return min(wanted, self.cache.rows)

    def _tensor(self, numbers: Items[int] | Items[Items[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self.model.device, non_blocking=True)
