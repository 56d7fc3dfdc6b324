"""A batch on several machines: engines in Ray Data's actors, and one process that writes the answers."""

from __future__ import annotations

import json
import logging
import math
import pickle
from collections.abc import AsyncIterator, Iterator
from typing import Any

import ray.data
from ray.exceptions import RayError

from hymba.errors import HymbaError
from hymba.serving.batch import AHEAD, Groups, Item, answer_all
from hymba.serving.machines import connect, last_words, place
from hymba.serving.service import Service

BLOCKS = 3  # as many requests each as an engine has rows, at it at a time, so that no row waits for a block to end


class Worker:
    """An engine in an actor."""

    def __init__(self, service: Service) -> None:
        self._engine, self._app = service.start()
        self._parallel = AHEAD * service.options.max_rows

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, list[str]]]:
        """Yield the answers to a batch of requests in groups, as lines of JSON."""
        items = (pickle.loads(item) for item in batch["item"])
        async for lines in answer_all(self._app, items, self._parallel):
            if self._engine.dead:
                raise HymbaError(f"the engine stopped: {self._engine.dead}")
            yield {"line": [json.dumps(line) for line in lines]}


def answer_on_cluster(service: Service, replicas: int, items: Iterator[Item]) -> Groups:
    """Yield groups of answers from engines on a Ray cluster; the requests have to fit into this process's memory.

    Raises:
        HymbaError: there is no cluster or no room in it, a model cannot be loaded, or an engine died.
    """
    if replicas < 1:
        raise HymbaError(f"replicas must be 1 or more, not {replicas}")
    service.check()
    connect(replicas)
    service, resources = place(service, replicas, replicas)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    rows = [{"item": pickle.dumps(item)} for item in items]
    block = min(service.options.max_rows, math.ceil(len(rows) / replicas))
    answered = ray.data.from_items(rows, override_num_blocks=math.ceil(len(rows) / block)).map_batches(
        Worker,
        fn_constructor_args=(service,),
        concurrency=replicas,
        max_concurrency=BLOCKS,
        batch_size=None,
        **resources,
    )
    try:
        for batch in answered.iter_batches(batch_size=None, prefetch_batches=0):
            yield [json.loads(line) for line in batch["line"]]
    except RayError as error:
        raise HymbaError(f"the batch stopped: {last_words(str(error))}; the same command goes on from here") from error
    finally:
        ray.shutdown()
