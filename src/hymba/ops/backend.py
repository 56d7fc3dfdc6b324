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

import torch
from torch import Tensor

from hymba.errors import HymbaError
from hymba.ops import gpu, native

BACKENDS = ("reference", "cpu", "native", "triton", "liger")

# Fastest first. "native" is C++, "liger" a package of kernels for training; "cpu" is written in plain torch operations,
# so it also serves every other device.
_ORDER: dict[str, tuple[str, ...]] = {"cpu": ("native", "cpu"), "cuda": ("triton", "liger", "cpu")}
_DEFAULT_ORDER = ("cpu",)

# Why the backends that not every machine has cannot run, or "" if they can.
_WHY_NOT: dict[str, Callable[[], str]] = {
    "native": native.why_not,
    "triton": gpu.why_not,
    "liger": gpu.why_no_liger,
}

_forced: ContextVar[str | None] = ContextVar("hymba_backend", default=None)


F = TypeVar("F", bound=Callable)


def choose(implementations: Mapping[str, F], x: Tensor) -> F:
    """Return the implementation to run for `x`, by the backend in force and the device of `x`.

    While torch.compile or torch.export trace, it is the one in torch operations, which is all they see.
    """
    if torch.compiler.is_compiling():
        return implementations["cpu"]
    name = selected(implementations, x.device.type)
    return implementations[name]


def selected(implementations: Mapping[str, Callable], device_type: str) -> str:
    """Return the name of the implementation that :func:`choose` takes on a device type such as ``"cpu"``."""
    forced = _forced.get() or os.environ.get("HYMBA_BACKEND")
    if forced:
        if forced not in BACKENDS:
            raise HymbaError(f"unknown backend {forced!r}: HYMBA_BACKEND takes one of {', '.join(BACKENDS)}")
        if reason := _why_not(forced):
            raise HymbaError(f"the {forced} backend is not there: {reason}")
        if forced in implementations:
            return forced
    for name in _ORDER.get(device_type, _DEFAULT_ORDER):  # a generator would take twice as long
        if name in implementations and not _why_not(name):
            return name
    return "reference"


def usable(implementations: Mapping[str, Callable]) -> list[str]:
    """Return the names of the implementations that can run on this machine."""
    return [name for name in implementations if not _why_not(name)]


def missing() -> dict[str, str]:
    """Return why each of the backends that cannot run on this machine cannot, in a line."""
    return {name: reason for name in _WHY_NOT if (reason := _why_not(name))}


def explain(implementations: Mapping[str, Callable], device_type: str) -> str:
    """Return in a few words why :func:`selected` chooses as it does on a device type."""
    name, forced = selected(implementations, device_type), _forced.get() or os.environ.get("HYMBA_BACKEND")
    if forced:
        return "HYMBA_BACKEND asks for it" if name == forced else f"HYMBA_BACKEND asks for {forced!r}, which it lacks"
    if name in _WHY_NOT:
        return {"triton": "Triton kernels", "liger": "Liger's kernels"}.get(name) or f"C++ kernels, {native.level()}"
    for faster in _ORDER.get(device_type, ()):
        if faster in implementations:
            return _why_not(faster) or "the fastest of its kind here"
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


def _why_not(name: str) -> str:
    reason = _WHY_NOT.get(name)
    return reason() if reason else ""
