"""What a decode step on a GPU does in one launch: projections with their norms, gates and sums, the norms of Mamba's δ,
B and C, and the places in the rings."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.gpu_case import Case, Set
from benchmarks.gpu_timing import device, random
from hymba.ops.linear import round_to_int4, round_to_int8

if TYPE_CHECKING:
    from benchmarks.gpu_ops import Sizes

KINDS: Mapping[str, tuple[float, Callable[[Tensor], Any]]] = {
    "bf16": (2.0, lambda w: w),
    "int8": (1.0, round_to_int8),
    "int4": (0.5, round_to_int4),
}


def fused(s: Sizes) -> Iterator[Case]:
    """Yield all of them."""
    if find_spec("hymba.ops.projection") is not None:
        yield from _projections(s)
    yield from _norms_of_parts(s)
    yield from _rings(s)


def _projections(s: Sizes) -> Iterator[Case]:
    """Each op beside the torch path of what it is made of."""
    c, module = s.config, importlib.import_module("hymba.ops.projection")
    width, inner, wide = c.hidden_size, c.d_inner, c.intermediate_size
    query = c.num_attention_heads * c.head_dim
    into = query + c.num_key_value_heads * (c.head_dim + c.v_head_dim) + 2 * inner
    for kind, (bytes_each, quantize) in KINDS.items():
        for rows in (1, 8) if kind == "bf16" else (1,):
            made: tuple[tuple[str, Any, Callable[[], Any], int, int], ...] = (
                (
                    "norm_linear",
                    module.IMPLEMENTATIONS,
                    partial(_norm_linear, quantize, rows, width, into),
                    width * into,
                    width + into,
                ),
                (
                    "norm_gated_linear",
                    module.GATED,
                    partial(_norm_gated, quantize, rows, width, wide),
                    2 * width * wide,
                    width + wide,
                ),
                (
                    "linear_residual",
                    module.RESIDUAL,
                    partial(_residual, quantize, rows, wide, width),
                    width * wide,
                    wide + 2 * width,
                ),
                (
                    "mean_of_norms_linear",
                    module.MEANS,
                    partial(_means, quantize, rows, inner, width),
                    width * inner,
                    2 * inner + 2 * width,
                ),
            )
            for op, implementations, make, weights, moved in made:
                nbytes = int(bytes_each * weights) + 2 * rows * moved
                yield Case(op, f"{kind}, {rows} rows", implementations, make, _call, nbytes, 2 * rows * weights)


def _call(f: Callable[..., Any], one: Set) -> Any:
    return f(*one["x"])


def _norm_linear(quantize: Callable[[Tensor], Any], rows: int, inputs: int, outputs: int) -> Set:
    return {"x": (random(rows, 1, inputs), random(inputs), 1e-6, quantize(random(outputs, inputs)))}


def _norm_gated(quantize: Callable[[Tensor], Any], rows: int, inputs: int, outputs: int) -> Set:
    weights = (quantize(random(outputs, inputs)) for _ in range(2))
    return {"x": (random(rows, 1, inputs), random(inputs), 1e-6, *weights)}


def _residual(quantize: Callable[[Tensor], Any], rows: int, inputs: int, outputs: int) -> Set:
    return {"x": (random(rows, 1, inputs), quantize(random(outputs, inputs)), random(rows, 1, outputs))}


def _means(quantize: Callable[[Tensor], Any], rows: int, inputs: int, outputs: int) -> Set:
    branches, weights = ([random(*shape) for _ in range(2)] for shape in ((rows, 1, inputs), (inputs,)))
    return {"x": (*branches, *weights, 1e-6, quantize(random(outputs, inputs)), random(rows, 1, outputs))}


def _norms_of_parts(s: Sizes) -> Iterator[Case]:
    c = s.config
    widths = (c.dt_rank, c.d_state, c.d_state)
    parts = importlib.import_module("hymba.ops.rms_norm").PARTS
    for rows in (1, s.of(128, 4), s.of(32768, 16)):

        def make(rows: int = rows) -> Set:
            return {"x": (random(rows, sum(widths)), tuple(random(width) for width in widths), 1e-6)}

        size = f"{rows}×({' + '.join(map(str, widths))})"
        yield Case("norm_parts", size, parts, make, _call, 4 * rows * sum(widths))


def _rings(s: Sizes) -> Iterator[Case]:
    """Positions and slots of a decode step, worked out once for all layers that share a window."""
    ring, c = importlib.import_module("hymba.ops.ring"), s.config
    slots, meta = s.of(8192, 30), c.num_meta_tokens
    for rows in (1, s.of(128, 3)):

        def held(*rest: Any, rows: int = rows) -> Set:
            return {"x": (torch.full((rows,), slots - 1, device=device()), *rest)}

        size = f"{rows} rows, {slots} slots"
        moved = 8 * rows * (meta + slots)
        yield Case("ring_positions", size, ring.POSITIONS, partial(held, slots, slots, meta), _call, moved)
        yield Case("ring_slots", size, ring.SLOTS, partial(held, None, 1, slots, meta), _call, 16 * rows)
