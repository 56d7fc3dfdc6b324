"""Answers while they grow: server-sent events, ended by [DONE]."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from hymba.errors import HymbaError
from hymba.serving.bridge import ClientGoneError, while_connected
from hymba.serving.errors import ApiError, as_api_error

SEND_SECONDS = 60.0  # for a client to take an event
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """Sends events as they come, and lets go of the answer as soon as the client does.

    Args:
        events: JSON objects; an error among them ends the stream with an event that tells it.
        close: called at the end, however it comes.
        count_error: called with the status that an error would have had.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[dict[str, Any]], close: Callable[[], None], count_error: Callable[[int], None]
    ) -> None:
        self.status_code, self.background = 200, None
        self._events, self._close, self._count_error = events, close, count_error
        self.init_headers(HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, as ASGI has it."""
        try:
            with suppress(ClientGoneError, TimeoutError, OSError):
                await while_connected(receive, self._send(send))
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await _send_event(send, json.dumps(event, ensure_ascii=False))
        except (ApiError, HymbaError) as error:
            await self._tell(send, error if isinstance(error, ApiError) else as_api_error(error))
        except (TimeoutError, OSError):
            raise
        except Exception:
            logging.getLogger("hymba").exception("an answer broke off")
            await self._tell(send, ApiError(500, "the server made a mistake; its log says more"))
        await _send_event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tell(self, send: Send, error: ApiError) -> None:
        self._count_error(error.status_code)
        await _send_event(send, json.dumps(error.body()))


async def _send_event(send: Send, data: str) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
