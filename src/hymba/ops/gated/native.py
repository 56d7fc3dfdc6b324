"""The gate in C++ (cpu.cpp): one pass over both inputs."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba.ops import native
from hymba.ops.gated import reference


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """C++ path for :func:`hymba.ops.gated.gated_silu`, same signature.

    Takes what :func:`hymba.ops.native.why_unfit` has nothing against; leaves the rest to the definition.
    """
    if up.dtype != gate.dtype or up.shape != gate.shape or not gate.numel() or native.why_unfit(gate):
        return reference.gated_silu(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Gate.apply(gate, up)
    return _forward(gate, up)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.library = native.library()
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        grad_gate, grad_up = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in ctx.saved_tensors)
        gate, up, grad = (native.as_rows(x) for x in (*ctx.saved_tensors, grad))
        _functions(ctx.library)[1](
            native.DTYPES.index(gate.dtype),
            gate.data_ptr(),
            up.data_ptr(),
            grad.data_ptr(),
            grad_gate.data_ptr(),
            grad_up.data_ptr(),
            *gate.shape,
            gate.stride(0),
            up.stride(0),
            grad.stride(0),
            torch.get_num_threads(),
        )
        return grad_gate, grad_up


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(gate.shape)
    gate, up = native.as_rows(gate), native.as_rows(up)
    _functions(native.library())[0](
        native.DTYPES.index(gate.dtype),
        gate.data_ptr(),
        up.data_ptr(),
        out.data_ptr(),
        *gate.shape,
        gate.stride(0),
        up.stride(0),
        torch.get_num_threads(),
    )
    return out


@functools.cache
def _functions(library: ctypes.CDLL) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return the forward and the backward pass, told what they take."""
    number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    forward, backward = library.hymba_gated_silu_forward, library.hymba_gated_silu_backward
    forward.argtypes = (number, *3 * (pointer,), *4 * (size,), number)
    backward.argtypes = (number, *5 * (pointer,), *5 * (size,), number)
    forward.restype = backward.restype = None
    return forward, backward
