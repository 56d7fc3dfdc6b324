"""The scan's backward pass on NVIDIA GPUs: from the last step to the first, states recomputed a block at a time.

The forward pass keeps the states that enter each block of `BLOCK` steps. A program takes some channels of a row over a
segment of blocks, last block first, one state of the N at a time: it walks that state through the block, then the
gradient of it (*flow*) back. Gradients of B and C are sums over channels: programs write their own sums, which torch
adds up, so that the result is the same every time. Where the forward pass cuts time in segments, so does this one:
first each from a flow of zero, then, with the true ones, again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.selective_scan.triton_segments import combine, segment_buffers, state_strides, step_strides
from hymba.ops.selective_scan.triton_steps import LOG2E, column, load_map, rates, sigmoid, step_sizes, with_column

LN2 = tl.constexpr(0.6931471805599453)


def gradients(
    x: Any, kept: Tensor, grad_y: Tensor, grad_final: Tensor, cut: Any, block: int
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the first nine inputs.

    Args:
        x: the inputs, as :class:`hymba.ops.selective_scan.triton.Inputs` has them prepared for a long scan.
        kept: (B, T / block, N, E) states that enter each block.
        grad_y: (B, T, E).
        grad_final: (B, E, N).
        cut: how to share it out, :class:`hymba.ops.selective_scan.triton.Tiles`.
        block: steps per block.
    """
    (rows, steps, width), states = x.u.shape, x.A_log.shape[1]
    grad_y = grad_y if grad_y.stride(2) == 1 else grad_y.contiguous()
    segments, programs = -(-steps // cut.length), -(-width // cut.back)
    constants: dict[str, Any] = {
        "states": states,
        "known": triton.next_power_of_2(states),
        "has_lengths": x.lengths is not None,
        "has_documents": x.document_offsets is not None,
        "has_gate": x.gate is not None,
        "num_warps": 1,
    }
    flows, strides = grad_final, state_strides(grad_final)
    if segments > 1:
        flows, strides = _segment_flows(x, grad_y, grad_final, cut, constants)
    maps = [v.transpose(1, 2).contiguous() for v in (x.B, x.C)]
    stepped = [None if v is None else torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (x.u, x.dt, x.gate)]
    shapes = ((rows, programs, states, steps),) * 2, ((rows, segments, states, width),), ((rows, segments, width),) * 2
    sums = [torch.empty(s, dtype=torch.float32, device=kept.device) for s in (*shapes[0], *shapes[1], *shapes[2])]
    flow, initial = torch.empty_like(sums[2]), None if x.initial_state is None else torch.empty_like(sums[2])
    first = state_strides(x.initial_state)
    _scan_back[programs, segments, rows](
        *(x.u, x.dt, x.gate, *maps, x.A_log, x.D, x.dt_bias, kept, x.initial_state, x.lengths, x.document_offsets),
        *(
            grad_y,
            flows,
            flow,
            *stepped,
            *sums,
            initial,
            *step_strides(x.u),
            *step_strides(x.dt),
            *step_strides(x.gate),
        ),
        *(*step_strides(grad_y), *strides, first[0], *first[2:], steps, width, cut.length, 1),
        **constants,
        channels=cut.back,
        block=block,
        has_initial=initial is not None,
    )
    return _summed(x, stepped, sums, initial)


def _segment_flows(
    x: Any, grad_y: Tensor, grad_final: Tensor, cut: Any, constants: dict[str, Any]
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the flows that enter the segments from behind, and their strides."""
    (rows, steps, width), states = x.u.shape, x.A_log.shape[1]
    segments = -(-steps // cut.length)
    ends, sums = segment_buffers(rows, segments, states, width, x.u.device)
    _flow_locally[-(-width // cut.channels), segments, rows](
        *(x.dt, x.gate, x.C, x.A_log, x.dt_bias, x.lengths, x.document_offsets, grad_y, ends, sums),
        *(*step_strides(x.dt), *step_strides(x.gate), *step_strides(grad_y), steps, width, cut.length, 1),
        **constants,
        channels=cut.channels,
        tile=cut.steps,
    )
    flows = combine(ends, sums, x.A_log, grad_final, reverse=True)
    return flows, (flows.stride(0), flows.stride(1), flows.stride(3), flows.stride(2))


def _summed(
    x: Any, stepped: list[Tensor | None], sums: list[Tensor], initial: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Add up what programs have left; return the gradients in the order of the inputs."""
    grad_u, grad_dt, grad_gate = stepped
    grad_B, grad_C = (v.sum(1).transpose(1, 2) for v in sums[:2])
    grad_A, grad_D, grad_bias = (v.sum((0, 1)) for v in sums[2:])
    grad_initial = None if initial is None else initial.sum(1).transpose(1, 2)
    return grad_u, grad_dt, grad_A.t(), grad_B, grad_C, grad_D, grad_bias, grad_gate, grad_initial


@triton.jit
def _add(decay, x, next_decay, next_x):
    """Put two stretches of the recurrence s = decay s + x together."""
    return decay * next_decay, x * next_decay + next_x


@triton.jit
def _over_channels(x):
    """Return the sums of a tile (channels, steps) over channels."""
    return tl.sum(x, 0)


@triton.jit
def gated_gradient(grad_y, gate, grad_at, gate_at, written, has_gate: tl.constexpr):
    """Return the gradient of what the gate multiplies; zero where nothing is."""
    grad = tl.load(grad_y + grad_at, mask=written, other=0.0).to(tl.float32)
    if has_gate:
        gate_t = tl.load(gate + gate_at).to(tl.float32)
        grad = grad * (gate_t * sigmoid(gate_t))
    return grad


@triton.jit(do_not_specialize=["one", "flow_n", "initial_n"])  # which would tell of contiguity
def _scan_back(
    u,
    dt,
    gate,
    B,
    C,
    A_log,
    D,
    dt_bias,
    kept,
    initial,
    lengths,
    offsets,
    grad_y,
    flows,
    flow,
    grad_u,
    grad_dt,
    grad_gate,
    grad_B,
    grad_C,
    grad_A,
    grad_D,
    grad_bias,
    grad_initial,
    u_row,
    u_step,
    dt_row,
    dt_step,
    gate_row,
    gate_step,
    grad_row,
    grad_step,
    flow_row,
    flow_segment,
    flow_e,
    flow_n,
    initial_row,
    initial_e,
    initial_n,
    steps,
    width,
    length,
    one,
    states: tl.constexpr,
    known: tl.constexpr,
    channels: tl.constexpr,
    block: tl.constexpr,
    has_lengths: tl.constexpr,
    has_documents: tl.constexpr,
    has_gate: tl.constexpr,
    has_initial: tl.constexpr,
):
    """Differentiate one segment, given the flow that enters it from behind.

    B and C are (B, N, T). grad_B and grad_C are (B, programs, N, T), grad_A and grad_initial (B, S, N, E), grad_D and
    grad_bias (B, S, E). Only the first segment's flow and restarts reach the initial state.
    """
    segment, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    e, n, r = tl.program_id(0) * channels + tl.arange(0, channels), tl.arange(0, known), tl.arange(0, block)
    inside, e = e < width, tl.minimum(e, width - 1)
    held = inside[:, None] & (n < states)[None, :]
    bias, direct = tl.load(dt_bias + e * one).to(tl.float32), tl.load(D + e * one).to(tl.float32)
    flow_at = row * flow_row + segment * flow_segment + e[:, None] * flow_e + n[None, :] * flow_n
    own = (row * tl.num_programs(1) + segment) * states * width + e * one
    every = own[:, None] + n[None, :] * width
    tl.store(flow + every, tl.load(flows + flow_at, mask=held, other=0.0).to(tl.float32), mask=held)
    tl.store(grad_A + every, tl.zeros((channels, known), tl.float32), mask=held)
    if has_initial:
        tl.store(grad_initial + every, tl.zeros((channels, known), tl.float32), mask=held)
    sum_D, sum_bias = tl.zeros((channels,), tl.float32), tl.zeros((channels,), tl.float32)
    limit = tl.load(lengths + row) if has_lengths else steps
    last = tl.minimum((segment + 1) * length, steps)
    first = segment * length + (last - segment * length - 1) // block * block
    while first >= segment * length:
        tl.debug_barrier()  # what was written above, or in the block before, is read here
        t = first + r
        at, valid, written = tl.minimum(t, steps - 1), (t < limit) & (t < last), inside[:, None] & (t < last)[None, :]
        u_at = row * u_row + at[None, :] * u_step + e[:, None] * one
        raw_at = row * dt_row + at[None, :] * dt_step + e[:, None] * one
        gate_at = row * gate_row + at[None, :] * gate_step + e[:, None] * one
        grad_at = row * grad_row + at[None, :] * grad_step + e[:, None] * one
        delta = step_sizes(tl.load(dt + raw_at), bias, valid)
        grad = gated_gradient(grad_y, gate, grad_at, gate_at, written, has_gate)
        inner = delta * tl.load(u + u_at).to(tl.float32)
        out, to_inner = tl.zeros((channels, block), tl.float32), tl.zeros((channels, block), tl.float32)
        to_delta = tl.zeros((channels, block), tl.float32)
        if has_documents:
            restart = (tl.load(offsets + row * steps + at) == 0) & valid
        k = 0
        while k < states:
            maps = (row * states + k) * steps + t
            B_k, C_k = tl.load(B + maps, mask=t < steps, other=0.0), tl.load(C + maps, mask=t < steps, other=0.0)
            rate = -tl.exp2(tl.load(A_log + e * states + k).to(tl.float32) * LOG2E) * LOG2E
            entering = tl.load(kept + ((row * tl.cdiv(steps, block) + first // block) * states + k) * width + e * one)
            mine = own + k * width
            back = tl.load(flow + mine, mask=inside, other=0.0)
            sum_A = tl.load(grad_A + mine, mask=inside, other=0.0)
            decay = tl.exp2(delta * rate[:, None])
            x = inner * B_k[None, :]
            carried, passed = decay, x
            if has_documents:
                start = tl.zeros((channels,), tl.float32)
                if has_initial:
                    start = tl.load(initial + row * initial_row + e * initial_e + k * initial_n).to(tl.float32)
                carried = tl.where(restart[None, :], 0.0, decay)
                passed = tl.where(restart[None, :], x + decay * start[:, None], x)
            passed = tl.where((r == 0)[None, :], passed + carried * entering[:, None], passed)
            _, state = tl.associative_scan((carried, passed), 1, _add)
            to_state = grad * C_k[None, :]
            for j in tl.static_range(block):
                i = block - 1 - j
                back += column(to_state, i, block)
                to_state = with_column(to_state, i, back, block)
                back = column(carried, i, block) * back
            tl.store(flow + mine, back, mask=inside)
            to_exponent = to_state * (state - x)
            tl.store(grad_A + mine, sum_A + tl.sum(to_exponent * delta, 1) * rate * LN2, mask=inside)
            if has_documents and has_initial:
                restarted = tl.sum(tl.where(restart[None, :], to_state * decay, 0.0), 1)
                restarted += tl.load(grad_initial + mine, mask=inside, other=0.0)
                tl.store(grad_initial + mine, restarted, mask=inside)
            to_delta += to_exponent * rate[:, None]
            to_inner += to_state * B_k[None, :]
            out += state * C_k[None, :]
            parts = ((row * tl.num_programs(0) + tl.program_id(0)) * states + k) * steps + t
            tl.store(grad_B + parts, _over_channels(to_state * inner), mask=t < last)
            tl.store(grad_C + parts, _over_channels(state * grad), mask=t < last)
            k += 1
        write_at = (row * steps + at[None, :]) * width + e[:, None] * one
        u_t = tl.load(u + u_at).to(tl.float32)
        if has_gate:
            gate_t = tl.load(gate + gate_at).to(tl.float32)
            open_t = sigmoid(gate_t)
            slope = open_t * (1.0 + gate_t * (1.0 - open_t))
            to_y = tl.load(grad_y + grad_at, mask=written, other=0.0).to(tl.float32) * (out + direct[:, None] * u_t)
            tl.store(grad_gate + write_at, (to_y * slope).to(grad_gate.dtype.element_ty), mask=written)
        to_u = to_inner * delta + direct[:, None] * grad
        tl.store(grad_u + write_at, to_u.to(grad_u.dtype.element_ty), mask=written)
        raw = tl.load(dt + raw_at).to(tl.float32) + bias[:, None]
        to_raw = tl.where(valid[None, :], (to_delta * LN2 + to_inner * u_t) * sigmoid(raw), 0.0)
        tl.store(grad_dt + write_at, to_raw.to(grad_dt.dtype.element_ty), mask=written)
        sum_D += tl.sum(grad * u_t, 1)
        sum_bias += tl.sum(to_raw, 1)
        first -= block
    place = (row * tl.num_programs(1) + segment) * width + e * one
    tl.store(grad_D + place, sum_D, mask=inside)
    tl.store(grad_bias + place, sum_bias, mask=inside)
    if has_initial and segment == 0:
        tl.debug_barrier()
        flow_now = tl.load(flow + every, mask=held, other=0.0)
        tl.store(grad_initial + every, flow_now + tl.load(grad_initial + every, mask=held, other=0.0), mask=held)


@triton.jit(do_not_specialize=["one"])
def _flow_locally(
    dt,
    gate,
    C,
    A_log,
    dt_bias,
    lengths,
    offsets,
    grad_y,
    ends,
    sums,
    dt_row,
    dt_step,
    gate_row,
    gate_step,
    grad_row,
    grad_step,
    steps,
    width,
    length,
    one,
    states: tl.constexpr,
    known: tl.constexpr,
    channels: tl.constexpr,
    tile: tl.constexpr,
    has_lengths: tl.constexpr,
    has_documents: tl.constexpr,
    has_gate: tl.constexpr,
):
    """Walk the flow back through one segment from zero; leave it and the sum of step sizes, −1 if a document started.

    C is (B, T, N).
    """
    segment, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    e, n, r = tl.program_id(0) * channels + tl.arange(0, channels), tl.arange(0, known), tl.arange(0, tile)
    inside, e = e < width, tl.minimum(e, width - 1)
    A, bias = rates(A_log, e, n, one, states), tl.load(dt_bias + e * one).to(tl.float32)
    flow, total, cut = tl.zeros((channels, known), tl.float32), tl.zeros((channels,), tl.float32), 0
    limit = tl.load(lengths + row) if has_lengths else steps
    last = tl.minimum((segment + 1) * length, steps)
    first = segment * length + (last - segment * length - 1) // tile * tile
    while first >= segment * length:
        t = first + r
        at, valid, written = tl.minimum(t, steps - 1), (t < limit) & (t < last), inside[:, None] & (t < last)[None, :]
        gate_at = row * gate_row + at[None, :] * gate_step + e[:, None] * one
        grad_at = row * grad_row + at[None, :] * grad_step + e[:, None] * one
        delta = step_sizes(tl.load(dt + row * dt_row + at[None, :] * dt_step + e[:, None] * one), bias, valid)
        grad = gated_gradient(grad_y, gate, grad_at, gate_at, written, has_gate)
        total += tl.sum(delta, 1)
        for j in tl.static_range(tile):
            i = tile - 1 - j
            step = tl.minimum(first + i, steps - 1)
            C_t = load_map(C + (row * steps + step) * states + n, n, states)
            flow += column(grad, i, tile)[:, None] * C_t[None, :]
            flow *= tl.exp2(column(delta, i, tile)[:, None] * A)
            if has_documents:
                if (tl.load(offsets + row * steps + step) == 0) & (first + i < limit) & (first + i < last):
                    cut = 1
                    flow = tl.zeros((channels, known), tl.float32)
        first -= tile
    place = row * tl.num_programs(1) + segment
    tl.store(sums + place * width + e * one, tl.where(cut > 0, -1.0, total), mask=inside)
    held = inside[:, None] & (n < states)[None, :]
    tl.store(ends + (place * states + n[None, :]) * width + e[:, None] * one, flow, mask=held)
