"""Attention on NVIDIA GPUs: few queries a row by the kernel below, as in decoding; many by FlexAttention.

The kernel is bound by reading keys and values, so each is read once for all query heads that share it and for all
queries of the row. Slots are split among programs ("flash decoding", arXiv 2311.01282): each walks its stretch with a
running softmax (arXiv 1805.02867), and a second, small kernel merges what they have found in the order of the slots, so
that results repeat to the bit.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba.ops import gpu
from hymba.ops.attention import cpu, flex
from hymba.ops.attention.heads import Heads, QuantizedHeads
from hymba.ops.attention.reference import Mask

# Rows of a tile, a query head of a query each: more go to FlexAttention.
_MOST_ROWS = 64
_NOWHERE = tl.constexpr(2**31 - 1)
# The interpreter multiplies the bits of bfloat16 as if they were integers.
_INTERPRETED = tl.constexpr(gpu.interpreted())
_LOG2_E = 1.4426950408889634


def attention(q: Tensor, k: Heads, v: Heads, **mask: Unpack[Mask]) -> Tensor:
    """GPU path for :func:`hymba.ops.attention.attention`, same signature."""
    if gpu.why_unfit(q):
        return cpu.attention(q, k, v, **mask)
    if _decodes(q, k, v, mask):
        return _decode(q, k, v, mask)
    return flex.attention(q, k, v, **mask)


def _decodes(q: Tensor, k: Heads, v: Heads, mask: Mask) -> bool:
    """Return whether the kernel serves: few queries, some keys, one dtype, no documents, no gradients."""
    if q.shape[1] * (q.shape[2] // k.shape[2]) > _MOST_ROWS or not q.numel() or not k.shape[1]:
        return False
    if max(q.shape[3], v.shape[3]) > 256 or mask.get("query_documents") is not None:
        return False
    if k.shape[1] * max(_stored(x)[0].stride(1) for x in (k, v)) >= 2**31:  # of a row's offsets
        return False
    if isinstance(k, QuantizedHeads) or isinstance(v, QuantizedHeads):
        return isinstance(k, QuantizedHeads) and isinstance(v, QuantizedHeads) and not _wants_gradient(q)
    return q.dtype == k.dtype == v.dtype and not _wants_gradient(q, k, v)


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class _Tiles(NamedTuple):
    """How the work is cut: slots a block, blocks a program, splits of a row, warps."""

    slots: int
    blocks: int
    splits: int
    warps: int


def _tiles(groups: int, slots: int, entry_bytes: int, tile_rows: int) -> _Tiles:
    """Return how to cut `slots` slots for `groups` pairs of a row and a KV head; from sizes alone.

    A block of keys and values in flight is 24 KB in bfloat16, and registers let two programs share a multiprocessor,
    of which an H200 has 132. Few pairs are split into as many programs as run at once, for what a row then waits for is
    latency; many into eight times as many, so that the last wave is small beside the rest.
    """
    block = 64 if entry_bytes <= 2 else 32
    blocks = triton.cdiv(slots, block)
    wanted = 264 if groups < 264 else 2112
    each = max(1, min(blocks, triton.cdiv(blocks * groups, wanted)))
    return _Tiles(block, each, triton.cdiv(blocks, each), 4 if tile_rows == 16 else 8)


def _decode(q: Tensor, k: Heads, v: Heads, mask: Mask) -> Tensor:
    (keys, key_scales), (values, value_scales) = _stored(k), _stored(v)
    if q.stride(3) != 1:
        q = q.contiguous()
    at, positions = mask["query_positions"], mask["key_positions"]
    if positions.stride(1) != 1:
        positions = positions.contiguous()
    (rows, steps, heads, width), (_, slots, groups, value_width) = q.shape, values.shape
    lanes = steps * (heads // groups)
    tile_rows = max(16, triton.next_power_of_2(lanes))
    tiles = _tiles(rows * groups, slots, keys.element_size(), tile_rows)
    out = q.new_empty((rows, steps, heads, value_width))
    parts = (rows, groups, tiles.splits, lanes)
    sums = stats = None  # where programs leave what they have found, and its (maximum, total)
    if tiles.splits > 1:
        sums = q.new_empty((*parts, value_width), dtype=torch.float32)
        stats = q.new_empty((*parts, 2), dtype=torch.float32)
    window = mask["window"]
    _attend[(rows * groups * tiles.splits,)](
        q, keys, values, key_scales, value_scales, at, positions, out, sums, stats,
        *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *_strides(key_scales), *_strides(value_scales),
        *at.stride(), positions.stride(0),
        slots, tiles.splits, tiles.blocks * tiles.slots, 0 if window is None else window, mask["num_meta"],
        width**-0.5 * _LOG2_E,
        STEPS=steps, GROUPS=groups, SHARED=heads // groups, WIDTH=width, VALUE_WIDTH=value_width,
        SLIDING=window is not None, QUANTIZED=key_scales is not None, SPLIT=tiles.splits > 1,
        TILE_ROWS=tile_rows, TILE_SLOTS=tiles.slots, TILE_WIDTH=max(16, triton.next_power_of_2(width)),
        TILE_VALUE_WIDTH=max(16, triton.next_power_of_2(value_width)),
        num_warps=tiles.warps, num_stages=1,  # the kernel itself calls ahead
    )  # fmt: skip
    if tiles.splits > 1:
        _merge[(rows * steps * heads,)](
            sums, stats, out, tiles.splits,
            STEPS=steps, GROUPS=groups, SHARED=heads // groups, VALUE_WIDTH=value_width,
            TILE_SPLITS=min(32, triton.next_power_of_2(tiles.splits)),
            TILE_VALUE_WIDTH=triton.next_power_of_2(value_width), num_warps=4,
        )  # fmt: skip
    return out


def _stored(x: Heads) -> tuple[Tensor, Tensor | None]:
    """Return entries and scales, if any, as the kernel reads them: the widths of heads dense."""
    entries, scales = (x.values, x.scales) if isinstance(x, QuantizedHeads) else (x, None)
    return (entries if entries.stride(3) == 1 else entries.contiguous()), scales


def _strides(scales: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if scales is None else scales.stride()


@triton.jit(do_not_specialize=["positions_row", "slots", "splits", "stretch", "window", "num_meta"])
def _attend(
    q, k, v, k_scales, v_scales, query_positions, key_positions, out, sums, stats,
    q_row, q_step, q_head, k_row, k_slot, k_head, v_row, v_slot, v_head,
    ks_row, ks_slot, ks_head, vs_row, vs_slot, vs_head, at_row, at_step, positions_row,
    slots, splits, stretch, window, num_meta, scale,
    STEPS: tl.constexpr, GROUPS: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    SLIDING: tl.constexpr, QUANTIZED: tl.constexpr, SPLIT: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_SLOTS: tl.constexpr, TILE_WIDTH: tl.constexpr, TILE_VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Attend to `stretch` slots of one row and KV head. A tile's rows are queries times the heads that share it."""
    program = tl.program_id(0)
    group = program % GROUPS  # neighbours read heads that lie side by side
    split = program // GROUPS % splits
    row = (program // (GROUPS * splits)).to(tl.int64)
    lane = tl.arange(0, TILE_ROWS)
    step, head = lane // SHARED, group * SHARED + lane % SHARED
    is_real = lane < STEPS * SHARED
    wide = tl.arange(0, TILE_WIDTH)
    queries = tl.load(
        q + row * q_row + (step * q_step + head * q_head)[:, None] + wide[None, :],
        mask=is_real[:, None] & (wide < WIDTH)[None, :],
        other=0,
    )
    at = tl.load(query_positions + row * at_row + step * at_step, mask=is_real, other=-1).to(tl.int32)
    if QUANTIZED:
        k_scales += row * ks_row + group * ks_head
        v_scales += row * vs_row + group * vs_head
    start = split * stretch
    top, total, result = _stretch(
        queries, at, k + row * k_row + group * k_head, v + row * v_row + group * v_head, k_scales, v_scales,
        key_positions + row * positions_row, start, tl.minimum(start + stretch, slots), slots,
        k_slot, v_slot, ks_slot, vs_slot, window, num_meta, scale,
        SLIDING, QUANTIZED, WIDTH, VALUE_WIDTH, TILE_ROWS, TILE_SLOTS, TILE_WIDTH, TILE_VALUE_WIDTH,
    )  # fmt: skip
    if SPLIT:
        part = ((row * GROUPS + group) * splits + split) * STEPS * SHARED + lane
        tl.store(stats + part * 2, top, mask=is_real)
        tl.store(stats + part * 2 + 1, total, mask=is_real)
        _put(sums, part, result, is_real, VALUE_WIDTH, TILE_VALUE_WIDTH)
    else:
        result = result / tl.where(total == 0, 1.0, total)[:, None]
        _put(out, (row * STEPS + step) * GROUPS * SHARED + head, result, is_real, VALUE_WIDTH, TILE_VALUE_WIDTH)


@triton.jit
def _stretch(
    queries, at, k, v, k_scales, v_scales, key_positions, start, end, slots,
    k_slot, v_slot, ks_slot, vs_slot, window, num_meta, scale,
    SLIDING: tl.constexpr, QUANTIZED: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_SLOTS: tl.constexpr, TILE_WIDTH: tl.constexpr, TILE_VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Return what the slots from `start` to `end` give: largest scores, sums of weights, and weighted values.

    Keys and values are called for a block ahead of their use, positions two blocks ahead.
    """
    newest = tl.max(at, 0)
    oldest = tl.min(tl.where(at < 0, _NOWHERE, at), 0) - window  # of what a window lets any of the queries see
    slot = tl.arange(0, TILE_SLOTS)
    top = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    result = tl.zeros([TILE_ROWS, TILE_VALUE_WIDTH], tl.float32)
    here = tl.load(key_positions + start + slot, mask=start + slot < end, other=-1).to(tl.int32)
    near, any_near = _near(here, newest, oldest, num_meta, SLIDING)
    keys, values, key_scale, value_scale = _read(
        k, v, k_scales, v_scales, start, slots, any_near, k_slot, v_slot, ks_slot, vs_slot,
        QUANTIZED, WIDTH, VALUE_WIDTH, TILE_SLOTS, TILE_WIDTH, TILE_VALUE_WIDTH,
    )  # fmt: skip
    place = start + TILE_SLOTS + slot
    ahead = tl.load(key_positions + place, mask=place < end, other=-1)
    for block in range(start, end, TILE_SLOTS):
        held = ahead.to(tl.int32)
        place = block + 2 * TILE_SLOTS + slot
        ahead = tl.load(key_positions + place, mask=place < end, other=-1)
        next_near, next_any = _near(held, newest, oldest, num_meta, SLIDING)
        next_keys, next_values, next_key_scale, next_value_scale = _read(
            k, v, k_scales, v_scales, block + TILE_SLOTS, slots, next_any, k_slot, v_slot, ks_slot, vs_slot,
            QUANTIZED, WIDTH, VALUE_WIDTH, TILE_SLOTS, TILE_WIDTH, TILE_VALUE_WIDTH,
        )  # fmt: skip
        if any_near:
            top, total, result = _weigh(
                top, total, result, queries, at, keys, values, key_scale, value_scale,
                here, near, window, num_meta, scale, SLIDING, QUANTIZED,
            )  # fmt: skip
        keys, values, here, near, any_near = next_keys, next_values, held, next_near, next_any
        if QUANTIZED:
            key_scale, value_scale = next_key_scale, next_value_scale
    return top, total, result


@triton.jit
def _weigh(
    top, total, result, queries, at, keys, values, key_scale, value_scale, here, near, window, num_meta, scale,
    SLIDING: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Take a block of keys and values into the running softmax (arXiv 1805.02867)."""
    if QUANTIZED:
        scores = _product(queries, tl.trans(keys.to(tl.float32).to(queries.dtype))) * scale * key_scale[None, :]
    else:
        scores = _product(queries, tl.trans(keys)) * scale
    seen = near[None, :] & (here[None, :] <= at[:, None])
    if SLIDING:
        seen = seen & ((here[None, :] >= at[:, None] - window) | (here < num_meta)[None, :])
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - safe[:, None])
    fade = tl.exp2(top - safe)
    total = total * fade + tl.sum(weights, 1)
    values = tl.where(near[:, None], values, 0)  # what lies there may be no number
    if QUANTIZED:  # integers and bfloat16 have the range; float16 would lose small products
        weights = weights * tl.where(near, value_scale, 0.0)[None, :]
        entries = values.to(tl.float32).to(tl.float32 if queries.dtype == tl.float32 else tl.bfloat16)
    else:
        entries = values
    return higher, total, result * fade[:, None] + _product(weights.to(entries.dtype), entries)


@triton.jit
def _put(to, place, result, is_real, VALUE_WIDTH: tl.constexpr, TILE_VALUE_WIDTH: tl.constexpr):
    """Store rows of `result` (rows, VALUE_WIDTH) at their places."""
    wide = tl.arange(0, TILE_VALUE_WIDTH)
    mask = is_real[:, None] & (wide < VALUE_WIDTH)[None, :]
    tl.store(to + place[:, None] * VALUE_WIDTH + wide[None, :], result.to(to.dtype.element_ty), mask=mask)


@triton.jit
def _near(held, newest, oldest, num_meta, SLIDING: tl.constexpr):
    """Return which slots some query of the row may see, and whether there are any."""
    near = (held >= 0) & (held <= newest)
    if SLIDING:
        near = near & ((held >= oldest) | (held < num_meta))
    return near, tl.max(near.to(tl.int32), 0) > 0


@triton.jit
def _read(
    k, v, k_scales, v_scales, start, slots, wanted, k_slot, v_slot, ks_slot, vs_slot,
    QUANTIZED: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    TILE_SLOTS: tl.constexpr, TILE_WIDTH: tl.constexpr, TILE_VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Return a block of keys and values, and their scales; nothing is read unless it is `wanted`.

    Addresses past the end are bent back: one predicate for all loads keeps them together.
    """
    wide, value_wide = tl.arange(0, TILE_WIDTH), tl.arange(0, TILE_VALUE_WIDTH)
    place = tl.minimum(start + tl.arange(0, TILE_SLOTS), slots - 1)
    keys = tl.load(k + (place * k_slot)[:, None] + wide[None, :], mask=wanted & (wide < WIDTH)[None, :], other=0)
    values = tl.load(
        v + (place * v_slot)[:, None] + value_wide[None, :], mask=wanted & (value_wide < VALUE_WIDTH)[None, :], other=0
    )
    key_scale, value_scale = 0.0, 0.0
    if QUANTIZED:
        key_scale = tl.load(k_scales + place * ks_slot, mask=wanted, other=0).to(tl.float32)
        value_scale = tl.load(v_scales + place * vs_slot, mask=wanted, other=0).to(tl.float32)
    return keys, values, key_scale, value_scale


@triton.jit
def _product(x, y):
    if _INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")


@triton.jit(do_not_specialize=["splits"])
def _merge(
    sums, stats, out, splits,
    STEPS: tl.constexpr, GROUPS: tl.constexpr, SHARED: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    TILE_SPLITS: tl.constexpr, TILE_VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Put together what the programs have found for one query and head."""
    program = tl.program_id(0)
    head, step = program % (GROUPS * SHARED), program // (GROUPS * SHARED) % STEPS
    row = (program // (GROUPS * SHARED * STEPS)).to(tl.int64)
    first = (row * GROUPS + head // SHARED) * splits
    split, wide = tl.arange(0, TILE_SPLITS), tl.arange(0, TILE_VALUE_WIDTH)
    high = tl.full([], float("-inf"), tl.float32)
    mass = tl.zeros([], tl.float32)
    merged = tl.zeros([TILE_VALUE_WIDTH], tl.float32)
    for start in range(0, splits, TILE_SPLITS):
        part = (first + start + split) * STEPS * SHARED + step * SHARED + head % SHARED
        there = start + split < splits
        found = tl.load(
            sums + part[:, None] * VALUE_WIDTH + wide[None, :],
            mask=there[:, None] & (wide < VALUE_WIDTH)[None, :],
            other=0,
        )
        top = tl.load(stats + part * 2, mask=there, other=float("-inf"))
        total = tl.load(stats + part * 2 + 1, mask=there, other=0)
        higher = tl.maximum(high, tl.max(top, 0))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        fade, share = tl.exp2(high - safe), tl.exp2(top - safe)
        mass = mass * fade + tl.sum(total * share, 0)
        merged = merged * fade + tl.sum(found * share[:, None], 0)
        high = higher
    merged = merged / tl.where(mass == 0, 1.0, mass)
    to = out + program.to(tl.int64) * VALUE_WIDTH + wide
    tl.store(to, merged.to(out.dtype.element_ty), mask=wide < VALUE_WIDTH)
