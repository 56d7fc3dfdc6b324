"""Ray: a cluster that runs already, or one on this machine, and what of it a replica gets."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace

import ray

from hymba.errors import HymbaError
from hymba.serving.service import Service

OBJECT_STORE_BYTES = 256 << 20  # of a cluster on this machine: it passes requests and answers, nothing large


def connect(replicas: int) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine with a CPU or more for each replica.

    Raises:
        HymbaError: no cluster answers at RAY_ADDRESS.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address, logging_level=logging.WARNING)
        else:
            ray.init(
                num_cpus=max(os.cpu_count() or 1, replicas),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.WARNING,
            )
    except ConnectionError as error:
        raise HymbaError(f"no Ray cluster answers at {address}: start one, or unset RAY_ADDRESS") from error


def place(service: Service, least: int, most: int) -> tuple[Service, dict[str, float]]:
    """Share the cluster out among replicas: return the service with its device decided, and what each replica takes.

    Each takes a GPU where there are enough, else as many CPUs as leave room for `most` replicas.

    Raises:
        HymbaError: there is no room for `least` replicas.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    if service.device.startswith("cuda") or (service.device == "auto" and sum(gpus) >= least):
        if sum(gpus) < least:
            raise HymbaError(f"{least} replicas on GPUs need as many, and the cluster has {sum(gpus)}")
        return replace(service, device="cuda"), {"num_cpus": 1, "num_gpus": 1}
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    if sum(cpus) < least:
        raise HymbaError(f"{least} replicas need a CPU each, and the cluster has {sum(cpus)}")
    return replace(service, device="cpu"), {"num_cpus": _largest_share(cpus, most)}


def _largest_share(cpus: Sequence[int], replicas: int) -> int:
    """Return how many CPUs each replica can take, given those of each machine; 1 where there is no room for all."""
    shares = range(max(cpus), 1, -1)
    return next((share for share in shares if sum(count // share for count in cpus) >= replicas), 1)


def last_words(*told: str) -> str:
    """Return the line that says why another process failed, out of the traces in which Ray tells it."""
    return "\n".join(told).strip().splitlines()[-1].removeprefix("hymba.errors.HymbaError: ")
