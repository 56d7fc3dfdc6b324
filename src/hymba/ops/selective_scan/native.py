"""The scan in C++ (cpu.cpp): one pass forward, and a backward pass from states kept every few steps."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba.errors import HymbaError
from hymba.ops import native
from hymba.ops.selective_scan import cpu

_BLOCK, _PADDING = 16, 64  # steps between kept states, and what their channels are padded to: as in cpu.cpp


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    dt_bias: Tensor,
    gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    document_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """C++ path for :func:`hymba.ops.selective_scan.selective_scan`, same signature.

    Takes what :func:`hymba.ops.native.why_unfit` has nothing against and leaves the rest to the torch path.

    Raises:
        HymbaError: the shapes do not fit together.
    """
    if native.why_unfit(u):
        ragged = {"lengths": lengths, "document_offsets": document_offsets}
        return cpu.selective_scan(u, dt, A, B, C, D, dt_bias=dt_bias, gate=gate, initial_state=initial_state, **ragged)
    x = _Inputs(u, dt, B, C, gate, A, D, dt_bias, initial_state, lengths, document_offsets).prepared()
    y, final = _Scan.apply(*x) if torch.is_grad_enabled() else _forward(x)[:2]
    return y.to(u.dtype), final


def update_(
    state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, gate: Tensor
) -> Tensor:
    """Scan on from `state` (B, E, N), overwrite it with the final state, and return y: a decode step without a copy.

    The other arguments are those of :func:`selective_scan`. No gradient flows. `state` is contiguous, and float32, or
    float64 where `u` is float64.

    Raises:
        HymbaError: the shapes do not fit together, or `state` is not such a tensor.
    """
    if not state.is_contiguous() or state.dtype != torch.promote_types(u.dtype, torch.float32):
        raise HymbaError("a state updated in place is contiguous and float32, or float64 where the input is")
    with torch.no_grad():
        if native.why_unfit(u):
            y, final = cpu.selective_scan(u, dt, A, B, C, D, dt_bias=dt_bias, gate=gate, initial_state=state)
            state.copy_(final)
            return y
        x = _Inputs(u, dt, B, C, gate, A, D, dt_bias, state, None, None).prepared()
        return _forward(x, final=state)[0].to(u.dtype)


class _Inputs(NamedTuple):
    """What the scan is given, in the order of `struct Scan`."""

    u: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    gate: Tensor | None
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    initial: Tensor | None
    lengths: Tensor | None
    offsets: Tensor | None

    def prepared(self) -> _Inputs:
        """Return the inputs as the kernel reads them: one dtype per step, the rest wide; last dimensions dense."""
        self._check_shapes()
        wide = torch.promote_types(self.u.dtype, torch.float32)
        mixed = any(x is not None and x.dtype != self.u.dtype for x in self[:5])
        stepped = [x.to(wide) if mixed and x is not None else x for x in self[:5]]
        stepped = [x if x is None or x.stride(2) == 1 else x.contiguous() for x in stepped]
        A, D, bias = (x if x.dtype == wide and x.is_contiguous() else x.to(wide).contiguous() for x in self[5:8])
        initial = self.initial
        if initial is not None and initial.dtype != wide:
            initial = initial.to(wide)
        if initial is not None and initial.stride()[1:] != (A.shape[1], 1):
            initial = initial.contiguous()
        counts = [x if x is None else x.to(torch.int64).contiguous() for x in self[9:]]
        return _Inputs._make((*stepped, A, D, bias, initial, *counts))

    def _check_shapes(self) -> None:
        rows, steps, width = self.u.shape
        states, size = self.A.shape[-1], (rows, steps, width)
        per_step, per_state = (size, size, *[(rows, steps, states)] * 2, size), (rows, width, states)
        wanted = (*per_step, (width, states), (width,), (width,), per_state, (rows,), (rows, steps))
        for name, x, shape in zip(self._fields, self, wanted, strict=True):
            if x is not None and (x.shape != shape or not x.is_cpu):
                raise HymbaError(f"selective_scan: {name} is {tuple(x.shape)} on {x.device}, not {shape} on the CPU")


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        y, final, kept = _forward(_Inputs(*inputs), keep=any(ctx.needs_input_grad))
        ctx.library, ctx.has_kept = native.library(), kept is not None
        ctx.save_for_backward(*inputs, kept)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, kept = ctx.saved_tensors
        x = _Inputs(*inputs)
        grad_y = grad_y if grad_y.stride(2) == 1 else grad_y.contiguous()
        dense = [None if v is None else torch.empty_like(v, memory_format=torch.contiguous_format) for v in x[:9]]
        grads = dict(zip(x._fields, dense, strict=False))
        outputs = {f"grad_{name}": grad for name, grad in grads.items()}
        arguments = _arguments(x, grad_y=grad_y, kept=kept, grad_final=grad_final.contiguous(), **outputs)
        ctx.library.hymba_selective_scan_backward(ctypes.byref(arguments))
        return *dense, None, None


def _forward(x: _Inputs, *, final: Tensor | None = None, keep: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y, the final state, and the states that enter each block if they are to be kept."""
    (rows, steps, width), states = x.u.shape, x.A.shape[1]
    y, kept = x.u.new_empty(x.u.shape), None
    if final is None:
        final = x.A.new_empty(rows, width, states)
    if keep:
        kept = x.A.new_empty(rows, -(-steps // _BLOCK), states, -(-width // _PADDING) * _PADDING)
    arguments = _arguments(x, y=y, final=final, kept=kept)
    native.library().hymba_selective_scan_forward(ctypes.byref(arguments))  # type: ignore[union-attr]
    return y, final, kept


_STEPPED = (*_Inputs._fields[:5], "grad_y")
_OUTPUTS = ("y", "final", "kept", "grad_final", *(f"grad_{name}" for name in _Inputs._fields[:9]))


class _Arguments(ctypes.Structure):
    """`struct Scan` of cpu.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "steps", "width", "states", "dtype", "threads")),
        *((f"{name}_row", ctypes.c_int64) for name in (*_STEPPED, "initial")),
        *((f"{name}_step", ctypes.c_int64) for name in _STEPPED),
        *((name, ctypes.c_void_p) for name in (*_Inputs._fields, "grad_y", *_OUTPUTS)),
    )


def _arguments(x: _Inputs, grad_y: Tensor | None = None, **outputs: Tensor | None) -> _Arguments:
    dtype = native.DTYPES.index(x.u.dtype)
    arguments = _Arguments(*x.u.shape, x.A.shape[1], dtype, torch.get_num_threads())
    for name, v in (*zip(_STEPPED, (*x[:5], grad_y), strict=True), ("initial", x.initial)):
        if v is not None:
            setattr(arguments, f"{name}_row", v.stride(0))
            if name != "initial":
                setattr(arguments, f"{name}_step", v.stride(1))
    for name, v in (*zip(x._fields, x, strict=True), ("grad_y", grad_y), *outputs.items()):
        if v is not None:
            setattr(arguments, name, v.data_ptr())
    return arguments
