"""Checking what goes in and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

# Its partial matching tells what might still become a match; the standard `re` has none.
import regex  # type: ignore[import-untyped]

from hymba.errors import HymbaError
from hymba.files import read_text


class GuardStream(Protocol):
    """Checks one answer as it grows.

    blocked: something forbidden was found; nothing more comes out.
    """

    blocked: bool

    @property
    def held(self) -> bool:
        """Whether some text is held back, because it might become forbidden."""

    def push(self, piece: str) -> str:
        """Take the next piece of the answer; return what is now certain to be allowed."""

    def flush(self) -> str:
        """The answer has ended: return what was held back, unless it is forbidden."""


class Guard(Protocol):
    """Decides which prompts are answered and where answers end. Used from several threads."""

    def allows(self, prompt: str) -> bool:
        """Whether the prompt's text may be answered."""

    def begin(self) -> GuardStream:
        """Return a check for one answer."""


class PatternGuard:
    """Forbids texts in which a regular expression is found.

    Raises:
        HymbaError: a pattern cannot be read, or is found in every text.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = [_compile(pattern) for pattern in patterns]

    @classmethod
    def from_file(cls, path: str | Path) -> PatternGuard:
        """Read one pattern a line; empty lines and those that begin with # say nothing.

        Raises:
            HymbaError: the file cannot be read, has no pattern, or a pattern is wrong.
        """
        lines = [line.strip() for line in read_text(path).splitlines()]
        patterns = [line for line in lines if line and not line.startswith("#")]
        if not patterns:
            raise HymbaError(f"{path} holds no pattern: write one regular expression a line")
        return cls(patterns)

    def allows(self, prompt: str) -> bool:
        """Whether no pattern is found in `prompt`."""
        return not any(pattern.search(prompt) for pattern in self._patterns)

    def begin(self) -> PatternStream:
        """Return a check for one answer."""
        return PatternStream(self._patterns)


class PatternStream:
    """Passes text on up to where a pattern begins that is found, or may yet be.

    A match that touches the end of the text so far is not decided: what follows may undo it, as with `\\bass\\b` in
    "ass" and "assist". The result does not depend on how the text was split, as long as patterns do not
    overlap and look at most one character ahead.
    """

    def __init__(self, patterns: Sequence[regex.Pattern[str]]) -> None:
        self.blocked = False
        self._patterns = patterns
        self._text = ""  # all of it: a pattern may look behind
        self._sent = 0

    @property
    def held(self) -> bool:
        """Whether some text is held back."""
        return self._sent < len(self._text)

    def push(self, piece: str) -> str:
        """Take the next piece; return what no match can begin in."""
        self._text += piece
        return self._pass(final=False)

    def flush(self) -> str:
        """The text has ended: return the rest, up to a match."""
        return self._pass(final=True)

    def _pass(self, final: bool) -> str:
        if self.blocked:
            return ""
        end = len(self._text)
        found = [pattern.search(self._text, self._sent, partial=not final) for pattern in self._patterns]
        matches = [match for match in found if match]
        self.blocked = any(not match.partial and (final or match.end() < end) for match in matches)
        cut = min((match.start() for match in matches), default=end)
        passed, self._sent = self._text[self._sent : cut], cut
        return passed


def _compile(pattern: str) -> regex.Pattern[str]:
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise HymbaError(f"the guard's pattern {pattern!r} is no regular expression: {error}") from error
    if compiled.search(""):
        raise HymbaError(f"the guard's pattern {pattern!r} is found in every text: it must match some letter")
    return compiled
