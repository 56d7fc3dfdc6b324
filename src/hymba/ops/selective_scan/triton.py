"""The scan on NVIDIA GPUs: a walk over the steps with states in registers, time cut in segments where channels are few.

A program takes some channels of a row over a segment of steps, some steps (a *tile*) at a time. The channels of a tile
lie over the lanes and its steps and states within a thread, so that nothing is exchanged between lanes; then the
exponentials are the floor. Where rows and channels do not fill a GPU, each segment first runs from zero
(`_scan_locally`); what it leaves and how it decays what entered it are put together in order (`combine`), and then each
segment runs from its true start. How many segments there are follows from the sizes alone, the number of rows
included. The backward pass is in `triton_backward`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba.errors import HymbaError
from hymba.ops import gpu
from hymba.ops.selective_scan import cpu, triton_backward
from hymba.ops.selective_scan.triton_segments import combine, segment_buffers, state_strides, step_strides
from hymba.ops.selective_scan.triton_steps import (
    LOG2E,
    column,
    load_map,
    load_state,
    next_state,
    rates,
    read_tile,
    sigmoid,
    softplus,
    starts_document,
    step_sizes,
    store_state,
    store_tile,
    with_column,
)

# Steps between the states that the backward pass starts from. Triton 3.4 multiplies matrices of 16 columns or more; the
# registers suit 8.
BLOCK = 8 if gpu.triton_version() >= (3, 5) else 16
_FEW = 8  # steps up to which one kernel with all channels side by side does it all
_SLOTS = 512  # programs of one warp that a large GPU runs at full speed: four on each of some 130 multiprocessors


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
    """Triton path for :func:`hymba.ops.selective_scan.selective_scan`, same signature.

    Takes what :func:`hymba.ops.gpu.why_unfit` has nothing against and leaves the rest to the torch path.

    Raises:
        HymbaError: the shapes do not fit together.
    """
    x = Inputs(u, dt, A_log, B, C, D, dt_bias, gate, initial_state, lengths, document_offsets)
    unfit = bool(gpu.why_unfit(u)) or any(v is not None and v.dtype not in gpu.DTYPES for v in x[:9])
    if not unfit:
        x.check_shapes()
    if unfit or not u.numel() or x.are_long():
        rest = {"lengths": lengths, "document_offsets": document_offsets, "final_state": final_state}
        return cpu.selective_scan(
            u, dt, A_log, B, C, D, dt_bias=dt_bias, gate=gate, initial_state=initial_state, **rest
        )
    if torch.is_grad_enabled() and final_state is None:
        return _Scan.apply(*x)
    y, final, _ = _forward(x, final_state)
    return y, final


class Tiles(NamedTuple):
    """How a scan is shared out among programs."""

    channels: int  # of a program that walks forward, or a gradient alone
    steps: int  # that it takes at a time
    back: int  # channels of a program that finds gradients, `BLOCK` steps at a time
    length: int  # steps of a segment, a multiple of `BLOCK`, and of 16 for vector loads


class Inputs(NamedTuple):
    """What the scan is given."""

    u: Tensor
    dt: Tensor
    A_log: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt_bias: Tensor
    gate: Tensor | None
    initial_state: Tensor | None
    lengths: Tensor | None
    document_offsets: Tensor | None

    def check_shapes(self) -> None:
        """Raise HymbaError unless all fits together on one device."""
        size, states = self.u.shape, self.A_log.shape[-1]
        (rows, steps, width), maps = size, (*size[:2], states)
        per_step, per_channel = (size, size, (width, states), maps, maps), ((width,), (width,), size)
        wanted = (*per_step, *per_channel, (rows, width, states), (rows,), (rows, steps))
        for name, x, shape in zip(self._fields, self, wanted, strict=True):
            if x is not None and (x.shape != shape or x.device != self.u.device):
                raise HymbaError(
                    f"selective_scan: {name} is {tuple(x.shape)} on {x.device}, not {tuple(shape)} on {self.u.device}"
                )

    def are_long(self) -> bool:
        """Return whether a row reaches beyond what the kernels count in 32 bits: 200 thousand steps or more."""
        return any(v is not None and (v.shape[1] - 1) * v.stride(1) >= 2**31 for v in (self.u, self.dt, self.gate))

    def prepared(self, wide: bool) -> Inputs:
        """Return the inputs as kernels read them: last dimensions dense, B and C dense, and if `wide` in float32, for a
        scan that reads them once for every few channels."""
        u, dt = (x if x.stride(2) == 1 else x.contiguous() for x in (self.u, self.dt))
        gate = self.gate if self.gate is None or self.gate.stride(2) == 1 else self.gate.contiguous()
        B, C = (x.float().contiguous() if wide else x.contiguous() for x in (self.B, self.C))
        A_log, D, bias = (x.contiguous() for x in (self.A_log, self.D, self.dt_bias))
        return Inputs(u, dt, A_log, B, C, D, bias, gate, *self[8:])


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        y, final, kept = _forward(Inputs(*inputs), keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(*inputs, kept)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, kept = ctx.saved_tensors
        x = Inputs(*inputs)
        found = triton_backward.gradients(x.prepared(wide=True), kept, grad_y, grad_final, tiles(*x.u.shape), BLOCK)
        own = (v if v is None else v.dtype for v in x[:9])
        return *(v if v is None else v.to(dtype) for v, dtype in zip(found, own, strict=True)), None, None


def _forward(x: Inputs, final_state: Tensor | None = None, keep: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y, the final state, and the states (B, T / BLOCK, N, E) that enter each block if they are to be kept."""
    (rows, steps, width), states = x.u.shape, x.A_log.shape[1]
    y, final = torch.empty(x.u.shape, dtype=x.u.dtype, device=x.u.device), final_state
    if final is None or final.dtype != torch.float32:
        final = torch.empty(rows, width, states, dtype=torch.float32, device=x.u.device)
    kept = None
    if steps <= _FEW and not keep:
        _launch_few(x.prepared(wide=False), y, final)
    else:
        kept = _launch_scan(x.prepared(wide=True), y, final, keep)
    return y, final if final_state is None or final is final_state else final_state.copy_(final), kept


