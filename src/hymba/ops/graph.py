"""Calls captured once as a CUDA graph and replayed: what :class:`hymba.ops.recording.Recording` is, for a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

X = TypeVar("X")
Y = TypeVar("Y")


class Graph:
    """Captures every kernel started inside ``with Graph() as graph:``, on this thread, without running it.

    Before, the same code must have run once, so that its kernels are compiled and loaded. What is computed must depend
    on tensors alone, and nothing inside may wait for the GPU. Inputs are changed by writing into their tensors; outputs
    are found in the tensors that the captured code returned.

    Args:
        pool: of memory, from ``torch.cuda.graph_pool_handle()``, to share with graphs that are replayed in turn and
            whose outputs are not needed any longer then; None for a pool of its own.
    """

    def __init__(self, pool: Any = None) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as a server's, may allocate meanwhile.
        self._capture = torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local")

    def __enter__(self) -> Graph:
        self._capture.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._capture.__exit__(*raised)

    def replay(self) -> None:
        """Run all kernels, in order, on the memory that they were captured with."""
        self._graph.replay()


def is_captured(x: Tensor) -> bool:
    """Return whether what is done with `x` becomes part of a graph, whose memory must not outlive it."""
    return x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def side_by_side(x: Tensor, first: Callable[[], X], second: Callable[[], Y]) -> tuple[X, Y]:
    """Return what two functions of `x` return, neither of which needs the other.

    Where a graph is being captured they become branches of it, so that small kernels of one run beside those of the
    other. What either allocates may be freed as usual: the branches begin and end in the stream that captures.
    """
    if not is_captured(x):
        return first(), second()
    stream, branch = torch.cuda.current_stream(x.device), _branch(x.device)
    branch.wait_stream(stream)
    with torch.cuda.stream(branch):
        found = first()
    also = second()
    stream.wait_stream(branch)
    return found, also


@functools.cache
def _branch(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
