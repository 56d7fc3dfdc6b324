"""Drafts without a draft model: what followed the same few tokens before, in the prompt or the text, may follow again.

Prompt lookup (Saxena, 2023; arXiv 2304.04487): where a text repeats itself, one pass of the model checks several tokens
for hardly more than the price of one. What is kept is what would have been chosen anyway, so the text stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

NGRAM = 3  # tokens that must agree
_PATIENCE = 64  # tokens without drafts after those before did not pay


class Drafter:
    """Drafts for one text, as long as they pay.

    Args:
        ids: of the prompt.
    """

    def __init__(self, ids: Items[int]) -> None:
        self._behind: dict[tuple[int, ...], int] = {}  # where the text goes on after each few tokens, the last time
        self._indexed = NGRAM
        self._accepted = 2.0  # drafted tokens a draft, a running mean
        self._resting = 0
        self._index(ids)

    def draft(self, ids: Items[int], most: int, price: float) -> list[int]:
        """Return up to `most` tokens that may follow `ids`; none if there is no such place or drafts do not pay.

        `price` is the time of a step that checks a draft over that of a plain one.
        """
        self._index(ids)
        if self._resting:
            self._resting -= 1
            return []
        place = self._behind.get(tuple(ids[-NGRAM:])) if len(ids) > NGRAM else None
        if place is None or most < 1:
            return []
        if 1 + self._accepted < price:
            self._resting, self._accepted = _PATIENCE, max(self._accepted, price - 0.9)
            return []
        return list(ids[place : place + most])

    def learn(self, accepted: int) -> None:
        """Note how many tokens of the last draft were right."""
        self._accepted += 0.3 * (accepted - self._accepted)

    def _index(self, ids: Items[int]) -> None:
        """Take in the tokens that are new, but not the last: nothing follows it yet."""
        for end in range(self._indexed, len(ids)):
            self._behind[tuple(ids[end - NGRAM : end])] = end
        self._indexed = max(self._indexed, len(ids))
