"""The convolution in C++ (cpu.cpp), summed in float32 and rounded once."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba.errors import HymbaError
from hymba.ops import native
from hymba.ops.causal_conv1d import cpu

_TAPS = (2, 3, 4)  # those that cpu.cpp is compiled for


def causal_conv1d(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    document_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """C++ path for :func:`hymba.ops.causal_conv1d.causal_conv1d`, same signature.

    Takes 2, 3 or 4 taps and what :func:`hymba.ops.native.why_unfit` has nothing against; leaves the rest to the torch
    path.

    Raises:
        HymbaError: the shapes do not fit together.
    """
    if native.why_unfit(u) or weight.shape[-1] not in _TAPS:
        return cpu.causal_conv1d(
            u, weight, bias, initial_state=initial_state, lengths=lengths, document_offsets=document_offsets
        )
    x = _Inputs(u, weight, bias, initial_state, lengths, document_offsets).prepared()
    return _Conv.apply(*x) if torch.is_grad_enabled() else _forward(x)


class _Inputs(NamedTuple):
    """What the convolution is given, in the order of `struct Conv`."""

    u: Tensor
    weight: Tensor
    bias: Tensor
    initial: Tensor | None
    lengths: Tensor | None
    offsets: Tensor | None

    def prepared(self) -> _Inputs:
        """Return the inputs as the kernel reads them: weights wide, the state in the dtype of `u`."""
        self._check_shapes()
        wide = torch.promote_types(self.u.dtype, torch.float32)
        u = self.u if self.u.stride(2) == 1 else self.u.contiguous()
        weight, bias = self.weight.to(wide).contiguous(), self.bias.to(wide).contiguous()
        initial = None if self.initial is None else self.initial.to(u.dtype)
        if initial is not None and initial.stride()[1:] != (weight.shape[1] - 1, 1):
            initial = initial.contiguous()
        counts = (x if x is None else x.to(torch.int64).contiguous() for x in self[4:])
        return _Inputs(u, weight, bias, initial, *counts)

    def _check_shapes(self) -> None:
        (rows, steps, width), taps = self.u.shape, self.weight.shape[-1]
        size = (rows, steps, width)
        wanted = (size, (width, taps), (width,), (rows, width, taps - 1), (rows,), (rows, steps))
        for name, x, shape in zip(self._fields, self, wanted, strict=True):
            if x is not None and (x.shape != shape or not x.is_cpu):
                raise HymbaError(f"causal_conv1d: {name} is {tuple(x.shape)} on {x.device}, not {shape} on the CPU")


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.library = native.library()
        ctx.save_for_backward(*inputs)
        return _forward(_Inputs(*inputs))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        x = _Inputs(*ctx.saved_tensors)
        grad_out = grad_out if grad_out.stride(2) == 1 else grad_out.contiguous()
        dense = [None if v is None else torch.empty_like(v, memory_format=torch.contiguous_format) for v in x[:4]]
        outputs = {f"grad_{name}": grad for name, grad in zip(x._fields, dense, strict=False)}
        arguments = _arguments(x, grad_out=grad_out, grad_final=grad_final.contiguous(), **outputs)
        ctx.library.hymba_causal_conv1d_backward(ctypes.byref(arguments))
        return *dense, None, None


def _forward(x: _Inputs) -> tuple[Tensor, Tensor]:
    """Return the convolution's SiLU and the final state."""
    rows, _, width = x.u.shape
    out, final = x.u.new_empty(x.u.shape), x.u.new_empty(rows, width, x.weight.shape[1] - 1)
    arguments = _arguments(x, out=out, final=final)
    native.library().hymba_causal_conv1d_forward(ctypes.byref(arguments))  # type: ignore[union-attr]
    return out, final


_OUTPUTS = ("out", "final", "grad_out", "grad_final", "grad_u", "grad_initial", "grad_weight", "grad_bias")


class _Arguments(ctypes.Structure):
    """`struct Conv` of cpu.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "steps", "width", "taps", "dtype", "threads")),
        *((name, ctypes.c_int64) for name in ("u_row", "grad_out_row", "initial_row", "u_step", "grad_out_step")),
        *((name, ctypes.c_void_p) for name in (*_Inputs._fields, *_OUTPUTS)),
    )


def _arguments(x: _Inputs, grad_out: Tensor | None = None, **outputs: Tensor | None) -> _Arguments:
    dtype = native.DTYPES.index(x.u.dtype)
    arguments = _Arguments(*x.u.shape, x.weight.shape[1], dtype, torch.get_num_threads())
    arguments.u_row, arguments.u_step, _ = x.u.stride()
    if x.initial is not None:
        arguments.initial_row = x.initial.stride(0)
    if grad_out is not None:
        arguments.grad_out_row, arguments.grad_out_step, _ = grad_out.stride()
    for name, v in (*zip(x._fields, x, strict=True), ("grad_out", grad_out), *outputs.items()):
        if v is not None:
            setattr(arguments, name, v.data_ptr())
    return arguments
