"""How a server behaves, beside what its engine does."""

from __future__ import annotations

from dataclasses import dataclass

from hymba.serving.guard import Guard


@dataclass(frozen=True)
class Settings:
    """Names, addresses and limits of one server; times are in seconds."""

    model_name: str = "hymba"  # what requests call the model
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_key: str | None = None  # None: everyone who reaches the server may use it
    origins: tuple[str, ...] = ()  # of web pages elsewhere that may call the server; "*": all
    max_body_bytes: int = 8 << 20
    body_seconds: float = 60.0  # for a request's body to arrive
    request_seconds: float | None = 600.0  # for an answer, the wait for a row included
    drain_seconds: float = 25.0  # for what runs when the server is told to stop
    guard: Guard | None = None
