"""The answer to one request, whole or streamed; the two kinds of completion say how each is written."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from hymba.inference import SamplingParams
from hymba.serving.answer import Answer, Piece
from hymba.serving.bridge import ClientGoneError, Job, Run, while_connected
from hymba.serving.errors import client_gone
from hymba.serving.protocol import Generation
from hymba.serving.state import State
from hymba.serving.streaming import EventStream


def make_jobs(prompt: list[int], params: SamplingParams, count: int, allowed: bool) -> list[Job]:
    """Return `count` texts that continue one prompt, each with a seed of its own if there is one."""
    seeds = [None if params.seed is None else (params.seed + i) % (1 << 63) for i in range(count)]
    return [Job(prompt, replace(params, seed=seed), allowed) for seed in seeds]


class Reply(ABC):
    """The choices of one request and how they are told.

    Args:
        jobs: the texts, `body.n` for each prompt. answers: one for each of them.
    """

    prefix: ClassVar[str]  # of ids
    kind: ClassVar[str]  # OpenAI's name for the object
    event_kind: ClassVar[str]  # and for a piece of it

    def __init__(self, state: State, body: Generation, jobs: Sequence[Job], answers: Sequence[Answer]) -> None:
        self._state, self._n, self._usage_wanted, self._stream = state, body.n, body.wants_usage, body.stream
        self._jobs, self._answers = jobs, answers
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    @abstractmethod
    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a choice that is complete."""

    @abstractmethod
    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return what a choice gained."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return what a choice begins with in a stream, before it gained anything."""
        return None

    async def respond(self, request: Request) -> Response:
        """Generate, and answer as the request wishes.

        Raises:
            ApiError, HymbaError: before anything was sent; later errors are told in the stream.
        """
        run = self._state.run(self._jobs)
        if self._stream:
            errors = self._state.metrics.errors
            return EventStream(self._events(run), run.close, lambda status: errors.labels(str(status)).inc())
        try:
            return JSONResponse(await while_connected(request.receive, self._collect(run)))
        except ClientGoneError:
            raise client_gone() from None
        finally:
            run.close()

    async def _collect(self, run: Run) -> dict[str, Any]:
        whole = [Piece() for _ in self._jobs]
        async for index, piece in self._pieces(run):
            whole[index].add(piece)
        choices = [self.choice(index, piece) for index, piece in enumerate(whole)]
        return self._head(self.kind) | {"choices": choices, "usage": self._usage(run)}

    async def _events(self, run: Run) -> AsyncIterator[dict[str, Any]]:
        head, begun = self._head(self.event_kind), set[int]()
        nothing = {"usage": None} if self._usage_wanted else {}
        async for index, piece in self._pieces(run):
            opening = self.opening(index) if index not in begun else None
            begun.add(index)
            if opening:
                yield head | {"choices": [opening]} | nothing
            yield head | {"choices": [self.delta(index, piece)]} | nothing
        if self._usage_wanted:
            yield head | {"choices": [], "usage": self._usage(run)}

    async def _pieces(self, run: Run) -> AsyncIterator[tuple[int, Piece]]:
        async for index, update in run.updates():
            piece = self._answers[index].push(update)
            if piece.finish and not update.finish:
                run.end(index)
            if piece:
                yield index, piece

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._state.settings.model_name,
        }

    def _usage(self, run: Run) -> dict[str, Any]:
        """Return the tokens spent; a prompt counts once, however many texts continue it."""
        prompt = sum(len(job.prompt) for job in self._jobs[:: self._n])
        cached = sum(sequence.cached_tokens for sequence in run.sequences[:: self._n])
        new = sum(answer.tokens for answer in self._answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
