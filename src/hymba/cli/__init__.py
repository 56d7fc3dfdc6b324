"""The `hymba` command, one file a subcommand.

Heavy packages load inside the commands, so that help is instant.
"""

from __future__ import annotations

from typing import Annotated

import typer

from hymba.cli.batch import batch
from hymba.cli.chat import chat
from hymba.cli.convert import convert
from hymba.cli.errors import CommandGroup
from hymba.cli.generate import generate
from hymba.cli.info import info
from hymba.cli.init import init
from hymba.cli.perplexity import perplexity
from hymba.cli.pretrain import pretrain
from hymba.cli.quantize import quantize
from hymba.cli.serve import serve

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, chat, serve, batch, perplexity, info, pretrain, init, convert, quantize):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import import_module

        typer.echo(f"hymba {import_module('hymba').__version__}")  # also where it runs from its sources
        raise typer.Exit


@app.callback()
def hymba(
    version: Annotated[
        bool,
        typer.Option("--version", help="Say which version this is.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Hymba: a small language model with attention heads and state-space heads side by side."""


def main() -> None:
    """Run the command line; the entry point of the `hymba` script."""
    app(prog_name="hymba")


__all__ = ["app", "main"]
