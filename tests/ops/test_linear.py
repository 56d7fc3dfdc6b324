"""Linear maps: the quantised formats, and the C++ kernels at every level against the definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hymba.errors import HymbaError
from hymba.ops import native as kernels
from hymba.ops.backend import usable
from hymba.ops.linear import (
    GROUP,
    IMPLEMENTATIONS,
    QuantizedWeight,
    cpu,
    dequantize,
    linear,
    native,
    reference,
    round_to_int4,
    round_to_int8,
)

LEVELS = kernels.available()
KINDS = [
    (32, torch.float32),
    (16, torch.bfloat16),
    (8, torch.bfloat16),
    (8, torch.float32),
    (4, torch.bfloat16),
    (4, torch.float32),
]
SHAPES = [
    *[(1, 1), (3, 5), (31, 2), (63, 33), (64, 4), (65, 31), (100, 67), (127, 40), (129, 32), (192, 64)],
    *[(1600, 37), (4480, 33), (8300, 5), (8300, 34)],
]
ROUND = {32: Tensor.float, 16: Tensor.bfloat16, 8: round_to_int8, 4: round_to_int4}


def problem(seed: int, rows: int, inputs: int, outputs: int, bits: int) -> tuple[Tensor, Tensor | QuantizedWeight]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=g) * torch.rand(rows, 1, generator=g) * 4
    return x, ROUND[bits](torch.randn(outputs, inputs, generator=g) * 0.1)


def exact_and_error(x: Tensor, weight: Tensor | QuantizedWeight) -> tuple[Tensor, Tensor]:
    """The product in float64, and how far a kernel may be off: activations to 15 bits, sums in float32, the result."""
    wide = dequantize(weight, torch.float64) if isinstance(weight, QuantizedWeight) else weight.double()
    x64 = x.double()
    wanted = F.linear(x64, wide)
    error = F.linear(x64.abs(), wide.abs()) * 2e-6 + wanted.abs() * torch.finfo(x.dtype).eps
    if isinstance(weight, QuantizedWeight):
        error += x64.abs().amax(1, keepdim=True) / 32767 * 0.501 * wide.abs().sum(1)
    return wanted, error


@pytest.fixture
def poisoned(monkeypatch):
    """Every output buffer starts as NaN: an entry that no kernel writes shows."""
    empty, new_empty = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("bits", "dtype"), KINDS)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_kernels_equal_the_definition(level, bits, dtype, inputs, outputs, poisoned):
    for rows in range(1, 18):
        x, weight = problem(rows, rows, inputs, outputs, bits)
        x = x.to(dtype)
        with kernels.use_level(level):
            out = native.linear(x, weight)
        wanted, error = exact_and_error(x, weight)
        if rows > native.MOST_ROWS:  # torch's product, with the dequantised weight rounded to the dtype
            error = error + 0.1 * x.double().abs().sum(1, keepdim=True) * 4 * torch.finfo(dtype).eps
        assert out.dtype == dtype
        assert bool(((out.double() - wanted).abs() <= error).all()), rows


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("bits", "dtype"), KINDS)
def test_a_batch_equals_its_rows_and_threads_change_nothing(level, bits, dtype):
    x, weight = problem(0, 11, 1000, 31, bits)  # fewer outputs than the matrix units take
    x, threads = x.to(dtype), torch.get_num_threads()
    with kernels.use_level(level):
        alone = torch.cat([native.linear(row[None], weight) for row in x])
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                for rows in (1, 2, 3, 4, 8, 11):
                    assert torch.equal(native.linear(x[:rows], weight), alone[:rows])
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("bits", "dtype"), KINDS)
@pytest.mark.parametrize("inputs", [70, 2100, 5504])
def test_many_rows_equal_few(level, bits, dtype, inputs):
    """Tiles, stretches of weights and blocks of rows and inputs change nothing."""
    x, weight = problem(5, 803, inputs, 37, bits)
    x = x.to(dtype)
    with kernels.use_level(level):
        if not kernels.is_batch_invariant(dtype, bits < 16):
            pytest.skip("torch multiplies many rows here")
        many = native.linear(x, weight)
        for first, last in ((0, 1), (5, 7), (400, 416), (760, 803)):
            assert torch.equal(native.linear(x[first:last], weight), many[first:last])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("bits", "dtype"), KINDS)
@pytest.mark.parametrize("shape", [(100, 3001), (1600, 700)])
def test_threads_change_nothing_where_a_call_is_worth_several(level, bits, dtype, shape):
    x, weight = problem(4, 8, *shape, bits)
    x, threads = x.to(dtype), torch.get_num_threads()
    with kernels.use_level(level):
        try:
            for rows in (1, 8):
                torch.set_num_threads(1)
                alone = native.linear(x[:rows], weight)
                for count in (2, 3):
                    torch.set_num_threads(count)
                    assert torch.equal(native.linear(x[:rows], weight), alone)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("outputs", [3, 33])
@pytest.mark.parametrize("inputs", [20_000, 140_000])
def test_sums_do_not_overflow(level, inputs, outputs):
    weight = QuantizedWeight(torch.full((outputs, inputs), -128, dtype=torch.int8), torch.ones(outputs), inputs)
    x = torch.ones(3, inputs) * torch.tensor([[1.0], [-3.0], [2.0]])
    with kernels.use_level(level):
        torch.testing.assert_close(native.linear(x, weight), reference.linear(x, weight))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_itself_alone(level, bits, bad):
    for rows, outputs in ((3, 9), (8, 40)):
        x, weight = problem(3, rows, 100, outputs, bits)
        x[1, 77] = bad
        with kernels.use_level(level):
            out = native.linear(x, weight)
        assert not out[1].isfinite().any()
        assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [1, 63, 64, 200])
def test_dequantisation(level, bits, inputs, poisoned):
    _, weight = problem(1, 1, inputs, 70, bits)
    with kernels.use_level(level):
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(native.dequantize(weight, dtype), dequantize(weight, dtype))


@given(st.integers(0, 2**31), st.integers(1, 200), st.integers(1, 9), st.booleans())
def test_rounding_is_as_close_as_the_format_allows(seed, inputs, outputs, zero_group):
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    if zero_group:
        weight[:, :GROUP] = 0
    eight, four = round_to_int8(weight), round_to_int4(weight)
    assert bool(((dequantize(eight, torch.float32) - weight).abs() <= eight.scales[:, None] * 0.5001).all())
    step = four.scales.float().abs().repeat_interleave(GROUP, dim=1)[:, :inputs]
    # +8 is not representable, and the scale itself is rounded.
    assert bool(((dequantize(four, torch.float32) - weight).abs() <= step * 1.04).all())


def test_given_scales_are_used():
    weight = torch.tensor([[1.0, -2.0, 0.4]])
    assert round_to_int8(weight, torch.tensor([0.5])).values.tolist() == [[2, -4, 1]]
    four = round_to_int4(weight, torch.tensor([[0.5]]))
    assert dequantize(four, torch.float32).tolist() == [[1.0, -2.0, 0.5]]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_and_a_bias(bits, dtype):
    x, weight = problem(2, 40, 700, 3001, bits)
    x, bias = x.to(dtype).unflatten(0, (2, 20)), torch.randn(3001).to(dtype)
    wanted, tolerance = reference.linear(x, weight, bias), 0.1 if dtype == torch.bfloat16 else 2e-3
    for rows in (x, x[:, :3]):
        for implementation in (cpu.linear, native.linear):
            out = implementation(rows, weight, bias)
            torch.testing.assert_close(out, wanted[:, : rows.shape[1]], atol=tolerance, rtol=0.02)


@pytest.mark.parametrize("name", usable(IMPLEMENTATIONS))
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_gradients_flow_to_the_input(name, bits):
    x, weight = problem(2, 3, 130, 11, bits)
    x = x.to(weight.dtype if isinstance(weight, Tensor) else x.dtype).requires_grad_()
    IMPLEMENTATIONS[name](x, weight).float().sum().backward()
    wide = dequantize(weight, torch.float32) if isinstance(weight, QuantizedWeight) else weight.float()
    torch.testing.assert_close(x.grad.float(), wide.sum(0).expand(3, -1), atol=0.02, rtol=0.02)


def test_bad_input_is_told():
    with pytest.raises(HymbaError, match="the weight takes 64 inputs, x has 63"):
        linear(torch.zeros(1, 63), round_to_int4(torch.ones(2, 64)))
    with pytest.raises(HymbaError, match="not a quantised weight of 65 inputs"):
        QuantizedWeight(torch.zeros(2, 64, dtype=torch.int8), torch.ones(2), 65)
