"""Several replicas of a server, on one machine or many: a Ray Serve application.

A front reads each request and hands it to a replica, which is an engine behind the very app that `hymba serve` runs.
Requests that begin alike go to one replica, whose prefix cache knows the beginning; where that one is busy or gone, to
the next in their ranking. Serve restarts replicas that die and adjusts their number; the front repeats what was lost
with one, as long as the client has seen nothing of the answer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from hymba.inference import EngineOptions, parse_cache
from hymba.serving.affinity import affinity_key, rank
from hymba.serving.errors import ApiError
from hymba.serving.inprocess import Call, Head, fetch, stream
from hymba.serving.limits import limit_body
from hymba.serving.replica_metrics import join_metrics
from hymba.serving.service import Service, name_of
from hymba.serving.settings import Settings

ATTEMPTS = 3  # at a request whose replica dies before the client has seen anything
AHEAD = 2  # requests at a replica for each row of its engine, before the next replica is asked
GLANCE = 3.0  # seconds for a replica to say how it is
EVENTS = "text/event-stream"
DIED = "the replica that was answering has died"

LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)

log = logging.getLogger("ray.serve")


class AffinityRouter(RequestRouter):
    """Asks replicas in the order in which a request's key prefers them; without a key, the least busy one.

    A replica that holds `max_ongoing_requests` already, or does not answer, is passed over.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the candidates in groups, the preferred ones first."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # every replica is in the list: none is left to try
        key = pending_request.kwargs.get("key")
        if key is None:
            return [candidate_replicas]
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[named[name]] for name in rank(key, named)]


class Replica:
    """An engine and its app, in an actor."""

    def __init__(self, service: Service) -> None:
        self._engine, self._app = service.start()
        self._name = serve.get_replica_context().replica_id.unique_id

    async def handle(self, call: Call, key: str | None) -> AsyncIterator[Head | bytes]:
        """Answer a request: the head first, then the body. `key` is what the router goes by."""
        self.check_health()
        async for part in stream(self._app, call):
            yield part

    async def measure(self) -> tuple[str, str]:
        """Return this replica's name and what it has for Prometheus."""
        _, text = await fetch(self._app, Call("GET", "/metrics"))
        return self._name, text.decode()

    def check_health(self) -> None:
        """End the process if its engine has ended: then Serve starts another, and the front asks elsewhere."""
        if self._engine.dead:
            log.error("the engine has ended: %s", self._engine.dead)
            os._exit(1)


