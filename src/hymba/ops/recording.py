"""Calls written down once and repeated: what a CUDA graph is to a GPU, for the operations of a CPU.

A decode step is a thousand small operations on the same memory, of which Python and the dispatcher take longer than the
arithmetic of a small model. A :class:`Recording` notes which operations some code runs and which memory they touch, and
:meth:`Recording.replay` repeats them there.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from hymba.errors import HymbaError
from hymba.ops import native

_NEW_MEMORY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_UNREPEATABLE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class _Active(threading.local):
    """Whether a recording is made in this thread."""

    now = False


_active = _Active()


class Recording(TorchDispatchMode):
    """Writes down every operation inside ``with Recording() as recording:``, C++ kernels included.

    What is computed must depend on tensors alone: a number that Python takes from a counter stays what it was. Inputs
    are changed by writing into their tensors; outputs are found in the tensors that the recorded code returned.

    Raises:
        HymbaError: inside the block, at an operation that reads a value into Python or gives a shape by value.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Say that torch.compile need not be told to keep out, for which torch would import it: over a second."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable, tuple, dict]] = []
        self._kept: list[Any] = []  # tensors whose memory the calls use

    def __enter__(self) -> Recording:
        native.listen(self._add)
        _active.now = True
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        native.listen(None)
        _active.now = False
        super().__exit__(*raised)

    def replay(self) -> None:
        """Repeat all operations, in order, on the memory that they were recorded with."""
        for call, arguments, keywords in self._calls:
            call(*arguments, **keywords)

    def __torch_dispatch__(self, function: OpOverload, types: Any, arguments: tuple = (), keywords: Any = None) -> Any:
        """Run one of torch's operations, and note how to repeat it."""
        keywords, kind = keywords or {}, _kind(function)
        if kind == "unrepeatable" and not (function is torch.ops.aten.index.Tensor and _is_plain(arguments[1])):
            raise HymbaError(f"{function} cannot be recorded: what follows depends on values")
        result = function(*arguments, **keywords)
        self._kept.append((arguments, result))
        if (find := _KERNELS.get(function)) and (call := find(result, *arguments, **keywords)):
            self._add(*call)
        elif kind == "in place":
            self._add(function, arguments, keywords)
        elif kind in ("new", "unrepeatable") and _has_tensors(arguments):
            self._add(*_into(result, function, arguments, keywords))
        return result

    def _add(self, call: Callable, arguments: tuple, keywords: dict | None = None) -> None:
        self._calls.append((call, arguments, keywords or {}))


def is_recorded() -> bool:
    """Return whether a :class:`Recording` is active: values must then not be read into Python."""
    return _active.now


@functools.cache
def _kind(function: OpOverload) -> str:
    """Return what an operation gives: a "new" value, a "view", one "in place", one that is "unrepeatable", or only
    "memory"."""
    aliases = [value.alias_info for value in function._schema.returns]
    if any(tag in function.tags for tag in _UNREPEATABLE):
        return "unrepeatable"
    if function.overloadpacket.__name__ in _NEW_MEMORY:
        return "memory"
    return "in place" if any(alias and alias.is_write for alias in aliases) else "view" if any(aliases) else "new"


def _is_plain(indices: list[Tensor | None]) -> bool:
    """Return whether an index names places by number; by bool its shape would depend on values."""
    return all(x is None or x.dtype == torch.int64 for x in indices)


def _has_tensors(arguments: tuple) -> bool:
    """Return whether a tensor decides the value of an operation; without one it is a constant."""
    flat = (x for argument in arguments for x in (argument if isinstance(argument, list | tuple) else (argument,)))
    return any(isinstance(x, Tensor) for x in flat)


