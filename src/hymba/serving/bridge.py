"""From the engine's thread to asyncio: the sequences of one request as one stream of updates."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from starlette.types import Receive

from hymba.inference import Engine, SamplingParams, Update
from hymba.inference import Sequence as EngineSequence
from hymba.serving.errors import ApiError
from hymba.serving.metrics import Metrics, Watch

T = TypeVar("T")

GLANCE = 1.0  # seconds between looks at an engine that is silent
REFUSED = Update(finish="content_filter")


class Mailbox:
    """Carries updates from other threads into an event loop, all that have gathered at once: to wake the loop costs
    more than a token's text, and in the middle of the engine's step.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._letters: deque[tuple[asyncio.Queue[tuple[int, Update]], int, Update]] = deque()
        self._called = False

    def post(self, queue: asyncio.Queue[tuple[int, Update]], index: int, update: Update) -> None:
        """Put (index, update) into `queue` soon; called in any thread."""
        self._letters.append((queue, index, update))
        if not self._called:
            self._called = True
            with suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # first: a letter that comes from here on calls anew
        while self._letters:
            queue, index, update = self._letters.popleft()
            queue.put_nowait((index, update))


@dataclass(frozen=True)
class Job:
    """A text to generate; one that is not allowed ends before it begins."""

    prompt: list[int]
    params: SamplingParams
    allowed: bool = True


class Run:
    """The texts of one request, given to the engine at once; iterate for what each gains. Close it in any case.

    Args:
        mailbox: of the running event loop. seconds: the time that all may take together.

    Raises:
        HymbaError: the engine does not take one of them; then it has none.
    """

    def __init__(
        self, engine: Engine, jobs: Sequence[Job], mailbox: Mailbox, metrics: Metrics, seconds: float | None
    ) -> None:
        self._engine, self._loop, self._seconds = engine, mailbox.loop, seconds
        self._queue: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._deadline = None if seconds is None else self._loop.time() + seconds
        self._open = set(range(len(jobs)))
        self.sequences = [
            EngineSequence(job.prompt, job.params, partial(mailbox.post, self._queue, i)) for i, job in enumerate(jobs)
        ]
        self._watches = [Watch(metrics, sequence) for sequence in self.sequences]
        try:
            for index, job in enumerate(jobs):
                if job.allowed:
                    engine.submit(self.sequences[index])
                else:
                    self._queue.put_nowait((index, REFUSED))
        except BaseException:
            self.close()
            raise

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """Yield (which text, what it gained) until all have ended.

        Raises:
            ApiError: the time is up, the engine failed, or the server is stopping.
        """
        while self._open:
            index, update = await self._next()
            if index not in self._open:
                continue
            self._watches[index].see(update)
            if update.finish == "error":
                raise self._failure(index, update.error or "the engine failed")
            if update.finish == "cancelled":
                raise ApiError(503, "the server is stopping: ask again", code="stopping")
            if update.finish:
                self._open.discard(index)
            yield index, update

    async def _next(self) -> tuple[int, Update]:
        while True:
            left = None if self._deadline is None else self._deadline - self._loop.time()
            if left is not None and left <= 0:
                raise ApiError(
                    504, f"the answer took more than the {self._seconds:g} seconds it may take", code="timeout"
                )
            try:
                async with asyncio.timeout(GLANCE if left is None else min(GLANCE, left)):
                    return await self._queue.get()
            except TimeoutError:
                if self._engine.dead and self._queue.empty():
                    raise ApiError(503, f"the engine has ended: {self._engine.dead}", code="engine_dead") from None

    def _failure(self, index: int, problem: str) -> ApiError:
        """Return what the failure of one text is to the client: its own doing if it restricted the tokens too far."""
        params = self.sequences[index].params
        if not self._engine.dead and (params.constraint is not None or params.logit_bias):
            return ApiError(400, problem, code="generation_failed")
        return ApiError(500, problem, code="engine_error")

    def end(self, index: int) -> None:
        """Give up one of the texts."""
        if index in self._open:
            self._open.discard(index)
            self._engine.cancel(self.sequences[index])

    def close(self) -> None:
        """Give up what has not ended."""
        for index in list(self._open):
            self.end(index)


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, or cancel it as soon as the client goes.

    Raises:
        ClientGoneError: it went.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
