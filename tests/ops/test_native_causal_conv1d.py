"""The C++ convolution against its definition: every instruction level, outputs, states and all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels import assert_close
from torch import Tensor

from hymba.errors import HymbaError
from hymba.ops import native
from hymba.ops.causal_conv1d import IMPLEMENTATIONS
from hymba.ops.causal_conv1d import native as conv

pytestmark = pytest.mark.usefixtures("poisoned")

Case = tuple[dict[str, Tensor], dict[str, Tensor | None]]


def problem(rows: int, steps: int, width: int, taps: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Inputs in float64 by argument name, strided as the model has them."""
    g = torch.Generator().manual_seed(seed)
    sizes = {"u": (rows, steps, width + 3), "weight": (width, taps), "bias": (width,)}
    sizes["initial_state"] = (1, width, taps - 1)
    inputs = {name: torch.randn(size, generator=g, dtype=torch.float64) for name, size in sizes.items()}
    return inputs | {
        "u": inputs["u"][..., 1:-2],
        "initial_state": inputs["initial_state"].expand(rows, -1, -1),
    }


def run(name: str, inputs: dict[str, Tensor], ragged: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Both outputs and the gradient of every input under random output gradients, by name."""
    leaves = {key: x.detach().requires_grad_() for key, x in inputs.items()}
    out, final = IMPLEMENTATIONS[name](**leaves, **ragged)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).bfloat16().to(x.dtype) for x in (out, final)]
    grads = torch.autograd.grad((out, final), list(leaves.values()), weights, allow_unused=True)
    return {"out": out, "final": final} | {f"d {key}": x for key, x in zip(leaves, grads, strict=True)}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, steps = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 9, 30]))
    width, taps = draw(st.sampled_from([1, 5, 16, 67, 130])), draw(st.integers(2, 4))
    seed = draw(st.integers(0, 2**16))
    inputs = problem(rows, steps, width, taps, seed=seed)
    if draw(st.booleans()):
        del inputs["initial_state"]
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, steps + 1, (rows,), generator=g)
    offsets = torch.randint(0, draw(st.sampled_from([1, 3, 9])), (rows, steps), generator=g)
    return inputs, {
        "lengths": lengths if draw(st.booleans()) else None,
        "document_offsets": offsets if draw(st.booleans()) else None,
    }


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2.0**-8)]
)
def test_equals_the_definition(level: str, dtype: torch.dtype, tolerance: float) -> None:
    @given(cases())
    def check(case: Case) -> None:
        inputs, ragged = {name: x.to(dtype) for name, x in case[0].items()}, case[1]
        wide = {name: x.double() for name, x in inputs.items()}
        ours = run("native", inputs, ragged)
        assert all(x.dtype == dtype for x in ours.values())
        assert_close(ours, run("reference", wide, ragged), tolerance)

    check()


def test_float32_weights_on_bfloat16_inputs(level: str) -> None:
    """Under autocast the weights stay float32, and so do their gradients."""
    inputs = {name: x.float() for name, x in problem(2, 9, 20, 4).items()}
    inputs["u"] = inputs["u"].bfloat16()
    ours = run("native", inputs, {})
    assert (ours["out"].dtype, ours["d weight"].dtype) == (torch.bfloat16, torch.float32)
    assert_close(ours, run("reference", {name: x.double() for name, x in inputs.items()}, {}), 2.0**-7)


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_threads_change_no_bit(level: str, dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) for name, x in problem(3, 40, 333, 4).items()}
    ragged = {"lengths": torch.tensor([40, 21, 0]), "document_offsets": torch.arange(40).expand(3, -1) % 17}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run("native", inputs, ragged))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(result[name], x) for name, x in results[0].items())


@pytest.mark.parametrize("taps", [1, 5])
def test_other_sizes_take_the_torch_path(taps: int) -> None:
    inputs = problem(1, 6, 5, taps)
    assert torch.equal(conv.causal_conv1d(**inputs)[0], IMPLEMENTATIONS["cpu"](**inputs)[0])


@pytest.mark.usefixtures("level")
def test_shapes_that_do_not_fit_are_refused() -> None:
    inputs = problem(2, 3, 5, 4)
    for name in ("u", "bias", "initial_state"):
        with pytest.raises(HymbaError, match="causal_conv1d: "):
            conv.causal_conv1d(**inputs | {name: inputs[name][..., :-1]})


def test_without_gradients_weights_are_read_as_they_are(level: str) -> None:
    @given(cases())
    def check(case: Case) -> None:
        low = {name: x.bfloat16() for name, x in case[0].items()}
        with torch.no_grad():
            out, final = conv.causal_conv1d(**low, **case[1])
        wanted = conv.causal_conv1d(**low, **case[1])
        assert torch.equal(out, wanted[0])
        assert torch.equal(final, wanted[1])

    check()


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_decode_in_place_equals_a_copy(level: str, dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) for name, x in problem(2, 1, 50, 4).items()}
    state = inputs.pop("initial_state").contiguous()
    expected = conv.causal_conv1d(**inputs, initial_state=state)
    out, final = conv.causal_conv1d(**inputs, initial_state=state, final_state=state)
    assert final is state
    assert torch.equal(out, expected[0])
    assert torch.equal(state, expected[1])
