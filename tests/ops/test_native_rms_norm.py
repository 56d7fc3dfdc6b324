"""The C++ norms against their definition: every instruction level, values and all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels import assert_close
from torch import Tensor

from hymba.ops import native, use_backend
from hymba.ops.rms_norm import mean_of_norms, rms_norm

pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 1e-6
WIDTHS = [1, 3, 12, 17, 100, 1600, 3200]


def problem(rows: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs in float64 by argument name: `x` a part of a wider tensor, `y` with a last dimension that is not dense."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, width + 5, generator=g, dtype=torch.float64)[..., 2 : width + 2]
    y = torch.randn(width, rows, 2, generator=g, dtype=torch.float64).movedim(0, -1)
    weights = 1 + torch.rand(2, width, generator=g, dtype=torch.float64)
    return {"x": x, "y": y, "x_weight": weights[0], "y_weight": weights[1]}


def cast(inputs: dict[str, Tensor], dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    dtypes = {name: (weight_dtype or dtype) if name.endswith("weight") else dtype for name in inputs}
    return {name: x.to(dtypes[name]) for name, x in inputs.items()}


def run(backend: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both ops' outputs and the gradients of all inputs under random output gradients, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with use_backend(backend):
        outputs = rms_norm(leaves["x"], leaves["x_weight"], EPS), mean_of_norms(*leaves.values(), EPS)
    results = dict(zip(("norm", "mean"), outputs, strict=True))
    for name, out in list(results.items()):
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grads = torch.autograd.grad(out, list(leaves.values()), grad.bfloat16().to(out.dtype), allow_unused=True)
        results |= {f"{name} d {key}": x for key, x in zip(leaves, grads, strict=True) if x is not None}
    return results


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-13),
        (torch.float32, torch.float32, 2e-6),
        (torch.bfloat16, torch.bfloat16, 2.0**-6),
        (torch.bfloat16, torch.float32, 2.0**-6),
    ],
)
def test_equals_the_definition(level: str, dtype: torch.dtype, weight_dtype: torch.dtype, tolerance: float) -> None:
    @given(st.integers(1, 5), st.sampled_from(WIDTHS), st.integers(0, 2**16))
    def check(rows: int, width: int, seed: int) -> None:
        inputs = cast(problem(rows, width, seed), dtype, weight_dtype)
        ours, wide = run("native", inputs), run("reference", cast(inputs, torch.float64))
        assert ours["norm"].dtype == ours["mean"].dtype == torch.promote_types(dtype, weight_dtype)
        assert all(x.dtype == inputs[name.split(" d ")[1]].dtype for name, x in ours.items() if " d " in name)
        assert_close(ours, wide, tolerance)

    check()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_rounds_where_torch_rounds(level: str, weight_dtype: torch.dtype) -> None:
    """To the bit, but where float32 sums in another order fall on another side of a rounding."""
    inputs = cast(problem(64, 1600), torch.bfloat16, weight_dtype)
    ours, theirs = run("native", inputs), run("reference", inputs)
    for name in ("norm", "mean"):
        assert (ours[name].bfloat16() == theirs[name].bfloat16()).double().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gets_its_own_dtype(level: str, dtype: torch.dtype) -> None:
    """Rounded once, from what the op returns without autocast: as the linear map behind it would round it."""
    inputs = cast(problem(3, 100), dtype, torch.float32)
    plain = run("native", inputs)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run("native", inputs), run("reference", inputs)
    for name in ("norm", "mean"):
        assert ours[name].dtype == theirs[name].dtype == torch.bfloat16
        assert torch.equal(ours[name], plain[name].bfloat16())
    assert_close(ours, theirs, 2.0**-7)


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_threads_change_no_bit(level: str, dtype: torch.dtype) -> None:
    inputs, before, results = cast(problem(700, 100), dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run("native", inputs))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(result[name], x) for name, x in results[0].items())


def test_other_tensors_take_the_definition() -> None:
    empty = rms_norm(torch.ones(2, 0, 8), torch.ones(8), EPS)
    assert empty.shape == (2, 0, 8)
    half = torch.ones(2, 8, dtype=torch.float16)
    assert rms_norm(half, half[0], EPS).dtype == torch.float16
    mixed = mean_of_norms(torch.ones(2, 8), torch.ones(8).bfloat16(), torch.ones(8), torch.ones(8), EPS)
    assert mixed.shape == (2, 8)
