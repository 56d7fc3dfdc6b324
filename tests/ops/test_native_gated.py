"""The C++ gate against its definition: every instruction level, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels import assert_close
from torch import Tensor

from hymba.ops import gated_silu, native, use_backend

pytestmark = pytest.mark.usefixtures("poisoned")


def problem(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The two halves of a wider tensor."""
    g = torch.Generator().manual_seed(seed)
    both = 4 * torch.randn(rows, 3, 2 * width, generator=g, dtype=torch.float64).to(dtype)
    return both[..., :width], both[..., width:]


def run(backend: str, inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    gate, up = (x.detach().requires_grad_() for x in inputs)
    with use_backend(backend):
        out = gated_silu(gate, up)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(out, (gate, up), grad.bfloat16().to(out.dtype))
    return {"out": out, "d gate": grads[0], "d up": grads[1]}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2.0**-7)]
)
def test_equals_the_definition(level: str, dtype: torch.dtype, tolerance: float) -> None:
    @given(st.integers(1, 5), st.sampled_from([1, 3, 12, 17, 100, 1600]), st.integers(0, 2**16))
    def check(rows: int, width: int, seed: int) -> None:
        gate, up = problem(rows, width, dtype, seed)
        ours = run("native", (gate, up))
        assert all(x.dtype == dtype for x in ours.values())
        assert_close(ours, run("reference", (gate.double(), up.double())), tolerance)

    check()


def test_bfloat16_rounds_where_torch_rounds(level: str) -> None:
    """To the bit, but where the last bit of a float32 sigmoid falls on another side of a rounding."""
    inputs = problem(64, 1600, torch.bfloat16)
    ours, theirs = run("native", inputs), run("reference", inputs)
    assert (ours["out"] == theirs["out"]).double().mean() > 0.999


def test_extremes_stay_finite(level: str) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 1e30])
    torch.testing.assert_close(gated_silu(gate, torch.ones(6)), torch.nn.functional.silu(gate))


def test_threads_change_no_bit(level: str) -> None:
    inputs, before, results = problem(300, 100, torch.bfloat16), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run("native", inputs))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(result[name], x) for name, x in results[0].items())


def test_other_tensors_take_the_definition() -> None:
    assert gated_silu(torch.ones(2, 0, 8), torch.ones(2, 0, 8)).shape == (2, 0, 8)
    assert gated_silu(torch.ones(2, 8), torch.ones(8)).shape == (2, 8)
    assert gated_silu(torch.ones(8).half(), torch.ones(8).half()).dtype == torch.float16
    assert native.DTYPES.index(gated_silu(torch.ones(8).bfloat16(), torch.ones(8)).dtype) == 0
