"""`hymba convert`: write a checkpoint anew."""

from __future__ import annotations

from typing import Annotated

import typer

from hymba.cli.options import DtypeOption, OutOption
from hymba.errors import HymbaError


def convert(
    source: Annotated[
        str, typer.Argument(help="'tiny', a directory, or a hub id such as owner/name.", show_default=False)
    ],
    out: OutOption,
    dtype: DtypeOption = None,
    max_shard_size: Annotated[str, typer.Option(help="Begin a new file beyond this size.")] = "5GB",
    remote_code: Annotated[
        bool,
        typer.Option("--remote-code", help="Add files with which trust_remote_code=True loads it from this package."),
    ] = False,
) -> None:
    """Write a checkpoint anew, in another dtype or other files.

    The tokenizer comes along, and so do keys of config.json that mean nothing here.
    """
    from hymba.inference import find_model, parse_dtype, write_model
    from hymba.model import load, scheme_of

    if remote_code:
        from hymba.hf import HymbaConfig
        from hymba.hf.remote_code import add_remote_code

    wanted, directory = parse_dtype(dtype), find_model(source)
    model = load(directory, wanted)
    if remote_code and scheme_of(model) is not None:
        raise HymbaError("--remote-code is for transformers, whose classes take no quantized checkpoint: leave it out")
    write_model(model, directory, out, max_shard_size)
    if remote_code:
        add_remote_code(out, HymbaConfig)
    files = sorted(out.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / 1e6
    typer.echo(f"{size:,.1f} MB in {len(files)} {'file' if len(files) == 1 else 'files'}: {out}")
