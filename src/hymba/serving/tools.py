"""Tool calls, as the released chat format writes them: <toolcall> {"name": …, "arguments": {…}} </toolcall>."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<toolcall>", "</toolcall>"


@dataclass(frozen=True)
class Call:
    """A call of a function, its arguments a JSON object in text."""

    id: str
    name: str
    arguments: str

    def tell(self) -> dict[str, Any]:
        """Return the call as a client sees it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def write_call(name: str, arguments: str) -> str:
    """Return the text of a call, as the model would have written it."""
    call = {"name": name, "arguments": json.loads(arguments)}
    return f"{OPEN} {json.dumps(call, ensure_ascii=False)} {CLOSE}"


class CallReader:
    """Takes the calls out of an answer as it grows, and the white space behind them; what is no call stays text.

    Args:
        names: of the functions that were offered; without any, everything is text.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._behind_call = False

    def push(self, piece: str) -> tuple[str, list[Call]]:
        """Take the next piece of text; return the text and the calls that are complete."""
        if not self._names:
            return piece, []
        self._held += piece
        text, calls = "", list[Call]()
        while OPEN in self._held:
            before, _, behind = self._held.partition(OPEN)
            text += self._trim(before)
            inside, closed, rest = behind.partition(CLOSE)
            if not closed:
                self._held = OPEN + behind
                return text, calls
            found = self._parse(inside)
            text += "" if found else self._trim(OPEN + inside + CLOSE)
            calls, self._held = calls + found, rest
        keep = next((n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n])), 0)
        cut = len(self._held) - keep
        text += self._trim(self._held[:cut])
        self._held = self._held[cut:]
        return text, calls

    def flush(self) -> tuple[str, list[Call]]:
        """The answer has ended: return what was held back, a call that was not closed too."""
        held, self._held = self._held, ""
        calls = self._parse(held.removeprefix(OPEN)) if held.startswith(OPEN) else []
        return ("" if calls else self._trim(held)), calls

    def _trim(self, text: str) -> str:
        if self._behind_call:
            text = text.lstrip()
            self._behind_call = not text
        return text

    def _parse(self, text: str) -> list[Call]:
        try:
            found = list(_read_calls(json.loads(text)))
        except (ValueError, RecursionError):
            return []
        if not all(call.name in self._names for call in found):
            return []
        self._behind_call = self._behind_call or bool(found)
        return found


def _read_calls(value: Any) -> Iterator[Call]:
    """Yield the calls in what stands between the marks: one, or a list.

    Raises:
        ValueError: it is something else.
    """
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise ValueError("a call names its function")
        arguments = item.get("arguments", {})
        if not isinstance(arguments, dict):
            raise ValueError("arguments are an object")
        yield Call(f"call_{uuid.uuid4().hex[:24]}", item["name"], json.dumps(arguments, ensure_ascii=False))
