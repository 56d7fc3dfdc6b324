"""A cluster served from a command line, from its first replica to its last."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from hymba.errors import HymbaError
from hymba.serving.cluster import LOGGING, build
from hymba.serving.machines import connect, last_words, place
from hymba.serving.service import Service
from hymba.serving.settings import Settings

NAME = "hymba"  # of the application


def parse_replicas(text: str) -> tuple[int, int]:
    """Return the least and the most replicas that "2" or "1:8" asks for.

    Raises:
        HymbaError: it is neither.
    """
    least, _, most = text.partition(":")
    try:
        replicas = int(least), int(most or least)
    except ValueError:
        replicas = 0, 0
    if not 1 <= replicas[0] <= replicas[1]:
        raise HymbaError(f"replicas are a number like 2, or the least and the most like 1:8, and not {text!r}")
    return replicas


def serve_cluster(
    service: Service, replicas: tuple[int, int], ready: Callable[[str], None] = lambda address: None
) -> None:
    """Serve until SIGTERM or Ctrl-C, on the cluster of RAY_ADDRESS or on one that is started on this machine.

    Args:
        replicas: the least and the most of them. ready: called with the address once requests are answered.

    Raises:
        HymbaError: there is no cluster, no room in it, or the replicas cannot be started.
    """
    service.check()
    host, port = service.settings.host, _free_port(service.settings)
    connect(replicas[1])
    try:
        service, resources = place(service, *replicas)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options={"host": host, "port": port}, logging_config=LOGGING)
        front = _deploy(build(service, replicas, resources))
        stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        ready(f"http://{host}:{port}")
        stopped.wait()
        with suppress(TimeoutError):
            front.broadcast("drain").results(timeout_s=service.settings.drain_seconds)
    finally:
        serve.shutdown()
        ray.shutdown()


def _deploy(application: serve.Application) -> DeploymentHandle:
    """Return an application's front, as soon as it answers.

    Raises:
        HymbaError: it never will, and the last line that a replica left says why.
    """
    try:
        return serve.run(application, name=NAME)
    except RuntimeError as error:
        told = [deployment.message for deployment in serve.status().applications[NAME].deployments.values()]
        raise HymbaError(f"the replicas cannot be started: {last_words(str(error), *told)}") from error


def _free_port(settings: Settings) -> int:
    """Return the port to listen on; a cluster's other machines are not asked whether it is free there.

    Raises:
        HymbaError: it is taken here.
    """
    try:
        with socket.create_server((settings.host, settings.port)) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        place = f"{settings.host}, port {settings.port}"
        raise HymbaError(f"cannot listen on {place}: {error.strerror}; choose another --host or --port") from error
