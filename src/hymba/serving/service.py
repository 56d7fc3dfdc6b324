"""A model behind the API, described so that it can be started in any process, on any machine."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from hymba.inference import Engine, EngineOptions, find_model, load_model, parse_dtype, parse_format
from hymba.serving.app import create_app
from hymba.serving.inprocess import App
from hymba.serving.settings import Settings


@dataclass(frozen=True)
class Service:
    """What `hymba.inference.load_model`, the engine and the app take."""

    model: str = "tiny"
    dtype: str | None = None
    device: str = "auto"
    quantize: str | None = None
    options: EngineOptions = field(default_factory=EngineOptions)
    settings: Settings = field(default_factory=Settings)

    def check(self) -> None:
        """Find what is wrong with the names before other processes do.

        Raises:
            HymbaError: there is no such model, dtype or format.
        """
        parse_dtype(self.dtype), parse_format(self.quantize)
        find_model(self.model)

    def start(self) -> tuple[Engine, App]:
        """Load the model and start its engine; return it and the app before it.

        Raises:
            HymbaError: the model cannot be loaded, or there is no memory for the rows.
        """
        model, tokenizer = load_model(self.model, self.dtype, self.device, self.quantize)
        engine = Engine(model, tokenizer, self.options)
        engine.start()
        return engine, create_app(engine, self.settings)

    def for_batches(self) -> Service:
        """Return the service as a batch needs it: nobody waits, so no answer is late and no request is one too many."""
        options = replace(self.options, max_waiting=sys.maxsize)
        return replace(self, options=options, settings=replace(self.settings, request_seconds=None, api_key=None))


def name_of(model: str) -> str:
    """Return what requests call a model: a directory by its last name, anything else as it was given."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model
