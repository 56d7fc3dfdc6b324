"""The scan in C++ (cpu.cpp): one pass forward, and a backward pass from states kept every few steps."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
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
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    dt_bias: Tensor,
    gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    document_offsets: Tensor | None = None,
    final_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """C++ path for :func:`hymba.ops.selective_scan.selective_scan`, same signature.

    Takes what :func:`hymba.ops.native.why_unfit` has nothing against and leaves the rest to the torch path.

    Raises:
        HymbaError: the shapes do not fit together.
    """
    if native.why_unfit(u):
        rest = {"lengths": lengths, "document_offsets": document_offsets, "final_state": final_state}
        return cpu.selective_scan(
            u, dt, A_log, B, C, D, dt_bias=dt_bias, gate=gate, initial_state=initial_state, **rest
        )
    x = _Inputs(u, dt, B, C, gate, A_log, D, dt_bias, initial_state, lengths, document_offsets)
    if torch.is_grad_enabled() and final_state is None:
        y, final = _Scan.apply(*x.prepared(wide_weights=True))
        return y.to(u.dtype), final
    y, final, _ = _forward(x.prepared(), final_state)
    return y if y.dtype == u.dtype else y.to(u.dtype), final


class _Inputs(NamedTuple):
    """What the scan is given, in the order of `struct Scan`."""

    u: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    gate: Tensor | None
    A_log: Tensor
    D: Tensor
    dt_bias: Tensor
    initial: Tensor | None
    lengths: Tensor | None
    offsets: Tensor | None

    def prepared(self, wide_weights: bool = False) -> _Inputs:
        """Return the inputs as the kernel reads them: one dtype per step, last dimensions dense, the state wide, and
        the weights all wide or all as the steps."""
        self._check_shapes()
        narrow, wide = self.u.dtype, torch.promote_types(self.u.dtype, torch.float32)
        if any(x is not None and x.dtype != narrow for x in self[:5]):
            narrow = wide
        kept = narrow if not wide_weights and all(x.dtype == narrow for x in self[5:8]) else wide
        stepped = [x if x is None else _dense(x, narrow, x.stride(2) == 1) for x in self[:5]]
        weights = [_dense(x, kept, x.is_contiguous()) for x in self[5:8]]
        initial = self.initial
        if initial is not None:
            initial = _dense(initial, wide, initial.stride()[1:] == (initial.shape[2], 1))
        counts = [x if x is None else x.to(torch.int64).contiguous() for x in self[9:]]
        return _Inputs._make((*stepped, *weights, initial, *counts))

    def _check_shapes(self) -> None:
        size, states = self.u.shape, self.A_log.shape[-1]
        (rows, steps, width), maps = size, (*size[:2], states)
        wanted = (*(size, size, maps, maps, size), (width, states), (width,), (width,), (rows, width, states))
        for name, x, shape in zip(self._fields, self, (*wanted, (rows,), (rows, steps)), strict=True):
            if x is not None and (x.shape != shape or not x.is_cpu):
                raise HymbaError(f"selective_scan: {name} is {tuple(x.shape)} on {x.device}, not {shape} on the CPU")


def _dense(x: Tensor, dtype: torch.dtype, is_dense: bool) -> Tensor:
    """Return `x` in a dtype, contiguous unless it is dense enough already."""
    x = x if x.dtype == dtype else x.to(dtype)
    return x if is_dense else x.contiguous()


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
        outputs = (None, None, kept, grad_final.contiguous(), *dense)
        ctx.library.hymba_selective_scan_backward(ctypes.byref(_arguments(x, grad_y, outputs)))
        return *dense, None, None


def _forward(x: _Inputs, final_state: Tensor | None = None, keep: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y, the final state, and the states that enter each block if they are to be kept."""
    (rows, steps, width), states = x.u.shape, x.A_log.shape[1]
    wide = torch.promote_types(x.u.dtype, torch.float32)
    y, final, kept = x.u.new_empty(x.u.shape), final_state, None
    in_place = final is not None and final.is_contiguous() and final.dtype == wide
    if final is None or not in_place:
        final = x.u.new_empty(rows, width, states, dtype=wide)
    if keep:
        kept = x.u.new_empty(rows, -(-steps // _BLOCK), states, -(-width // _PADDING) * _PADDING, dtype=wide)
    arguments = _arguments(x, None, (y, final, kept, *_NO_GRADIENTS))
    native.library().hymba_selective_scan_forward(ctypes.byref(arguments))  # type: ignore[union-attr]
    return y, final if final_state is None or in_place else final_state.copy_(final), kept


_STEPPED = (*_Inputs._fields[:5], "grad_y")
_OUTPUTS = ("y", "final", "kept", "grad_final", *(f"grad_{name}" for name in _Inputs._fields[:9]))
_NO_GRADIENTS = (None,) * (len(_OUTPUTS) - 3)


class _Arguments(ctypes.Structure):
    """`struct Scan` of cpu.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "steps", "width", "states", "dtype", "wide_weights", "threads")),
        *((f"{name}_row", ctypes.c_int64) for name in (*_STEPPED, "initial")),
        *((f"{name}_step", ctypes.c_int64) for name in _STEPPED),
        *((name, ctypes.c_void_p) for name in (*_Inputs._fields, "grad_y", *_OUTPUTS)),
    )


def _arguments(x: _Inputs, grad_y: Tensor | None, outputs: Sequence[Tensor | None]) -> _Arguments:
    dtype, wide_weights = native.DTYPES.index(x.u.dtype), x.D.dtype != x.u.dtype
    strides = [(0, 0) if v is None else v.stride()[:2] for v in (*x[:5], grad_y)]
    return _Arguments(
        *(*x.u.shape, x.A_log.shape[1], dtype, wide_weights, torch.get_num_threads()),
        *(row for row, _ in strides),
        0 if x.initial is None else x.initial.stride(0),
        *(step for _, step in strides),
        *(None if v is None else v.data_ptr() for v in (*x, grad_y, *outputs)),
    )
