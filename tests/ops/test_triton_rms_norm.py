"""The Triton norms against their definition, on a GPU or interpreted: values and all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import DEVICE, assert_close
from torch import Tensor

from hymba.ops import norm_parts, use_backend
from hymba.ops.backend import usable
from hymba.ops.rms_norm import IMPLEMENTATIONS, mean_of_norms, rms_norm

pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 1e-6
WIDTHS = [1, 3, 17, 100, 300]
PARTS = [[12, 8, 8], [100, 16, 16], [1, 40], [5]]


def problem(rows: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs in float64 by argument name: `x` a part of a wider tensor, `y` with a last dimension that is not dense."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, width + 5, generator=g, dtype=torch.float64).to(DEVICE)[..., 2 : width + 2]
    y = torch.randn(width, rows, 2, generator=g, dtype=torch.float64).to(DEVICE).movedim(0, -1)
    weights = (1 + torch.rand(2, width, generator=g, dtype=torch.float64)).to(DEVICE)
    return {"x": x, "y": y, "x_weight": weights[0], "y_weight": weights[1]}


def cast(inputs: dict[str, Tensor], dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    dtypes = {name: (weight_dtype or dtype) if "weight" in name else dtype for name in inputs}
    return {name: x.to(dtypes[name]) for name, x in inputs.items()}


def gradients(outputs: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of all inputs under random output gradients, by name."""
    results: dict[str, Tensor] = {}
    for name, out in outputs.items():
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grads = torch.autograd.grad(
            out, list(leaves.values()), grad.bfloat16().to(out), allow_unused=True, retain_graph=True
        )
        results |= {f"{name} d {key}": x for key, x in zip(leaves, grads, strict=True) if x is not None}
    return results


def run(backend: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of both ops of whole rows and the gradients of all inputs, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with use_backend(backend):
        outputs = {"norm": rms_norm(leaves["x"], leaves["x_weight"], EPS), "mean": mean_of_norms(*leaves.values(), EPS)}
    return outputs | gradients(outputs, leaves)


def run_parts(backend: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    x, *weights = leaves.values()
    with use_backend(backend):
        outputs = {f"part {i}": out for i, out in enumerate(norm_parts(x, tuple(weights), EPS))}
    return outputs | gradients(outputs, leaves)


DTYPES = [
    (torch.float32, torch.float32, 4e-6),
    (torch.bfloat16, torch.bfloat16, 2.0**-6),
    (torch.bfloat16, torch.float32, 2.0**-6),
    (torch.float16, torch.float16, 2.0**-9),
]


@pytest.mark.parametrize(("dtype", "weight_dtype", "tolerance"), DTYPES)
def test_equals_the_definition(dtype: torch.dtype, weight_dtype: torch.dtype, tolerance: float) -> None:
    @settings(max_examples=8)
    @given(st.sampled_from([1, 2, 13]), st.sampled_from(WIDTHS), st.integers(0, 2**16))
    def check(rows: int, width: int, seed: int) -> None:
        inputs = cast(problem(rows, width, seed), dtype, weight_dtype)
        ours, wide = run("triton", inputs), run("reference", cast(inputs, torch.float64))
        assert ours["norm"].dtype == ours["mean"].dtype == torch.promote_types(dtype, weight_dtype)
        assert all(x.dtype == inputs[name.split(" d ")[1]].dtype for name, x in ours.items() if " d " in name)
        assert_close(ours, wide, tolerance)

    check()


@pytest.mark.parametrize(("dtype", "weight_dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("widths", PARTS)
def test_parts_equal_the_definition(
    widths: list[int], dtype: torch.dtype, weight_dtype: torch.dtype, tolerance: float
) -> None:
    inputs = {"x": problem(11, sum(widths))["x"]}
    inputs |= {f"weight {i}": problem(1, width, i)["x_weight"] for i, width in enumerate(widths)}
    inputs = cast(inputs, dtype, weight_dtype)
    ours, wide = run_parts("triton", inputs), run_parts("reference", cast(inputs, torch.float64))
    assert ours["part 0"].shape == (11, 2, widths[0])
    assert ours["part 0"].dtype == torch.promote_types(dtype, weight_dtype)
    assert_close(ours, wide, tolerance)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_rounds_where_torch_rounds(weight_dtype: torch.dtype) -> None:
    """To the bit, but where float32 sums in another order fall on another side of a rounding."""
    inputs = cast(problem(16, 800), torch.bfloat16, weight_dtype)
    ours, theirs = run("triton", inputs), run("reference", inputs)
    for name in ("norm", "mean"):
        assert (ours[name].bfloat16() == theirs[name].bfloat16()).double().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gets_its_own_dtype(dtype: torch.dtype) -> None:
    """Rounded once, from what the op returns without autocast: as the linear map behind it would round it."""
    inputs = cast(problem(3, 100), dtype, torch.float32)
    plain = run("triton", inputs)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        ours, theirs = run("triton", inputs), run("reference", inputs)
    for name in ("norm", "mean"):
        assert ours[name].dtype == theirs[name].dtype == torch.bfloat16
        assert torch.equal(ours[name], plain[name].bfloat16())
    assert_close(ours, theirs, 2.0**-7)


def test_gradients_of_many_rows_are_summed_by_several_programs() -> None:
    """And a row's own result is the same whatever rows are beside it."""
    inputs = cast(problem(350, 6), torch.float32)
    ours = run("triton", inputs)
    assert_close(ours, run("reference", cast(inputs, torch.float64)), 4e-6)
    alone = run("triton", inputs | {name: inputs[name][17:18] for name in ("x", "y")})
    for name in ("norm", "mean"):
        assert torch.equal(alone[name], ours[name][17:18])


def test_other_tensors_take_the_definition() -> None:
    with use_backend("triton"):
        empty = rms_norm(torch.ones(2, 0, 8, device=DEVICE), torch.ones(8, device=DEVICE), EPS)
        assert empty.shape == (2, 0, 8)
        one = torch.ones(2, 8, device=DEVICE)
        assert mean_of_norms(one, one.bfloat16(), one[0], one[0], EPS).shape == (2, 8)
        assert rms_norm(one.double(), one[0].double(), EPS).dtype == torch.float64
        parts = norm_parts(one, (one[0, :2],) * 4, EPS)
        assert [part.shape[-1] for part in parts] == [2] * 4


def test_parts_are_normed_by_the_implementation_in_force() -> None:
    x, weights = torch.randn(3, 24), (torch.ones(10), torch.ones(14))
    for backend in {*usable(IMPLEMENTATIONS)} - {"triton"}:
        with use_backend(backend):
            for part, made, weight in zip(x.split([10, 14], -1), norm_parts(x, weights, EPS), weights, strict=True):
                assert torch.equal(made, rms_norm(part, weight, EPS))
