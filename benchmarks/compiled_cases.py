"""The launches that `python -m benchmarks.compiled` compiles: each op's wrappers at the sizes of Hymba-1.5B.

Tensors are on the CPU and hold anything: nothing is run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hymba.ops import probe
from hymba.ops.attention import Mask, round_heads
from hymba.ops.causal_conv1d.triton import causal_conv1d
from hymba.ops.draw.triton import draw_tokens
from hymba.ops.gated.triton import gated_silu
from hymba.ops.linear import QuantizedWeight
from hymba.ops.ring.triton import ring_positions, ring_slots, write_ring
from hymba.ops.rms_norm.triton import mean_of_norms, norm_parts, rms_norm
from hymba.ops.rotary.triton import apply_rotary

SIZES = ((1, 1), (2, 2048))  # rows and steps: of decoding, of training


def _probe() -> None:
    probe.count(torch.zeros(16, dtype=torch.int32))


def _weight(outputs: int, inputs: int, bits: int) -> Tensor | QuantizedWeight:
    if bits == 16:
        return torch.zeros(outputs, inputs, dtype=torch.bfloat16)
    groups = -(-inputs // 64)
    if bits == 8:
        return QuantizedWeight(torch.zeros(outputs, inputs, dtype=torch.int8), torch.zeros(outputs), inputs)
    values = torch.zeros(outputs, groups * 32, dtype=torch.uint8)
    return QuantizedWeight(values, torch.zeros(outputs, groups, dtype=torch.bfloat16), inputs)


def _ring() -> None:
    lengths = torch.zeros(8, dtype=torch.int64)
    ring_positions(lengths, 1025, 1025, 128)
    ring_slots(lengths, None, 1, 1025, 128)
    ring_slots(lengths, lengths, 8, 1025, 128)
    rows, slots, real = lengths[:, None], torch.zeros(8, 8, dtype=torch.int64), torch.zeros(8, 8, dtype=torch.bool)
    stored = [torch.zeros(8, 1153, 5, width, dtype=torch.bfloat16) for width in (64, 128)]
    k = torch.zeros(8, 8, 5, 64, dtype=torch.bfloat16)
    v = torch.zeros(8, 8, 8960, dtype=torch.bfloat16)[..., 1920:2560].unflatten(-1, (5, 128))
    for buffers in (stored, [round_heads(x) for x in stored]):
        write_ring(rows, slots[:, :1], None, None, (k[:, :1], v[:, :1]), buffers)
        write_ring(rows, slots, slots, real, (k, v), buffers)
    write_ring(rows, slots, None, None, (round_heads(k), round_heads(v)), buffers)


def _conv() -> None:
    weight, bias = _narrow(3200, 4), _narrow(3200)
    for rows, steps in SIZES:
        u = _narrow(rows, steps, 8960)[..., 2560:5760]
        state, lengths = torch.zeros(rows, 3200, 3, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.int64)
        with torch.no_grad():
            causal_conv1d(u, weight, bias, initial_state=state, final_state=state)
            causal_conv1d(u, weight, bias, initial_state=state, final_state=state, lengths=lengths)
        for offsets in (None, torch.zeros(rows, steps, dtype=torch.int64)):
            _forward_and_backward(
                lambda *x, offsets=offsets: causal_conv1d(*x[:3], initial_state=x[3], document_offsets=offsets)[0],
                *(u, weight, bias, _narrow(1, 3200, 3).expand(rows, -1, -1)),
            )
    for taps in (2, 3):
        out, final = causal_conv1d(u, _narrow(3200, taps), bias, lengths=lengths)
        torch.autograd.backward((out, final), (torch.empty_like(out), torch.empty_like(final)))


def _draw() -> None:
    numbers = torch.zeros(8, dtype=torch.float64)
    counts = numbers.long()
    draw_tokens(torch.zeros(8, 32001), numbers, counts, numbers, numbers, counts, counts)


def _gated() -> None:
    for rows, steps in SIZES:
        both = _narrow(rows, steps, 2 * 5504)
        _forward_and_backward(gated_silu, *both.chunk(2, dim=-1))


def _norms() -> None:
    for rows, steps in SIZES:
        weight, wide_weight = _narrow(1600), _narrow(3200)
        _forward_and_backward(rms_norm, _narrow(rows, steps, 1600), weight, 1e-6)
        branches = _narrow(rows, steps, 3200), _narrow(rows, steps, 3200)
        _forward_and_backward(mean_of_norms, *branches, wide_weight, wide_weight, 1e-6)
        parts = _narrow(100), _narrow(16), _narrow(16)
        _forward_and_backward(lambda x, *w: norm_parts(x, w, 1e-6), _narrow(rows, steps, 132), *parts)


def _rotary() -> None:
    for rows, steps in SIZES:
        tables = [_narrow(rows, steps, 32).detach() for _ in range(2)]
        for start, heads in ((0, 25), (1600, 5)):
            x = _narrow(rows, steps, 8960)[..., start : start + heads * 64].unflatten(-1, (heads, 64))
            _forward_and_backward(apply_rotary, x, *tables)


def _narrow(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)


def _forward_and_backward(op: Callable, *arguments: object) -> None:
    """Call an op without and with gradients, and back."""
    with torch.no_grad():
        op(*arguments)
    out = op(*arguments)
    torch.autograd.backward(
        out, [torch.empty_like(x) for x in out] if isinstance(out, tuple) else torch.empty_like(out)
    )


@torch.no_grad()
def _attention() -> None:
    """Decoding in bfloat16, 8 bits and float32, and eight drafts checked, in a sliding layer of the whole buffer."""
    from hymba.ops.attention import triton as kernels

    positions = torch.zeros(2, 1153, dtype=torch.int64)
    for dtype, steps, quantized in (
        (torch.bfloat16, 1, False),
        (torch.bfloat16, 1, True),
        (torch.float32, 1, False),
        (torch.bfloat16, 8, False),
    ):
        q, k, v = (
            torch.zeros(2, n, heads, width, dtype=dtype)
            for n, heads, width in ((steps, 25, 64), (1153, 5, 64), (1153, 5, 128))
        )
        keys, values = (round_heads(k), round_heads(v)) if quantized else (k, v)
        mask: Mask = {
            "query_positions": positions[:, :steps],
            "key_positions": positions,
            "window": 1024,
            "num_meta": 128,
        }
        kernels.attention(q, keys, values, **mask)


@torch.no_grad()
def _linear(bits: int) -> None:
    """In order: lm_head, x_proj, dt_proj; one row, 16 and 64."""
    from hymba.ops.linear.triton import linear

    for outputs, inputs in ((32001, 1600), (132, 3200), (3200, 100)):
        for rows in (1, 16, 64):
            linear(torch.zeros(rows, inputs, dtype=torch.bfloat16), _weight(outputs, inputs, bits))


@torch.no_grad()
def _projection(bits: int) -> None:
    """In order: norm and in_proj; norm, gate and up; down_proj; norms and out_proj; one row and 16."""
    from hymba.ops.projection import triton

    norm, wide_norm = torch.ones(1600, dtype=torch.bfloat16), torch.ones(3200, dtype=torch.bfloat16)
    for rows in (1, 16):
        x, inner, hidden = (torch.zeros(rows, n, dtype=torch.bfloat16) for n in (1600, 3200, 5504))
        triton.norm_linear(x, norm, 1e-6, _weight(8960, 1600, bits))
        triton.norm_gated_linear(x, norm, 1e-6, _weight(5504, 1600, bits), _weight(5504, 1600, bits))
        triton.linear_residual(hidden, _weight(1600, 5504, bits), x)
        norms = (wide_norm, wide_norm)
        triton.mean_of_norms_linear(inner, inner.clone(), *norms, 1e-6, _weight(1600, 3200, bits), x)


def _scan() -> None:
    """Decoding, drafts, a long row in segments and rows that fill the GPU, packed and not, forward and backward."""
    from hymba.ops.selective_scan.triton import selective_scan

    for rows, steps, packed in ((1, 1, False), (1, 8, False), (1, 2048, False), (8, 256, False), (8, 256, True)):
        u, dt = _narrow(rows, steps, 3200), _narrow(rows, steps, 3200)
        gate = _narrow(rows, steps, 8960)[..., 5760:]
        maps, A_log, weights = (_narrow(rows, steps, 16) for _ in range(2)), _narrow(3200, 16), _narrow(3200)
        state = torch.zeros(1, 3200, 16).expand(rows, -1, -1)
        offsets = torch.zeros(rows, steps, dtype=torch.int64) if packed else None
        _forward_and_backward(
            partial(selective_scan, dt_bias=weights, gate=gate, initial_state=state, document_offsets=offsets),
            *(u, dt, A_log, *maps, weights),
        )


CASES: dict[str, Callable[[], None]] = {
    "attention": _attention,
    "causal_conv1d": _conv,
    "draw": _draw,
    "gated": _gated,
    **{f"linear {bits} bits": partial(_linear, bits) for bits in (16, 8, 4)},
    "probe": _probe,
    **{f"projection {bits} bits": partial(_projection, bits) for bits in (16, 8, 4)},
    "ring": _ring,
    "rms_norm": _norms,
    "rotary": _rotary,
    "selective_scan": _scan,
}
