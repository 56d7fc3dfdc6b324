"""One op at one size, as the GPU's benchmarks see it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Set = Mapping[str, Any]  # one set of inputs
Run = Callable[[Callable[..., Any], Set], Any]  # one call of an implementation on one set


@dataclass(frozen=True)
class Case:
    """What is timed, and what it has to move and multiply at least.

    make: returns a fresh set of inputs. run: calls the implementation that it is given.
    prepare: does what is not timed and returns what is, in place of `run`; a backward pass behind its forward pass.
    peers: by name, what imports another library's function of a set and returns it.
    backward: whether the calls take gradients themselves; such calls are not recorded as graphs.
    """

    op: str
    size: str
    implementations: Mapping[str, Callable[..., Any]]
    make: Callable[[], Set]
    run: Run
    bytes: int
    flops: int = 0
    prepare: Callable[[Callable[..., Any], Set], Callable[[], Any]] | None = None
    peers: Mapping[str, Callable[[], Callable[[Set], Any]]] = field(default_factory=dict)
    backward: bool = False

    @property
    def gradients(self) -> bool:
        """Whether its calls need gradients."""
        return self.backward or self.prepare is not None


def implementations(op: str) -> Mapping[str, Callable[..., Any]]:
    """Return what an op can be chosen from."""
    found: Mapping[str, Callable[..., Any]] = importlib.import_module(f"hymba.ops.{op}").IMPLEMENTATIONS
    return found
