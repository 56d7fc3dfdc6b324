"""`hymba init`: random weights for a configuration."""

from __future__ import annotations

from typing import Annotated

import typer

from hymba.cli.options import OutOption


def init(
    config_dir: Annotated[
        str,
        typer.Argument(help="Holds config.json, and the tokenizer if it is to be copied.", show_default=False),
    ],
    out: OutOption,
    seed: Annotated[int, typer.Option(min=0, help="The same seed, the same weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
) -> None:
    """Write a model with random weights in the released layout.

    For trying sizes and measuring speed: what it generates is noise.
    """
    from hymba.inference import find_model, parse_dtype, write_model
    from hymba.model import HymbaConfig, init_weights, skeleton

    source, wanted = find_model(config_dir, weights=False), parse_dtype(dtype)
    config = HymbaConfig.from_directory(source)
    model = init_weights(skeleton(config).to(wanted).to_empty(device="cpu"), seed)
    write_model(model, source, out)
    count = sum(p.numel() for p in model.parameters())
    typer.echo(f"{count:,} random parameters in {dtype}, seed {seed}: {out}")
