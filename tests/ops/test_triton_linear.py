"""Linear maps of few rows in Triton, alone and with what stands around them, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels import DEVICE
from torch import Tensor

from hymba.ops import projection, use_backend
from hymba.ops.linear import QuantizedWeight, dequantize, reference, round_to_int4, round_to_int8
from hymba.ops.linear import triton as linear

Weight = Tensor | QuantizedWeight
ROUND = {16: lambda weight: weight, 8: round_to_int8, 4: round_to_int4}
# Of one rounding. Triton's interpreter cuts bits off where a GPU rounds to bfloat16.
TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
OPS = ("norm_linear", "norm_gated_linear", "linear_residual", "mean_of_norms_linear")
IMPLEMENTATIONS = (projection.IMPLEMENTATIONS, projection.GATED, projection.RESIDUAL, projection.MEANS)

pytestmark = pytest.mark.usefixtures("poisoned")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quantized(seed: int, outputs: int, inputs: int, bits: int, dtype: torch.dtype) -> Weight:
    weight = ROUND[bits](random(seed, outputs, inputs).to(dtype) * 0.3)
    if isinstance(weight, Tensor):
        return weight.to(DEVICE)
    return QuantizedWeight(weight.values.to(DEVICE), weight.scales.to(DEVICE), inputs)


def wide(weight: Weight) -> Tensor:
    """The matrix in float64."""
    return dequantize(weight, torch.float64) if isinstance(weight, QuantizedWeight) else weight.double()


def check(found: Tensor, expected: Tensor, dtype: torch.dtype, size: Tensor | float = 0.0) -> None:
    """Compare entry by entry; `size` is what sums could have become, were there no signs."""
    assert found.dtype == dtype
    error = (found.double() - expected).abs()
    assert bool((error <= (expected.abs() + size) * TOLERANCE[dtype] + 1e-6).all()), float(error.max())


@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 1, 2, 7, 16, 17, 32, 33]),
    st.sampled_from([1, 12, 63, 64, 100, 130, 200]),
    st.integers(1, 70),
    st.sampled_from([16, 8, 4]),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.booleans(),
)
def test_equals_the_definition(seed, rows, inputs, outputs, bits, dtype, biased):
    x, weight = random(seed, rows, inputs).to(DEVICE, dtype), quantized(seed + 1, outputs, inputs, bits, dtype)
    bias = random(seed + 2, outputs).to(DEVICE, dtype) if biased else None
    found = linear.linear(x, weight, bias)
    exact = x.double() @ wide(weight).T + (0 if bias is None else bias.double())
    # Several rows meet weights that are rounded to the dtype, as the definition's are; torch's product does too.
    is_exact = bits == 16 or (rows == 1 and not linear.why_unfit(x, weight))
    check(found, exact, dtype, 0.01 if is_exact else x.double().abs() @ wide(weight).abs().T)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("inputs", [1600, 5504])
def test_inputs_of_several_steps(inputs, rows, bits):
    x = random(0, rows, inputs).to(DEVICE, torch.bfloat16)
    weight = quantized(1, 5, inputs, bits, torch.bfloat16)
    check(linear.linear(x, weight), x.double() @ wide(weight).T, torch.bfloat16, 20.0 if rows > 1 else 0.1)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_joined_projections_round_as_their_parts_do(op, rows, bits, dtype):
    inputs, outputs = 200, 23
    x, y, stream = (random(i, rows, n).to(DEVICE, dtype) for i, n in enumerate((inputs, inputs, outputs)))
    norm, other = ((1 + 0.2 * random(i, inputs)).to(DEVICE, dtype) for i in (3, 4))
    weight, up = (quantized(i, outputs, inputs, bits, dtype) for i in (5, 6))
    arguments = {
        "norm_linear": (x, norm, 1e-5, weight),
        "norm_gated_linear": (x, norm, 1e-5, weight, up),
        "linear_residual": (x, weight, stream),
        "mean_of_norms_linear": (x, y, norm, other, 1e-5, weight, stream),
    }[op]
    implementations = IMPLEMENTATIONS[OPS.index(op)]
    found, expected = (implementations[name](*arguments) for name in ("triton", "reference"))
    assert found.dtype == dtype
    # Inputs of a size of one and 200 weights of 0.3 make products of 4.2; a gate multiplies two of them.
    cut = 4 if dtype == torch.bfloat16 and DEVICE.type == "cpu" else 1
    tolerance = TOLERANCE[dtype] * (40 if op == "norm_gated_linear" else 10) * cut
    torch.testing.assert_close(found, expected, rtol=2 * TOLERANCE[dtype] * cut, atol=tolerance)
    assert float((found.double() - expected.double()).abs().mean()) < tolerance / 4


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("outputs", [40, 9])
def test_a_row_does_not_depend_on_the_others(outputs, bits):
    """Bit for bit, be they 2 or 32; and where rows are parts of wider ones."""
    wider = random(0, 32, 400).to(DEVICE, torch.float16)
    x, norm = wider[:, 100:300], (1 + 0.2 * random(1, 200)).to(DEVICE, torch.float16)
    weight = quantized(2, outputs, 200, bits, torch.float16)
    with use_backend("triton"):
        whole = projection.norm_linear(x, norm, 1e-5, weight)
        for rows in (2, 3, 16, 17):
            assert torch.equal(projection.norm_linear(x[:rows], norm, 1e-5, weight), whole[:rows])
        assert torch.equal(projection.norm_linear(x[5:7].clone(), norm, 1e-5, weight), whole[5:7])


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("op", OPS)
def test_gradients_come_from_the_parts(op, bits):
    x, y, stream = (random(i, 3, n).to(DEVICE).float() for i, n in enumerate((64, 64, 8)))
    norm, weight = torch.ones(64, device=DEVICE), quantized(4, 8, 64, bits, torch.float32)
    arguments = {
        "norm_linear": (norm, 1e-5, weight),
        "norm_gated_linear": (norm, 1e-5, weight, weight),
        "linear_residual": (weight, stream),
        "mean_of_norms_linear": (y, norm, norm, 1e-5, weight, stream),
    }[op]
    grads = []
    for name in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        IMPLEMENTATIONS[OPS.index(op)][name](leaf, *arguments).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [1, 63, 64, 200, 1100])
def test_dequantisation(inputs, bits):
    weight = quantized(0, 7, inputs, bits, torch.float32)
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(linear.dequantize(weight, dtype), dequantize(weight, dtype))
    found, expected = linear.dequantize(weight, torch.bfloat16), dequantize(weight, torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[torch.bfloat16], atol=0)


def test_rows_of_no_tokens_and_of_many_go_to_torch():
    weight = quantized(0, 5, 64, 8, torch.bfloat16)
    for rows in (0, linear.MOST_ROWS + 1):
        x = random(1, 2, rows, 64).to(DEVICE, torch.bfloat16)
        torch.testing.assert_close(linear.linear(x, weight), reference.linear(x, weight), rtol=0.02, atol=0.02)
