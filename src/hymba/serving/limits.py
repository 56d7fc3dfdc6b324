"""The door: who may come in, how much they may bring, and that nobody new does while the server is closing."""

from __future__ import annotations

import asyncio
import hmac
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hymba.serving.errors import ApiError, client_gone
from hymba.serving.settings import Settings
from hymba.serving.state import State

KEPT = ("/v1/", "/tokenize", "/detokenize")  # what asks for a key; the rest tells nobody's business


class Gate:
    """Stands before an app: 401 without the key, 503 while the server drains, 413 for too much, 408 for too slow."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app, self._state = app, state
        self._key = None if state.settings.api_key is None else state.settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer in the app's place."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        begun = False

        async def count(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self._state.metrics.errors.labels(str(message["status"])).inc()
            await send(message)

        problem = self._problem(scope)
        if problem is not None:
            return await problem.response()(scope, receive, count)
        self._state.active += 1
        try:
            await self._app(scope, limit_body(receive, self._state.settings), count)
        except Exception:
            if begun:
                raise
            logging.getLogger("hymba").exception("%s failed", scope["path"])
            await ApiError(500, "the server made a mistake; its log says more").response()(scope, receive, count)
        finally:
            self._state.active -= 1

    def _problem(self, scope: Scope) -> ApiError | None:
        """Return why a request is turned away unread, if it is."""
        headers, settings = dict(scope["headers"]), self._state.settings
        length = headers.get(b"content-length", b"0")
        if scope["path"].startswith(KEPT):
            if not self._has_key(headers.get(b"authorization", b"")):
                told = {"WWW-Authenticate": "Bearer"}
                problem = "no valid API key: send it as 'Authorization: Bearer KEY'"
                return ApiError(401, problem, code="invalid_api_key", headers=told)
            if self._state.draining:
                return ApiError(503, "the server is stopping: ask again", code="stopping", headers={"Retry-After": "5"})
        if length.isdigit() and int(length) > settings.max_body_bytes:
            return _too_large(settings.max_body_bytes)
        return None

    def _has_key(self, authorization: bytes) -> bool:
        if self._key is None:
            return True
        scheme, _, key = authorization.partition(b" ")
        return hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"


def limit_body(receive: Receive, settings: Settings) -> Receive:
    """Return `receive` with limits on the body's bytes and on the time that it takes to arrive.

    It raises ApiError: 413 for too much, 408 for too slow, 499 for a client that has gone.
    """
    deadline, size, whole = asyncio.get_running_loop().time() + settings.body_seconds, 0, False

    async def limited() -> Message:
        nonlocal size, whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            problem = f"the body did not arrive within {settings.body_seconds:g} seconds"
            raise ApiError(408, problem, code="timeout") from None
        if message["type"] == "http.disconnect":
            raise client_gone()
        size += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        if size > settings.max_body_bytes:
            raise _too_large(settings.max_body_bytes)
        return message

    return limited


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is longer than the {limit} bytes that the server takes", code="too_large")
