"""Attention on the GPU: the decode kernel, and what it leaves to torch, against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import DEVICE
from torch import Tensor

from hymba.ops.attention import IMPLEMENTATIONS, Heads, QuantizedHeads, reference, round_heads
from hymba.ops.attention import triton as kernels

attention = IMPLEMENTATIONS["triton"]
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def problem(
    seed: int, slots: int, steps: int, heads: int, groups: int, widths: tuple[int, int], dtype: torch.dtype
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Rows that hold different numbers of tokens, in slots in any order, some empty; the last row is padding.

    Queries are a slice of a wider projection, keys and values slices of larger buffers, as the model gives them.
    """
    g, rows = torch.Generator().manual_seed(seed), 3
    wide = torch.randn(rows, steps, heads * widths[0] + 16, generator=g).to(dtype).to(DEVICE)
    q = wide[..., : heads * widths[0]].unflatten(-1, (heads, -1))
    k, v = (
        torch.randn(rows, slots + 3, groups, width, generator=g).to(dtype).to(DEVICE)[:, :slots] for width in widths
    )
    held = torch.randint(1, slots + 1, (rows, 1), generator=g)
    order = torch.stack([torch.randperm(slots, generator=g) for _ in range(rows)])
    queries = held - steps + torch.arange(steps)  # the first of them may be padding
    queries[-1] = -1
    positions = {"query_positions": queries, "key_positions": torch.where(order < held, order, -1)}
    return [q, k, v], {name: x.to(DEVICE) for name, x in positions.items()}


def check(heads: list, mask: dict, tolerance: float) -> Tensor:
    with torch.no_grad():
        out = attention(*heads, **mask)
    wide = [x.dequantize(torch.float64) if isinstance(x, QuantizedHeads) else x.double() for x in heads]
    wanted = reference.attention(*wide, **mask)
    assert out.dtype == heads[0].dtype
    assert not out[mask["query_positions"] < 0].any()
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)
    return out


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@settings(max_examples=4)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 5, 63, 64, 65, 131]),
    st.sampled_from([1, 2, 7]),
    st.sampled_from([(5, 1, (64, 128)), (3, 1, (16, 16)), (4, 2, (24, 40)), (2, 2, (1, 3))]),
    st.sampled_from([None, 0, 5, 100]),
    st.sampled_from([0, 3]),
)
def test_few_queries_equal_the_reference(dtype, quantized, seed, slots, steps, sizes, window, num_meta):
    heads, positions = problem(seed, slots, min(steps, slots), *sizes, dtype)
    tolerance = TOLERANCES[dtype]
    if quantized:  # weights are then in bfloat16, also beside queries in float16
        heads[1:] = map(round_heads, heads[1:])
        tolerance = tolerance if dtype == torch.float32 else TOLERANCES[torch.bfloat16]
    check(heads, {**positions, "window": window, "num_meta": num_meta}, tolerance)


def whole_buffer(slots: int, rows: int = 3) -> dict:
    """Buffers with long stretches of empty slots: at the end, at the beginning, and all of a row's."""
    places = torch.arange(slots).repeat(rows, 1)
    empty = torch.stack([places[0] >= slots // 3, places[0] < slots // 2, places[0] >= 0])
    mask = {"query_positions": torch.full((rows, 1), slots), "key_positions": places.masked_fill(empty, -1)}
    return {name: x.to(DEVICE) for name, x in mask.items()} | {"window": slots // 4, "num_meta": 10}


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_slots_that_nobody_sees_are_not_read(dtype, poisoned):
    (q, k, v), _ = problem(0, 400, 1, 5, 1, (64, 128), dtype)
    mask = whole_buffer(400)
    wanted = check([q, k, v], mask, TOLERANCES[dtype])
    seen = reference.visible(**mask)[:, 0, :, None, None]
    hidden = [torch.where(seen, x, float("nan")) for x in (k, v)]
    with torch.no_grad():
        assert torch.equal(attention(q, *hidden, **mask), wanted)
    assert not wanted[-1].any()


@pytest.mark.parametrize(("rows", "slots"), [(1, 200), (3, 70)])
def test_the_number_of_splits_changes_little_and_repeats(rows, slots, monkeypatch):
    heads, positions = problem(1, slots, 1, 10, 2, (64, 128), torch.float32)
    mask = {**{name: x[:rows] for name, x in positions.items()}, "window": None, "num_meta": 4}
    heads = [x[:rows] for x in heads]
    wanted = check(heads, mask, 2e-5)
    assert torch.equal(check(heads, mask, 2e-5), wanted)
    tiles = kernels._tiles
    for blocks in (1, 3, 1000):
        monkeypatch.setattr(
            kernels,
            "_tiles",
            lambda *sizes, n=blocks: tiles(*sizes)._replace(blocks=n, splits=-(-slots // (n * tiles(*sizes).slots))),
        )
        check(heads, mask, 2e-5)


def test_large_scores_stay_finite():
    (q, k, v), positions = problem(2, 400, 1, 5, 1, (64, 32), torch.float32)
    check([q * 1e3, k, v], {**positions, "window": None, "num_meta": 0}, 2e-3)


@pytest.mark.parametrize("steps", [1, 40])
def test_what_has_no_kernel_goes_to_torch(steps):
    for dtype in (torch.float64, torch.float32):
        (q, k, v), positions = problem(3, 50, steps, 4, 2, (8, 12), torch.float32)
        mask = {**positions, "window": 5, "num_meta": 2}
        heads: list[Heads] = [x.to(dtype).requires_grad_(dtype == torch.float32) for x in (q, k, v)]
        out = attention(*heads, **mask)
        assert out.requires_grad == (dtype == torch.float32)
        torch.testing.assert_close(
            out.double(), reference.attention(*(x.double() for x in heads), **mask), atol=1e-5, rtol=1e-5
        )


def test_many_splits_are_merged_in_parts(monkeypatch):
    """The largest score lies in the last part, so that what was merged before it must fade."""
    (q, k, v), _ = problem(4, 560, 1, 3, 1, (16, 16), torch.float32)
    k[:, 540:] = 2 * q[:, :, :1]
    places = torch.arange(560, device=DEVICE)[None]
    mask = {"query_positions": places[:, -1:], "key_positions": places, "window": None, "num_meta": 0}
    monkeypatch.setattr(kernels, "_tiles", lambda *sizes: kernels._Tiles(slots=16, blocks=1, splits=35, warps=4))
    check([q[:1], k[:1], v[:1]], mask, 2e-5)
