"""The scan in pieces that stay in cache, with a backward pass that keeps only some of the states.

A *panel* is b rows over some tens of steps, time outermost: inputs are (t b, 1, E) or (t b, 1, N), a state is
(b, N, E), so that the vector units run along E. Its steps are taken a *block* at a time, in which all but the
recurrence itself is one operation on (t b, N, E). No tensor of that shape outlives its block: the backward
pass recomputes each block from the state that entered it. A call costs about as much as its arithmetic here,
hence views made in bulk and results written in place; ``out=`` also keeps autocast from rounding products.
Plain torch operations, so any device can run it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba.ops.selective_scan import operator, reference

# Elements per thread of one block, (t b, N, E), and of one step in it. The backward pass works on three such
# tensors, which should about fit a core's second-level cache; much smaller steps would be all call overhead.
_BLOCK_ELEMENTS = 192 * 1024
_STEP_ELEMENTS = 24 * 1024
_PANEL_BLOCKS = 8


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
    """Fast path for :func:`hymba.ops.selective_scan.selective_scan`, same signature."""
    given = (u, dt, A_log, B, C, D, dt_bias, gate, initial_state, lengths, document_offsets)
    if torch.compiler.is_compiling():
        y, final = operator.selective_scan(*given)
    elif not u.numel():
        y, final = reference.selective_scan(
            u,
            dt,
            A_log,
            B,
            C,
            D,
            dt_bias=dt_bias,
            gate=gate,
            initial_state=initial_state,
            lengths=lengths,
            document_offsets=document_offsets,
        )
    else:
        x = _Inputs.of(*given)
        single = u.shape[1] == 1 and not torch.is_grad_enabled()
        y, final = _single_step(x) if single else _Scan.apply(torch.is_grad_enabled(), *x)
    return y, final if final_state is None else final_state.copy_(final)


def gradients(grad_y: Tensor, grad_final: Tensor, *inputs: Any) -> _Inputs:
    """Return the gradients of `inputs`, those of the scan in their order, with that of A_log in the place of A."""
    x, threads = _Inputs.of(*inputs), torch.get_num_threads()
    *_, kept = _scan(x, True, threads)
    grads = _differentiate(x, kept, threads, grad_y, grad_final)
    return grads._replace(A=grads.A * x.A)


class _Inputs(NamedTuple):
    """What the scan is given. A gradient of it carries the same names."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt_bias: Tensor
    gate: Tensor | None
    initial_state: Tensor | None
    valid: Tensor | None = None  # (B, T) bool, steps before the row's length
    restarts: Tensor | None = None  # (B, T) bool, valid steps that start a document

    @classmethod
    def of(
        cls, u: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, *options: Any
    ) -> _Inputs:
        """Take the arguments of the scan, in their order; options are gate, initial state, lengths and offsets."""
        gate, initial_state, lengths, document_offsets = options
        valid = restarts = None
        if lengths is not None:
            valid = reference.valid_steps(lengths, u.shape[0], u.shape[1], u.device)
        if document_offsets is not None:
            restarts = document_offsets == 0 if valid is None else (document_offsets == 0) & valid
        A = -torch.exp(A_log.to(torch.promote_types(u.dtype, torch.float32)))
        return cls(u, dt, A, B, C, D, dt_bias, gate, initial_state, valid, restarts)

    @property
    def wide(self) -> torch.dtype:
        """The dtype that everything is computed in."""
        return torch.promote_types(self.u.dtype, torch.float32)

    def initial(self, rows: slice) -> Tensor:
        """Return the initial state of some rows, (b, N, E), wide and contiguous."""
        state = self.u.new_zeros(rows.stop - rows.start, *self.A.mT.shape, dtype=self.wide)
        return state if self.initial_state is None else state.copy_(self.initial_state[rows].mT)


