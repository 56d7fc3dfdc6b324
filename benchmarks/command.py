"""What the benchmarks' command lines share: options, a progress bar, one-line errors, and the record of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hymba.errors import HymbaError
from hymba.files import replacing
from hymba.model.config import SIZES
from hymba.ops import native

ROOT = Path(__file__).parent.parent
INTERRUPTED = 130  # what a shell reports of a command ended by Ctrl-C

Size = StrEnum("Size", {name: name for name in SIZES})  # type: ignore[misc]


class Weights(StrEnum):
    """How the weights are stored."""

    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"


SizeOption = Annotated[Size, typer.Option("--config", help="The model's size; its weights are random.")]
WeightsOption = Annotated[Weights, typer.Option(help="How the weights are stored.")]
Rows = Annotated[int, typer.Option(min=1, help="Sequences in the batch.")]
Context = Annotated[int, typer.Option(min=1, help="Tokens in the cache before timing begins.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads to use; without it, as many as torch does.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print, as the last line, everything as one JSON object.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Write the JSON to OUT/<device>/<date>-<commit>-<name>.json too.", show_default=False),
]


def main(*commands: Callable[..., None]) -> None:
    """Run the command line of one benchmark, or of several by name; what goes wrong becomes a line on stderr."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    for command in commands:
        app.command(context_settings={"help_option_names": ["-h", "--help"]})(command)
    try:
        app()
    except HymbaError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except MemoryError:
        problem = "there is not enough memory: choose a smaller --config, fewer --rows or a shorter --context"
    typer.secho(f"error: {' '.join(problem.split())}", fg="red", err=True)
    sys.exit(1)


def use_threads(threads: int | None) -> None:
    """Let torch, and with it the kernels, use that many threads."""
    if threads is not None:
        torch.set_num_threads(threads)


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar on stderr, in a terminal; yield what moves it on by one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def finish(
    name: str,
    settings: Mapping[str, Any],
    result: Mapping[str, Any],
    lines: Sequence[str],
    as_json: bool,
    out: Path | None,
) -> None:
    """Print what people read, then, if asked for, the JSON object; write that under `out` if given.

    Args:
        name: of the benchmark and the variant, such as "decode-1.5b-int8"; the newest result of a name counts.
        settings: what the run was asked to do.
        result: the numbers, at the top of the object.
        lines: what people read.
    """
    if native.library() is None:
        typer.secho(f"warning: measured without C++ kernels: {native.why_not()}", fg="yellow", err=True)
    for line in lines:
        typer.echo(line)
    record = new_record(name, settings, result)
    if out is not None:
        typer.echo(f"written to {write_record(record, out)}", err=True)
    if as_json:
        typer.echo(json.dumps(record))


def new_record(name: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result with what belongs to it: its name and settings, the command, date, commit and machine."""
    from benchmarks.machine import describe

    return {
        "name": name,
        **result,
        "settings": dict(settings),
        "command": _command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": describe(),
    }


def write_record(record: Mapping[str, Any], out: Path) -> Path:
    """Write a result to `out`/<device>/<date>-<commit>-<name>.json and return the path."""
    path = out / record["machine"]["device"] / f"{record['date'][:10]}-{record['commit']}-{record['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def _command() -> str:
    """Return the command line that repeats this run, without what belongs to this machine's folders."""
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word in ("--out", "--store"):
            next(words, None)
        elif word != "--json":
            kept.append(f"…/{Path(word).name}" if word.startswith("/") else word)
    return " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *kept])


def commit() -> str:
    """Return the commit of the code that runs, marked if it holds changes not committed.

    HYMBA_COMMIT in the environment names it where the sources are a copy without their history.
    """
    if named := os.environ.get("HYMBA_COMMIT"):
        return named[:8]
    changed = "-dirty" if _git("status", "--porcelain", "--", "src", "benchmarks/*.py") else ""
    return (_git("rev-parse", "--short=8", "HEAD") or "unknown") + changed


def _git(*arguments: str) -> str:
    try:
        finished = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return finished.stdout.strip()