def _into(result: Any, function: OpOverload, arguments: tuple, keywords: dict) -> tuple[Callable, tuple, dict]:
    """Return a call that computes `function` into the memory of `result`."""
    if isinstance(result, Tensor) and (variant := _out_variant(function)):
        call, out, taken = variant
        return call, arguments, {name: x for name, x in keywords.items() if name in taken} | {out: result}

    def compute_and_copy() -> None:
        for to, x in zip(_tensors(result), _tensors(function(*arguments, **keywords)), strict=True):
            to.copy_(x)

    return compute_and_copy, (), {}


@functools.cache
def _out_variant(function: OpOverload) -> tuple[OpOverload, str, frozenset[str]] | None:
    """Return the variant of an operation that writes into a tensor, that argument's name, and the keywords it takes."""
    for name in function.overloadpacket.overloads():
        variant = getattr(function.overloadpacket, name)
        outs = [a.name for a in variant._schema.arguments if a.is_out]
        if len(outs) == 1 and _positional(variant) == _positional(function):
            return variant, outs[0], frozenset(a.name for a in variant._schema.arguments)
    return None


def _positional(function: OpOverload) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in function._schema.arguments if not a.kwarg_only and not a.is_out]


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if isinstance(x, Tensor)]


def _sum(result: Tensor, x: Tensor, y: Any, alpha: float = 1) -> tuple[Callable, tuple] | None:
    """Return the kernel's call for aten.add.Tensor, if it takes this one."""
    if not isinstance(y, Tensor) or alpha != 1 or native.why_unfit(x):
        return None
    if not x.dtype == y.dtype == result.dtype or x.shape != y.shape or not _are_dense(x, y, result):
        return None
    add = native.library().hymba_add  # type: ignore[union-attr]
    add.argtypes = (ctypes.c_int, *3 * (ctypes.c_void_p,), ctypes.c_int64, ctypes.c_int)
    pointers = x.data_ptr(), y.data_ptr(), result.data_ptr()
    return add, (native.DTYPES.index(x.dtype), *pointers, x.numel(), torch.get_num_threads())


def _scatter(
    result: Tensor, to: Tensor, indices: list[Tensor | None], source: Tensor, accumulate: bool = False
) -> tuple[Callable, tuple] | None:
    """Return the kernel's call for aten.index_put_, if it takes this one: both first dimensions by number."""
    rows, columns = indices if len(indices) == 2 else (None, None)
    if rows is None or columns is None or accumulate or native.why_not() or not to.is_cpu:
        return None
    if not rows.dtype == columns.dtype == torch.int64 or source.dtype != to.dtype or rows.shape != columns.shape:
        return None
    each = to.shape[2:].numel()  # torch drops dimensions of size one from the front of the source
    if source.numel() != rows.numel() * each or not _are_dense(rows, columns, to):
        return None
    apart = each
    if not source.is_contiguous():  # the values of one token a row, as a projection of many heads leaves them
        if source.ndim != rows.ndim + to.ndim - 2 or rows.numel() != len(rows) or not source[0].is_contiguous():
            return None
        apart = source.stride(0)
    scatter = native.library().hymba_scatter  # type: ignore[union-attr]
    scatter.argtypes = (*4 * (ctypes.c_void_p,), *5 * (ctypes.c_int64,))
    pointers = source.data_ptr(), to.data_ptr(), rows.data_ptr(), columns.data_ptr()
    sizes = rows.numel(), apart * to.element_size(), *to.shape[:2], each * to.element_size()

    def run() -> None:
        if scatter(*pointers, *sizes):
            raise HymbaError(f"a recorded assignment names a place outside {tuple(to.shape)}")

    return run, ()


def _are_dense(*tensors: Tensor) -> bool:
    return all(x.is_contiguous() and x.is_cpu for x in tensors)


# Operations that have a kernel of their own for being repeated (native/recorded.cpp).
_KERNELS: dict[OpOverload, Callable[..., tuple[Callable, tuple] | None]] = {
    torch.ops.aten.add.Tensor: _sum,
    torch.ops.aten.index_put_.default: _scatter,
}
