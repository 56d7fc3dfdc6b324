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
from hymba.ops import native

BACKENDS = ("reference", "cpu", "native")

# Fastest first. "native" is C++; "cpu" is written in plain torch operations, so it also serves every other device.
_ORDER: dict[str, tuple[str, ...]] = {"cpu": ("native", "cpu")}
_DEFAULT_ORDER = ("cpu",)

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
        if forced == "native" and native.why_not():
            raise HymbaError(f"the native backend is not there: {native.why_not()}")
        if forced in implementations:
            return forced
    for name in _ORDER.get(device_type, _DEFAULT_ORDER):  # a generator would take twice as long
        if name in implementations and (name != "native" or native.library()):
            return name
    return "reference"


def usable(implementations: Mapping[str, Callable]) -> list[str]:
    """Return the names of the implementations that can run on this machine."""
    return [name for name in implementations if name != "native" or native.library()]


def explain(implementations: Mapping[str, Callable], device_type: str) -> str:
    """Return in a few words why :func:`selected` chooses as it does on a device type."""
    name, forced = selected(implementations, device_type), _forced.get() or os.environ.get("HYMBA_BACKEND")
    if forced:
        return "HYMBA_BACKEND asks for it" if name == forced else f"HYMBA_BACKEND asks for {forced!r}, which it lacks"
    if name == "native":
        return f"C++ kernels, {native.level()}"
    if device_type == "cpu" and "native" in implementations:
        return native.why_not()
    return "the fastest of its kind here" if len(implementations) > 1 else "the only one"


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
