"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from hymba.serving.answer import Answer, Piece
from hymba.serving.bridge import Job
from hymba.serving.protocol import AssistantMessage, ChatRequest, Content, Message
from hymba.serving.reply import Reply, make_jobs
from hymba.serving.state import State
from hymba.serving.tools import write_call
from hymba.serving.vocabulary import chat_logprobs
from hymba.text import STOP_STRINGS


def router(state: State) -> APIRouter:
    """Return the endpoint."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        state.check_model(body.model)
        jobs = await run_in_threadpool(prepare, state, body)
        return await ChatReply(state, body, jobs).respond(request)

    return routes


def prepare(state: State, body: ChatRequest) -> list[Job]:
    """Return the texts to generate: the conversation's next turn, n times.

    Raises:
        HymbaError: the template refuses it, or its numbers do not fit together.
    """
    tools = [tool.model_dump(exclude_unset=True) for tool in body.offered]
    text = state.vocabulary.render(write_messages(body.messages), tools, body.contexts)
    prompt = state.vocabulary.encode(text, special=False)
    params = state.params(
        body,
        max_new_tokens=body.limit or state.engine.max_length,
        logprobs=body.top_logprobs if body.logprobs else None,
        stop=body.stops if body.ignore_eos else (*STOP_STRINGS, *body.stops),
    )
    return make_jobs(prompt, params, body.n, state.allows(text))


def write_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return a conversation as the template takes it: texts, tool calls among them."""
    return [{"role": _role(message), "content": _text(message)} for message in messages]


def _role(message: Message) -> str:
    return "system" if message.role == "developer" else message.role


def _text(message: Message) -> str:
    text = _join(message.content)
    if not isinstance(message, AssistantMessage) or not message.tool_calls:
        return text
    calls = [write_call(call.function.name, call.function.arguments) for call in message.tool_calls]
    return "\n".join([*([text] if text else []), *calls])


def _join(content: Content) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class ChatReply(Reply):
    """Choices that are messages."""

    prefix, kind, event_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, state: State, body: ChatRequest, jobs: Sequence[Job]) -> None:
        guard, names = state.settings.guard, {tool.function.name for tool in body.offered}
        answers = [Answer(guard.begin() if guard else None, names) for _ in jobs]
        super().__init__(state, body, jobs, answers)
        self._logprobs = body.logprobs
        self._calls = [0] * len(jobs)

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a message; one with calls has no content but words."""
        content = piece.text.strip() or None if piece.calls else piece.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if piece.calls:
            message["tool_calls"] = [call.tell() for call in piece.calls]
        return {"index": index, "message": message, "logprobs": self._tell(piece), "finish_reason": piece.finish}

    def opening(self, index: int) -> dict[str, Any]:
        """Return the role."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return new text and calls; a call comes whole."""
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.calls:
            first = self._calls[index]
            self._calls[index] += len(piece.calls)
            delta["tool_calls"] = [{"index": i} | call.tell() for i, call in enumerate(piece.calls, first)]
        return {"index": index, "delta": delta, "logprobs": self._tell(piece), "finish_reason": piece.finish}

    def _tell(self, piece: Piece) -> dict[str, Any] | None:
        return chat_logprobs(self._state.vocabulary, piece.entries) if self._logprobs and piece.entries else None
