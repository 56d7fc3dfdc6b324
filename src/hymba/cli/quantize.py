"""`hymba quantize`: write a model with weights of 8 or 4 bits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from hymba.cli.loading import quantizing
from hymba.cli.options import JsonOption, OutOption
from hymba.errors import HymbaError

if TYPE_CHECKING:
    from hymba.model import Rounding


def quantize(
    source: Annotated[
        str, typer.Argument(help="'tiny', a directory, or a hub id such as owner/name.", show_default=False)
    ],
    weights: Annotated[str, typer.Option(help="int8 or int4.", show_default=False)],
    out: OutOption,
    as_json: JsonOption = False,
) -> None:
    """Write a model with weights of 8 or 4 bits, and tell how far they are from what they were.

    It takes half or little more than a quarter of the space of bfloat16, and reads as much less for each token.
    """
    from hymba.inference import check_vacant, find_model, parse_format, write_model
    from hymba.model import load

    bits, directory = parse_format(weights), find_model(source)
    check_vacant(out)
    roundings: list[Rounding] = []
    with quantizing(directory) as show:

        def report(rounding: Rounding) -> None:
            roundings.append(rounding)
            show(rounding)

        model = load(directory, bits=bits, report=report)
    if not roundings:
        raise HymbaError(f"{source} is quantised already")
    write_model(model, directory, out)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    if as_json:
        told = {"model": source, "weights": weights, "out": str(out), "weight_bytes": size}
        typer.echo(json.dumps(told | {"errors": [r._asdict() for r in roundings]}, indent=2))
    else:
        _print_table(roundings)
        typer.echo(f"{size / 1e6:,.1f} MB in {weights}: {out}")


def _print_table(roundings: list[Rounding]) -> None:
    """Print the errors of all layers' weights of a kind in one row."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    kinds: dict[str, list[Rounding]] = {}
    for rounding in roundings:
        kinds.setdefault(_kind(rounding), []).append(rounding)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.caption = "error: ‖W − Ŵ‖ / ‖W‖, of all entries of a kind and of the worst layer"
    table.add_column("weight")
    for heading in ("bits", "layers", "parameters", "error", "worst"):
        table.add_column(heading, justify="right")
    for kind, members in kinds.items():
        entries, errors = sum(r.entries for r in members), [r.error for r in members]
        mean = (sum(r.error**2 * r.entries for r in members) / entries) ** 0.5
        numbers = (str(members[0].bits), str(len(members)), f"{entries:,}")
        table.add_row(kind, *numbers, f"{mean:.2%}", f"{max(errors):.2%}")
    Console().print(table)


def _kind(rounding: Rounding) -> str:
    """Return the last name of the module that the weight belongs to."""
    return rounding.name.removesuffix(".weight").rpartition(".")[2]
