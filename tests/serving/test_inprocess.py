"""An app called in-process: the whole of the request goes in, the whole of the answer comes out as it is made."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from hymba.serving.inprocess import App, Call, Head, fetch, stream

CALL = Call("POST", "/v1/é", (("content-type", "text/plain"), ("content-length", "99")), b"body", "a=%20")


async def echo(
    scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
) -> None:
    message = await receive()
    told = [scope["method"], scope["path"], scope["query_string"], sorted(scope["headers"]), message["body"]]
    await send({"type": "http.response.start", "status": 201, "headers": [(b"X-Kind", b"echo")]})
    await send({"type": "http.response.body", "body": repr(told).encode(), "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def test_a_call_reaches_the_app_and_its_answer_comes_back() -> None:
    head, body = asyncio.run(fetch(echo, CALL))
    assert (head.status, head.get("x-kind"), head.get("x-other")) == (201, "echo", None)
    headers = [(b"content-length", b"4"), (b"content-type", b"text/plain")]
    assert body.decode() == repr(["POST", "/v1/é", b"a=%20", headers, b"body"])


def endless(log: list[str]) -> App:
    """An app that sends until it is told that the client has gone, or is cancelled."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await receive()
            gone = asyncio.ensure_future(receive())
            await send({"type": "http.response.start", "status": 200})
            while not gone.done():
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
                await asyncio.sleep(0.001)
            log.append(gone.result()["type"])
        except asyncio.CancelledError:
            log.append("cancelled")
            raise

    return app


def test_pieces_come_as_they_are_made_and_giving_up_is_a_disconnect() -> None:
    log: list[str] = []

    async def read_three() -> list[Head | bytes]:
        parts = stream(endless(log), CALL)
        read = [await anext(parts) for _ in range(3)]
        await parts.aclose()
        return read

    assert asyncio.run(read_three()) == [Head(200, ()), b"x", b"x"]
    assert log == ["http.disconnect"]


def test_a_reader_that_is_cancelled_has_gone_too() -> None:
    log: list[str] = []

    async def read_for_a_moment() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await fetch(endless(log), CALL)

    asyncio.run(read_for_a_moment())
    assert log == ["http.disconnect"]


def test_an_app_that_fails_before_it_answers_is_an_error() -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("no")

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        pass

    with pytest.raises(ValueError, match="no"):
        asyncio.run(fetch(fail, CALL))
    with pytest.raises(RuntimeError, match="without an answer"):
        asyncio.run(fetch(silent, CALL))


def test_an_app_that_fails_behind_its_answer_has_answered() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await echo(scope, receive, send)
        raise ValueError("too late to tell")

    assert asyncio.run(fetch(app, CALL))[0].status == 201
