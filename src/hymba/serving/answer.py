"""One choice of an answer as it grows: from the engine's updates, through the guard and the reading of tool calls."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from hymba.inference import Update
from hymba.serving.guard import GuardStream
from hymba.serving.tools import Call, CallReader
from hymba.serving.vocabulary import Entry


@dataclass
class Piece:
    """What a choice gained."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)  # tokens with their log-probabilities, if these were asked for
    finish: str | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.calls or self.entries or self.finish)

    def add(self, piece: Piece) -> None:
        """Take what was gained next."""
        self.text += piece.text
        self.calls += piece.calls
        self.entries += piece.entries
        self.finish = piece.finish


class Answer:
    """A choice; `push` says what an update adds to what the client may see.

    tokens: how many were generated.

    Args:
        prompt: ids and text that the choice begins with, for `echo`.
        silent: nothing but the prompt is wanted, so the one token that the engine makes is left out.
    """

    def __init__(
        self,
        guard: GuardStream | None = None,
        functions: Collection[str] = (),
        prompt: tuple[list[int], str] | None = None,
        silent: bool = False,
    ) -> None:
        self.tokens = 0
        self._guard, self._reader = guard, CallReader(functions)
        self._prompt, self._silent = prompt, silent
        self._entries: list[Entry] = []  # not shown yet
        self._called = False

    def push(self, update: Update) -> Piece:
        """Take the next update."""
        piece = Piece()
        if self._prompt is not None:
            ids, piece.text = self._prompt
            self._entries += zip(ids, update.prompt_logprobs, strict=True) if update.prompt_logprobs else []
            self._prompt = None
        if self._silent:
            piece.finish = update.finish and "length"
            return self._show(piece)
        self.tokens += len(update.tokens)
        self._entries += [(entry.token, entry) for entry in update.logprobs]
        text, piece.finish = self._filter(update)
        read, piece.calls = self._reader.push(text)
        piece.text += read
        if piece.finish:
            rest, calls = self._reader.flush()
            piece.text, piece.calls = piece.text + rest, piece.calls + calls
        self._called = self._called or bool(piece.calls)
        if piece.finish == "stop" and self._called:
            piece.finish = "tool_calls"
        return self._show(piece)

    def _filter(self, update: Update) -> tuple[str, str | None]:
        """Return the text that the guard lets through, and why the answer ends, if it does."""
        if self._guard is None:
            return update.text, update.finish
        text = self._guard.push(update.text)
        if update.finish:
            text += self._guard.flush()
        return text, "content_filter" if self._guard.blocked else update.finish

    def _show(self, piece: Piece) -> Piece:
        """Add the log-probabilities of the tokens, unless the guard still holds some of their text."""
        if self._guard is not None and self._guard.blocked:
            self._entries.clear()
        elif self._guard is None or not self._guard.held:
            piece.entries, self._entries = self._entries, []
        return piece
