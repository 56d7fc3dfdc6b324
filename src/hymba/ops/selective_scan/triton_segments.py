"""Segments of time put together: what enters each, from what each leaves (arXiv 2312.00752, section 3.3.2)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops.selective_scan.triton_steps import LOG2E, column, spread, with_column


def step_strides(x: Tensor | None) -> tuple[int, int]:
    """Return the strides of rows, and of steps or segments."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def state_strides(x: Tensor | None) -> tuple[int, int, int]:
    """Return the strides of rows, channels and states of a tensor (B, E, N)."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def segment_buffers(rows: int, segments: int, states: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return memory for what segments leave, (B, S, N, E), and for their sums of step sizes, (B, S, E)."""
    ends = torch.empty(rows, segments, states, width, dtype=torch.float32, device=device)
    return ends, torch.empty(rows, segments, width, dtype=torch.float32, device=device)


def combine(ends: Tensor, sums: Tensor, A_log: Tensor, start: Tensor | None, reverse: bool) -> Tensor:
    """Return what enters each segment, (B, S, N, E), first of all `start` (B, E, N) or zero.

    `ends` is what each leaves when nothing enters it and `sums` its sum of step sizes, negative where nothing of what
    enters leaves. With `reverse` the last segment comes first.
    """
    rows, segments, states, width = ends.shape
    entering, channels = torch.empty_like(ends), 32
    _combine[-(-width // channels), states, rows](
        *(ends, sums, A_log, start, entering, *state_strides(start), segments, width, states, 1),
        has_start=start is not None,
        reverse=reverse,
        channels=channels,
        at_once=8,
        num_warps=1,
    )
    return entering


@triton.jit(do_not_specialize=["one"])
def _combine(
    ends,
    sums,
    A_log,
    start,
    entering,
    start_row,
    start_e,
    start_n,
    segments,
    width,
    states,
    one,
    has_start: tl.constexpr,
    reverse: tl.constexpr,
    channels: tl.constexpr,
    at_once: tl.constexpr,
):
    """One state of some channels; some segments are read at once, for there is nothing else to wait for."""
    n, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    e = tl.program_id(0) * channels + tl.arange(0, channels)
    inside, e = e < width, tl.minimum(e, width - 1)
    rate = -tl.exp2(tl.load(A_log + e * states + n).to(tl.float32) * LOG2E) * LOG2E
    state = tl.zeros((channels,), tl.float32)
    if has_start:
        state = tl.load(start + row * start_row + e * start_e + n * start_n).to(tl.float32)
    first = 0
    while first < segments:
        k = first + tl.arange(0, at_once)
        at = row * segments + tl.where(k < segments, segments - 1 - k if reverse else k, 0)
        total = tl.load(sums + at[None, :] * width + spread(e, one)[:, None])
        place = (at[None, :] * states + n) * width + spread(e, one)[:, None]
        left = tl.load(ends + place)
        decay = tl.where(total < 0, 0.0, tl.exp2(total * rate[:, None]))
        entered = tl.zeros((channels, at_once), tl.float32)
        for i in tl.static_range(at_once):
            entered = with_column(entered, i, state, at_once)
            state = column(decay, i, at_once) * state + column(left, i, at_once)
        tl.store(entering + place, entered, mask=inside[:, None] & (k < segments)[None, :])
        first += at_once
