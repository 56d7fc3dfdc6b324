"""An ASGI app called in its own process, without a socket, its answer streamed.

What stands behind `hymba batch` and behind the replicas of a cluster: a body means there exactly what it
means over HTTP, because it is the same app that reads it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

App = Callable[..., Awaitable[None]]  # (scope, receive, send), as in the ASGI specification
Message = MutableMapping[str, Any]
Headers = tuple[tuple[str, str], ...]  # names in lower case


@dataclass(frozen=True)
class Call:
    """A request. `path` is decoded, `query` is not."""

    method: str
    path: str
    headers: Headers = (("content-type", "application/json"),)
    body: bytes = b""
    query: str = ""


@dataclass(frozen=True)
class Head:
    """What comes before the body of an answer."""

    status: int
    headers: Headers

    def get(self, name: str) -> str | None:
        """Return the first header called `name`, given in lower case."""
        return next((value for key, value in self.headers if key == name), None)


async def stream(app: App, call: Call) -> AsyncIterator[Head | bytes]:
    """Yield the answer's head, then its body, piece by piece as the app sends it.

    The app sees a client that has gone when the iteration is given up or cancelled.

    Raises:
        Exception: whatever the app raised before it had sent a head.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    arrived, gone = False, asyncio.Event()

    async def receive() -> Message:
        nonlocal arrived
        if not arrived:
            arrived = True
            return {"type": "http.request", "body": call.body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    task = asyncio.ensure_future(app(_scope(call), receive, sent.put))
    task.add_done_callback(lambda _: sent.put_nowait(None))
    begun = False
    try:
        while (message := await sent.get()) is not None:
            if message["type"] == "http.response.start":
                begun = True
                yield Head(message["status"], _decode(message.get("headers", ())))
            elif message["type"] == "http.response.body" and message.get("body"):
                yield bytes(message["body"])
    finally:
        gone.set()
        await _finish(task)
    if not begun:
        raise task.exception() or RuntimeError("the app ended without an answer")


async def fetch(app: App, call: Call) -> tuple[Head, bytes]:
    """Return the whole answer."""
    parts = [part async for part in stream(app, call)]
    heads = [part for part in parts if isinstance(part, Head)]
    return heads[0], b"".join(part for part in parts if isinstance(part, bytes))


async def _finish(task: asyncio.Future[None], patience: float = 1.0) -> None:
    """Let an app that was told of a disconnect end by itself, then cancel it."""
    await asyncio.wait({task}, timeout=patience)
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # seen: an app that has sent its answer may still raise, and has logged why


def _scope(call: Call) -> dict[str, Any]:
    told = [(name, value) for name, value in call.headers if name not in ("content-length", "transfer-encoding")]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": call.query.encode(),
        "root_path": "",
        "headers": [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in (*told, ("content-length", str(len(call.body))))
        ],
        "client": ("in-process", 0),
        "server": ("in-process", 80),
        "state": {},
    }


def _decode(headers: Any) -> Headers:
    return tuple((bytes(name).decode("latin-1").lower(), bytes(value).decode("latin-1")) for name, value in headers)
