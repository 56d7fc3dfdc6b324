"""Which sequences run, in which rows of the cache, and how much of a prompt at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from hymba.inference.runner import Runner
from hymba.inference.sequence import Sequence

_LEAST_CHUNK = 16  # tokens of a prompt between two steps of the others


class Scheduler:
    """First come, first served, as long as there are rows; prompts take turns, a chunk each.

    The sequences that are being continued hold the first rows, in order, so that a step sees them side by side; prompts
    are read in the rows behind and then moved up.

    waiting, reading, running: sequences without a row, with a prompt to be read, and being continued.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.waiting: deque[Sequence] = deque()
        self.reading: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._free = list(range(runner.cache.rows))  # taken from the end

    def __iter__(self) -> Iterator[Sequence]:
        return iter([*self.running, *self.reading, *self.waiting])

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Give rows to those who waited longest, and return them."""
        admitted = []
        while self.waiting and self._free:
            sequence = self.waiting.popleft()
            sequence.row = self._free.pop()
            self.runner.clear(sequence.row)
            self.reading.append(sequence)
            admitted.append(sequence)
        return admitted

    def start(self, sequence: Sequence) -> None:
        """Move a sequence whose prompt is read up to those that run."""
        self.reading.remove(sequence)
        target = len(self.running)
        if sequence.row != target:
            self._vacate(target, sequence)
        self.running.append(sequence)

    def release(self, sequence: Sequence) -> None:
        """Take a sequence out, and free its row."""
        if sequence.row is None:
            self.waiting.remove(sequence)
            return
        freed = sequence.row
        if sequence in self.reading:
            self.reading.remove(sequence)
        else:
            last = self.running.pop()
            if last is not sequence and last.row is not None:
                self.runner.move(last.row, freed, last.computed)
                self.running[freed], last.row, freed = last, freed, len(self.running)
        sequence.row = None
        self._free.append(freed)
        self._free.sort()

    def _vacate(self, target: int, sequence: Sequence) -> None:
        """Put `sequence` into row `target`; who reads there takes its row."""
        source = sequence.row
        assert source is not None
        other = next((one for one in self.reading if one.row == target), None)
        saved = None if other is None else self.runner.save(target, other.computed)
        self.runner.move(source, target, sequence.computed)
        sequence.row = target
        if other is None or saved is None:
            self._free[self._free.index(target)] = source
            self._free.sort()
        else:
            self.runner.restore(source, saved)
            other.row = source


class Pace:
    """How many tokens of prompts to read between two steps, so that those who wait for the steps hardly notice.

    Args:
        most: tokens at once.
        share: of a step's time that reading may take as well while others run.
    """

    def __init__(self, most: int, share: float = 1.0) -> None:
        self.most, self.share = most, share
        self.plain = self.checked = 0.0  # seconds of a step, and of one that checks drafts
        self._second_a_token = 0.0

    def budget(self, others: int) -> int:
        """Return how many tokens to read before the next step of `others` sequences."""
        if not others or not self.plain or not self._second_a_token:
            return self.most if not others else min(self.most, 4 * _LEAST_CHUNK)
        return max(_LEAST_CHUNK, min(self.most, int(self.share * self.plain / self._second_a_token)))

    @property
    def price(self) -> float:
        """The time of a step that checks drafts over that of a plain one."""
        return self.checked / self.plain if self.plain and self.checked else 1.2

    def read(self, tokens: int, seconds: float) -> None:
        """Note how long reading took."""
        self._second_a_token = _mean(self._second_a_token, seconds / tokens)

    def stepped(self, seconds: float, checked: bool) -> None:
        """Note how long a step took."""
        if checked:
            self.checked = _mean(self.checked, seconds)
        else:
            self.plain = _mean(self.plain, seconds)


def _mean(before: float, now: float) -> float:
    """Return a running mean that forgets: an outlier counts as twice the mean, and what takes less than half as long
    as before is believed at once, since a first call may have compiled kernels."""
    return now if not before or now < before / 2 else before + 0.1 * (min(now, 2 * before) - before)
