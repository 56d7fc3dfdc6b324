"""Device functions that the scan's kernels share.

Tiles are (channels, steps) or (channels, states). The compiler lays a tile out with channels over the lanes and the
other axis within each thread, so that states need no exchange between lanes and taking a column costs no instruction,
where it knows of the places in memory what :func:`spread` tells of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def spread(e, one):
    """Return the offsets of channels e for the compiler to know that they are neighbours, else it might lay the other
    axis over the lanes, and not how they are aligned (`one` hides it), else a lane would take several channels."""
    return tl.max_contiguous(e * one, e.shape[0])


@triton.jit
def column(tile, i, size: tl.constexpr):
    """Return column i of a float32 tile (…, size). An integer sum, of which nothing is left in the machine code."""
    bits = tile.to(tl.int32, bitcast=True)
    chosen = tl.where(tl.arange(0, size)[None, :] == i, bits, 0)
    return tl.sum(chosen, 1).to(tl.float32, bitcast=True)


@triton.jit
def with_column(tile, i, x, size: tl.constexpr):
    """Return the tile with column i replaced."""
    return tl.where(tl.arange(0, size)[None, :] == i, x[:, None], tile)


@triton.jit
def reciprocal(x):
    """Return 1 / x for x ≥ 1, infinity included, in two instructions; to 3e-7."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(−x))."""
    return reciprocal(1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)), also where it is tiny: log1p(e) = 2 artanh(e / (2 + e)), an odd polynomial to 2e-8."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    z = e * reciprocal(2.0 + e)
    w = z * z
    tail = w * (0.6666664 + w * (0.40007671 + w * (0.28233955 + w * 0.26867553)))
    return tl.maximum(x, 0.0) + (2.0 * z + z * tail)


@triton.jit
def rates(A_log, e, n, one, states: tl.constexpr):
    """Return A log2(e) of channels e as a tile (channels, states)."""
    n = tl.minimum(n, states - 1)  # what is beyond is worked out and not used
    return -tl.exp2(tl.load(A_log + e[:, None] * states + n[None, :] * one).to(tl.float32) * LOG2E) * LOG2E


@triton.jit
def step_sizes(dt, bias, valid):
    """Return the step sizes (channels, steps) of raw ones; zero at steps that are not valid."""
    return tl.where(valid[None, :], softplus(dt.to(tl.float32) + bias[:, None]), 0.0)


@triton.jit
def next_state(state, delta, inner, A, B_t):
    """Return the state after a step of sizes delta (channels,) that B_t (states,) times inner enters."""
    return tl.exp2(delta[:, None] * A) * state + inner[:, None] * B_t[None, :]


@triton.jit
def load_map(places, n, states: tl.constexpr):
    """Return a step's B or C (known,) in float32, zero beyond the states that there are."""
    return tl.load(places) if states == n.shape[0] else tl.load(places, mask=n < states, other=0.0)


@triton.jit
def starts_document(offsets, row, t, steps, limit, last):
    """Return whether step t starts a document; steps past the length or the last one do not."""
    return (tl.load(offsets + row * steps + tl.minimum(t, steps - 1)) == 0) & (t < limit) & (t < last)


@triton.jit
def read_tile(row, e, t, stride, one):
    """Return (channels e, steps t) of a row, all of which there are."""
    return tl.load(row + (t[None, :] * stride + spread(e, one)[:, None]))


@triton.jit
def load_tile(row, e, t, stride, mask, one):
    """Return (channels e, steps t) of a row in float32."""
    return tl.load(row + (t.to(tl.int64)[None, :] * stride + spread(e, one)[:, None]), mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def store_tile(row, x, e, t, stride, mask, one):
    """Write (channels e, steps t) of a row."""
    tl.store(row + (t.to(tl.int64)[None, :] * stride + spread(e, one)[:, None]), x.to(row.dtype.element_ty), mask=mask)


@triton.jit
def load_state(lines, first, e, n, width, one, states: tl.constexpr, exists: tl.constexpr):
    """Return (channels e, lines first + n) of a matrix `width` wide in float32, zero if there is none; beyond the last
    state, that one."""
    state = tl.zeros((e.shape[0], n.shape[0]), tl.float32)
    if exists:
        places = (first + tl.minimum(n, states - 1))[None, :] * width + spread(e, one)[:, None]
        state = tl.load(lines + places).to(tl.float32)
    return state


@triton.jit
def store_state(states, first, state, e, n, width, held, one):
    """Write (channels e, lines first + n) of a matrix `width` wide."""
    tl.store(states + ((first + n)[None, :] * width + spread(e, one)[:, None]), state, mask=held)
