"""The Triton gate against its definition: values and gradients, on a GPU or interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import DEVICE, assert_close
from torch import Tensor

from hymba.ops import gated_silu, use_backend

pytestmark = pytest.mark.usefixtures("poisoned")


def problem(rows: int, width: int, dtype: torch.dtype, seed: int = 0, gap: int = 0) -> tuple[Tensor, Tensor]:
    """The two parts of a wider tensor, `gap` columns between them."""
    g = torch.Generator().manual_seed(seed)
    both = 4 * torch.randn(rows, 3, 2 * width + gap, generator=g, dtype=torch.float64).to(dtype).to(DEVICE)
    return both[..., :width], both[..., width + gap :]


def run(backend: str, inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    gate, up = (x.detach().requires_grad_() for x in inputs)
    with use_backend(backend):
        out = gated_silu(gate, up)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(out, (gate, up), grad.bfloat16().to(out))
    return {"out": out, "d gate": grads[0], "d up": grads[1]}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-9)]
)
def test_equals_the_definition(dtype: torch.dtype, tolerance: float) -> None:
    @settings(max_examples=10)
    @given(st.integers(1, 3), st.sampled_from([1, 3, 17, 100, 1030]), st.integers(0, 2**16), st.sampled_from([0, 5]))
    def check(rows: int, width: int, seed: int, gap: int) -> None:
        gate, up = problem(rows, width, dtype, seed, gap)
        for inputs in ((gate, up), (gate.contiguous(), up.contiguous())):
            ours = run("triton", inputs)
            assert all(x.dtype == dtype for x in ours.values())
            assert_close(ours, run("reference", (gate.double(), up.double())), tolerance)

    check()


def test_bfloat16_rounds_where_torch_rounds() -> None:
    """To the bit, but where the last bit of a float32 sigmoid falls on another side of a rounding."""
    inputs = problem(8, 800, torch.bfloat16)
    ours, theirs = run("triton", inputs), run("reference", inputs)
    for name, x in ours.items():
        assert (x == theirs[name]).double().mean() > 0.995, name


def test_extremes_stay_finite() -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 1e30], device=DEVICE, requires_grad=True)
    with use_backend("triton"):
        out = gated_silu(gate, torch.ones(6, device=DEVICE))
    torch.testing.assert_close(out, torch.nn.functional.silu(gate))
    grads = (torch.autograd.grad(x.sum(), gate)[0] for x in (out, torch.nn.functional.silu(gate)))
    torch.testing.assert_close(*grads)


def test_other_tensors_take_the_definition() -> None:
    with use_backend("triton"):
        assert gated_silu(torch.ones(2, 0, 8, device=DEVICE), torch.ones(2, 0, 8, device=DEVICE)).shape == (2, 0, 8)
        assert gated_silu(torch.ones(2, 8, device=DEVICE), torch.ones(8, device=DEVICE)).shape == (2, 8)
        wide = torch.ones(8, dtype=torch.float64, device=DEVICE)
        assert gated_silu(wide, wide).dtype == torch.float64
