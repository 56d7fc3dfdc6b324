"""Which implementation of an op runs: a dictionary lookup, about one microsecond, and never a surprise.

Each op owns a dictionary from implementation name to function. :func:`choose` walks the names that suit the tensor's
device, fastest first, and returns the first that the op has. ``HYMBA_BACKEND=reference`` in the environment, or
``with use_backend("reference"):`` in code, overrides the order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from torch import Tensor

from hymba.errors import HymbaError

BACKENDS = ("reference", "cpu")

# Fastest first. The CPU path is written in plain torch operations, so it also serves every other device.
_ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference")}
_DEFAULT_ORDER = ("cpu", "reference")

_forced: ContextVar[str | None] = ContextVar("hymba_backend", default=None)


F = TypeVar("F", bound=Callable)


def choose(implementations: Mapping[str, F], x: Tensor) -> F:
    """Return the implementation to run for `x`, by the backend in force and the device of `x`."""
    name = selected(implementations, x.device.type)
    return implementations[name]


def selected(implementations: Mapping[str, Callable], device_type: str) -> str:
    """Return the name of the implementation that :func:`choose` takes on a device type such as ``"cpu"``."""
    forced = _forced.get() or os.environ.get("HYMBA_BACKEND")
    if forced:
        if forced not in BACKENDS:
            raise HymbaError(f"unknown backend {forced!r}: HYMBA_BACKEND takes one of {', '.join(BACKENDS)}")
        if forced in implementations:
            return forced
    return next(name for name in _ORDER.get(device_type, _DEFAULT_ORDER) if name in implementations)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block with the implementation `name`, where the op has it.

    Raises:
        HymbaError: `name` is not one of ``BACKENDS``.
    """
    if name not in BACKENDS:
        raise HymbaError(f"unknown backend {name!r}: use one of {', '.join(BACKENDS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
