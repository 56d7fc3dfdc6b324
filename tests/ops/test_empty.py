"""Calls without rows, without steps or without keys: every implementation of an op returns the same empty outputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernels import DEVICE
from torch import Tensor

from hymba.ops import use_backend
from hymba.ops.attention import attention, round_heads
from hymba.ops.backend import missing
from hymba.ops.causal_conv1d import causal_conv1d
from hymba.ops.cross_entropy import linear_cross_entropy
from hymba.ops.gated import gated_silu
from hymba.ops.linear import linear, round_to_int4, round_to_int8
from hymba.ops.projection import linear_residual, mean_of_norms_linear, norm_gated_linear, norm_linear
from hymba.ops.ring import ring_positions, ring_slots, write_ring
from hymba.ops.rms_norm import mean_of_norms, norm_parts, rms_norm
from hymba.ops.rotary import apply_rotary, rotary_tables
from hymba.ops.selective_scan import selective_scan

WIDTH, STATES = 64, 16


class Draw:
    """Random inputs in one dtype, which want gradients or not."""

    def __init__(self, rows: int, steps: int, dtype: torch.dtype, trains: bool) -> None:
        self.rows, self.steps, self.dtype, self.trains = rows, steps, dtype, trains

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=DEVICE).to(dtype or self.dtype).requires_grad_(self.trains)

    def per_token(self, *shape: int) -> Tensor:
        return self(self.rows, self.steps, *shape)

    def counts(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int64, device=DEVICE)


def attend(x: Draw, keys: int = 3, bits: int | None = None, packed: bool = False) -> Tensor:
    q, k, v = x.per_token(4, 16), x(x.rows, keys, 2, 16), x(x.rows, keys, 2, 32)
    if bits is not None:
        k, v = round_heads(k.detach()), round_heads(v.detach())
    documents = {"query_documents": x.counts(x.rows, x.steps), "key_documents": x.counts(x.rows, keys)}
    at = torch.arange(x.steps, device=DEVICE).expand(x.rows, -1) + keys
    held = torch.arange(keys, device=DEVICE).expand(x.rows, -1)
    rest = documents if packed else {}
    return attention(q, k, v, query_positions=at, key_positions=held, window=5, num_meta=2, **rest)


def scan(x: Draw, start: bool = True, ragged: bool = False, packed: bool = False) -> tuple[Tensor, ...]:
    initial = x(x.rows, WIDTH, STATES, dtype=torch.promote_types(x.dtype, torch.float32)) if start else None
    lengths, offsets = x.counts(x.rows), x.counts(x.rows, x.steps)
    y, final = selective_scan(
        *(x.per_token(WIDTH), x.per_token(WIDTH), x(WIDTH, STATES), x.per_token(STATES), x.per_token(STATES), x(WIDTH)),
        dt_bias=x(WIDTH),
        gate=x.per_token(WIDTH),
        initial_state=initial,
        lengths=lengths if ragged else None,
        document_offsets=offsets if packed else None,
    )
    if not x.steps:
        assert torch.equal(final, torch.zeros_like(final) if initial is None else initial)
    return y, final


def convolve(x: Draw, start: bool = True, ragged: bool = False, packed: bool = False) -> tuple[Tensor, ...]:
    initial = x(x.rows, WIDTH, 3) if start else None
    lengths, offsets = x.counts(x.rows), x.counts(x.rows, x.steps)
    y, final = causal_conv1d(
        *(x.per_token(WIDTH), x(WIDTH, 4), x(WIDTH)),
        initial_state=initial,
        lengths=lengths if ragged else None,
        document_offsets=offsets if packed else None,
    )
    if not x.steps:
        assert torch.equal(final, torch.zeros_like(final) if initial is None else initial)
    return y, final


def tables(x: Draw) -> tuple[Tensor, Tensor]:
    return rotary_tables(x.counts(x.rows, x.steps), 16, 10000.0, x.dtype)


def ring(x: Draw, bits: int | None) -> tuple[Tensor, ...]:
    lengths = x.counts(x.rows)
    slots = ring_slots(lengths, lengths, x.steps, 6, 2)
    own = x.per_token(2, 32), x.per_token(2, 32)
    stored = [x(x.rows, 8, 2, 32) for _ in own]
    held = stored if bits is None else [round_heads(s) for s in stored]
    write_ring(torch.arange(x.rows, device=DEVICE)[:, None], *slots, own, held)
    return ring_positions(lengths, 4, 6, 2), *(s for s in slots if s is not None)


W, EPS = WIDTH, 1e-6
CALLS: dict[str, Callable[[Draw], Tensor | tuple[Tensor, ...]]] = {
    "attention": attend,
    "attention, packed": lambda x: attend(x, packed=True),
    "attention, no keys": lambda x: attend(x, keys=0),
    "scan": scan,
    "scan, no state": lambda x: scan(x, start=False),
    "scan, ragged": lambda x: scan(x, ragged=True),
    "scan, packed": lambda x: scan(x, packed=True),
    "convolution": convolve,
    "convolution, no state": lambda x: convolve(x, start=False),
    "convolution, ragged": lambda x: convolve(x, ragged=True),
    "convolution, packed": lambda x: convolve(x, packed=True),
    "rotary": lambda x: apply_rotary(x.per_token(4, 16), *tables(x)),
    "norm": lambda x: rms_norm(x.per_token(W), x(W), EPS),
    "mean of norms": lambda x: mean_of_norms(x.per_token(W), x.per_token(W), x(W), x(W), EPS),
    "norm parts": lambda x: norm_parts(x.per_token(44), (x(12), x(16), x(16)), EPS),
    "linear": lambda x: linear(x.per_token(W), x(48, W), x(48)),
    "gated": lambda x: gated_silu(x.per_token(W), x.per_token(W)),
    "norm linear": lambda x: norm_linear(x.per_token(W), x(W), EPS, x(48, W)),
    "norm gated linear": lambda x: norm_gated_linear(x.per_token(W), x(W), EPS, x(48, W), x(48, W)),
    "linear residual": lambda x: linear_residual(x.per_token(W), x(48, W), x.per_token(48)),
    "mean of norms linear": lambda x: mean_of_norms_linear(
        x.per_token(W), x.per_token(W), x(W), x(W), EPS, x(48, W), x.per_token(48)
    ),
    "cross entropy": lambda x: linear_cross_entropy(x.per_token(W), x(48, W), x.counts(x.rows, x.steps)),
}
UNTRAINED: dict[str, Callable[[Draw], Tensor | tuple[Tensor, ...]]] = {
    "attention, 8 bits": lambda x: attend(x, bits=8),
    "linear, 8 bits": lambda x: linear(x.per_token(W), round_to_int8(torch.randn(48, W, device=DEVICE))),
    "linear, 4 bits": lambda x: linear(x.per_token(W), round_to_int4(torch.randn(48, W, device=DEVICE))),
    "ring": lambda x: ring(x, None),
    "ring, 8 bits": lambda x: ring(x, 8),
}


@pytest.mark.parametrize("backend", [name for name in ("cpu", "native", "triton") if name not in missing()])
@pytest.mark.parametrize("name", [*CALLS, *UNTRAINED])
def test_empty_calls_equal_the_reference(name: str, backend: str) -> None:
    call = (CALLS | UNTRAINED)[name]
    for rows, steps in ((2, 0), (0, 3), (0, 0), *([(2, 3)] if name == "attention, no keys" else [])):
        for dtype in (torch.float32, torch.bfloat16):
            for trains in (False, True) if name in CALLS else (False,):
                shapes = []
                for each in (backend, "reference"):
                    with use_backend(each), torch.set_grad_enabled(trains):
                        made = call(Draw(rows, steps, dtype, trains))
                    outputs = made if isinstance(made, tuple) else (made,)
                    if trains:
                        sum(x.float().sum() for x in outputs).backward()
                    shapes.append([(x.shape, x.dtype) for x in outputs])
                assert shapes[0] == shapes[1], (rows, steps, dtype, trains)
