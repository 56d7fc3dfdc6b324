"""The Triton rotation against its definition, on a GPU or interpreted: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import DEVICE, assert_close
from torch import Tensor

from hymba.ops import apply_rotary, rotary_tables, use_backend

pytestmark = pytest.mark.usefixtures("poisoned")


def problem(
    rows: int, steps: int, heads: int, width: int, dtype: torch.dtype, table_rows: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """A part of a wider projection, and the tables of some positions."""
    g = torch.Generator().manual_seed(rows + steps)
    wide = torch.randn(rows, steps, heads * width + 7, generator=g, dtype=torch.float64).to(dtype).to(DEVICE)
    positions = torch.randint(0, 9000, (table_rows, steps), generator=g).to(DEVICE)
    x = wide[..., 3:-4].unflatten(-1, (heads, width))
    return x, *rotary_tables(positions, width, 10000.0, dtype)


def run(backend: str, x: Tensor, cos: Tensor, sin: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    with use_backend(backend):
        out = apply_rotary(x, cos, sin)
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(out.movedim(3, 0).shape, generator=g, dtype=torch.float64).to(out).movedim(0, 3)
    return {"out": out, "d x": torch.autograd.grad(out, x, grad)[0]}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.0), (torch.float16, 0.0)])
def test_equals_the_definition(dtype: torch.dtype, tolerance: float) -> None:
    """In 16 bits to the bit."""

    @settings(max_examples=10)
    @given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.sampled_from([2, 6, 34, 64, 200]))
    def check(rows: int, steps: int, heads: int, width: int) -> None:
        for table_rows in {1, rows}:
            inputs = problem(rows, steps, heads, width, dtype, table_rows)
            ours = run("triton", *inputs)
            assert all(x.dtype == dtype for x in ours.values())
            assert_close(ours, run("reference", *inputs), tolerance)

    check()


def test_wider_tables_are_rounded_first() -> None:
    x, cos, sin = problem(2, 5, 3, 34, torch.float32)
    narrow = run("triton", x.bfloat16(), cos.bfloat16(), sin.bfloat16())
    for backend in ("triton", "reference"):
        assert_close(run(backend, x.bfloat16(), cos, sin), narrow, 0)


def test_the_gradient_turns_back() -> None:
    x, cos, sin = problem(2, 9, 5, 64, torch.float32)
    with use_backend("triton"):
        assert_close({"x": apply_rotary(apply_rotary(x, cos, sin), cos, -sin)}, {"x": x}, 1e-6)


def test_other_tensors_take_the_definition() -> None:
    x, cos, sin = problem(1, 4, 2, 8, torch.float32)
    with use_backend("triton"):
        assert apply_rotary(x[:, :0], cos[:, :0], sin[:, :0]).shape == (1, 0, 2, 8)
        torch.testing.assert_close(
            apply_rotary(x, cos[:, :1], sin[:, :1]),
            apply_rotary(x, cos[:, :1].expand_as(cos), sin[:, :1].expand_as(sin)),
        )
        cos.requires_grad_()
        assert torch.autograd.grad(apply_rotary(x, cos, sin).sum(), cos)[0].shape == cos.shape