def _single_step(x: _Inputs) -> tuple[Tensor, Tensor]:
    """Decode one token, in as few calls as it takes. A restart would change nothing."""
    u, dt, A, B, C = (v.to(x.wide) for v in (x.u, x.dt, x.A, x.B, x.C))
    delta = F.softplus(dt + x.dt_bias)  # (B, 1, E)
    if x.valid is not None:
        delta = delta * x.valid[..., None]
    state = torch.mul(delta.mT, A).exp_()
    state = state.zero_() if x.initial_state is None else state.mul_(x.initial_state)
    state.addcmul_((delta * u).mT, B)
    y = torch.empty_like(u)
    torch.bmm(C, state.mT, out=y)
    y.addcmul_(u, x.D.to(x.wide))
    if x.gate is not None:
        y *= F.silu(x.gate.to(x.wide))
    return y.to(x.u.dtype), state


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keep: bool, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.threads = torch.get_num_threads()  # the backward pass must cut the same blocks
        y, final, kept = _scan(_Inputs(*inputs), keep, ctx.threads)
        if keep:
            ctx.save_for_backward(*inputs, *kept)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        count, saved = (
            len(_Inputs._fields),
            ctx.saved_tensors,
        )  # read once: a checkpoint recomputes at each reading
        return None, *_differentiate(_Inputs(*saved[:count]), list(saved[count:]), ctx.threads, grad_y, grad_final)


