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
from hymba.ops.selective_scan.triton_steps import (
    LOG2E,
    column,
    load_map,
    load_tile,
    rates,
    sigmoid,
    spread,
    step_sizes,
    store_tile,
    with_column,
)

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
    if segments > 1:
        flow = _segment_flows(x, grad_y, grad_final, cut, constants)
    else:
        flow = torch.empty(rows, 1, states, width, dtype=torch.float32, device=kept.device)
        flow[:, 0] = grad_final.transpose(1, 2)
    maps = [v.transpose(1, 2).contiguous() for v in (x.B, x.C)]
    stepped = [None if v is None else torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (x.u, x.dt, x.gate)]
    sums = [flow.new_empty(rows, programs, states, steps) for _ in range(2)]
    sums += [torch.zeros_like(flow), *(flow.new_empty(rows, segments, width) for _ in range(2))]
    initial = None if x.initial_state is None else torch.zeros_like(flow)
    _scan_back[programs, segments, rows](
        *(x.u, x.dt, x.gate, *maps, x.A_log, x.D, x.dt_bias, kept, x.initial_state, x.lengths, _keeps(x)),
        *(grad_y, flow, *stepped, *sums, initial),
        *(*step_strides(x.u), *step_strides(x.dt), *step_strides(x.gate), *step_strides(grad_y)),
        *(*state_strides(x.initial_state), steps, width, cut.length, 1),
        **constants,
        channels=cut.back,
        block=block,
        parts=1 if x.u.dtype == torch.bfloat16 else 2,  # TF32 keeps 11 bits, which float16 rounding would show
        has_initial=initial is not None,
    )
    return _summed(stepped, sums, None if initial is None else initial.sum(1) + flow[:, 0])


def _keeps(x: Any) -> Tensor | None:
    """Return (B, T) float32, 0 at steps that start a document and 1 at others; None without documents."""
    if x.document_offsets is None:
        return None
    keeps = x.document_offsets != 0
    if x.lengths is not None:
        keeps = keeps | (torch.arange(x.u.shape[1], device=x.u.device) >= x.lengths[:, None])
    return keeps.float()


def _segment_flows(x: Any, grad_y: Tensor, grad_final: Tensor, cut: Any, constants: dict[str, Any]) -> Tensor:
    """Return the flows that enter the segments from behind, (B, S, N, E)."""
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
    return combine(ends, sums, x.A_log, grad_final, reverse=True)


def _summed(stepped: list[Tensor | None], sums: list[Tensor], initial: Tensor | None) -> tuple[Tensor | None, ...]:
    """Add up what programs have left; return the gradients in the order of the inputs."""
    grad_u, grad_dt, grad_gate = stepped
    grad_B, grad_C = (v.sum(1).transpose(1, 2) for v in sums[:2])
    grad_A, grad_D, grad_bias = (v.sum((0, 1)) for v in sums[2:])
    grad_initial = None if initial is None else initial.transpose(1, 2)
    return grad_u, grad_dt, grad_A.t(), grad_B, grad_C, grad_D, grad_bias, grad_gate, grad_initial


@triton.jit
def _add(decay, x, next_decay, next_x):
    """Put two stretches of the recurrence s = decay s + x together."""
    return decay * next_decay, x * next_decay + next_x


@triton.jit
def _sum_into_row(sums, k, x, parts: tl.constexpr):
    """Put the sums of a tile (channels, steps) over channels in row k of `sums` (16 or more, steps).

    A product with ones moves a value through shared memory once, where sums over lanes move it five times. The matrix
    unit takes 11 bits of a factor (TF32): x goes in whole, which leaves those, or in two parts, for 22.
    """
    ones = tl.full((sums.shape[0], x.shape[0]), 1.0, tl.float32)
    if parts == 1:
        total = tl.dot(ones, x, input_precision="tf32")
    else:
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        total = tl.dot(ones, x - high, tl.dot(ones, high, input_precision="tf32"), input_precision="tf32")
    return tl.where((tl.arange(0, sums.shape[0]) == k)[:, None], total, sums)


