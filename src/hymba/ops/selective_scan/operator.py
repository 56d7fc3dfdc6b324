"""The scan as one operator of torch, with its gradients: what torch.compile and torch.export put into a graph.

They would unroll a loop over the steps, and could not export it for any number of steps. When the graph runs, the
operator calls :func:`hymba.ops.selective_scan.selective_scan`, kernels included; gradients are the torch path's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_INPUTS = (
    "Tensor u, Tensor dt, Tensor A_log, Tensor B, Tensor C, Tensor D, Tensor dt_bias, "
    "Tensor? gate, Tensor? initial_state, Tensor? lengths, Tensor? document_offsets"
)
_FLOATS = 9  # of these, those that have gradients, in the same order


@torch.library.custom_op("hymba::selective_scan", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def selective_scan(
    u: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    gate: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    document_offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return what :func:`hymba.ops.selective_scan.selective_scan` does."""
    from hymba.ops.selective_scan import selective_scan as scan

    options = {"gate": gate, "initial_state": initial_state, "lengths": lengths, "document_offsets": document_offsets}
    with torch.no_grad():
        y, final = scan(u, dt, A_log, B, C, D, dt_bias=dt_bias, **options)
    return y.contiguous(), final.contiguous()


@torch.library.custom_op(
    "hymba::selective_scan_backward",
    mutates_args=(),
    schema=f"(Tensor grad_y, Tensor grad_final, {_INPUTS}) -> Tensor[]",
)
def differentiate(grad_y: Tensor, grad_final: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    """Return the gradients of the floating inputs that are there."""
    from hymba.ops.selective_scan import cpu

    with torch.no_grad():
        grads = cpu.gradients(grad_y, grad_final, *inputs)
    pairs = zip(grads, inputs, strict=False)
    return [grad.to(x.dtype).contiguous() for grad, x in pairs if grad is not None and x is not None]


@selective_scan.register_fake
def _(u: Tensor, dt: Tensor, A_log: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(u.dtype, torch.float32)
    return u.new_empty(u.shape), u.new_empty(u.shape[0], *A_log.shape, dtype=wide)


@differentiate.register_fake
def _(grad_y: Tensor, grad_final: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs[:_FLOATS] if x is not None]


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    found = iter(differentiate(grad_y, grad_final, *inputs))
    return tuple(next(found) if i < _FLOATS and x is not None else None for i, x in enumerate(inputs))


selective_scan.register_autograd(_backward, setup_context=_keep)
