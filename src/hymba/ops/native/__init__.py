"""The C++ kernels, loaded through ctypes: no link to torch, so one build serves every version of it.

``HYMBA_NATIVE=0`` in the environment turns them off; ``HYMBA_SIMD=portable`` (or ``avx2``, ``avx512``) picks a level
of instructions in place of the best this machine has.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hymba.errors import HymbaError

LEVELS = ("portable", "avx2", "avx512")

# What kernels read and write, by the numbers they know them by.
DTYPES = (torch.float32, torch.bfloat16, torch.float64)

_forced: str | None = None  # by use_level


class _Listener(threading.local):
    hear: Callable[[Callable, tuple], None] | None = None  # by listen


class _Library(ctypes.CDLL):
    """A library of kernels, each call of which whoever records calls hears of."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))

        class Kernel(ctypes._CFuncPtr):  # type: ignore[name-defined]
            _flags_ = self._FuncPtr._flags_
            _restype_ = ctypes.c_int

            def __call__(self, *arguments: Any) -> Any:
                result = super().__call__(*arguments)
                if _listener.hear is not None:
                    _listener.hear(self, arguments)
                return result

        self._FuncPtr = Kernel


_listener = _Listener()


def library() -> ctypes.CDLL | None:
    """Return the kernels' library, or None where there is none; :func:`why_not` then says why."""
    return load(_forced) if _forced else _chosen()[0]


def why_not() -> str:
    """Return in one line why :func:`library` is None, or "" if it is not."""
    return "" if library() is not None else _chosen()[1]


def why_unfit(x: Tensor) -> str:
    """Return in one line why no kernel takes `x`, or "" if one does: a dense CPU tensor of one of ``DTYPES``."""
    if torch.compiler.is_compiling():
        return "torch.compile does not see into C++ kernels"
    if x.dtype not in DTYPES or not x.is_cpu or type(x) not in (Tensor, torch.nn.Parameter):
        return f"no C++ kernel for {type(x).__name__}s of {x.dtype} on {x.device}"
    return why_not()


def is_batch_invariant(dtype: torch.dtype, quantized: bool) -> bool:
    """Return whether a token's result is the same bit for bit however many tokens are computed with it.

    It is with kernels that sum in one order for every size, as all of ours do that work with vectors. On a processor
    with matrix units (AMX), prompts in bfloat16 or with quantized weights are multiplied by torch, whose order depends
    on the size, and so are all prompts where kernels are portable, which would be too slow for many tokens.

    Args:
        dtype: of the activations.
        quantized: whether weights have 8 or 4 bits.
    """
    if library() is None or level() == "portable" or dtype not in DTYPES[:2]:
        return False
    return (dtype == torch.float32 and not quantized) or not has_matrix_units()


def has_matrix_units() -> bool:
    """Return whether the kernels use the processor's matrix units (AMX)."""
    return (handle := library()) is not None and _has_tiles(handle)


@functools.cache
def _has_tiles(handle: ctypes.CDLL) -> bool:
    return bool(handle.hymba_attention_has_tiles())


def listen(listener: Callable[[Callable, tuple], None] | None) -> None:
    """Tell `listener` of each kernel's call in this thread from now on, with its arguments; None ends it."""
    _listener.hear = listener


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """Return `x` (…, width) with dense rows at even distances, and the distance: uncopied wherever strides allow."""
    if x.is_contiguous():
        return x, x.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.stride(0)


def level() -> str:
    """Return the level of instructions in use, such as "avx512", or "" without a library."""
    return _forced or ("" if _chosen()[0] is None else _chosen()[1])


@contextmanager
def use_level(level: str) -> Iterator[None]:
    """Run the kernels of one level inside the block, in every thread: for tests.

    Raises:
        HymbaError: it was not built, or this machine lacks its instructions.
    """
    global _forced
    load(level)
    before, _forced = _forced, level
    try:
        yield
    finally:
        _forced = before


def available() -> list[str]:
    """Return the levels that are built and that this machine runs, slowest first."""
    return [level for level in LEVELS if not _reason_against(level)]


@functools.cache
def load(level: str) -> ctypes.CDLL:
    """Load one level's library, whatever the environment says.

    Raises:
        HymbaError: it was not built, or this machine lacks its instructions.
    """
    if reason := _reason_against(level):
        raise HymbaError(reason)
    from hymba.ops.native.build import library_path

    handle = _Library(library_path(level))
    handle.hymba_read_bandwidth.restype = ctypes.c_float
    handle.hymba_set_gomp.argtypes = [ctypes.c_void_p]
    handle.hymba_set_gomp(_torch_threads())
    return handle


@functools.cache
def _reason_against(level: str) -> str:
    """Return in one line why a level's library cannot be used, or "" if it can."""
    from hymba.ops.native import build  # here, so that `python -m` runs it as a fresh module

    remedy = "python -m hymba.ops.native.build"
    path = build.library_path(level)
    if not path.exists():
        return f"the C++ kernels are not built ({path.name}): {remedy}"
    if level != "portable" and (reason := _reason_against("portable")):
        return reason
    try:
        # The portable library is safe to ask; another may hold instructions that this processor lacks everywhere.
        portable = ctypes.CDLL(str(build.library_path("portable")))
        if not portable.hymba_supports(LEVELS.index(level)):
            return f"this processor does not run {level} kernels"
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the C++ kernels do not load: {error}"
    handle.hymba_fingerprint.restype = ctypes.c_char_p
    if handle.hymba_fingerprint().decode() != build.fingerprint():
        return f"the C++ kernels are older than their sources: {remedy}"
    return ""


@functools.cache
def _chosen() -> tuple[ctypes.CDLL | None, str]:
    """Return the library in use and its level, or None and the reason. Read once per process."""
    if os.environ.get("HYMBA_NATIVE") == "0":
        return None, "HYMBA_NATIVE=0 turns the C++ kernels off"
    forced = os.environ.get("HYMBA_SIMD")
    if forced:
        if forced not in LEVELS:
            raise HymbaError(f"unknown level {forced!r}: HYMBA_SIMD takes one of {', '.join(LEVELS)}")
        return load(forced), forced
    from hymba.ops.native.build import levels

    reason = ""
    for name in reversed(levels()):
        reason = _reason_against(name)
        if not reason:
            return load(name), name
    logging.getLogger("hymba").warning("running without C++ kernels, several times slower: %s", reason)
    return None, reason


def _torch_threads() -> int | None:
    """Return the address of the function that forks in torch's own OpenMP pool: two pools would fight for the cores.

    A look-up through torch's library finds it in whichever libgomp torch was linked with. None: kernels start threads.
    """
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
