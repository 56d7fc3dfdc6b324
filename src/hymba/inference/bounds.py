"""What an engine may hold, what it says when that is not enough, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from hymba.errors import HymbaError


class PromptTooLongError(HymbaError):
    """A prompt of `tokens` tokens, where `limit` is the most."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(f"the prompt has {tokens} tokens and the limit is {limit}: shorten it")
        self.tokens, self.limit = tokens, limit


class QueueFullError(HymbaError):
    """Too many sequences wait already; `waiting` says how many."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} requests wait already: try again later")
        self.waiting = waiting


class EngineDeadError(HymbaError):
    """The engine has stopped and takes no more."""


@dataclass(frozen=True)
class EngineOptions:
    """How much an engine may hold.

    max_rows: texts that run at once. max_length: tokens of each, prompt and continuation; None: the model's own limit.
    max_waiting: texts that may queue. prefix_cache_bytes: of snapshots; 0: none; None: twice those of the rows.
    cache_bits: 8 quantizes keys and values. speculate: draft what followed the same tokens before, where it pays; None:
    if that cannot change a text, that is, with batch-invariant arithmetic. prefill_tokens: the most tokens of a prompt
    to run at once, where prompts may be cut anywhere; None: as many as `generate` runs.
    """

    max_rows: int = 8
    max_length: int | None = None
    max_waiting: int = 256
    prefix_cache_bytes: int | None = None
    cache_bits: int | None = None
    speculate: bool | None = None
    prefill_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_length", "max_waiting", "prefill_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise HymbaError(f"{name} must be 1 or more, not {value}")
        if (self.prefix_cache_bytes or 0) < 0:
            raise HymbaError(f"prefix_cache_bytes must be 0 or more, not {self.prefix_cache_bytes}")


@dataclass
class EngineStats:
    """What an engine holds now (the first three, `cache_bytes` and the prefix cache's size) and has done so far."""

    running: int = 0
    waiting: int = 0
    rows: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    prefix_entries: int = 0
    prefix_bytes: int = 0
    prefix_hits: int = 0
    prefix_queries: int = 0
    cache_bytes: int = 0
    finished: dict[str, int] = field(default_factory=dict)
