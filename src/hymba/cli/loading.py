"""Loading with a progress bar where it takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedTokenizerBase

    from hymba.model import Hymba, Rounding


def load_model(
    name: str, dtype: str | None, device: str, quantize: str | None
) -> tuple[Hymba, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer; arguments as in `hymba.inference.load_model`."""
    from hymba import inference

    if quantize is None:
        return inference.load_model(name, dtype, device)
    with quantizing(inference.find_model(name)) as report:
        return inference.load_model(name, dtype, device, quantize, report)


@contextmanager
def quantizing(directory: Path) -> Iterator[Callable[[Rounding], None]]:
    """Show a progress bar; yield what is to be called after each weight of the model in `directory`."""
    from hymba.model import HymbaConfig, count_parameters, skeleton

    total = count_parameters(skeleton(HymbaConfig.from_directory(directory)))
    with progress_bar() as bar:
        task = bar.add_task("quantising", total=total)
        yield lambda rounding: bar.advance(task, rounding.entries)


def progress_bar() -> Progress:
    """Return a progress bar on stderr, which stays silent outside a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