class Front:
    """Takes requests over HTTP and has replicas answer them."""

    def __init__(self, replicas: DeploymentHandle, settings: Settings) -> None:
        self._replicas, self._settings = replicas, settings
        self._active, self._draining = 0, False

    async def __call__(self, request: Request) -> Response:
        """Pass a request on, and its answer back; tell the health and the metrics of all replicas."""
        try:
            if request.url.path == "/metrics":
                return Response(join_metrics(await self._measure()), media_type="text/plain; version=0.0.4")
            if self._draining:
                told = {"Retry-After": "5"}
                raise ApiError(503, "the server is stopping: ask again", code="stopping", headers=told)
            if request.url.path == "/health":
                return JSONResponse({"status": "ok", "replicas": len(await self._measure())})
            body = await Request(request.scope, limit_body(request.receive, self._settings)).body()
            call = Call(request.method, request.url.path, tuple(request.headers.items()), body, request.url.query)
            return await self._ask(call, affinity_key(request.headers, body))
        except ApiError as error:
            return error.response()

    async def drain(self) -> None:
        """Take no more, and return when all that runs has ended."""
        self._draining = True
        while self._active:
            await asyncio.sleep(0.1)

    async def _measure(self) -> list[tuple[str, str]]:
        """Return what all replicas measure; what one does, while another does not answer."""
        with suppress(DeploymentUnavailableError, TimeoutError):
            answers = self._replicas.broadcast("measure")
            told = await answers.results_async(timeout_s=GLANCE, return_exceptions=True)
            if measured := [tell for tell in told if isinstance(tell, tuple)]:
                return measured
        with suppress(DeploymentUnavailableError, TimeoutError, RayActorError):
            return [await asyncio.wait_for(self._replicas.measure.remote(), GLANCE)]
        raise ApiError(503, "no replica answers", code="no_replica")

    async def _ask(self, call: Call, key: str | None) -> Response:
        for attempt in range(ATTEMPTS):
            parts = self._replicas.options(stream=True).handle.remote(call, key=key)
            try:
                return await self._begin(parts)
            except RayActorError:
                log.warning("%s: attempt %d of %d at %s", DIED, attempt + 1, ATTEMPTS, call.path)
                await asyncio.sleep(attempt)
            except BackPressureError:
                told = {"Retry-After": "1"}
                raise ApiError(429, "too many requests wait for a replica", code="queue_full", headers=told) from None
            except DeploymentUnavailableError:
                raise ApiError(503, "the replicas cannot be started; the log says why", code="no_replica") from None
        raise ApiError(503, f"{DIED}, {ATTEMPTS} times", code="replica_died", headers={"Retry-After": "5"})

    async def _begin(self, parts: DeploymentResponseGenerator) -> Response:
        """Return an answer once it cannot be asked for again: a stream at its first event, another at its end."""
        self._active += 1
        try:
            head = await anext(parts)
            if (head.get("content-type") or "").startswith(EVENTS):
                response: Response = StreamingResponse(self._pass_on(await anext(parts), parts), head.status)
            else:
                response = Response(b"".join([piece async for piece in parts]), head.status)
                self._active -= 1
        except BaseException:
            self._active -= 1
            parts.cancel()
            raise
        response.raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in head.headers]
        return response

    async def _pass_on(self, first: bytes, parts: DeploymentResponseGenerator) -> AsyncIterator[bytes]:
        """Yield a stream of events; where the replica dies, the last ones tell so."""
        try:
            yield first
            async for piece in parts:
                yield piece
        except RayActorError:
            told = ApiError(503, f"{DIED}; the answer ends here", code="replica_died").body()
            yield f"data: {json.dumps(told)}\n\ndata: [DONE]\n\n".encode()
        finally:
            self._active -= 1
            parts.cancel()


def build(service: Service, replicas: tuple[int, int], resources: dict[str, float]) -> serve.Application:
    """Return the application.

    Args:
        replicas: the least and the most of them; between the two, as many as the load asks for.
        resources: of each, as Ray's actors take them: "num_cpus", "num_gpus".
    """
    rows = service.options.max_rows
    replica = serve.deployment(
        Replica,
        ray_actor_options=resources,
        max_ongoing_requests=AHEAD * rows,
        max_queued_requests=service.options.max_waiting,
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas[0],
            initial_replicas=replicas[0],
            max_replicas=replicas[1],
            target_ongoing_requests=rows,
        ),
        request_router_config=RequestRouterConfig(request_router_class=AffinityRouter),
        health_check_period_s=5,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=service.settings.drain_seconds,
        logging_config=LOGGING,
    )
    front = serve.deployment(
        Front,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100_000,
        health_check_period_s=5,
        logging_config=LOGGING,
    )
    return front.bind(replica.bind(service), service.settings)


class Arguments(BaseModel, extra="forbid"):
    """What :func:`app` takes: NAME=VALUE of `serve run`, or `args` of a configuration; see `hymba serve --help`."""

    model: str = "tiny"
    dtype: str | None = None
    device: str = "auto"
    quantize: str | None = None
    cache: str | None = None
    max_rows: int = 8
    max_length: int | None = None
    timeout: float = 600
    replicas: int = 1
    max_replicas: int | None = None
    cpus: float = 1
    gpus: float = 0


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """Return the application for Serve's own commands: `serve run hymba.serving.cluster:app model=tiny replicas=2`.

    Raises:
        pydantic.ValidationError: an argument is none of :class:`Arguments`, or no such value.
    """
    args = Arguments.model_validate(arguments)
    options = EngineOptions(args.max_rows, args.max_length, cache_bits=parse_cache(args.cache))
    key = os.environ.get("HYMBA_API_KEY") or None
    settings = Settings(name_of(args.model), api_key=key, request_seconds=args.timeout)
    service = Service(args.model, args.dtype, args.device, args.quantize, options, settings)
    resources = {"num_cpus": args.cpus, "num_gpus": args.gpus}
    return build(service, (args.replicas, args.max_replicas or args.replicas), resources)
