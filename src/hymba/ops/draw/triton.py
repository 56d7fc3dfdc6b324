"""Drawing in Triton: one launch, a program a row, which finds each cut by bisection in place of a sort.

Cuts fall on bits of floats read as whole numbers, so bisection is exact: a comparison and a sum over the row, which
lies in the processor's cache, at most 32 times.

The noise of a token is −log E with E = −log(1 − v), so the largest sum of score and noise is the smallest E / weight.
Bounds of it in float32, from the first 32 bits of v, leave a token or two that can win; only they take float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops import gpu
from hymba.ops.draw import reference

_CHUNK = 8192  # logits looked at together, 8 a thread


def draw_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    indices: Tensor,
) -> Tensor:
    """Triton path for :func:`hymba.ops.draw.draw_tokens`, same signature.

    The likeliest token, cuts to `top_k`, the noise, −1 and −2 are those of the definition. Probabilities may differ
    from its in their last bits, so a token that meets `top_p` or `min_p` to rounding may be cut off or not; tokens of
    one probability, to float32, are cut by id.
    """
    if gpu.why_unfit(logits) or not logits.numel():
        return reference.draw_tokens(logits, temperature, top_k, top_p, min_p, seeds, indices)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    numbers = (x.to(torch.float64).contiguous() for x in (temperature, top_p, min_p))
    counts = (x.to(torch.int64).contiguous() for x in (top_k, seeds, indices))
    weights = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    tensors = logits, weights, *numbers, *counts, chosen
    chunk = min(max(triton.next_power_of_2(logits.shape[1]), 256), _CHUNK)
    options = {"num_warps": chunk // 256, "enable_fp_fusion": False}  # the noise is rounded as the definition rounds it
    _draw[(len(logits),)](*tensors, logits.shape[1], logits.stride(0), CHUNK=chunk, **options)
    return chosen


@triton.jit
def _split_mix(state, n):
    """Return output `n` of SplitMix64 started from `state`, uint64 both."""
    x = state + (n + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _first_bits(state, ids):
    """Return the first 32 bits of v of tokens, int64."""
    n = ids.to(tl.uint64)
    return ((_split_mix(state, n >> 1) >> ((n & 1) * 32)) & 0xFFFFFFFF).to(tl.int64)


@triton.jit
def _log(x):
    """Return the logarithm of a positive float64, as reference.py defines it."""
    bits = x.to(tl.int64, bitcast=True)
    k = (bits >> 52) - 1022
    m = ((bits & 0xFFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    low = m < 0.70703125
    m = tl.where(low, 2 * m, m)
    k = tl.where(low, k - 1, k)
    s = (m - 1) / (m + 1)
    z = s * s
    series = z * 0 + 1 / 19
    for i in tl.static_range(9):
        series = series * z + 1 / (17 - 2 * i)
    return k.to(tl.float64) * 0.6931471805599453 + 2 * s * series


@triton.jit
def _gumbel(state, token):
    """Return the noise of one token, float64."""
    rest = (_split_mix(state, token.to(tl.uint64) + 4294967296) >> 43).to(tl.int64)
    odd = (_first_bits(state, token) << 21) | rest | 1
    v = odd.to(tl.float64) * 1.1102230246251565e-16  # 2^-53
    return -_log(-_log(1 - v))


@triton.jit
def _exponential(bits):
    """Return −log(1 − v) in float32, to a relative 2^-12, of v = bits / 2^32."""
    v = bits.to(tl.float32) * 2.3283064365386963e-10
    rest = (4294967296 - bits).to(tl.float32) * 2.3283064365386963e-10
    small = v < 0.00390625
    return tl.where(small, v * (1 + v * 0.5), -tl.log(tl.where(small | (rest <= 0), 0.5, rest)))


@triton.jit
def _bound(weights, width, state, CHUNK: tl.constexpr):
    """Put a lower bound of E / weight in the place of each weight; return an upper bound of their minimum."""
    least = tl.full((CHUNK,), float("inf"), tl.float32)
    for start in range(0, width, CHUNK):
        ids, w = _chunk(weights, start, width, 0.0, CHUNK)
        bits, kept = _first_bits(state, ids), w > 0
        w = tl.where(kept, w, 1.0)
        above = (
            tl.where(bits < 4294967295, _exponential(bits + 1), 37.0) / w
        )  # v may be its largest, of which E is 36.8
        least = tl.minimum(least, tl.where(kept, above, float("inf")))
        tl.store(weights + ids, tl.where(kept, _exponential(bits) / w, float("inf")), mask=ids < width)
    tl.debug_barrier()
    return tl.min(least, axis=0)


@triton.jit
def _next(bounds, width, after, limit, CHUNK: tl.constexpr):
    """Return the first id after `after` whose bound is at most `limit`, or the width."""
    found = tl.full((CHUNK,), 0, tl.int32) + width
    for start in range(0, width, CHUNK):
        ids, bound = _chunk(bounds, start, width, float("inf"), CHUNK)
        found = tl.minimum(found, tl.where((bound <= limit) & (ids > after), ids, width))
    return tl.min(found, axis=0)


@triton.jit
def _noisiest(logits, weights, width, largest, heat, first, state, CHUNK: tl.constexpr):
    """Return the token with the largest sum of score and noise among those with a weight."""
    # Half as much at once: the bits of noise take twice the registers.
    limit = _bound(weights, width, state, CHUNK // 2) * 1.0009765625  # more than the errors of both bounds
    best = heat.to(tl.float64) * 0 - float("inf")
    token = first
    at = _next(weights, width, first * 0 - 1, limit, CHUNK)
    while at < width:
        x = tl.load(logits + at).to(tl.float32)
        depth = tl.where(x == largest, 0.0, x.to(tl.float64) - largest.to(tl.float64))
        value = depth / heat.to(tl.float64) + _gumbel(state, at)
        token = tl.where(value > best, at, token)
        best = tl.maximum(best, value)
        at = _next(weights, width, at, limit, CHUNK)
    return token


@triton.jit
def _chunk(x, start, width, missing, CHUNK: tl.constexpr):
    """Return numbers and values of a chunk of a row, in float32."""
    ids = start + tl.arange(0, CHUNK)
    return ids, tl.load(x + ids, mask=ids < width, other=missing).to(tl.float32)


@triton.jit
def _ordered(x):
    """Return the bits of float32 values as whole numbers that are ordered as the values are."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # zeros of either sign are one
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _count(x, width, least, CHUNK: tl.constexpr):
    """Return how many values have ordered bits of at least `least`."""
    total = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, width, CHUNK):
        ids, values = _chunk(x, start, width, float("-inf"), CHUNK)
        total += ((_ordered(values) >= least) & (ids < width)).to(tl.int32)
    return tl.sum(total, axis=0)


