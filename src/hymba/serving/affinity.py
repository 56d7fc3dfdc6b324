"""Which replica a request goes to: requests that begin alike go to one, where their beginning is cached already.

Rendezvous hashing: every replica has a rank for every key, so that the choice needs no memory, every front makes the
same, and a replica that comes or goes moves no keys but its own (Thaler and Ravishankar, 1998).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

SESSION_HEADER = "x-session-id"
# Characters of a prompt that count as its beginning. Long enough to tell short system prompts' conversations apart,
# short enough that those of one long system prompt meet in the replica that holds it.
BEGINNING = 1024


def affinity_key(headers: Mapping[str, str], body: bytes) -> str | None:
    """Return what requests that belong together have in common; None for a request that belongs to none.

    It is the session's header, else `user` of the body, else the beginning of the prompt: of a chat up to its first
    question, which later turns repeat.
    """
    if session := headers.get(SESSION_HEADER):
        return f"session {session}"
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict):
        return None
    if isinstance(given.get("user"), str) and given["user"]:
        return f"user {given['user']}"
    beginning = _first_turn(given["messages"]) if "messages" in given else given.get("prompt")
    return None if beginning is None else json.dumps(beginning)[:BEGINNING]


def _first_turn(messages: Any) -> Any:
    """Return a chat up to its first question."""
    if not isinstance(messages, list):
        return messages
    asked = (n for n, message in enumerate(messages) if isinstance(message, dict) and message.get("role") == "user")
    return messages[: next(asked, len(messages)) + 1]


def rank(key: str, replicas: Iterable[str]) -> list[str]:
    """Return the names of replicas in the order in which a key prefers them."""
    return sorted(replicas, key=lambda name: hashlib.blake2b(f"{name} {key}".encode(errors="surrogatepass")).digest())
