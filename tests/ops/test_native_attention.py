"""Decode attention in C++ at every level against the reference in float64."""

import pytest
import torch
from torch import Tensor

from hymba.ops import native as kernels
from hymba.ops.attention import cpu, native, reference

LEVELS = kernels.available()
DTYPES = [torch.float32, torch.bfloat16]


def problem(
    seed: int, slots: int, heads: int, groups: int, widths: tuple[int, int], dtype: torch.dtype, rows: int = 3
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Rows that hold different numbers of tokens, in slots in any order, some of them empty; the last row is padding.

    Keys and values are slices of larger buffers, as the cache gives them.
    """
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, 1, heads, widths[0], generator=g).to(dtype)
    k, v = (torch.randn(rows, slots + 3, groups, width, generator=g).to(dtype)[:, :slots] for width in widths)
    held = torch.randint(1, slots + 1, (rows, 1), generator=g)
    order = torch.stack([torch.randperm(slots, generator=g) for _ in range(rows)])
    keys = torch.where(order < held, order, -1)
    queries = held - 1
    queries[-1] = -1
    return [q, k, v], {"query_positions": queries, "key_positions": keys}


@pytest.fixture
def poisoned(monkeypatch):
    """Every output buffer starts as NaN: an entry that no kernel writes shows."""
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 0, 5, 200])
@pytest.mark.parametrize(
    ("slots", "heads", "groups", "widths"),
    [
        (1, 1, 1, (1, 1)),
        (5, 5, 1, (64, 128)),
        (127, 4, 4, (6, 10)),
        (128, 25, 5, (64, 128)),
        (131, 12, 2, (32, 64)),
        (700, 14, 2, (48, 40)),
        (1153, 25, 5, (64, 128)),
    ],
)
def test_decoding_equals_the_reference(level, dtype, window, slots, heads, groups, widths, poisoned):
    for num_meta in (0, 3):
        heads_of, positions = problem(slots + num_meta, slots, heads, groups, widths, dtype)
        with kernels.use_level(level):
            out = native.attention(*heads_of, **positions, window=window, num_meta=num_meta)
        wide = reference.attention(*(x.double() for x in heads_of), **positions, window=window, num_meta=num_meta)
        assert out.dtype == dtype
        assert not out[-1].any()
        tolerance = 2e-5 if dtype == torch.float32 else 1e-3
        torch.testing.assert_close(out.double(), wide, atol=tolerance, rtol=torch.finfo(dtype).eps + 1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unseen_slots_are_never_read(level, dtype):
    (q, k, v), positions = problem(0, 300, 10, 2, (64, 128), dtype)
    mask = {**positions, "window": 70, "num_meta": 4}
    with kernels.use_level(level):
        wanted = native.attention(q, k, v, **mask)
        seen = reference.visible(**mask)[:, 0, :, None, None]
        hidden = [torch.where(seen, x, float("nan")) for x in (k, v)]
        assert torch.equal(native.attention(q, *hidden, **mask), wanted)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_parts_of_a_buffer_may_be_empty(level, dtype):
    (q, k, v), _ = problem(0, 900, 25, 5, (64, 128), dtype)
    slots = torch.arange(900).repeat(3, 1)
    empty = torch.stack([slots[0] >= 300, slots[0] < 600, (slots[0] + 100) % 300 < 200])
    mask = {"query_positions": torch.full((3, 1), 899), "key_positions": slots.masked_fill(empty, -1), "window": 700}
    with kernels.use_level(level):
        out = native.attention(q, k, v, **mask, num_meta=20)
    wide = reference.attention(q.double(), k.double(), v.double(), **mask, num_meta=20)
    torch.testing.assert_close(out.double(), wide, atol=1e-3, rtol=torch.finfo(dtype).eps + 1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_other_rows_change_nothing(level, dtype):
    (q, k, v), positions = problem(1, 900, 25, 5, (64, 128), dtype)
    mask, threads = {"window": None, "num_meta": 4}, torch.get_num_threads()
    with kernels.use_level(level):
        try:
            outputs = []
            for count in (1, 2):
                torch.set_num_threads(count)
                outputs.append(native.attention(q, k, v, **positions, **mask))
        finally:
            torch.set_num_threads(threads)
        first = {name: x[:1] for name, x in positions.items()}
        alone = native.attention(q[:1], k[:1], v[:1], **first, **mask)
    assert torch.equal(*outputs)
    assert torch.equal(alone, outputs[0][:1])


@pytest.mark.parametrize("level", LEVELS)
def test_large_scores_stay_finite(level):
    (q, k, v), positions = problem(2, 400, 5, 1, (64, 32), torch.float32)
    with kernels.use_level(level):
        out = native.attention(q * 1e3, k, v, **positions, window=None, num_meta=0)
    wanted = reference.attention(*(x.double() for x in (q * 1e3, k, v)), **positions, window=None, num_meta=0)
    torch.testing.assert_close(out.double(), wanted, atol=2e-3, rtol=2e-3)


def test_what_has_no_kernel_goes_to_torch():
    (q, k, v), positions = problem(3, 20, 4, 2, (8, 12), torch.float32)
    mask = {**positions, "window": 5, "num_meta": 2}
    wanted = cpu.attention(q, k, v, **mask)
    leaf = q.clone().requires_grad_()
    out = native.attention(leaf, k, v, **mask)
    out.sum().backward()
    assert torch.equal(out, wanted)
    assert leaf.grad is not None
    documents = torch.zeros_like(positions["query_positions"]), torch.zeros_like(positions["key_positions"])
    packed = native.attention(q, k, v, **mask, query_documents=documents[0], key_documents=documents[1])
    torch.testing.assert_close(packed, wanted)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 5, 200])
@pytest.mark.parametrize(("heads", "groups", "widths"), [(25, 5, (64, 128)), (6, 3, (20, 10)), (7, 1, (64, 32))])
def test_many_queries_equal_each_alone_and_the_reference(level, dtype, window, heads, groups, widths, poisoned):
    """Keys in any order, some slots empty, some queries padding."""
    g, steps, slots = torch.Generator().manual_seed(6), 75, 300
    q = torch.randn(2, steps, heads, widths[0], generator=g).to(dtype)
    k, v = (torch.randn(2, slots, groups, width, generator=g).to(dtype) for width in widths)
    order = torch.stack([torch.randperm(slots, generator=g) for _ in range(2)])
    queries = torch.stack([torch.arange(200, 200 + steps), torch.arange(100, 100 + steps)])
    queries[1, 60:] = -1
    mask = {"key_positions": torch.where(order < 280, order, -1), "window": window, "num_meta": 4}
    with kernels.use_level(level):
        if level == "portable" or (dtype == torch.bfloat16 and kernels.has_matrix_units()):
            pytest.skip("other kernels serve many queries here")
        out = native.attention(q, k, v, query_positions=queries, **mask)
        for t in (0, 7, 8, 74):
            alone = native.attention(q[:, t : t + 1], k, v, query_positions=queries[:, t : t + 1], **mask)
            assert torch.equal(alone, out[:, t : t + 1])
    wide = reference.attention(q.double(), k.double(), v.double(), query_positions=queries, **mask)
    assert not out[1, 60:].any()
    tolerance = 2e-5 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(out.double(), wide, atol=tolerance, rtol=torch.finfo(dtype).eps + 1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("positions", [[[3, 3, 1]], [[0, 1, 1 << 50]]])
def test_positions_that_the_kernel_does_not_serve_go_to_torch(level, positions):
    """Two keys at one position, or one far away."""
    q, k, v = torch.randn(1, 1, 2, 8), torch.randn(1, 3, 1, 8), torch.randn(1, 3, 1, 8)
    keys = torch.tensor(positions)
    mask = {"query_positions": keys.amax(1, keepdim=True), "key_positions": keys, "window": None, "num_meta": 0}
    with kernels.use_level(level):
        out = native.attention(q, k, v, **mask)
    torch.testing.assert_close(out, reference.attention(q, k, v, **mask))
