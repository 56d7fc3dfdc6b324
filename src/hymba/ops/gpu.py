"""The Triton kernels: when they can run, and how an op reaches them without importing Triton before it is needed.

They run on NVIDIA GPUs from Ampere on; under ``TRITON_INTERPRET=1`` in the environment, slowly and for tests, on the
CPU. ``HYMBA_TRITON=0`` turns them off.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

OLDEST = (3, 4)  # of Triton
CAPABILITY = (8, 0)  # of the GPU: bfloat16 arithmetic

# What the kernels read and write.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def deferred(module: str, name: str) -> Callable[..., Any]:
    """Return a function `name` of a module that is imported at the first call, for Triton takes long to import.

    Kernels start on the GPU where the first argument, a tensor, lies.
    """

    @functools.cache
    def load() -> Callable[..., Any]:
        return getattr(import_module(module), name)

    def call(x: Tensor, *arguments: Any, **keywords: Any) -> Any:
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return load()(x, *arguments, **keywords)
        return load()(x, *arguments, **keywords)

    return call


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_unfit(x: Tensor) -> str:
    """Return in one line why no kernel takes `x`, or "" if one does: a GPU tensor of one of ``DTYPES``."""
    if torch.compiler.is_compiling():
        return "torch.compile does not see into Triton kernels"
    if x.dtype not in DTYPES or not (x.is_cuda or interpreted()):
        return f"no Triton kernel for {x.dtype} on {x.device}"
    return why_not()


@functools.cache
def why_not() -> str:
    """Return in one line why Triton kernels cannot run here, or "" if they can. Found out once per process."""
    if os.environ.get("HYMBA_TRITON") == "0":
        return "HYMBA_TRITON=0 turns the Triton kernels off"
    if not interpreted() and (reason := _reason_against_device()):
        return reason
    try:
        import triton
    except Exception as error:  # a broken installation fails in ways of its own
        return f"Triton does not load: {first_line(error)}"
    if triton_version() < OLDEST:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}: pip install -U triton"
    if interpreted():
        import_module("hymba.ops.interpreter").mend()
    try:
        import_module("hymba.ops.probe").run()
    except Exception as error:  # no C compiler, another driver, …
        return f"Triton does not work here: {first_line(error)}"
    return ""


@functools.cache
def why_no_liger() -> str:
    """Return in one line why Liger's kernels cannot run here, or "" if they can."""
    if interpreted():
        return "Triton's interpreter does not run Liger's kernels"
    if reason := why_not():
        return reason
    return "" if find_spec("liger_kernel") else "liger-kernel is not installed: pip install liger-kernel"


def triton_version() -> tuple[int, int]:
    """Return Triton's version, such as (3, 6)."""
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


def _reason_against_device() -> str:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "no NVIDIA GPU is in reach of torch"
    if (found := torch.cuda.get_device_capability()) < CAPABILITY:
        return f"the GPU has compute capability {found[0]}.{found[1]}: the kernels need {CAPABILITY[0]}.{CAPABILITY[1]}"
    return ""


def first_line(error: Exception) -> str:
    """Return what an error says first, or its name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
