"""The gate in C++ (cpu.cpp): one pass over both inputs."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba.ops import native
from hymba.ops.gated import reference

_pack = struct.Struct("13q").pack  # `struct Gate` of cpu.cpp


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
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))
        (gate, gate_stride), (up, up_stride), (grad, grad_stride) = (native.as_rows(x) for x in (gate, up, grad))
        inputs = gate.data_ptr(), gate_stride, up.data_ptr(), up_stride, 0, grad.data_ptr(), grad_stride
        ctx.library.hymba_gated_silu_backward(_pack(*_sizes(gate), *inputs, grad_gate.data_ptr(), grad_up.data_ptr()))
        return grad_gate, grad_up


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    (gate, gate_stride), (up, up_stride) = native.as_rows(gate), native.as_rows(up)
    inputs = gate.data_ptr(), gate_stride, up.data_ptr(), up_stride
    kernel = native.library().hymba_gated_silu_forward  # type: ignore[union-attr]
    kernel(_pack(*_sizes(gate), *inputs, out.data_ptr(), 0, 0, 0, 0))
    return out


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    width = x.shape[-1]
    return native.DTYPES.index(x.dtype), x.numel() // width, width, torch.get_num_threads()