def _scan(x: _Inputs, keep: bool, threads: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return y, the final state, and the states that enter each block, which are worth keeping only if `keep`."""
    y, final = torch.empty_like(x.u), x.u.new_empty(x.u.shape[0], *x.A.shape, dtype=x.wide)
    plan, kept = _Plan(x, threads, buffers=2), []
    for rows in plan.row_spans:
        buffers = plan.buffers(rows)
        state = x.initial(rows)
        for steps in plan.step_spans:
            panel = _Panel(x, rows, steps, plan.block_steps)
            out, entering, state = panel.scan(state, keep, *buffers)
            y[rows, steps] = panel.uncut(panel.read(out))
            kept.append(entering)
        final[rows] = state.mT
    return y, final, kept


def _differentiate(x: _Inputs, kept: list[Tensor], threads: int, grad_y: Tensor, grad_final: Tensor) -> _Inputs:
    """Return the gradients of all inputs, given what :func:`_scan` kept with as many `threads`."""
    plan, grads = _Plan(x, threads, buffers=3), _empty_gradients(x)
    for rows in reversed(plan.row_spans):
        buffers = plan.buffers(rows)
        flow = grad_final[rows].mT.clone(memory_format=torch.contiguous_format)
        for steps in reversed(plan.step_spans):
            panel = _Panel(x, rows, steps, plan.block_steps)
            part = panel.differentiate(grad_y[rows, steps], flow, kept.pop(), *buffers)
            _add(grads, part, panel, rows, steps)
        if grads.initial_state is not None:
            grads.initial_state[rows] += flow.mT
    return grads


class _Plan:
    """How one call is cut into panels and blocks, and the memory that its blocks share."""

    def __init__(self, x: _Inputs, threads: int, buffers: int) -> None:
        (rows, steps, width), size = x.u.shape, x.A.numel()
        b = min(rows, -(-_STEP_ELEMENTS * threads // size))
        self.block_steps = min(steps, -(-_BLOCK_ELEMENTS * threads // (size * b)))
        self.row_spans = _spans(rows, b)
        self.step_spans = _spans(steps, self.block_steps * _PANEL_BLOCKS)
        shape = (self.block_steps * b, x.A.shape[1], width)
        self.memory = [torch.empty(shape, dtype=x.wide, device=x.u.device) for _ in range(buffers)]

    def buffers(self, rows: slice) -> list[_Buffer]:
        b = rows.stop - rows.start
        return [_Buffer(memory[: self.block_steps * b], b) for memory in self.memory]


class _Buffer:
    """Memory for one block, (t b, N, E), with its steps (b, N, E)."""

    def __init__(self, block: Tensor, b: int) -> None:
        self.block, self.steps = block, block.split(b)


def _spans(total: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


class _Panel:
    """The inputs of some rows and steps, wide and laid out for the scan."""

    def __init__(self, x: _Inputs, rows: slice, steps: slice, block_steps: int) -> None:
        self.b, self.wide = rows.stop - rows.start, x.wide
        self.u, self.B, self.C = (self.cut(v[rows, steps]) for v in (x.u, x.B, x.C))
        self.gate = None if x.gate is None else self.cut(x.gate[rows, steps])
        self.A, self.D = x.A.to(self.wide).t().contiguous(), x.D.to(self.wide)
        self.raw_delta = self.cut(x.dt[rows, steps]) + x.dt_bias
        self.delta = F.softplus(self.raw_delta)
        self.valid = None if x.valid is None else x.valid[rows, steps].t().reshape(-1, 1, 1)
        if self.valid is not None:
            self.delta *= self.valid
        self.inner = self.delta * self.u
        self.initial = x.initial(rows)
        self.restarts: list[Tensor | None] = [None] * (len(self.u) // self.b)
        if x.restarts is not None:  # per step, (b, 1, 1) where any row restarts
            masks = x.restarts[rows, steps].t()[..., None, None]
            hits = masks.flatten(1).any(1).tolist()
            self.restarts = [mask if hit else None for mask, hit in zip(masks, hits, strict=True)]
        self.block = block_steps * self.b  # inputs in one block
        self.steps = _spans(len(self.restarts), block_steps)
        self.recurrent = list(zip(*self.by_block(self.delta, self.inner, self.B.mT), strict=True))

    def cut(self, x: Tensor) -> Tensor:
        """Return (b, t, X) as (t b, 1, X), widened."""
        return x.transpose(0, 1).to(self.wide).reshape(-1, 1, x.shape[2])

    def uncut(self, x: Tensor) -> Tensor:
        """Return (t b, 1, X) as (b, t, X)."""
        return x.view(-1, self.b, x.shape[2]).transpose(0, 1)

    def by_block(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        return [x.split(self.block) for x in tensors]

    def recur(self, k: int, state: Tensor, decay: _Buffer, states: _Buffer) -> tuple[Tensor, list[Tensor]]:
        """Fill the buffers for block k; return its states (t b, N, E) and the one before each step."""
        delta, inner, B = self.recurrent[k]
        torch.mul(delta, self.A, out=decay.block[: len(delta)]).exp_()
        filled = torch.mul(inner, B, out=states.block[: len(delta)])
        previous = []
        restarts = self.restarts[self.steps[k]]
        for restart, decay_t, state_t in zip(restarts, decay.steps, states.steps, strict=False):
            if restart is not None:
                state = torch.where(restart, self.initial, state)
            previous.append(state)
            state = state_t.addcmul_(decay_t, state)
        return filled, previous

    def scan(self, state: Tensor, keep: bool, *buffers: _Buffer) -> tuple[Tensor, Tensor, Tensor]:
        """Return C · s (t b, 1, E), the states entering its blocks (one unless `keep`) and the last one."""
        out = torch.empty_like(self.u)
        entering = self.u.new_empty(len(self.steps) if keep else 1, *state.shape)
        for k, (C, out_k) in enumerate(zip(*self.by_block(self.C, out), strict=True)):
            state = entering[k if keep else 0].copy_(state)
            filled, _ = self.recur(k, state, *buffers)
            torch.bmm(C, filled, out=out_k)
            state = filled[-self.b :]
        return out, entering, state

    def read(self, out: Tensor) -> Tensor:
        """Turn C · s into y, in place."""
        out.addcmul_(self.u, self.D)
        return out if self.gate is None else out.mul_(F.silu(self.gate))

    def differentiate(self, grad_y: Tensor, flow: Tensor, entering: Tensor, *buffers: _Buffer) -> _Inputs:
        """Return the gradients of the panel's inputs, laid out alike; `flow` as in `_Backward.block`."""
        grad_y = self.cut(grad_y)
        grad_out, grad_gate = grad_y, None
        if self.gate is not None:
            grad_out = grad_y * F.silu(self.gate)
        back = _Backward(self, grad_out)
        for k in reversed(range(len(self.steps))):
            back.block(k, flow, entering[k], *buffers)
        if self.gate is not None:
            sigmoid = self.gate.sigmoid()
            slope = (1 - sigmoid).mul_(self.gate).add_(1).mul_(sigmoid)
            grad_gate = slope.mul_(grad_y).mul_(back.out.addcmul_(self.u, self.D))
        grad_dt = back.delta.addcmul_(back.inner, self.u).mul_(self.raw_delta.sigmoid())
        if self.valid is not None:
            grad_dt *= self.valid
        return _Inputs(
            u=back.inner.mul_(self.delta).addcmul_(grad_out, self.D),
            dt=grad_dt,
            A=back.A.sum(0).t(),
            B=back.B,
            C=back.C,
            D=(grad_out * self.u).sum((0, 1)),
            dt_bias=grad_dt.sum((0, 1)),
            gate=grad_gate,
            initial_state=back.initial,
        )


class _Backward:
    """What the recurrence of one panel passes back: gradients under their inputs' names, and `out`, C · s."""

    def __init__(self, panel: _Panel, grad_out: Tensor) -> None:
        self.panel = panel
        self.out, self.inner, self.delta = (torch.empty_like(panel.u) for _ in range(3))
        self.B, self.C = torch.empty_like(panel.B), torch.empty_like(panel.C)
        self.A, self.initial = torch.zeros_like(panel.initial), torch.zeros_like(panel.initial)
        inputs = (panel.inner, panel.B, panel.C, grad_out)
        outputs = (self.out, self.inner, self.delta.squeeze(1), self.B, self.C)
        self.blocks = list(zip(*panel.by_block(*inputs, *outputs), strict=True))
        steps = (x.split(panel.b) for x in (grad_out, panel.C.mT, panel.delta))
        self.steps = list(zip(panel.restarts, *steps, strict=True))

    def block(self, k: int, flow: Tensor, state: Tensor, decay: _Buffer, states: _Buffer, grads: _Buffer) -> None:
        """Differentiate block k, entered by `state`.

        `flow` (b, N, E) comes as the gradient of the state that leaves the block and becomes that of `state`.
        """
        inner, B, C, grad_out, out, grad_inner, grad_delta, grad_B, grad_C = self.blocks[k]
        filled, previous = self.panel.recur(k, state, decay, states)
        if self.panel.gate is not None:
            torch.bmm(C, filled, out=out)
        torch.bmm(grad_out, filled.mT, out=grad_C)
        steps = zip(self.steps[self.panel.steps[k]], previous, decay.steps, grads.steps, strict=False)
        for (restart, grad_out_t, C_t, delta_t), previous_t, decay_t, grad_t in reversed(list(steps)):
            torch.addcmul(flow, grad_out_t, C_t, out=grad_t)
            torch.mul(decay_t, grad_t, out=flow)
            grad_exponent = torch.mul(flow, previous_t, out=decay_t)
            self.A.addcmul_(grad_exponent, delta_t)
            if restart is not None:
                self.initial += torch.where(restart, flow, 0)
                flow.masked_fill_(restart, 0)
        grad_states, grad_exponents = grads.block[: len(filled)], decay.block[: len(filled)]
        torch.bmm(inner, grad_states.mT, out=grad_B)
        torch.bmm(B, grad_states, out=grad_inner)
        torch.sum(grad_exponents.mul_(self.panel.A), 1, out=grad_delta)


def _empty_gradients(x: _Inputs) -> _Inputs:
    """Return gradients to be filled, with zeros where `_add` sums."""
    per_step = {name: torch.empty_like(getattr(x, name)) for name in ("u", "dt", "B", "C")}
    summed = {name: torch.zeros_like(getattr(x, name), dtype=x.wide) for name in ("A", "D", "dt_bias")}
    gate = None if x.gate is None else torch.empty_like(x.gate)
    state = None if x.initial_state is None else x.u.new_zeros(x.initial_state.shape, dtype=x.wide)
    return _Inputs(**per_step, **summed, gate=gate, initial_state=state)


def _add(grads: _Inputs, part: _Inputs, panel: _Panel, rows: slice, steps: slice) -> None:
    """Put a panel's gradients in their places; add up those of the parameters and of the initial state."""
    for name in ("u", "dt", "B", "C", "gate"):
        piece = getattr(part, name)
        if piece is not None:
            getattr(grads, name)[rows, steps] = panel.uncut(piece)
    for name in ("A", "D", "dt_bias"):
        getattr(grads, name).add_(getattr(part, name))
    if grads.initial_state is not None and part.initial_state is not None:
        grads.initial_state[rows] += part.initial_state.mT
