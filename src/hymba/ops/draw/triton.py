"""Drawing in Triton: one launch, a program a row, which finds each cut by bisection in place of a sort.

Cuts fall on bits of floats read as whole numbers, so bisection is exact: a comparison and a sum over the row, which
lies in the processor's cache, at most 32 times.
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
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, draws: Tensor
) -> Tensor:
    """Triton path for :func:`hymba.ops.draw.draw_tokens`, same signature.

    The likeliest token, cuts to `top_k` and −1 are those of the definition. Probabilities may differ from its in their
    last bits, so where one meets `top_p`, `min_p` or a draw to rounding, the token may be the neighbour's; tokens of
    one probability, to float32, are cut by id.
    """
    if gpu.why_unfit(logits) or not logits.numel():
        return reference.draw_tokens(logits, temperature, top_k, top_p, min_p, draws)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    numbers = (x.to(torch.float64).contiguous() for x in (temperature, top_p, min_p, draws))
    weights = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    tensors = logits, weights, *numbers, top_k.to(torch.int64).contiguous(), chosen
    chunk = min(max(triton.next_power_of_2(logits.shape[1]), 256), _CHUNK)
    _draw[(len(logits),)](*tensors, logits.shape[1], logits.stride(0), CHUNK=chunk, num_warps=chunk // 256)
    return chosen


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
def _sum(weights, width, above, until, CHUNK: tl.constexpr):
    """Return the sum in float64 of the weights with bits above `above` and ids up to `until`."""
    total = tl.zeros((CHUNK,), tl.float64)
    for start in range(0, width, CHUNK):
        ids, w = _chunk(weights, start, width, 0.0, CHUNK)
        total += tl.where((w.to(tl.int32, bitcast=True) > above) & (ids <= until), w, 0.0).to(tl.float64)
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
    limit = p * _sum(weights, width, -1, width, CHUNK)
    low, high = most * 0, most
    while low < high:
        middle = low + (high - low) // 2
        if _sum(weights, width, middle, width, CHUNK) < limit:
            high = middle
        else:
            low = middle + 1
    weight = low.to(tl.float32, bitcast=True).to(tl.float64)
    room = (limit - _sum(weights, width, low, width, CHUNK)) / tl.where(weight > 0, weight, 1.0)
    count = tl.ceil(tl.minimum(tl.where(weight > 0, room, width + 0.0), width + 0.0)).to(tl.int32)
    return low, _place_of(weights, width, low, count, CHUNK)


@triton.jit
def _draw(logits, weights, temperature, top_p, min_p, draws, top_k, chosen, width, row_apart, CHUNK: tl.constexpr):
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
    token, has_nan = first, tl.sum(nans, axis=0) > 0
    if (heat != 0) & (has_nan == 0):
        for start in range(0, width, CHUNK):
            ids, x = _chunk(logits, start, width, float("-inf"), CHUNK)
            w = tl.exp(tl.div_rn(x - largest, tl.zeros_like(x) + heat.to(tl.float32)))
            tl.store(weights + ids, w, mask=ids < width)
        tl.debug_barrier()
        if k < width:
            bits, place = _cut_to_k(logits, width, k, CHUNK)
            _keep(logits, weights, width, bits, place, first, 0.0, CHUNK)
        bits, place = first * 0 - 1, first * 0
        if p < 1:
            bits, place = _cut_to_p(weights, width, p, 1065353216 + first * 0, CHUNK)  # the bits of 1
        _keep(weights, weights, width, bits, place, first, tl.load(min_p + row), CHUNK)
        target = tl.load(draws + row) * _sum(weights, width, -1, width, CHUNK)
        low, high = first * 0, first * 0 + width - 1
        while low < high:  # for the first at which the sum passes the target
            middle = (low + high) // 2
            if _sum(weights, width, -1, middle, CHUNK) > target:
                high = middle
            else:
                low = middle + 1
        token = low
    tl.store(chosen + row, tl.where(has_nan, -1, token).to(tl.int64))
