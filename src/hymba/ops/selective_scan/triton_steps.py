"""Device functions that the scan's kernels share.

Tiles are (channels, steps) or (channels, states). Where a pointer's contiguity is hidden from the compiler (its last
stride comes as a number that it does not know to be 1) it lays a tile out with channels over the lanes and the other
axis within each thread, so that states need no exchange between lanes and taking a column costs no instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


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
def load_map(places, n, states: tl.constexpr):
    """Return a step's B or C (known,) in float32, zero beyond the states that there are."""
    return tl.load(places) if states == n.shape[0] else tl.load(places, mask=n < states, other=0.0)


@triton.jit
def load_tile(row, e, t, stride, mask, one):
    """Return (channels e, steps t) of a row in float32."""
    return tl.load(row + (t.to(tl.int64)[None, :] * stride + e[:, None] * one), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(row, x, e, t, stride, mask, one):
    """Write (channels e, steps t) of a row."""
    tl.store(row + (t.to(tl.int64)[None, :] * stride + e[:, None] * one), x.to(row.dtype.element_ty), mask=mask)


@triton.jit
def load_state(states, places, held, exists: tl.constexpr):
    """Return a tile (channels, states) in float32, zero where nothing is held or there is no such tensor."""
    state = tl.zeros(held.shape, tl.float32)
    if exists:
        state = tl.load(states + places, mask=held, other=0.0).to(tl.float32)
    return state