@triton.jit
def _place_of(x, width, bits, count, CHUNK: tl.constexpr):
    """Return the id before which `count` values have these ordered bits, or more than the row holds."""
    low, high = count * 0, count * 0 + width
    while low < high:
        middle, total = (low + high) // 2, tl.zeros((CHUNK,), tl.int32)
        for start in range(0, width, CHUNK):
            ids, values = _chunk(x, start, width, float("-inf"), CHUNK)
            total += ((_ordered(values) == bits) & (ids < middle)).to(tl.int32)
        if tl.sum(total, axis=0) >= count:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def _sum(weights, width, above, CHUNK: tl.constexpr):
    """Return the sum in float64 of the weights with bits above `above`."""
    total = tl.zeros((CHUNK,), tl.float64)
    for start in range(0, width, CHUNK):
        _ids, w = _chunk(weights, start, width, 0.0, CHUNK)
        total += tl.where(w.to(tl.int32, bitcast=True) > above, w, 0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def _keep(x, weights, width, bits, place, always, least, CHUNK: tl.constexpr):
    """Let only those weights be that `x` puts above `bits`, or at them before `place`, if they are at least `least`."""
    tl.debug_barrier()
    for start in range(0, width, CHUNK):
        ids, values = _chunk(x, start, width, float("-inf"), CHUNK)
        w = tl.load(weights + ids, mask=ids < width, other=0)
        order = _ordered(values)
        kept = (order > bits) | ((order == bits) & (ids < place)) | (ids == always)
        kept = kept & ((w.to(tl.float64) >= least) | (ids == always))
        tl.store(weights + ids, tl.where(kept, w, 0.0), mask=ids < width)
    tl.debug_barrier()


@triton.jit
def _cut_to_k(x, width, k, CHUNK: tl.constexpr):
    """Return the ordered bits of the k-th largest value, and the id before which those of its size are among the k."""
    low, high = k * 0 - 2147483647, k * 0 + 2147483647
    while low < high:
        middle = (low + high + 1) >> 1
        if _count(x, width, middle.to(tl.int32), CHUNK) >= k:
            low = middle
        else:
            high = middle - 1
    bits = low.to(tl.int32)
    spare = k.to(tl.int32) - _count(x, width, bits + 1, CHUNK)
    return bits, _place_of(x, width, bits, spare, CHUNK)


@triton.jit
def _cut_to_p(weights, width, p, most, CHUNK: tl.constexpr):
    """Return the bits of the smallest weight that less than p of the sum goes before, and the id before which those of
    its size are such."""
    limit = p * _sum(weights, width, -1, CHUNK)
    low, high = most * 0, most
    while low < high:
        middle = low + (high - low) // 2
        if _sum(weights, width, middle, CHUNK) < limit:
            high = middle
        else:
            low = middle + 1
    weight = low.to(tl.float32, bitcast=True).to(tl.float64)
    room = (limit - _sum(weights, width, low, CHUNK)) / tl.where(weight > 0, weight, 1.0)
    count = tl.ceil(tl.minimum(tl.where(weight > 0, room, width + 0.0), width + 0.0)).to(tl.int32)
    return low, _place_of(weights, width, low, count, CHUNK)


@triton.jit
def _draw(
    logits, weights, temperature, top_p, min_p, top_k, seeds, indices, chosen, width, row_apart, CHUNK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits, weights = logits + row * row_apart, weights + row * width
    most, where = tl.full((CHUNK,), float("-inf"), tl.float32), tl.zeros((CHUNK,), tl.int32)
    nans = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, width, CHUNK):
        ids, x = _chunk(logits, start, width, float("-inf"), CHUNK)
        where, most = tl.where(x > most, ids, where), tl.maximum(x, most)
        nans += (x != x).to(tl.int32)
    largest = tl.max(most, axis=0)
    first = tl.min(tl.where(most == largest, where, width), axis=0)
    heat, p, k = tl.load(temperature + row), tl.load(top_p + row), tl.maximum(tl.load(top_k + row), 1)
    token, has_nan, has_none = first, tl.sum(nans, axis=0) > 0, largest == float("-inf")
    if (heat != 0) & (has_nan == 0) & (has_none == 0):
        # of float32, 2^-126 to 2^127: reference.py
        scale = tl.minimum(tl.maximum(heat, 1.1754943508222875e-38), 1.7014118346046923e38).to(tl.float32)
        for start in range(0, width, CHUNK):
            ids, x = _chunk(logits, start, width, float("-inf"), CHUNK)
            depth = tl.where(x == largest, 0.0, x - largest)  # 0 for the largest even if it is infinite
            w = tl.exp(tl.div_rn(depth, tl.zeros_like(x) + scale))
            tl.store(weights + ids, w, mask=ids < width)
        tl.debug_barrier()
        if k < width:
            bits, place = _cut_to_k(logits, width, k, CHUNK)
            _keep(logits, weights, width, bits, place, first, 0.0, CHUNK)
        bits, place = first * 0 - 1, first * 0
        if p < 1:
            bits, place = _cut_to_p(weights, width, p, 1065353216 + first * 0, CHUNK)  # the bits of 1
        _keep(weights, weights, width, bits, place, first, tl.load(min_p + row), CHUNK)
        text = _split_mix(tl.load(seeds + row).to(tl.uint64), tl.load(indices + row).to(tl.uint64))
        token = _noisiest(logits, weights, width, largest, scale, first, text, CHUNK)
    tl.store(chosen + row, tl.where(has_nan, -1, tl.where(has_none, -2, token)).to(tl.int64))
