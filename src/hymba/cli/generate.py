"""`hymba generate`: continue a text."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hymba.cli.loading import load_model
from hymba.cli.options import (
    TEMPERATURE,
    TOP_P,
    CacheOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    QuantizeOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from hymba.cli.threads import spare_threads
from hymba.errors import HymbaError

if TYPE_CHECKING:
    from hymba.inference import Continuation


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The text to continue; without it, stdin is read.", show_default=False),
    ] = None,
    model: ModelOption = "tiny",
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 200,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(help="Refuse a longer prompt; the model's limit unless given.", show_default=False),
    ] = None,
    temperature: TemperatureOption = TEMPERATURE,
    top_k: TopKOption = None,
    top_p: TopPOption = TOP_P,
    seed: SeedOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text, streaming it as it is made.

    In a terminal the prompt is repeated, dimmed; in a pipe or a file stands the continuation alone.
    """
    text = _read_prompt() if prompt is None else prompt
    from hymba.inference import Continuation, SamplingParams, encode_prompt, parse_cache

    params, bits = SamplingParams(max_new_tokens, temperature, top_k, top_p, seed), parse_cache(cache)
    loaded, tokenizer = load_model(model, dtype, device, quantize)
    spare_threads(loaded)
    ids = encode_prompt(tokenizer, text)
    continuation = Continuation(loaded, tokenizer, ids, params, None, max_prompt_tokens, bits)
    if as_json:
        told = {"model": model, "prompt": text, "prompt_tokens": len(ids)} | _measure(continuation)
        typer.echo(json.dumps(told, ensure_ascii=False, indent=2))
        return
    if sys.stdout.isatty():
        typer.secho(text, dim=True, nl=False)
    for piece in continuation:
        sys.stdout.write(piece)
        sys.stdout.flush()
    typer.echo()


def _read_prompt() -> str:
    """Return what is piped in, less the newline at its end."""
    if sys.stdin.isatty():
        raise HymbaError("no prompt: give one, or pipe a text in")
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise HymbaError("the text piped in is not UTF-8") from error


def _measure(continuation: Continuation) -> dict[str, Any]:
    """Run to the end; return the text and how it went. The first token is timed apart: it runs the prompt."""
    begun = time.perf_counter()
    pieces = iter(continuation)
    next(pieces)
    first = time.perf_counter()
    for _ in pieces:
        pass
    later, seconds = len(continuation.tokens) - 1, time.perf_counter() - first
    return {
        "text": continuation.text,
        "new_tokens": len(continuation.tokens),
        "finish_reason": continuation.finish,
        "first_token_seconds": round(first - begun, 4),
        "tokens_per_second": round(later / seconds, 2) if later else None,
    }
