"""`hymba chat`: a conversation."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from hymba.cli.loading import load_model
from hymba.cli.options import (
    TEMPERATURE,
    TOP_P,
    CacheOption,
    DeviceOption,
    DtypeOption,
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
    from hymba.inference import Conversation

HINT = "Ctrl-C stops an answer · /reset starts anew · /exit or Ctrl-D leaves"
NOT_TAUGHT = "The bundled model only continues prose: it was never taught to converse."


def chat(
    model: ModelOption = "tiny",
    system: Annotated[str | None, typer.Option(help="What the assistant is told first.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 512,
    temperature: TemperatureOption = TEMPERATURE,
    top_k: TopKOption = None,
    top_p: TopPOption = TOP_P,
    seed: SeedOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    cache: CacheOption = None,
) -> None:
    """Talk with a model that was taught to converse.

    Its memory is kept from turn to turn, so that each runs only what is new. Ctrl-C stops an answer, /reset
    starts anew, /exit or Ctrl-D leaves.
    """
    from hymba.inference import Conversation, SamplingParams, parse_cache
    from hymba.text import STOP_STRINGS

    params = SamplingParams(max_new_tokens, temperature, top_k, top_p, seed, stop=STOP_STRINGS)
    bits = parse_cache(cache)
    loaded, tokenizer = load_model(model, dtype, device, quantize)
    spare_threads(loaded)
    conversation = Conversation(loaded, tokenizer, params, system, bits)
    for line in (HINT, *([NOT_TAUGHT] if model == "tiny" else [])):
        typer.secho(line, dim=True, err=True)
    for question in _read_questions():
        if question == "/exit":
            return
        if question == "/reset":
            conversation = Conversation(loaded, tokenizer, params, system, bits)
            typer.secho("a new conversation", dim=True, err=True)
        else:
            _answer(conversation, question)


def _read_questions() -> Iterator[str]:
    """Yield what is typed, line by line, until Ctrl-D; Ctrl-C drops the line."""
    prompt = "\n› " if sys.stdin.isatty() else ""
    if prompt:
        import readline  # noqa: F401 - gives input() its history and editing keys
    while True:
        try:
            question = input(prompt).strip()
        except EOFError:
            if prompt:
                typer.echo()
            return
        except KeyboardInterrupt:
            typer.secho(f"\n{HINT}", dim=True, err=True)
            continue
        if question:
            yield question


def _answer(conversation: Conversation, question: str) -> None:
    """Stream the answer until it ends or is interrupted."""
    try:
        answer = conversation.ask(question)
    except HymbaError as error:
        typer.secho(f"{error}; /reset starts anew", fg="red", err=True)
        return
    with _interruption() as interrupted:
        for piece in answer:
            sys.stdout.write(piece)
            sys.stdout.flush()
            if interrupted():
                typer.secho(" …", dim=True, nl=False)
                break
    typer.echo()


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C rather than raise it: in the middle of a step it would leave the cache half written.

    A second Ctrl-C raises.
    """
    asked: list[int] = []

    def note(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
