"""NaN where there is only padding or an empty slot has no effect."""

from __future__ import annotations

import pytest
import torch
from kernels import DEVICE
from torch import Tensor

from hymba.ops import use_backend
from hymba.ops.attention import QuantizedHeads, attention, attention_weights, round_heads, visible, weigh_values
from hymba.ops.backend import missing
from hymba.ops.causal_conv1d import causal_conv1d
from hymba.ops.cross_entropy import linear_cross_entropy

NAN = float("nan")
BACKENDS = [name for name in ("reference", "cpu", "native", "triton") if name not in missing()]
# Queries of the second row end with padding; keys of each row have empty slots.
KEYS = torch.tensor([[0, 1, 2, 3, -1, 5, -1, 4], [0, 1, 2, -1, -1, -1, -1, 3]], device=DEVICE)
QUERIES = {
    1: torch.tensor([[5], [3]], device=DEVICE),
    3: torch.tensor([[3, 4, 5], [2, 3, -1]], device=DEVICE),
}


def poisoned(x: Tensor, where: Tensor, value: float = NAN) -> Tensor:
    return x.masked_fill(where.view(*where.shape, *[1] * (x.ndim - where.ndim)), value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_ignores_empty_slots_and_padding(
    backend: str, steps: int, bits: int | None, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 16, generator=draw).to(DEVICE, dtype) for n, h in ((steps, 4), (8, 2), (8, 2)))
    at, empty = QUERIES[steps], KEYS < 0
    mask = {"query_positions": at, "key_positions": KEYS, "window": 3, "num_meta": 2}

    def run(value: float) -> Tensor:
        own = [poisoned(x, empty, 0 if bits else value) for x in (k, v)]
        if bits is not None:
            own = [QuantizedHeads(x.values, poisoned(x.scales, empty, value)) for x in map(round_heads, own)]
        with use_backend(backend):
            return attention(poisoned(q, at < 0, value), *own, **mask)

    clean, dirty = run(0), run(NAN)
    torch.testing.assert_close(dirty, clean)
    assert not dirty[at < 0].any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_gradient_of_attention_comes_from_padding(backend: str) -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, n, h, 16, generator=draw) for n, h in ((3, 4), (8, 2), (8, 2))]
    at, keys = QUERIES[3].cpu(), KEYS.cpu()
    mask = {"query_positions": at, "key_positions": keys, "window": 3, "num_meta": 2}
    found = []
    for value in (0.0, NAN):
        own = [
            poisoned(x, where < 0, value).requires_grad_() for x, where in zip(inputs, (at, keys, keys), strict=True)
        ]
        with use_backend(backend):
            out = attention(*own, **mask)
        found.append(torch.autograd.grad(out.square().sum(), own))
    for clean, dirty in zip(*found, strict=True):
        torch.testing.assert_close(dirty, clean)


def test_attention_matrices_ignore_empty_slots_and_padding() -> None:
    q, k, v = torch.randn(2, 3, 4, 16), torch.randn(2, 8, 2, 16), torch.randn(2, 8, 2, 16)
    at, keys = QUERIES[3].cpu(), KEYS.cpu()
    weights = attention_weights(poisoned(q, at < 0), poisoned(k, keys < 0), visible(at, keys, window=3, num_meta=2))
    assert not weights[1, :, 2].any()
    assert weigh_values(weights, poisoned(v, keys < 0)).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_convolution_ignores_inputs_after_the_length(backend: str) -> None:
    u, weight, bias = torch.randn(2, 6, 32), torch.randn(32, 4), torch.randn(32)
    lengths = torch.tensor([6, 2])
    dirty = poisoned(u, torch.arange(6) >= lengths[:, None])
    u, weight, bias, lengths, dirty = (x.to(DEVICE) for x in (u, weight, bias, lengths, dirty))
    with use_backend(backend):
        (clean_y, clean_state), (y, state) = (causal_conv1d(x, weight, bias, lengths=lengths) for x in (u, dirty))
    assert torch.equal(state, clean_state)
    assert torch.equal(y[1, :2], clean_y[1, :2])
    assert torch.equal(y[0], clean_y[0])


@pytest.mark.parametrize("backend", [name for name in ("reference", "cpu", "native", "liger") if name not in missing()])
def test_hidden_states_without_a_loss_reach_no_gradient(backend: str) -> None:
    x, weight = torch.randn(2, 5, 16), torch.randn(40, 16)
    targets = torch.tensor([[1, 2, -100, 4, -1], [-100, 7, 8, 9, 10]])
    found = []
    for value in (0.0, NAN):
        hidden = poisoned(x, targets < 0, value).to(DEVICE).requires_grad_()
        head = weight.clone().to(DEVICE).requires_grad_()
        with use_backend(backend):
            loss = linear_cross_entropy(hidden, head, targets.to(DEVICE))
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, head))))
    for clean, dirty in zip(*found, strict=True):
        torch.testing.assert_close(dirty, clean)
