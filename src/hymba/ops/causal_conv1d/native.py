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
    final_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """C++ path for :func:`hymba.ops.causal_conv1d.causal_conv1d`, same signature.

    Takes 2, 3 or 4 taps and what :func:`hymba.ops.native.why_unfit` has nothing against; leaves the rest to the torch
    path.

    Raises:
        HymbaError: the shapes do not fit together.
    """
    if native.why_unfit(u) or weight.shape[-1] not in _TAPS:
        rest = {"lengths": lengths, "document_offsets": document_offsets, "final_state": final_state}
        return cpu.causal_conv1d(u, weight, bias, initial_state=initial_state, **rest)
    x = _Inputs(u, weight, bias, initial_state, lengths, document_offsets)
    if torch.is_grad_enabled() and final_state is None:
        return _Conv.apply(*x.prepared(wide_weights=True))
    return _forward(x.prepared(), final_state)


class _Inputs(NamedTuple):
    """What the convolution is given, in the order of `struct Conv`."""

    u: Tensor
    weight: Tensor
    bias: Tensor
    initial: Tensor | None
    lengths: Tensor | None
    offsets: Tensor | None

    def prepared(self, wide_weights: bool = False) -> _Inputs:
        """Return the inputs as the kernel reads them: the state as `u`, the weights wide or as `u`, and all dense."""
        self._check_shapes()
        dtype = self.u.dtype
        if wide_weights or not self.weight.dtype == self.bias.dtype == dtype:
            dtype = torch.promote_types(dtype, torch.float32)
        u = self.u if self.u.stride(2) == 1 else self.u.contiguous()
        weight, bias = (x.to(dtype).contiguous() for x in (self.weight, self.bias))
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
        outputs = (None, None, grad_out, grad_final.contiguous(), dense[0], dense[3], dense[1], dense[2])
        ctx.library.hymba_causal_conv1d_backward(ctypes.byref(_arguments(x, *outputs)))
        return *dense, None, None


def _forward(x: _Inputs, final_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the convolution's SiLU and the final state."""
    rows, _, width = x.u.shape
    out, final = x.u.new_empty(x.u.shape), final_state
    in_place = final is not None and final.is_contiguous() and final.dtype == x.u.dtype
    if final is None or not in_place:
        final = x.u.new_empty(rows, width, x.weight.shape[1] - 1)
    arguments = _arguments(x, out, final, *(None,) * 6)
    native.library().hymba_causal_conv1d_forward(ctypes.byref(arguments))  # type: ignore[union-attr]
    return out, final if final_state is None or in_place else final_state.copy_(final)


_OUTPUTS = ("out", "final", "grad_out", "grad_final", "grad_u", "grad_initial", "grad_weight", "grad_bias")


class _Arguments(ctypes.Structure):
    """`struct Conv` of cpu.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "steps", "width", "taps", "dtype", "wide_weights", "threads")),
        *((name, ctypes.c_int64) for name in ("u_row", "grad_out_row", "initial_row", "u_step", "grad_out_step")),
        *((name, ctypes.c_void_p) for name in (*_Inputs._fields, *_OUTPUTS)),
    )


def _arguments(x: _Inputs, *outputs: Tensor | None) -> _Arguments:
    dtype, wide_weights = native.DTYPES.index(x.u.dtype), x.weight.dtype != x.u.dtype
    grad_out = outputs[2]
    (u_row, u_step, _), (grad_row, grad_step, _) = x.u.stride(), (0, 0, 0) if grad_out is None else grad_out.stride()
    return _Arguments(
        *(*x.u.shape, x.weight.shape[1], dtype, wide_weights, torch.get_num_threads()),
        *(u_row, grad_row, 0 if x.initial is None else x.initial.stride(0), u_step, grad_step),
        *(None if v is None else v.data_ptr() for v in (*x, *outputs)),
    )