def tiles(rows: int, steps: int, width: int) -> Tiles:
    """Choose by the sizes.

    Two channels to a thread, so that what is read of B and C serves twice; tiles that leave room for three warps on a
    scheduler. Segments cost a second walk: they pay where less than half the GPU would be busy, and there are then
    as many as make four programs for each slot.
    """
    channels = 64 if width > 32 else 32
    programs = rows * -(-width // channels) * (channels // 32)
    segments = max(1, 4 * _SLOTS // programs) if 2 * programs <= _SLOTS else 1
    return Tiles(channels, 4, 32, max(64, -(-steps // (16 * segments)) * 16))


def _launch_few(x: Inputs, y: Tensor, final: Tensor) -> None:
    (rows, steps, width), states = x.u.shape, x.A_log.shape[1]
    known = triton.next_power_of_2(states)
    channels = max(1, 256 // known)  # two loads of four states to a lane
    strides = (*state_strides(x.initial_state), *state_strides(final))
    _scan_few[-(-width // channels), rows](
        *(x.u, x.dt, x.gate, x.B, x.C, x.A_log, x.D, x.dt_bias, x.initial_state, x.lengths, x.document_offsets),
        *(y, final, *step_strides(x.u), *step_strides(x.dt), *step_strides(x.gate)),
        *(*strides, steps, width),
        states=states,
        known=known,
        channels=channels,
        has_lengths=x.lengths is not None,
        has_documents=x.document_offsets is not None,
        has_gate=x.gate is not None,
        has_initial=x.initial_state is not None,
        num_warps=1,
    )


def _launch_scan(x: Inputs, y: Tensor, final: Tensor, keep: bool) -> Tensor | None:
    (rows, steps, width), states = x.u.shape, x.A_log.shape[1]
    cut = tiles(rows, steps, width)
    segments = -(-steps // cut.length)
    constants: dict[str, Any] = {
        "states": states,
        "known": triton.next_power_of_2(states),
        "channels": cut.channels,
        "tile": cut.steps,
        "has_lengths": x.lengths is not None,
        "has_documents": x.document_offsets is not None,
        "has_initial": x.initial_state is not None,
        "num_warps": 1,
    }
    grid = (-(-width // cut.channels), segments, rows)
    initial = None  # a copy, for channels to lie side by side, and `final` may be written over what it was
    if x.initial_state is not None:
        initial = x.initial_state.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    start = initial
    if segments > 1:
        start = _segment_starts(x, initial, grid, cut.length, constants)
    kept = None
    if keep:
        kept = torch.empty(rows, -(-steps // BLOCK), states, width, dtype=torch.float32, device=y.device)
    _scan[grid](
        *(x.u, x.dt, x.gate, x.B, x.C, x.A_log, x.D, x.dt_bias, start, initial, x.lengths),
        *(x.document_offsets, y, final, kept, *step_strides(x.u), *step_strides(x.dt), *step_strides(x.gate)),
        *(*state_strides(final), steps, width, cut.length, 1),
        **constants,
        block=BLOCK,
        has_gate=x.gate is not None,
        has_start=start is not None,
        keep=keep,
    )
    return kept


def _segment_starts(
    x: Inputs, initial: Tensor | None, grid: tuple[int, ...], length: int, constants: dict[str, Any]
) -> Tensor:
    """Return the states that enter the segments, (B, S, N, E)."""
    _, steps, width = x.u.shape
    ends, sums = segment_buffers(grid[2], grid[1], x.A_log.shape[1], width, x.u.device)
    _scan_locally[grid](
        *(x.u, x.dt, x.B, x.A_log, x.dt_bias, initial, x.lengths, x.document_offsets, ends, sums),
        *(*step_strides(x.u), *step_strides(x.dt), steps, width, length, 1),
        **constants,
    )
    return combine(ends, sums, x.A_log, x.initial_state, reverse=False)


@triton.jit(do_not_specialize=["one", "final_n"])  # which would tell of contiguity
def _scan(
    u,
    dt,
    gate,
    B,
    C,
    A_log,
    D,
    dt_bias,
    start,
    initial,
    lengths,
    offsets,
    y,
    final,
    kept,
    u_row,
    u_step,
    dt_row,
    dt_step,
    gate_row,
    gate_step,
    final_row,
    final_e,
    final_n,
    steps,
    width,
    length,
    one,
    states: tl.constexpr,
    known: tl.constexpr,
    channels: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
    has_lengths: tl.constexpr,
    has_documents: tl.constexpr,
    has_gate: tl.constexpr,
    has_start: tl.constexpr,
    has_initial: tl.constexpr,
    keep: tl.constexpr,
):
    """Walk one segment from its true start and read it out; the last one leaves the final state.

    B and C are (B, T, N), start (B, S, N, E), initial (B, N, E), kept (B, T / block, N, E); final is (B, E, N).
    """
    segment, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    e, n, r = tl.program_id(0) * channels + tl.arange(0, channels), tl.arange(0, known), tl.arange(0, tile)
    inside, e = e < width, tl.minimum(e, width - 1)  # channels beyond the last do as it does, and are not written
    held = inside[:, None] & (n < states)[None, :]
    A = rates(A_log, e, n, one, states)
    bias, direct = tl.load(dt_bias + e * one).to(tl.float32), tl.load(D + e * one).to(tl.float32)
    state = load_state(start, (row * tl.num_programs(1) + segment) * states, e, n, width, one, states, has_start)
    limit = tl.load(lengths + row) if has_lengths else steps
    last = tl.minimum((segment + 1) * length, steps)
    first = segment * length
    while first < last:
        if keep and first % block == 0:
            store_state(kept, (row * tl.cdiv(steps, block) + first // block) * states, state, e, n, width, held, one)
        t = first + r
        at = tl.minimum(t, steps - 1)
        valid, written = (t < limit) & (t < last), inside[:, None] & (t < last)[None, :]
        u_t = read_tile(u + row * u_row, e, at, u_step, one).to(tl.float32)
        raw = read_tile(dt + row * dt_row, e, at, dt_step, one)
        if has_gate:
            gate_t = read_tile(gate + row * gate_row, e, at, gate_step, one).to(tl.float32)
        delta = step_sizes(raw, bias, valid)
        inner, out = delta * u_t, direct[:, None] * u_t
        for i in tl.static_range(tile):
            if has_documents:  # noqa: SIM102 (known when compiled)
                if starts_document(offsets, row, first + i, steps, limit, last):
                    state = load_state(initial, row * states, e, n, width, one, states, has_initial)
            maps = (row * steps + tl.minimum(first + i, steps - 1)) * states + n
            B_t, C_t = load_map(B + maps, n, states), load_map(C + maps, n, states)
            state = next_state(state, column(delta, i, tile), column(inner, i, tile), A, B_t)
            out = with_column(out, i, column(out, i, tile) + tl.sum(state * C_t[None, :], 1), tile)
        if has_gate:
            out = out * (gate_t * sigmoid(gate_t))
        store_tile(y + row * steps * width, out, e, t, width, written, one)
        first += tile
    place = row * final_row + e[:, None] * final_e + n[None, :] * final_n
    tl.store(final + place, state, mask=held & (last == steps))


@triton.jit(do_not_specialize=["one"])
def _scan_locally(
    u,
    dt,
    B,
    A_log,
    dt_bias,
    initial,
    lengths,
    offsets,
    ends,
    sums,
    u_row,
    u_step,
    dt_row,
    dt_step,
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
    has_initial: tl.constexpr,
):
    """Walk one segment from zero; leave its state and its sum of step sizes, −1 if a document started in it.

    B is (B, T, N), initial (B, N, E).
    """
    segment, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    e, n, r = tl.program_id(0) * channels + tl.arange(0, channels), tl.arange(0, known), tl.arange(0, tile)
    inside, e = e < width, tl.minimum(e, width - 1)
    held = inside[:, None] & (n < states)[None, :]
    A, bias = rates(A_log, e, n, one, states), tl.load(dt_bias + e * one).to(tl.float32)
    state, total, cut = tl.zeros((channels, known), tl.float32), tl.zeros((channels,), tl.float32), 0
    limit = tl.load(lengths + row) if has_lengths else steps
    last = tl.minimum((segment + 1) * length, steps)
    first = segment * length
    while first < last:
        t = first + r
        at = tl.minimum(t, steps - 1)
        u_t = read_tile(u + row * u_row, e, at, u_step, one).to(tl.float32)
        raw = read_tile(dt + row * dt_row, e, at, dt_step, one)
        delta = step_sizes(raw, bias, (t < limit) & (t < last))
        inner = delta * u_t
        total += tl.sum(delta, 1)
        for i in tl.static_range(tile):
            if has_documents:  # noqa: SIM102 (known when compiled)
                if starts_document(offsets, row, first + i, steps, limit, last):
                    cut = 1
                    state = load_state(initial, row * states, e, n, width, one, states, has_initial)
            B_t = load_map(B + (row * steps + tl.minimum(first + i, steps - 1)) * states + n, n, states)
            state = next_state(state, column(delta, i, tile), column(inner, i, tile), A, B_t)
        first += tile
    place = row * tl.num_programs(1) + segment
    tl.store(sums + place * width + e * one, tl.where(cut > 0, -1.0, total), mask=inside)
    store_state(ends, place * states, state, e, n, width, held, one)


@triton.jit
def _scan_few(
    u,
    dt,
    gate,
    B,
    C,
    A_log,
    D,
    dt_bias,
    initial,
    lengths,
    offsets,
    y,
    final,
    u_row,
    u_step,
    dt_row,
    dt_step,
    gate_row,
    gate_step,
    initial_row,
    initial_e,
    initial_n,
    final_row,
    final_e,
    final_n,
    steps,
    width,
    states: tl.constexpr,
    known: tl.constexpr,
    channels: tl.constexpr,
    has_lengths: tl.constexpr,
    has_documents: tl.constexpr,
    has_gate: tl.constexpr,
    has_initial: tl.constexpr,
):
    """All steps of a row, few as they are: bound by the states, which are read as they lie, states over the lanes."""
    row, e, n = tl.program_id(1).to(tl.int64), tl.program_id(0) * channels + tl.arange(0, channels), tl.arange(0, known)
    inside, within = e < width, n < states
    held = inside[:, None] & within[None, :]
    begin = tl.zeros((channels, known), tl.float32)
    if has_initial:
        place = row * initial_row + e[:, None] * initial_e + n[None, :] * initial_n
        begin = tl.load(initial + place, mask=held, other=0.0)
    A = tl.load(A_log + e[:, None] * states + n[None, :], mask=held, other=0.0).to(tl.float32)
    A = -tl.exp2(A * LOG2E) * LOG2E
    bias = tl.load(dt_bias + e, mask=inside, other=0.0).to(tl.float32)
    direct = tl.load(D + e, mask=inside, other=0.0).to(tl.float32)
    limit = tl.load(lengths + row) if has_lengths else steps
    state, t = begin, 0
    while t < steps:
        u_t = tl.load(u + row * u_row + t * u_step + e, mask=inside, other=0.0).to(tl.float32)
        raw = tl.load(dt + row * dt_row + t * dt_step + e, mask=inside, other=0.0).to(tl.float32)
        maps = (row * steps + t) * states + n
        B_t = tl.load(B + maps, mask=within, other=0.0).to(tl.float32)
        C_t = tl.load(C + maps, mask=within, other=0.0).to(tl.float32)
        if has_documents:
            restart = (tl.load(offsets + row * steps + t) == 0) & (t < limit)
            state = tl.where(restart, begin, state)
        delta = tl.where(t < limit, softplus(raw + bias), 0.0)
        state = tl.exp2(delta[:, None] * A) * state + (delta * u_t)[:, None] * B_t[None, :]
        out = tl.sum(state * C_t[None, :], 1) + direct * u_t
        if has_gate:
            gate_t = tl.load(gate + row * gate_row + t * gate_step + e, mask=inside, other=0.0).to(tl.float32)
            out = out * (gate_t * sigmoid(gate_t))
        tl.store(y + (row * steps + t) * width + e, out.to(y.dtype.element_ty), mask=inside)
        t += 1
    place = row * final_row + e[:, None] * final_e + n[None, :] * final_n
    tl.store(final + place, state, mask=held)
