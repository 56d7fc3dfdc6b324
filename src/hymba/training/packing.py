"""From tokens to the rows of a batch: documents packed without leakage.

A row is filled with *pieces* of documents. Every piece starts with BOS and with position 0, and no piece sees
another: training shows what use will show, a context that begins with BOS, at a text's start or within it.
Each stored token is the target of exactly one prediction, the first of a piece being predicted from BOS. A
book fills consecutive rows. Only where one slot is left, and at the end of an epoch, is a row padded.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hymba.training.data import Corpus

Array = np.ndarray[Any, Any]
IGNORED = -100  # label of a slot that is no target


@dataclass(frozen=True)
class Layout:
    """Which pieces fill which row: row r holds pieces first[r] … first[r + 1] − 1.

    starts, lengths: (pieces,) int64, in stored tokens, BOS not counted; first: (rows + 1,) int64
    """

    starts: Array
    lengths: Array
    first: Array

    def __len__(self) -> int:
        return len(self.first) - 1


def lay_out(segments: Sequence[tuple[int, int]], seq_length: int) -> Layout:
    """Cut `segments` (start, stop) of the stored tokens into pieces that fill rows of `seq_length` slots."""
    starts: list[int] = []
    lengths: list[int] = []
    first = [0]
    room = seq_length
    for start, stop in segments:
        while start < stop:
            if room < 2:  # BOS and one token
                first.append(len(starts))
                room = seq_length
            length = min(room - 1, stop - start)
            starts.append(start)
            lengths.append(length)
            start += length
            room -= length + 1
    first.append(len(starts))
    return Layout(np.asarray(starts), np.asarray(lengths), np.asarray(first))


class PackedRows(Dataset[dict[str, Tensor]]):
    """The rows of a corpus, epoch after epoch: item i is the i-th row of the run.

    With a `seed`, each epoch shuffles the documents, cuts them elsewhere, and shuffles the rows; item i
    depends on nothing but the corpus, `seq_length`, the seed and i. Without one, the rows are in order.
    """

    def __init__(self, corpus: Corpus, seq_length: int, *, bos: int, pad: int, seed: int | None = None) -> None:
        self.corpus, self.seq_length, self.bos, self.pad, self.seed = corpus, seq_length, bos, pad, seed
        self._layout, self._order, self._epoch = *self._arrange(0), 0
        self._ends = [len(self._layout)]  # rows up to the end of each epoch met so far
        self.length = len(self._layout)  # of the run; a trainer sets it

    def __len__(self) -> int:
        return self.length

    def rows_until(self, epochs: float) -> int:
        """Return the rows of the first `epochs` epochs, a last one in part."""
        whole = int(epochs)
        before = self._end_of(whole - 1) if whole else 0
        return before + round((epochs - whole) * (self._end_of(whole) - before)) if epochs > whole else before

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        """Return input_ids, position_ids and labels, each (seq_length,) int64."""
        while item >= self._ends[-1]:
            self._end_of(len(self._ends))
        epoch = bisect_right(self._ends, item)
        if epoch != self._epoch:
            self._layout, self._order, self._epoch = *self._arrange(epoch), epoch
        row = int(self._order[item - (self._ends[epoch - 1] if epoch else 0)])
        return {name: torch.from_numpy(values) for name, values in self._fill(row).items()}

    def _end_of(self, epoch: int) -> int:
        while len(self._ends) <= epoch:
            self._ends.append(self._ends[-1] + len(self._arrange(len(self._ends))[0]))
        return self._ends[epoch]

    def _arrange(self, epoch: int) -> tuple[Layout, Array]:
        """Return the epoch's layout and the order of its rows."""
        offsets = self.corpus.offsets.tolist()
        segments = list(pairwise(offsets))
        if self.seed is None:
            layout = lay_out(segments, self.seq_length)
            return layout, np.arange(len(layout))
        random = np.random.default_rng((self.seed, epoch))
        segments = [segments[d] for d in random.permutation(len(segments))]
        # Begin anywhere in the first document and end with the rest of it: each epoch cuts a book elsewhere.
        start, stop = segments[0]
        middle = int(random.integers(start, stop))
        layout = lay_out([(middle, stop), *segments[1:], (start, middle)], self.seq_length)
        return layout, random.permutation(len(layout))

    def _fill(self, row: int) -> dict[str, Array]:
        layout = self._layout
        ids = np.full(self.seq_length, self.pad, dtype=np.int64)
        labels = np.full(self.seq_length, IGNORED, dtype=np.int64)
        positions = np.arange(self.seq_length)
        slot = 0
        for piece in range(layout.first[row], layout.first[row + 1]):
            start, length = layout.starts[piece], layout.lengths[piece]
            ids[slot] = self.bos
            ids[slot + 1 : slot + 1 + length] = self.corpus.tokens[start : start + length]
            labels[slot + 1 : slot + 1 + length] = ids[slot + 1 : slot + 1 + length]
            positions[slot:] -= positions[slot]
            slot += 1 + length
        # The padding is a document of its own.
        if slot < self.seq_length:
            positions[slot:] -= positions[slot]
        return {"input_ids": ids, "position_ids": positions, "labels": labels}
