"""The one place where what went wrong becomes a line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from hymba.errors import HymbaError

INTERRUPTED = 130  # what a shell reports of a command ended by Ctrl-C


class CommandGroup(TyperGroup):
    """Runs a subcommand. Bad input, an unreadable file, Ctrl-C and a closed pipe end without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand, and exit with 1 after an error, 130 after Ctrl-C."""
        try:
            return super().invoke(ctx)
        except HymbaError as error:
            _print_error(str(error))
        except BrokenPipeError:  # the reader, `head` say, has enough; Python must not flush into it at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            _print_error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except KeyboardInterrupt:
            typer.echo(err=True)
            raise typer.Exit(INTERRUPTED) from None
        raise typer.Exit(1)


def _print_error(problem: str) -> None:
    """Print one line, however many the problem has."""
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {' '.join(problem.split())}", err=True)
