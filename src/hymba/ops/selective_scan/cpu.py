"""The scan in blocks that stay in cache, with a backward pass that keeps only the states between blocks.

The state is laid out (rows, N, E), so that the vector units run along E. A block is some rows times some steps; in it
all but the recurrence itself is one operation on (rows, steps, N, E). No tensor of that shape outlives its block: the
backward pass recomputes each block from the state that entered it. Plain torch operations, so any device can run it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba.ops.selective_scan import reference

# Elements per thread of one (rows, steps, N, E) buffer, and of one step in it. The backward pass works on three such
# buffers, which together should fit a core's second-level cache; a smaller step would be all call overhead.
_BLOCK_ELEMENTS = 192 * 1024
_STEP_ELEMENTS = 24 * 1024


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
    """Fast path for :func:`hymba.ops.selective_scan.selective_scan`, same signature."""
    valid = restarts = None
    if lengths is not None:
        valid = reference.valid_steps(lengths, u.shape[0], u.shape[1], u.device)
    if document_offsets is not None:
        restarts = document_offsets == 0 if valid is None else (document_offsets == 0) & valid
    keep = torch.is_grad_enabled()
    return _Scan.apply(keep, u, dt, A, B, C, D, dt_bias, gate, initial_state, valid, restarts)


class _Problem:
    """The inputs of one call, and how they are cut into blocks of rows and steps."""

    def __init__(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        gate: Tensor | None,
        initial_state: Tensor | None,
        valid: Tensor | None,
        restarts: Tensor | None,
    ) -> None:
        self.u, self.dt, self.B, self.C, self.gate, self.valid, self.restarts = u, dt, B, C, gate, valid, restarts
        self.wide = torch.promote_types(u.dtype, torch.float32)
        self.A = A.to(self.wide).t().contiguous()  # (N, E)
        self.D, self.dt_bias = D.to(self.wide), dt_bias.to(self.wide)
        self.state_shape = (u.shape[0], *self.A.shape)  # (B, N, E)
        self.initial = self.zeros(*self.state_shape)
        if initial_state is not None:
            self.initial.copy_(initial_state.transpose(1, 2))
        threads, size = torch.get_num_threads(), self.A.numel()
        self.block_rows = min(u.shape[0], -(-_STEP_ELEMENTS * threads // size))
        self.block_steps = min(u.shape[1], -(-_BLOCK_ELEMENTS * threads // (size * self.block_rows)))

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.wide, device=self.u.device)

    def row_spans(self) -> list[slice]:
        return [slice(i, i + self.block_rows) for i in range(0, self.u.shape[0], self.block_rows)]

    def step_spans(self) -> list[slice]:
        return [slice(i, i + self.block_steps) for i in range(0, self.u.shape[1], self.block_steps)]

    def buffer(self) -> Tensor:
        return self.zeros(self.block_rows * self.block_steps * self.A.numel())


class _Block:
    """The inputs of some rows and steps in the wide dtype, u and delta (b, t, E), B and C (b, t, N), and its scan."""

    def __init__(self, problem: _Problem, rows: slice, steps: slice) -> None:
        def cut(x: Tensor) -> Tensor:
            return x[rows, steps].to(problem.wide).contiguous()

        self.u, self.B, self.C = cut(problem.u), cut(problem.B), cut(problem.C)
        self.delta = F.softplus(cut(problem.dt) + problem.dt_bias)
        if problem.valid is not None:
            self.delta *= problem.valid[rows, steps, None]
        self.gate = None if problem.gate is None else cut(problem.gate)
        self.direct = self.u * problem.D
        self.inner = self.delta * self.u
        self.A, self.initial = problem.A, problem.initial[rows]
        self.restarts: list[Tensor | None] = [None] * self.u.shape[1]  # (b, 1, 1) bool at steps where any row restarts
        if problem.restarts is not None:
            masks = problem.restarts[rows, steps, None, None]
            self.restarts = [m if hit else None for m, hit in zip(masks.unbind(1), masks.any(0).flatten().tolist())]

    def view(self, buffer: Tensor) -> Tensor:
        """Return the head of a flat buffer as (b, t, N, E)."""
        shape = (*self.u.shape[:2], *self.A.shape)
        return buffer[: self.u.numel() * self.A.shape[0]].view(shape)

    def recur(self, entering: Tensor, decay: Tensor, states: Tensor) -> list[Tensor]:
        """Fill `decay` and `states` (b, t, N, E); return the state (b, N, E) that each step started from."""
        torch.mul(self.delta[:, :, None], self.A, out=decay).exp_()
        torch.mul(self.inner[:, :, None], self.B[..., None], out=states)
        previous = []
        for decay_t, state_t, restart in zip(decay.unbind(1), states.unbind(1), self.restarts):
            if restart is not None:
                entering = torch.where(restart, self.initial, entering)
            previous.append(entering)
            entering = state_t.addcmul_(decay_t, entering)
        return previous

    def read(self, states: Tensor) -> Tensor:
        """Return C · s + D u, (b, t, E)."""
        return _over_states(self.C, states).add_(self.direct)


def _over_states(weights: Tensor, x: Tensor) -> Tensor:
    """Sum (b, t, N, E) over N with weights (b, t, N)."""
    out = x.new_empty(x.shape[0] * x.shape[1], 1, x.shape[3])
    # With `out`, autocast leaves the product in the dtype of its inputs.
    torch.bmm(weights.flatten(0, 1)[:, None], x.flatten(0, 1), out=out)
    return out.view(x.shape[0], x.shape[1], x.shape[3])


def _over_channels(x: Tensor, weights: Tensor) -> Tensor:
    """Sum (b, t, N, E) over E with weights (b, t, E)."""
    out = x.new_empty(x.shape[0] * x.shape[1], x.shape[2], 1)
    torch.bmm(x.flatten(0, 1), weights.flatten(0, 1)[..., None], out=out)
    return out.view(x.shape[:3])


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keep: bool, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        problem = _Problem(*inputs)
        y = torch.empty(problem.u.shape, dtype=problem.u.dtype, device=problem.u.device)
        final = problem.zeros(*problem.state_shape)
        spans = problem.step_spans()
        entering = problem.zeros(len(spans) if keep else 1, *problem.state_shape)
        buffers = problem.buffer(), problem.buffer()
        for rows in problem.row_spans():
            state = problem.initial[rows]
            for k, steps in enumerate(spans):
                block = _Block(problem, rows, steps)
                decay, states = (block.view(buffer) for buffer in buffers)
                block.recur(entering[k if keep else 0, rows].copy_(state), decay, states)
                out = block.read(states)
                y[rows, steps] = out if block.gate is None else out.mul_(F.silu(block.gate))
                state = states[:, -1]
            final[rows] = state
        if keep:
            ctx.save_for_backward(entering, *inputs)
        return y, final.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        entering, *inputs = ctx.saved_tensors
        problem = _Problem(*inputs)
        grads = _Gradients(problem, *inputs[:9])
        buffers = problem.buffer(), problem.buffer(), problem.buffer()
        for rows in problem.row_spans():
            # What the steps after a block say of the state it leaves: (b, N, E), updated in place.
            flow = grad_final[rows].transpose(1, 2).to(problem.wide, copy=True, memory_format=torch.contiguous_format)
            for k, steps in reversed(list(enumerate(problem.step_spans()))):
                block = _Block(problem, rows, steps)
                grads.add(block, rows, steps, grad_y[rows, steps].to(problem.wide), entering[k, rows], flow, *map(block.view, buffers))
            grads.initial[rows] += flow
        return None, *grads.as_inputs(), None, None


class _Gradients:
    """The gradients of every input, filled block by block, latest steps first."""

    def __init__(self, problem: _Problem, *inputs: Tensor | None) -> None:
        wide = problem.zeros
        self.inputs = inputs
        u, dt, _, B, C, _, _, gate, _ = inputs
        self.u, self.dt, self.B, self.C = (torch.empty_like(x) for x in (u, dt, B, C))
        self.gate = None if gate is None else torch.empty_like(gate)
        self.A, self.initial = wide(problem.block_rows, *problem.A.shape), wide(*problem.state_shape)
        self.D, self.dt_bias = wide(u.shape[2]), wide(u.shape[2])
        self.D_weight = problem.D

    def add(self, block, rows, steps, grad_y, entering, flow, decay, states, grad_states) -> None:
        previous = block.recur(entering, decay, states)
        if block.gate is not None:
            sigmoid = block.gate.sigmoid()
            silu = block.gate * sigmoid
            slope = sigmoid + silu * (1 - sigmoid)
            self.gate[rows, steps] = slope.mul_(grad_y).mul_(block.read(states))
            grad_y = grad_y * silu
        grad_y = grad_y.contiguous()
        self.C[rows, steps] = _over_channels(states, grad_y)

        initial, grad_A = self.initial[rows], self.A[: flow.shape[0]]
        per_step = zip(
            decay.unbind(1),
            grad_states.unbind(1),
            previous,
            block.restarts,
            grad_y[:, :, None].unbind(1),
            block.C[..., None].unbind(1),
            block.delta[:, :, None].unbind(1),
            strict=True,
        )
        for decay_t, grad_t, previous_t, restart, grad_y_t, C_t, delta_t in reversed(list(per_step)):
            torch.addcmul(flow, grad_y_t, C_t, out=grad_t)
            torch.mul(decay_t, grad_t, out=flow)
            torch.mul(flow, previous_t, out=decay_t)  # now the gradient of delta A
            grad_A.addcmul_(decay_t, delta_t)
            if restart is not None:
                initial += torch.where(restart, flow, 0)
                flow.masked_fill_(restart, 0)

        self.B[rows, steps] = _over_channels(grad_states, block.inner)
        grad_inner = _over_states(block.B, grad_states)
        grad_delta = decay.mul_(block.A).sum(2).addcmul_(grad_inner, block.u)
        self.u[rows, steps] = (grad_inner * block.delta).addcmul_(grad_y, self.D_weight)
        self.D += (grad_y * block.u).sum((0, 1))
        # The slope of softplus, written with its value; a step of size zero has none.
        grad_dt = grad_delta.mul_(torch.expm1(-block.delta).neg_())
        self.dt[rows, steps] = grad_dt
        self.dt_bias += grad_dt.sum((0, 1))

    def as_inputs(self):
        initial = None if self.inputs[8] is None else self.initial.transpose(1, 2)
        return self.u, self.dt, self.A.sum(0).t(), self.B, self.C, self.D, self.dt_bias, self.gate, initial
