"""The app: endpoints, the door before them, errors in one shape."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware

from hymba.inference import Engine
from hymba.serving import chat, completions, errors, page
from hymba.serving.errors import ApiError
from hymba.serving.limits import Gate
from hymba.serving.protocol import DetokenizeRequest, ErrorBody, TokenizeRequest
from hymba.serving.settings import Settings
from hymba.serving.state import State


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """Return the app in front of an engine that was started; its state is `app.state.server`."""
    state = State.of(engine, settings)
    # No pages of documentation: they would fetch their scripts from elsewhere.
    app = FastAPI(title="hymba", version=version("hymba"), docs_url=None, redoc_url=None)
    app.state.server = state
    told: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
    for router in (chat.router(state), completions.router(state), _text_router(state), _status_router(state)):
        app.include_router(router, responses=told)
    app.include_router(page.router)
    errors.install(app)
    app.add_middleware(Gate, state=state)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


def _text_router(state: State) -> APIRouter:
    """Return the endpoints that turn text into tokens and back."""
    routes = APIRouter()

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Tell the tokens of a text, or of a conversation as the model would see it."""
        state.check_model(body.model)
        tokens = await run_in_threadpool(_tokenize, state, body)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": state.engine.max_length}

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """Tell the text of tokens."""
        state.check_model(body.model)
        state.check_tokens(body.tokens, "tokens")
        return {"prompt": await run_in_threadpool(state.vocabulary.decode, body.tokens)}

    return routes


def _tokenize(state: State, body: TokenizeRequest) -> list[int]:
    if body.messages is None:
        return state.vocabulary.encode(body.prompt or "", body.add_special_tokens)
    return state.vocabulary.encode(state.vocabulary.render(chat.write_messages(body.messages)), special=False)


def _status_router(state: State) -> APIRouter:
    """Return the endpoints that tell about the server."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Tell which model is served, and what a conversation with it holds."""
        return {"object": "list", "data": [state.card()]}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Tell about one model."""
        state.check_model(name)
        return state.card()

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Tell whether requests are answered."""
        if state.engine.dead:
            raise ApiError(503, f"the engine has ended: {state.engine.dead}", code="engine_dead")
        if state.draining:
            raise ApiError(503, "the server is stopping", code="stopping")
        return {"status": "ok"}

    @routes.get("/version")
    async def tell_version() -> dict[str, str]:
        """Tell the version."""
        return {"version": version("hymba")}

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Tell everything that Prometheus wants to know."""
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes
