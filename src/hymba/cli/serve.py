"""`hymba serve`: an OpenAI-compatible server and a chat page."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from hymba.cli.loading import load_model
from hymba.cli.options import CacheOption, DeviceOption, DtypeOption, QuantizeOption
from hymba.cli.threads import spare_threads
from hymba.errors import HymbaError

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

    serving = _serving()
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
    loaded, tokenizer = load_model(model, dtype, device, quantize)
    spare_threads(loaded)
    engine = Engine(loaded, tokenizer, options)
    serving.serve(engine, settings, lambda address: typer.echo(f"{settings.model_name} is served at {address}"))


def name_of(model: str) -> str:
    """Return what requests call a model: a directory by its last name, anything else as it was given."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


def _serving() -> ModuleType:
    try:
        from hymba import serving
    except ModuleNotFoundError as error:
        raise HymbaError(f"a server needs {error.name}, which is not installed: pip install 'hymba[serve]'") from error
    return serving
