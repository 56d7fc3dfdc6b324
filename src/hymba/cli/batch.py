"""`hymba batch`: answer a file of requests."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hymba.cli.extras import needing
from hymba.cli.loading import progress_bar
from hymba.cli.options import CacheOption, DeviceOption, DtypeOption, ModelOption, QuantizeOption
from hymba.cli.threads import spare_threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hymba.serving.batch import Answering, Groups, Item, Tally
    from hymba.serving.service import Service


def batch(
    requests: Annotated[
        Path, typer.Argument(metavar="IN", help="Requests in OpenAI's batch format, one a line.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The file to append answers to.", show_default=False)],
    model: ModelOption = "tiny",
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    cache: CacheOption = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Texts that an engine generates at once.")] = 16,
    replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Engines on a Ray cluster; one in this process unless given.", show_default=False),
    ] = None,
) -> None:
    """Answer every request of a file, each exactly once.

    Interrupted, by Ctrl-C or worse, the same command goes on where it was.
    """
    from hymba.inference import EngineOptions, parse_cache

    with needing("serve"):
        from hymba.serving import Settings
        from hymba.serving.batch import run
        from hymba.serving.service import Service, name_of
    options = EngineOptions(max_rows=max_rows, cache_bits=parse_cache(cache))
    service = Service(model, dtype, device, quantize, options, Settings(name_of(model))).for_batches()
    with progress_bar() as bar:
        task = bar.add_task(out.name, total=None)

        def show(tally: Tally) -> None:
            bar.update(task, completed=tally.done, total=tally.total)

        tally = run(requests, out, _here(service) if replicas is None else _on_cluster(service, replicas), show)
    errors = f", {tally.failed} of them with an error" if tally.failed else ""
    typer.echo(f"{out} answers {tally.done} of {tally.total} requests{errors}", err=True)


def _here(service: Service) -> Answering:
    def answering(items: Iterator[Item]) -> Groups:
        from hymba.serving.batch import answer_here

        engine, app = service.start()
        spare_threads(engine.model)
        yield from answer_here(engine, app, items)

    return answering


def _on_cluster(service: Service, replicas: int) -> Answering:
    with needing("cluster"):
        from hymba.serving.batch_cluster import answer_on_cluster

    return partial(answer_on_cluster, service, replicas)
