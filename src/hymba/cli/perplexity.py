"""`hymba perplexity`: how well a model predicts text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hymba.cli.loading import load_model, progress_bar
from hymba.cli.options import CacheOption, DeviceOption, DtypeOption, JsonOption, ModelOption, QuantizeOption

if TYPE_CHECKING:
    from hymba.evaluation import Score


def perplexity(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="UTF-8 text.", show_default=False)],
    model: ModelOption = "tiny",
    context: Annotated[
        int | None, typer.Option(help="Tokens read at once; as in training unless given.", show_default=False)
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens from window to window; half of the context unless given.", show_default=False),
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how well a model predicts text, in bits per byte too.

    Windows of CONTEXT tokens follow one another at STRIDE tokens; each token is scored once, with at least
    CONTEXT - STRIDE tokens before it, the first window's aside.
    """
    from hymba.evaluation import default_context, read_text
    from hymba.inference import parse_cache

    texts, bits = [read_text(file) for file in files], parse_cache(cache)
    loaded, tokenizer = load_model(model, dtype, device, quantize)
    context = default_context(loaded.config) if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    scores = _score(loaded, tokenizer, files, texts, (context, stride), bits)
    if as_json:
        dtype = str(loaded.dtype).removeprefix("torch.")
        settings = {"model": model, "dtype": dtype, "quantize": quantize, "cache": cache}
        told = [{"file": str(file)} | _describe(score) for file, score in zip(files, scores, strict=True)]
        total = _describe(sum(scores[1:], scores[0]))
        typer.echo(
            json.dumps(settings | {"context": context, "stride": stride, "files": told, "total": total}, indent=2)
        )
    else:
        _print_table(files, scores, context, stride)


def _score(
    model: Any, tokenizer: Any, files: list[Path], texts: list[str], windows: tuple[int, int], bits: int | None
) -> list[Score]:
    """Score each text under a progress bar."""
    from hymba.evaluation import score_text

    scores = []
    with progress_bar() as bar:
        for file, text in zip(files, texts, strict=True):
            task = bar.add_task(file.name, total=None)

            def show(done: int, total: int, task: Any = task) -> None:
                bar.update(task, completed=done, total=total)

            scores.append(score_text(model, tokenizer, text, *windows, show, bits))
    return scores


def _describe(score: Score) -> dict[str, float]:
    return {
        "bytes": score.num_bytes,
        "tokens": score.tokens,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }


def _print_table(files: list[Path], scores: list[Score], context: int, stride: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("file", overflow="fold")
    for heading in ("bytes", "tokens", "loss", "perplexity", "bits per byte"):
        table.add_column(heading, justify="right")
    rows = [(escape(str(file)), score) for file, score in zip(files, scores, strict=True)]
    if len(rows) > 1:
        rows.append(("all together", sum(scores[1:], scores[0])))
    for place, (name, s) in enumerate(rows, 1):
        numbers = (f"{s.num_bytes:,}", f"{s.tokens:,}", f"{s.loss:.4f}", f"{s.perplexity:,.2f}")
        table.add_row(name, *numbers, f"[bold]{s.bits_per_byte:.4f}[/]", end_section=place == len(files))
    console = Console()
    console.print(table)
    console.print(f"loss in nats a token · context {context}, stride {stride}: each token scored once", style="dim")
