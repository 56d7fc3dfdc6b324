"""The convolution in Triton: one launch forward, one backward; programs of a row's first steps leave its state.

A program walks some steps of a row over a block of channels and keeps the last inputs in registers, so that each input
is read once. Sums are in float32 and rounded to the dtype of `u` before SiLU.
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
from hymba.ops.causal_conv1d import cpu
from hymba.ops.gated.triton import silu

_TAPS = (2, 3, 4)


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
    """Triton path for :func:`hymba.ops.causal_conv1d.causal_conv1d`, same signature.

    Takes 2, 3 or 4 taps and what :func:`hymba.ops.gpu.why_unfit` has nothing against; leaves the rest to the torch
    path.

    Raises:
        HymbaError: the shapes do not fit together.
    """
    x = _Inputs(u, weight, bias, initial_state, lengths, document_offsets)
    if gpu.why_unfit(u) or not x.have_kernels() or (final_state is not None and final_state.dtype not in gpu.DTYPES):
        rest = {"lengths": lengths, "document_offsets": document_offsets, "final_state": final_state}
        return cpu.causal_conv1d(u, weight, bias, initial_state=initial_state, **rest)
    x = x.prepared()
    if torch.is_grad_enabled() and final_state is None:
        return _Conv.apply(*x)
    if final_state is None:
        final_state = u.new_empty(u.shape[0], u.shape[2], weight.shape[1] - 1)
    elif initial_state is not None and document_offsets is not None:  # which all programs of a row read
        x = x._replace(initial=x.initial.clone())  # type: ignore[union-attr]
    return _forward(x, final_state), final_state


class _Inputs(NamedTuple):
    """What the convolution is given."""

    u: Tensor
    weight: Tensor
    bias: Tensor
    initial: Tensor | None
    lengths: Tensor | None
    offsets: Tensor | None

    def have_kernels(self) -> bool:
        """Return whether the kernels take these dtypes and so many taps."""
        known = all(x is None or x.dtype in gpu.DTYPES for x in self[:4])
        return known and self.weight.shape[-1] in _TAPS and self.u.numel() > 0

    def prepared(self) -> _Inputs:
        """Return the inputs as the kernels read them.

        Raises:
            HymbaError: the shapes do not fit together.
        """
        (rows, steps, width), taps = self.u.shape, self.weight.shape[-1]
        size = (rows, steps, width)
        wanted = (size, (width, taps), (width,), (rows, width, taps - 1), (rows,), (rows, steps))
        for name, x, shape in zip(self._fields, self, wanted, strict=True):
            if x is not None and (x.shape != shape or x.device != self.u.device):
                raise HymbaError(f"causal_conv1d: {name} is {tuple(x.shape)} on {x.device}, not {shape}")
        u = self.u if self.u.stride(2) == 1 else self.u.contiguous()
        return _Inputs(u, self.weight.contiguous(), self.bias.contiguous(), self.initial, *map(_dense, self[4:]))


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


class _Tiles(NamedTuple):
    """How the work is shared out: steps and channels of a program, and its warps."""

    steps: int
    channels: int
    warps: int


def _tiles(rows: int, steps: int, backward: bool) -> _Tiles:
    """Return the tiles for (B, T): many short ones fill the GPU, long ones read few inputs twice and sum more.

    A thread has 4 channels, 8 bytes in 16 bits: 8 would leave too few registers for enough warps to hide the memory's
    latency. In a call of few steps it has one, for speed.
    """
    if steps <= 8:
        return _Tiles(8, 128, 4)
    many = rows * steps > 4096
    return _Tiles((128 if backward else 64) if many else 16, 128, 1)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x = _Inputs(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        final = x.u.new_empty(x.u.shape[0], x.u.shape[2], x.weight.shape[1] - 1)
        return _forward(x, final), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        x = _Inputs(*ctx.saved_tensors)
        if grad_out is None:
            grad_out = x.u.new_zeros(1, 1, 1).expand_as(x.u)
        grad_out = grad_out if grad_out.stride(2) == 1 else grad_out.contiguous()
        grad_u, grad_initial, sums = _backward(x, grad_out, _dense(grad_final))
        sums = sums.sum(0)
        if grad_initial is not None and x.initial is not None:
            grad_initial = grad_initial.sum(1).transpose(1, 2).to(x.initial.dtype)
        return grad_u, sums[:-1].t().to(x.weight.dtype), sums[-1].to(x.bias.dtype), grad_initial, None, None


def _forward(x: _Inputs, final: Tensor) -> Tensor:
    """Return the convolution's SiLU, and write the final state."""
    rows, steps, width = x.u.shape
    tiles, out = _tiles(rows, steps, False), torch.empty_like(x.u, memory_format=torch.contiguous_format)
    grid = (triton.cdiv(width, tiles.channels), triton.cdiv(steps, tiles.steps), rows)
    _forward_kernel[_flat(grid)](
        *(*x, out, final, steps, width, grid[1]),
        *(*x.u.stride()[:2], *_strides(x.initial), *_strides(final)),
        TAPS=x.weight.shape[1],
        STEPS=tiles.steps,
        CHANNELS=tiles.channels,
        num_warps=tiles.warps,
    )
    return out


