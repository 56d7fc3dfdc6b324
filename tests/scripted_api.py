"""An OpenAI API that answers by script, and a way to serve an app for the length of a test."""

import asyncio
import json
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

MODEL = {
    "id": "hymba-test",
    "object": "model",
    "max_length": 8192,
    "cache": {"fixed_bytes": 20_000_000, "bytes_per_token": 10_000, "llama_bytes_per_token": 110_000},
}


class Gate:
    """Holds the pieces of an answer back until a test lets them through."""

    def __init__(self) -> None:
        self._passes = threading.Semaphore(0)

    def let_through(self, pieces: int) -> None:
        self._passes.release(pieces)

    async def wait(self) -> None:
        while not self._passes.acquire(blocking=False):
            await asyncio.sleep(0.005)


@dataclass
class Answer:
    """One answer: its pieces, and how it ends."""

    pieces: Sequence[str] = ("Hello", " there", ".")
    finish: str = "stop"
    error: str | None = None  # in place of the end; the whole answer if the status is not 200
    status: int = 200
    breaks_off: bool = False  # the connection closes behind the last piece
    gate: Gate | None = None
    usage: tuple[int, int, int] = (40, 20, 32)  # tokens of the prompt, of the answer, of the prompt from the cache


@dataclass
class ScriptedApi:
    """Answers with what stands next in `script`, and remembers what it was asked."""

    script: deque[Answer] = field(default_factory=deque)
    requests: list[dict[str, Any]] = field(default_factory=list)
    key: str | None = None
    left: threading.Event = field(default_factory=threading.Event)  # a client went away before the end

    def build(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        async def models(request: Request) -> Response:
            return self._refusal(request) or JSONResponse({"object": "list", "data": [MODEL]})

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            if refusal := self._refusal(request):
                return refusal
            self.requests.append(await request.json())
            answer = self.script.popleft() if self.script else Answer()
            if answer.status != 200:
                return JSONResponse({"error": {"message": answer.error}}, answer.status)
            return StreamingResponse(self._stream(answer), media_type="text/event-stream")

        return app

    def _refusal(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "this server asks for an API key"}}, 401)

    async def _stream(self, answer: Answer) -> AsyncIterator[str]:
        try:
            yield ": the connection is open\n\n"
            for piece in answer.pieces:
                if answer.gate:
                    await answer.gate.wait()
                yield _event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
        except asyncio.CancelledError:
            self.left.set()
            raise
        if answer.error:
            yield _event({"error": {"message": answer.error}})
        if answer.error or answer.breaks_off:
            return
        yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": answer.finish}]})
        prompt, new, cached = answer.usage
        details = {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        yield _event({"choices": [], "usage": details})
        yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve `app` on a free port of this machine; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(timeout=10)
