"""`/v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from hymba.serving.answer import Answer, Piece
from hymba.serving.bridge import Job
from hymba.serving.errors import ApiError
from hymba.serving.protocol import CompletionRequest
from hymba.serving.reply import Reply, make_jobs
from hymba.serving.state import State
from hymba.serving.vocabulary import CompletionLogprobs


def router(state: State) -> APIRouter:
    """Return the endpoint."""
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text, or several."""
        state.check_model(body.model)
        prompts, jobs = await run_in_threadpool(prepare, state, body)
        return await CompletionReply(state, body, prompts, jobs).respond(request)

    return routes


def prepare(state: State, body: CompletionRequest) -> tuple[list[tuple[list[int], str]], list[Job]]:
    """Return the prompts, ids and text, and the texts to generate: n for each prompt.

    Raises:
        ApiError, HymbaError: a prompt is empty or holds unknown tokens, or the numbers do not fit together.
    """
    prompts = read_prompts(state, body.prompt)
    params = state.params(
        body,
        max_new_tokens=max(1, body.max_tokens),  # the engine makes one at least; see `silent`
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    jobs = [job for ids, text in prompts for job in make_jobs(ids, params, body.n, state.allows(text))]
    return prompts, jobs


def read_prompts(state: State, given: str | list[str] | list[int] | list[list[int]]) -> list[tuple[list[int], str]]:
    """Return the ids and the text of each prompt, whichever of them was given.

    Raises:
        ApiError: there is none, one is empty, or it holds a token that the model does not know.
    """
    one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    prompts: Any = [given] if one else given
    found: list[tuple[list[int], str]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            found.append((state.vocabulary.encode(prompt, special=True), prompt))
        else:
            state.check_tokens(prompt, "prompt")
            found.append((prompt, state.vocabulary.decode(prompt)))
    if not found or not all(ids for ids, _ in found):
        raise ApiError(400, "the prompt is empty: give some text or tokens to continue", "prompt", "invalid_value")
    return found


class CompletionReply(Reply):
    """Choices that are texts."""

    prefix, kind, event_kind = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, state: State, body: CompletionRequest, prompts: Sequence[tuple[list[int], str]], jobs: Sequence[Job]
    ) -> None:
        guard, silent = state.settings.guard, body.max_tokens == 0
        echoes = [prompt if body.echo else None for prompt in prompts for _ in range(body.n)]
        answers = [
            Answer(guard.begin() if guard else None, (), echo if job.allowed else None, silent)
            for job, echo in zip(jobs, echoes, strict=True)
        ]
        super().__init__(state, body, jobs, answers)
        wanted = body.logprobs is not None
        self._logprobs = [CompletionLogprobs(state.vocabulary, body.echo) if wanted else None for _ in jobs]

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a text."""
        return self.delta(index, piece)

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return new text."""
        writer = self._logprobs[index]
        logprobs = writer.write(piece.entries) if writer else None
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}