def _backward(x: _Inputs, grad_out: Tensor, grad_final: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradient of `u`, and by programs what is to be summed to those of the initial state (B, parts,
    taps − 1, E), and of the weight and the bias (parts, taps + 1, E)."""
    rows, steps, width = x.u.shape
    taps, tiles = x.weight.shape[1], _tiles(rows, steps, True)
    grid = (triton.cdiv(width, tiles.channels), triton.cdiv(steps, tiles.steps), rows)
    grad_u = torch.empty_like(x.u, memory_format=torch.contiguous_format)
    parts = 1 if x.offsets is None else grid[1]
    state = rows, parts, taps - 1, width
    grad_initial = None if x.initial is None else x.u.new_empty(state, dtype=torch.float32)
    sums = x.u.new_empty(rows * grid[1], taps + 1, width, dtype=torch.float32)
    _backward_kernel[_flat(grid)](
        *(*x, grad_out, grad_final, grad_u, grad_initial, sums, steps, width, grid[1], parts),
        *(*x.u.stride()[:2], *_strides(x.initial), *grad_out.stride()[:2]),
        TAPS=taps,
        STEPS=tiles.steps,
        CHANNELS=tiles.channels,
        num_warps=tiles.warps,
    )
    return grad_u, grad_initial, sums


def _strides(state: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if state is None else state.stride()


def _flat(grid: tuple[int, int, int]) -> tuple[int]:
    """Return the grid in one dimension, which alone may be long; blocks of channels lie next to each other."""
    return (grid[0] * grid[1] * grid[2],)


@triton.jit
def _place(width, chunks, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return a program's row (int64), chunk, first step, channels, and which of these there are."""
    blocks = tl.cdiv(width, CHANNELS)
    n = tl.program_id(0)
    channels = (n % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    chunk = (n // blocks) % chunks
    return (n // blocks // chunks).to(tl.int64), chunk, chunk * STEPS, channels, channels < width


@triton.jit
def _start(
    initial, row, channels, mask, row_apart, channel_apart, tap_apart, back: tl.constexpr, TAPS: tl.constexpr, like
):
    """Return the inputs `back` steps before the first in float32, rounded as those of `like` are."""
    x = tl.zeros(channels.shape, tl.float32)
    if initial is not None and back < TAPS:
        place = row * row_apart + channels.to(tl.int64) * channel_apart + (TAPS - 1 - back) * tap_apart
        x = tl.load(initial + place, mask=mask, other=0).to(like.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _starts(initial, row, channels, mask, row_apart, channel_apart, tap_apart, TAPS: tl.constexpr, like):
    """Return the inputs 1, 2 and 3 steps before the first, as :func:`_start` does."""
    s1 = _start(initial, row, channels, mask, row_apart, channel_apart, tap_apart, 1, TAPS, like)
    s2 = _start(initial, row, channels, mask, row_apart, channel_apart, tap_apart, 2, TAPS, like)
    s3 = _start(initial, row, channels, mask, row_apart, channel_apart, tap_apart, 3, TAPS, like)
    return s1, s2, s3


@triton.jit
def _taps(weight, bias, channels, mask, TAPS: tl.constexpr):
    """Return bias and weights of the inputs 0, 1, 2 and 3 steps ago in float32; a channel's weights lie together."""
    b = tl.load(bias + channels, mask=mask, other=0).to(tl.float32)
    taps = tl.arange(0, 4) - (4 - TAPS)
    mask = mask[:, None] & (taps >= 0)[None, :]
    w = tl.load(weight + channels[:, None] * TAPS + taps[None, :], mask=mask, other=0).to(tl.float32)
    even, odd = tl.split(tl.reshape(w, (channels.shape[0], 2, 2)))
    w3, w1 = tl.split(even)
    w2, w0 = tl.split(odd)
    return b, w0, w1, w2, w3


@triton.jit
def _before(u, first, s1, s2, s3, u_step, mask, TAPS: tl.constexpr):
    """Return the inputs 1, 2 and 3 steps before step `first` of a row in float32, the initial ones before step 0."""
    mask &= first > 0
    at = u + first.to(tl.int64) * u_step
    x1 = tl.where(first > 0, tl.load(at - u_step, mask=mask, other=0).to(tl.float32), s1)
    x2, x3 = s2, s3
    if TAPS > 2:
        x2 = tl.where(first > 0, tl.load(at - 2 * u_step, mask=mask, other=0).to(tl.float32), s2)
    if TAPS > 3:
        x3 = tl.where(first > 0, tl.load(at - 3 * u_step, mask=mask, other=0).to(tl.float32), s3)
    return x1, x2, x3


@triton.jit
def _four(x, t, end, apart, mask):
    """Return the inputs of steps t … t + 3 below `end`, all called for before any is used."""
    x0 = tl.load(x, mask=mask & (t < end), other=0)
    x1 = tl.load(x + apart, mask=mask & (t + 1 < end), other=0)
    x2 = tl.load(x + 2 * apart, mask=mask & (t + 2 < end), other=0)
    x3 = tl.load(x + 3 * apart, mask=mask & (t + 3 < end), other=0)
    return x0, x1, x2, x3


@triton.jit
def _offsets(offsets, t, end):
    """Return the offsets of steps t … t + 3 below `end`; beyond any tap where there are no documents."""
    o0, o1, o2, o3 = 4, 4, 4, 4
    if offsets is not None:
        o0 = tl.load(offsets, mask=t < end, other=4)
        o1 = tl.load(offsets + 1, mask=t + 1 < end, other=4)
        o2 = tl.load(offsets + 2, mask=t + 2 < end, other=4)
        o3 = tl.load(offsets + 3, mask=t + 3 < end, other=4)
    return o0, o1, o2, o3


@triton.jit
def _pick(i: tl.constexpr, x0, x1, x2, x3):
    """Return the i-th of four values."""
    if i == 0:
        x = x0
    elif i == 1:
        x = x1
    elif i == 2:
        x = x2
    else:
        x = x3
    return x


@triton.jit
def _restarted(x1, x2, x3, s1, s2, s3, offset, RESTARTS: tl.constexpr):
    """Return the inputs 1, 2 and 3 steps ago, of which those before a document's start are its initial ones."""
    if RESTARTS:
        x3 = tl.where(offset < 3, tl.where(offset < 2, tl.where(offset < 1, s3, s2), s1), x3)
        x2 = tl.where(offset < 2, tl.where(offset < 1, s2, s1), x2)
        x1 = tl.where(offset < 1, s1, x1)
    return x1, x2, x3


@triton.jit
def _sum(x0, x1, x2, x3, b, w0, w1, w2, w3, TAPS: tl.constexpr):
    """Return the convolution of one step."""
    total = b + x0 * w0 + x1 * w1
    if TAPS > 2:
        total += x2 * w2
    if TAPS > 3:
        total += x3 * w3
    return total


@triton.jit
def _length(lengths, row, steps):
    """Return how many steps of a row are valid."""
    length = row * 0 + steps
    if lengths is not None:
        length = tl.load(lengths + row).to(tl.int64)
    return length


@triton.jit
def _forward_kernel(
    u, weight, bias, initial, lengths, offsets, out, final, steps, width, chunks,
    u_row, u_step, i_row, i_channel, i_tap, f_row, f_channel, f_tap,
    TAPS: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row, chunk, first, channels, mask = _place(width, chunks, STEPS, CHANNELS)
    dtype = u.dtype.element_ty
    u += row * u_row + channels
    near = mask & ((chunk == 0) | (offsets is not None))  # who reads the initial state
    s1, s2, s3 = _starts(initial, row, channels, near, i_row, i_channel, i_tap, TAPS, u)
    b, w0, w1, w2, w3 = _taps(weight, bias, channels, mask, TAPS)
    p1, p2, p3 = _before(u, first, s1, s2, s3, u_step, mask, TAPS)
    end = tl.minimum(first + STEPS, steps)
    at, place = first.to(tl.int64) * u_step, row * steps + first
    for t in range(first, end, 4):
        u0, u1, u2, u3 = _four(u + at, t, end, u_step, mask)
        o0, o1, o2, o3 = _offsets(None if offsets is None else offsets + place, t, end)
        for i in tl.static_range(4):
            x0 = _pick(i, u0, u1, u2, u3).to(tl.float32)
            offset = _pick(i, o0, o1, o2, o3)
            x1, x2, x3 = _restarted(p1, p2, p3, s1, s2, s3, offset, offsets is not None)
            total = _sum(x0, x1, x2, x3, b, w0, w1, w2, w3, TAPS)
            made = silu(total.to(dtype).to(tl.float32)).to(dtype)
            tl.store(out + (place + i) * width + channels, made, mask=mask & (t + i < end))
            p3, p2, p1 = p2, p1, x0
        at += 4 * u_step
        place += 4
    if chunk == 0:
        length = _length(lengths, row, steps)
        tl.debug_barrier()  # the state before may be the state after
        for tap in tl.static_range(TAPS - 1):
            last = length + tap - (TAPS - 1)
            x = tl.load(u + last * u_step, mask=mask & (last >= 0), other=0).to(tl.float32)
            x = tl.where(last >= 0, x, tl.where(last == -1, s1, tl.where(last == -2, s2, s3)))
            to = row * f_row + channels.to(tl.int64) * f_channel + tap * f_tap
            tl.store(final + to, x.to(dtype).to(final.dtype.element_ty), mask=mask)


@triton.jit
def _none(CHANNELS: tl.constexpr):
    none = tl.zeros((CHANNELS,), tl.float32)
    return none, none, none, none


@triton.jit
def _back_from_sum(total, grad, is_own):
    """Return the gradient of a step's sum under that of its SiLU, and again, zero unless the step is the program's."""
    x = total.to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-x))
    d = grad.to(tl.float32) * sigmoid * (1 + x * (1 - sigmoid))
    return d, tl.where(is_own, d, 0.0)


@triton.jit
def _pass_back(d, w1, w2, w3, offset, a1, a2, a3, RESTARTS: tl.constexpr):
    """Add a step's share to the gradients of the inputs 1, 2 and 3 steps ago, those of its own document."""
    if RESTARTS:
        a1 += tl.where(offset < 1, 0.0, d * w1)
        a2 += tl.where(offset < 2, 0.0, d * w2)
        a3 += tl.where(offset < 3, 0.0, d * w3)
    else:
        a1 += d * w1
        a2 += d * w2
        a3 += d * w3
    return a1, a2, a3


@triton.jit
def _pass_to_start(d, w1, w2, w3, offsets, offset, s1, s2, s3):
    """Add a step's share to the gradients of the initial inputs that it read for those before its document."""
    if offsets is not None and offset < 3:  # few steps are
        s1 += d * tl.where(offset == 0, w1, tl.where(offset == 1, w2, w3))
        s2 += d * tl.where(offset == 0, w2, tl.where(offset == 1, w3, 0.0))
        s3 += d * tl.where(offset == 0, w3, 0.0)
    return s1, s2, s3


@triton.jit
def _leave(grad_initial, grad, position, s1, s2, s3):
    """Add the gradient of the input at a position to that of the initial ones if it is one of these."""
    if grad_initial is not None and position < 0:
        s1 += tl.where(position == -1, grad, 0.0)
        s2 += tl.where(position == -2, grad, 0.0)
        s3 += tl.where(position == -3, grad, 0.0)
    return s1, s2, s3


@triton.jit
def _taken(grad_final, position, length, row, width, channels, mask, TAPS: tl.constexpr):
    """Return what the final state's gradient (B, E, TAPS − 1) adds to that of the input at a position."""
    added = tl.zeros(channels.shape, tl.float32)
    if grad_final is not None:
        tap = position - length + (TAPS - 1)
        if (tap >= 0) & (tap < TAPS - 1):
            place = (row * width + channels) * (TAPS - 1) + tap
            added = tl.load(grad_final + place, mask=mask, other=0).to(tl.float32)
    return added


@triton.jit
def _backward_kernel(
    u, weight, bias, initial, lengths, offsets, grad, grad_final, grad_u, grad_initial, sums,
    steps, width, chunks, parts, u_row, u_step, i_row, i_channel, i_tap, g_row, g_step,
    TAPS: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Walk a chunk's steps and TAPS − 1 more: an input's gradient is whole when its last user has been seen."""
    row, chunk, first, channels, mask = _place(width, chunks, STEPS, CHANNELS)
    u, grad = u + row * u_row + channels, grad + row * g_row + channels
    near = mask & ((chunk == 0) | (offsets is not None))  # who reads the initial state
    s1, s2, s3 = _starts(initial, row, channels, near, i_row, i_channel, i_tap, TAPS, u)
    b, w0, w1, w2, w3 = _taps(weight, bias, channels, mask, TAPS)
    p1, p2, p3 = _before(u, first, s1, s2, s3, u_step, mask, TAPS)
    b_sum, a1, a2, a3 = _none(CHANNELS)  # the last: gradients so far of the inputs 1, 2 and 3 steps ago
    w0_sum, w1_sum, w2_sum, w3_sum = _none(CHANNELS)
    s1_sum, s2_sum, s3_sum = a1, a2, a3
    end, length = tl.minimum(first + STEPS, steps), _length(lengths, row, steps)
    at, g_at, place = first.to(tl.int64) * u_step, first.to(tl.int64) * g_step, row * steps + first
    for t in range(first, end + TAPS - 1, 4):
        u0, u1, u2, u3 = _four(u + at, t, steps, u_step, mask)
        g0, g1, g2, g3 = _four(grad + g_at, t, steps, g_step, mask)
        o0, o1, o2, o3 = _offsets(None if offsets is None else offsets + place, t, steps)
        for i in tl.static_range(4):
            x0 = _pick(i, u0, u1, u2, u3).to(tl.float32)
            offset = _pick(i, o0, o1, o2, o3)
            x1, x2, x3 = _restarted(p1, p2, p3, s1, s2, s3, offset, offsets is not None)
            total = _sum(x0, x1, x2, x3, b, w0, w1, w2, w3, TAPS).to(u.dtype.element_ty)
            d, own = _back_from_sum(total, _pick(i, g0, g1, g2, g3), t + i < end)
            b_sum += own
            w0_sum, w1_sum = w0_sum + own * x0, w1_sum + own * x1
            w2_sum, w3_sum = w2_sum + own * x2, w3_sum + own * x3
            s1_sum, s2_sum, s3_sum = _pass_to_start(own, w1, w2, w3, offsets, offset, s1_sum, s2_sum, s3_sum)
            a1, a2, a3 = _pass_back(d, w1, w2, w3, offset, a1, a2, a3, offsets is not None)
            done = t + i - (TAPS - 1)
            whole = _pick(5 - TAPS, a3, a3, a2, a1) + _taken(grad_final, done, length, row, width, channels, mask, TAPS)
            kept = mask & (done >= first) & (done < end)
            tl.store(grad_u + (place + i - (TAPS - 1)) * width + channels, whole.to(grad_u.dtype.element_ty), mask=kept)
            s1_sum, s2_sum, s3_sum = _leave(grad_initial, whole, done, s1_sum, s2_sum, s3_sum)
            a3, a2, a1 = a2, a1, d * w0
            p3, p2, p1 = p2, p1, x0
        at, g_at, place = at + 4 * u_step, g_at + 4 * g_step, place + 4
    to = sums + (row * chunks + chunk) * (TAPS + 1) * width + channels
    _store_back(to, w0_sum, w1_sum, w2_sum, w3_sum, width, mask, TAPS)
    tl.store(to + TAPS * width, b_sum, mask=mask)
    if grad_initial is not None:
        to = grad_initial + (row * parts + chunk) * (TAPS - 1) * width + channels
        _store_back(to, s1_sum, s2_sum, s3_sum, s3_sum, width, mask & (chunk < parts), TAPS - 1)


@triton.jit
def _store_back(to, x0, x1, x2, x3, width, mask, COUNT: tl.constexpr):
    """Store the first COUNT of four rows, the first last."""
    for i in tl.static_range(COUNT):
        tl.store(to + (COUNT - 1 - i) * width, _pick(i, x0, x1, x2, x3), mask=mask)