@triton.jit
def gated_gradient(grad_y, gate, grad_at, gate_at, written, has_gate: tl.constexpr):
    """Return the gradient of what the gate multiplies; zero where nothing is."""
    grad = tl.load(grad_y + grad_at, mask=written, other=0.0).to(tl.float32)
    if has_gate:
        gate_t = tl.load(gate + gate_at).to(tl.float32)
        grad = grad * (gate_t * sigmoid(gate_t))
    return grad


@triton.jit
def _state_back(
    row,
    own,
    e,
    t,
    r,
    first,
    inside,
    delta,
    grad,
    inner,
    k,
    to_inner,
    to_delta,
    out,
    sum_B,
    sum_C,
    B,
    C,
    A_log,
    kept,
    initial,
    keeps,
    flow,
    grad_A,
    grad_initial,
    initial_row,
    initial_e,
    initial_n,
    steps,
    width,
    one,
    states: tl.constexpr,
    block: tl.constexpr,
    parts: tl.constexpr,
    has_documents: tl.constexpr,
    has_initial: tl.constexpr,
):
    """Walk state k through a block and its gradient back; return the block's sums with its part."""
    maps = (row * states + k) * steps + t
    B_k, C_k = tl.load(B + maps, mask=t < steps, other=0.0), tl.load(C + maps, mask=t < steps, other=0.0)
    rate = -tl.exp2(tl.load(A_log + e * states + k).to(tl.float32) * LOG2E) * LOG2E
    entering = tl.load(kept + ((row * tl.cdiv(steps, block) + first // block) * states + k) * width + e * one)
    mine = own + k * width
    back = tl.load(flow + mine, mask=inside, other=0.0)
    sum_A = tl.load(grad_A + mine, mask=inside, other=0.0)
    decay = tl.exp2(delta * rate[:, None])
    carried, passed = decay, inner * B_k[None, :]
    if has_documents:
        keep = tl.load(keeps + row * steps + t, mask=t < steps, other=1.0)
        carried = decay * keep[None, :]
        if has_initial:
            start = tl.load(initial + row * initial_row + e * initial_e + k * initial_n).to(tl.float32)
            passed += (decay - carried) * start[:, None]
    passed = tl.where((r == 0)[None, :], passed + carried * entering[:, None], passed)
    _, state = tl.associative_scan((carried, passed), 1, _add)
    to_state = grad * C_k[None, :]
    for j in tl.static_range(block):
        i = block - 1 - j
        back += column(to_state, i, block)
        to_state = with_column(to_state, i, back, block)
        back = column(carried, i, block) * back
    tl.store(flow + mine, back, mask=inside)
    to_exponent = to_state * (state - inner * B_k[None, :])
    tl.store(grad_A + mine, sum_A + tl.sum(to_exponent * delta, 1) * rate * LN2, mask=inside)
    if has_documents and has_initial:
        restarted = tl.sum(to_state * (decay - carried), 1)
        restarted += tl.load(grad_initial + mine, mask=inside, other=0.0)
        tl.store(grad_initial + mine, restarted, mask=inside)
    to_delta += to_exponent * rate[:, None]
    to_inner += to_state * B_k[None, :]
    out += state * C_k[None, :]
    sum_B = _sum_into_row(sum_B, k, to_state * inner, parts)
    sum_C = _sum_into_row(sum_C, k, state * grad, parts)
    return to_inner, to_delta, out, sum_B, sum_C


@triton.jit
def _states_back(
    row,
    own,
    e,
    t,
    r,
    first,
    inside,
    delta,
    grad,
    inner,
    B,
    C,
    A_log,
    kept,
    initial,
    keeps,
    flow,
    grad_A,
    grad_initial,
    initial_row,
    initial_e,
    initial_n,
    steps,
    width,
    one,
    states: tl.constexpr,
    known: tl.constexpr,
    block: tl.constexpr,
    parts: tl.constexpr,
    has_documents: tl.constexpr,
    has_initial: tl.constexpr,
):
    """Walk every state through a block and its gradient back; return the block's sums."""
    rows: tl.constexpr = known if known > 16 else 16  # the least that a matrix product takes
    out, to_inner = tl.zeros(delta.shape, tl.float32), tl.zeros(delta.shape, tl.float32)
    to_delta = tl.zeros(delta.shape, tl.float32)
    sum_B, sum_C = tl.zeros((rows, block), tl.float32), tl.zeros((rows, block), tl.float32)
    k = 0
    while k < states:
        # fmt: off
        to_inner, to_delta, out, sum_B, sum_C = _state_back(
            row, own, e, t, r, first, inside, delta, grad, inner, k, to_inner, to_delta, out,
            sum_B, sum_C, B, C, A_log, kept, initial, keeps, flow, grad_A, grad_initial,
            initial_row, initial_e, initial_n, steps, width, one, states, block, parts,
            has_documents, has_initial,
        )
        # fmt: on
        k += 1
    return to_inner, to_delta, out, sum_B, sum_C


@triton.jit
def _read_block(
    row,
    e,
    t,
    valid,
    written,
    u,
    dt,
    gate,
    dt_bias,
    grad_y,
    u_row,
    u_step,
    dt_row,
    dt_step,
    gate_row,
    gate_step,
    grad_row,
    grad_step,
    one,
    has_gate: tl.constexpr,
):
    """Return a block's step sizes, the gradients of what its gate multiplies, and its step sizes times u."""
    bias = tl.load(dt_bias + e * one).to(tl.float32)
    delta = step_sizes(load_tile(dt + row * dt_row, e, t, dt_step, written, one), bias, valid)
    grad = load_tile(grad_y + row * grad_row, e, t, grad_step, written, one)
    if has_gate:
        gate_t = load_tile(gate + row * gate_row, e, t, gate_step, written, one)
        grad = grad * (gate_t * sigmoid(gate_t))
    return delta, grad, delta * load_tile(u + row * u_row, e, t, u_step, written, one)


@triton.jit
def _write_sums(target, first, sums, t, last, steps, states: tl.constexpr):
    """Write the sums (16 or more, steps) of a block's states as lines first + 0, first + 1, … of a matrix."""
    m = tl.arange(0, sums.shape[0])
    places = (first + m[:, None]) * steps + t[None, :]
    tl.store(target + places, sums, mask=(m < states)[:, None] & (t < last)[None, :])


@triton.jit
def _write_block(
    row,
    first,
    r,
    e,
    valid,
    written,
    delta,
    grad,
    to_inner,
    to_delta,
    out,
    sum_D,
    sum_bias,
    u,
    dt,
    gate,
    D,
    dt_bias,
    keeps,
    grad_y,
    grad_u,
    grad_dt,
    grad_gate,
    u_row,
    u_step,
    dt_row,
    dt_step,
    gate_row,
    gate_step,
    grad_row,
    grad_step,
    steps,
    width,
    one,
    has_gate: tl.constexpr,
):
    """Write the gradients of a block's steps; return the sums over steps with its part."""
    place, t = row * steps * width, first * one + r  # `one` keeps the compiler from holding on to addresses
    bias, direct = tl.load(dt_bias + e * one).to(tl.float32), tl.load(D + e * one).to(tl.float32)
    u_t = load_tile(u + row * u_row, e, t, u_step, written, one)
    if has_gate:
        gate_t = load_tile(gate + row * gate_row, e, t, gate_step, written, one)
        open_t = sigmoid(gate_t)
        slope = open_t * (1.0 + gate_t * (1.0 - open_t))
        to_y = load_tile(grad_y + row * grad_row, e, t, grad_step, written, one)
        store_tile(grad_gate + place, to_y * (out + direct[:, None] * u_t) * slope, e, t, width, written, one)
    store_tile(grad_u + place, to_inner * delta + direct[:, None] * grad, e, t, width, written, one)
    raw = load_tile(dt + row * dt_row, e, t, dt_step, written, one) + bias[:, None]
    to_raw = tl.where(valid[None, :], (to_delta * LN2 + to_inner * u_t) * sigmoid(raw), 0.0)
    store_tile(grad_dt + place, to_raw, e, t, width, written, one)
    sum_D += tl.sum(grad * u_t, 1)
    sum_bias += tl.sum(to_raw, 1)
    return sum_D, sum_bias


@triton.jit(do_not_specialize=["one", "initial_n"])  # which would tell of contiguity
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
    keeps,
    grad_y,
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
    parts: tl.constexpr,
    has_lengths: tl.constexpr,
    has_documents: tl.constexpr,
    has_gate: tl.constexpr,
    has_initial: tl.constexpr,
):
    """Differentiate one segment.

    B and C are (B, N, T); keeps (B, T) is 0 where a document starts, else 1.
    flow (B, S, N, E) comes as what enters the segment from behind and becomes what leaves it.
    grad_B and grad_C are (B, programs, N, T), grad_D and grad_bias (B, S, E). To grad_A and to grad_initial, which has
    the part of documents that start, both (B, S, N, E), the segment's share is added.
    """
    segment, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    e, r = tl.program_id(0) * channels + tl.arange(0, channels), tl.arange(0, block)
    inside, e = e < width, tl.minimum(e, width - 1)
    own = (row * tl.num_programs(1) + segment) * states * width + e * one
    sum_D, sum_bias = tl.zeros((channels,), tl.float32), tl.zeros((channels,), tl.float32)
    limit = tl.load(lengths + row) if has_lengths else steps
    last = tl.minimum((segment + 1) * length, steps)
    first = segment * length + (last - segment * length - 1) // block * block
    while first >= segment * length:
        tl.debug_barrier()  # what was written above, or in the block before, is read here
        t = first + r
        valid, written = (t < limit) & (t < last), inside[:, None] & (t < last)[None, :]
        # fmt: off
        delta, grad, inner = _read_block(
            row, e, t, valid, written, u, dt, gate, dt_bias, grad_y, u_row, u_step, dt_row, dt_step,
            gate_row, gate_step, grad_row, grad_step, one, has_gate,
        )
        # fmt: on
        # fmt: off
        to_inner, to_delta, out, sum_B, sum_C = _states_back(
            row, own, e, t, r, first, inside, delta, grad, inner, B, C, A_log, kept, initial, keeps, flow,
            grad_A, grad_initial, initial_row, initial_e, initial_n, steps, width, one, states, known,
            block, parts, has_documents, has_initial,
        )
        # fmt: on
        sums_at = (row * tl.num_programs(0) + tl.program_id(0)) * states
        _write_sums(grad_B, sums_at, sum_B, t, last, steps, states)
        _write_sums(grad_C, sums_at, sum_C, t, last, steps, states)
        # fmt: off
        sum_D, sum_bias = _write_block(
            row, first, r, e, valid, written, delta, grad, to_inner, to_delta, out, sum_D, sum_bias, u,
            dt, gate, D, dt_bias, keeps, grad_y, grad_u, grad_dt, grad_gate, u_row, u_step, dt_row,
            dt_step, gate_row, gate_step, grad_row, grad_step, steps, width, one, has_gate,
        )
        # fmt: on
        first -= block
    ends_at = (row * tl.num_programs(1) + segment) * width + e * one
    tl.store(grad_D + ends_at, sum_D, mask=inside)
    tl.store(grad_bias + ends_at, sum_bias, mask=inside)


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
        gate_at = row * gate_row + at[None, :] * gate_step + spread(e, one)[:, None]
        grad_at = row * grad_row + at[None, :] * grad_step + spread(e, one)[:, None]
        delta = step_sizes(tl.load(dt + row * dt_row + at[None, :] * dt_step + spread(e, one)[:, None]), bias, valid)
        grad = gated_gradient(grad_y, gate, grad_at, gate_at, written, has_gate)
        total += tl.sum(delta, 1)
        for j in tl.static_range(tile):
            i = tile - 1 - j
            step = tl.minimum(first + i, steps - 1)
            C_t = load_map(C + (row * steps + step) * states + n, n, states)
            flow += column(grad, i, tile)[:, None] * C_t[None, :]
            flow *= tl.exp2(column(delta, i, tile)[:, None] * A)
            if has_documents:  # noqa: SIM102 (known when compiled)
                if (tl.load(offsets + row * steps + step) == 0) & (first + i < limit) & (first + i < last):
                    cut = 1
                    flow = tl.zeros((channels, known), tl.float32)
        first -= tile
    place = row * tl.num_programs(1) + segment
    tl.store(sums + place * width + e * one, tl.where(cut > 0, -1.0, total), mask=inside)
    held = inside[:, None] & (n < states)[None, :]
    tl.store(ends + (place * states + n[None, :]) * width + spread(e, one)[:, None], flow, mask=held)
