"""`hymba serve`: an OpenAI-compatible server and a chat page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hymba.cli.extras import needing
from hymba.cli.loading import load_model
from hymba.cli.options import CacheOption, DeviceOption, DtypeOption, QuantizeOption
from hymba.cli.threads import spare_threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from hymba.serving.service import Service

KEY = "HYMBA_API_KEY"  # not an option: every user of a machine can read the command lines of all
LOOPBACK = ("127.0.0.1", "::1", "localhost")

_ENGINE, _DOOR = "Engine", "Access"


def serve(
    model: Annotated[
        str, typer.Argument(help="'tiny' (bundled), a directory, or a hub id such as owner/name.")
    ] = "tiny",
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    cache: CacheOption = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Texts generated at once.", rich_help_panel=_ENGINE)] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a prompt and its answer together; the model's limit unless given.",
            show_default=False,
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    replicas: Annotated[
        str | None,
        typer.Option(
            help="Engines on a Ray cluster, like 2, or like 1:8 as the load asks; one in this process unless given.",
            show_default=False,
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds that an answer may take.", rich_help_panel=_ENGINE)
    ] = 600,
    host: Annotated[str, typer.Option(help="The address to listen on.", rich_help_panel=_DOOR)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.", rich_help_panel=_DOOR)] = 8000,
    origin: Annotated[
        list[str] | None,
        typer.Option(
            help="A web page's origin that may call the server; may be repeated.",
            show_default=False,
            rich_help_panel=_DOOR,
        ),
    ] = None,
    guard: Annotated[
        Path | None,
        typer.Option(
            help="A file of regular expressions that end an answer.", show_default=False, rich_help_panel=_DOOR
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's API and as a chat page.

    HYMBA_API_KEY in the environment is the key that clients must send. SIGTERM and Ctrl-C let running answers end.
    """
    from hymba.inference import Engine, EngineOptions, parse_cache

    with needing("serve"):
        from hymba import serving
        from hymba.serving.service import Service, name_of
    settings = serving.Settings(
        model_name=name_of(model),
        host=host,
        port=port,
        api_key=os.environ.get(KEY) or None,
        origins=tuple(origin or ()),
        request_seconds=timeout,
        guard=None if guard is None else serving.PatternGuard.from_file(guard),
    )
    options = EngineOptions(max_rows=max_rows, max_length=max_length, cache_bits=parse_cache(cache))
    if host not in LOOPBACK and settings.api_key is None:
        typer.secho(f"whoever reaches {host} may use this server: set {KEY} to ask for a key", fg="yellow", err=True)

    def tell(address: str) -> None:
        typer.echo(f"{settings.model_name} is served at {address}")

    if replicas is not None:
        return _serve_replicas(Service(model, dtype, device, quantize, options, settings), replicas, tell)
    loaded, tokenizer = load_model(model, dtype, device, quantize)
    spare_threads(loaded)
    serving.serve(Engine(loaded, tokenizer, options), settings, tell)


def _serve_replicas(service: Service, replicas: str, ready: Callable[[str], None]) -> None:
    with needing("cluster"):
        from hymba.serving.cluster_server import parse_replicas, serve_cluster
    serve_cluster(service, parse_replicas(replicas), ready)
