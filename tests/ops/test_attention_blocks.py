"""Attention of many queries on the matrix unit against the reference in float64: values, gradients, masks, 8 bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hymba.ops import native as kernels
from hymba.ops.attention import QuantizedHeads, blocks, cpu, native, reference, round_heads
from hymba.ops.attention.reference import Mask

# The levels of instructions that the kernel runs at; tests that take no level hold for torch's kernels too.
TILED = []
for _level in kernels.available():
    with kernels.use_level(_level):
        TILED += [_level] * blocks.fits(torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16))


def problem(
    seed: int, steps: int, stored: int, num_meta: int, heads: tuple[int, int], widths: tuple[int, int], packed: bool
) -> tuple[list[Tensor], dict[str, Tensor | int]]:
    """Two ragged rows; keys in scrambled order with empty slots between, or documents packed into each row."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, steps + 1, (2, 1), generator=g)
    past = torch.zeros(2, 1, dtype=torch.int64) if packed else torch.randint(0, stored + 1, (2, 1), generator=g)
    columns = torch.arange(steps)
    documents = torch.randint(0, 4, (2, steps), generator=g).sort(dim=1).values
    starts = torch.searchsorted(documents, documents)
    offsets = columns - starts if packed else columns + past
    queries = torch.where(columns < lengths, offsets + num_meta, -1)
    held = torch.where(torch.arange(stored) < past, torch.arange(stored) + num_meta, -1)
    keys = torch.cat((torch.arange(num_meta).expand(2, -1), held, queries), dim=1)
    order = torch.randperm(keys.shape[1], generator=g)
    sizes = (steps, heads[0], widths[0]), (keys.shape[1], heads[1], widths[0]), (keys.shape[1], heads[1], widths[1])
    arguments = {"query_positions": queries, "key_positions": keys[:, order], "num_meta": num_meta}
    if packed:
        key_documents = torch.cat((torch.full((2, num_meta + stored), -1), documents), dim=1)
        arguments |= {"query_documents": documents, "key_documents": key_documents[:, order]}
    return [torch.randn(2, *size, generator=g).bfloat16() for size in sizes], arguments


def differentiated(implementation, heads: list[Tensor], grad: Tensor, mask: Mask) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in heads]
    out = implementation(*leaves, **mask)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves)]


def assert_near(ours: Tensor, wanted: Tensor, slack: float = 0) -> None:
    """Weights, outputs and gradients are each rounded to bfloat16 once or twice."""
    error = (ours.double() - wanted).norm()
    assert float(error) <= 6e-3 * float(wanted.norm()) + 1e-4 + slack


@pytest.mark.parametrize("tiled", TILED)
@settings(deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(2, 140),
    st.integers(0, 90),
    st.integers(0, 5),
    st.one_of(st.none(), st.integers(0, 60)),
    st.sampled_from([(1, 1), (3, 1), (10, 2), (4, 4), (7, 1)]),
    st.sampled_from([(64, 128), (6, 10), (48, 16)]),
    st.booleans(),
)
def test_values_and_gradients_equal_the_reference(tiled, seed, steps, stored, num_meta, window, heads, widths, packed):
    tensors, arguments = problem(seed, steps, stored, num_meta, heads, widths, packed)
    mask = {**arguments, "window": window}
    grad = torch.randn(2, steps, heads[0], widths[1], generator=torch.Generator().manual_seed(seed)).bfloat16()
    with kernels.use_level(tiled):
        results = differentiated(native.attention, tensors, grad, mask)
        with torch.no_grad():
            assert torch.equal(native.attention(*tensors, **mask), results[0])
    wanted = differentiated(reference.attention, [x.double() for x in tensors], grad, mask)
    torchs = differentiated(cpu.attention, tensors, grad, mask)
    for ours, theirs, exact in zip(results, torchs, wanted, strict=True):
        # Few keys leave small differences of large numbers: as exact as torch's kernels, which round alike, is enough.
        slack = 1.5 * float((theirs.double() - exact).norm())
        assert_near(ours, exact, slack)
    assert not results[0][arguments["query_positions"] < 0].any()


@pytest.mark.parametrize("window", [None, 100])
def test_quantised_heads_over_several_blocks(window):
    (q, k, v), arguments = problem(0, 200, 150, 3, (10, 2), (64, 128), packed=False)
    mask = {**arguments, "window": window}
    wide = [x.float() * 3 for x in (k, v)]
    rounded = [round_heads(x) for x in wide]
    out = native.attention(q, *rounded, **mask)
    assert_near(out, reference.attention(q.double(), *rounded, **mask))
    halves = [QuantizedHeads(x.values[:, ::2], x.scales[:, ::2]) for x in rounded]
    mask["key_positions"] = mask["key_positions"][:, ::2]
    assert_near(native.attention(q, *halves, **mask), reference.attention(q.double(), *halves, **mask))


@pytest.mark.parametrize("tiled", TILED)
def test_threads_change_nothing_and_memory_may_hold_anything(tiled, poisoned):
    tensors, arguments = problem(5, 170, 60, 4, (5, 1), (64, 128), packed=False)
    mask = {**arguments, "window": 50}
    grad, threads, results = torch.randn(2, 170, 5, 128), torch.get_num_threads(), []
    empty = (arguments["key_positions"] < 0)[:, :, None, None]
    tensors[1:] = [torch.where(empty, float("nan"), x) for x in tensors[1:]]
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with kernels.use_level(tiled):
                results.append(differentiated(native.attention, tensors, grad, mask))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert bool(one.isfinite().all())


def test_large_scores_stay_finite():
    (q, k, v), arguments = problem(7, 90, 0, 2, (5, 1), (64, 32), packed=False)
    out = native.attention(q * 300, k, v, **arguments, window=None)
    wanted = reference.attention((q * 300).double(), k.double(), v.double(), **arguments, window=None)
    assert_near(out, wanted)


def test_without_the_kernel_torch_serves():
    (q, k, v), arguments = problem(8, 40, 10, 2, (4, 2), (16, 16), packed=False)
    with kernels.use_level("portable"):
        assert not blocks.fits(q)
        out = native.attention(q, k, v, **arguments, window=9)
    wanted = reference.attention(q.double(), k.double(), v.double(), **arguments, window=9)
    assert_near(out, wanted)
