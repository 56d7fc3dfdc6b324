"""The Triton convolution against its definition, on a GPU or interpreted: outputs, states and all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import DEVICE, assert_close
from torch import Tensor

from hymba.errors import HymbaError
from hymba.ops.causal_conv1d import IMPLEMENTATIONS, reference

pytestmark = pytest.mark.usefixtures("poisoned")

Case = tuple[dict[str, Tensor], dict[str, Tensor | None]]


def problem(rows: int, steps: int, width: int, taps: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Inputs in float64 by argument name, strided as the model has them."""
    g = torch.Generator().manual_seed(seed)
    sizes = {"u": (rows, steps, width + 3), "weight": (width, taps), "bias": (width,)}
    sizes["initial_state"] = (1, width, taps - 1)
    inputs = {name: torch.randn(size, generator=g, dtype=torch.float64).to(DEVICE) for name, size in sizes.items()}
    return inputs | {
        "u": inputs["u"][..., 1:-2],
        "initial_state": inputs["initial_state"].expand(rows, -1, -1),
    }


def conv(name: str, *, u: Tensor, **rest: Tensor | None) -> tuple[Tensor, Tensor]:
    return IMPLEMENTATIONS[name](u, **rest)


def run(name: str, inputs: dict[str, Tensor], ragged: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Both outputs and the gradient of every input under random output gradients, by name."""
    leaves = {key: x.detach().requires_grad_() for key, x in inputs.items()}
    out, final = conv(name, **leaves, **ragged)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).bfloat16().to(x) for x in (out, final)]
    grads = torch.autograd.grad((out, final), list(leaves.values()), weights, allow_unused=True)
    return {"out": out, "final": final} | {f"d {key}": x for key, x in zip(leaves, grads, strict=True)}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, steps = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 8, 17, 37]))
    width, taps = draw(st.sampled_from([1, 67, 130])), draw(st.integers(2, 4))
    seed = draw(st.integers(0, 2**16))
    inputs = problem(rows, steps, width, taps, seed=seed)
    if draw(st.booleans()):
        del inputs["initial_state"]
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, steps + 1, (rows,), generator=g).to(DEVICE)
    offsets = torch.randint(0, draw(st.sampled_from([1, 3, 9])), (rows, steps), generator=g).to(DEVICE)
    return inputs, {
        "lengths": lengths if draw(st.booleans()) else None,
        "document_offsets": offsets if draw(st.booleans()) else None,
    }


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 4e-6), (torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-9)]
)
def test_equals_the_definition(dtype: torch.dtype, tolerance: float) -> None:
    @settings(max_examples=12 if dtype == torch.float32 else 3)
    @given(cases())
    def check(case: Case) -> None:
        inputs, ragged = {name: x.to(dtype) for name, x in case[0].items()}, case[1]
        wide = {name: x.double() for name, x in inputs.items()}
        ours = run("triton", inputs, ragged)
        assert all(x.dtype == dtype for x in ours.values())
        assert_close(ours, run("reference", wide, ragged), tolerance)

    check()


def test_sums_are_rounded_before_silu() -> None:
    inputs = {name: x.bfloat16() for name, x in problem(2, 40, 60, 4).items()}
    wide = {name: x.float() for name, x in inputs.items()}
    history = reference.with_history(wide["u"], 4, wide["initial_state"]).transpose(1, 2)
    sums = torch.nn.functional.conv1d(history, wide["weight"][:, None], wide["bias"], groups=60)
    expected = torch.nn.functional.silu(sums.bfloat16()).transpose(1, 2)
    assert (run("triton", inputs, {})["out"] == expected).double().mean() > 0.999


def test_float32_weights_on_bfloat16_inputs() -> None:
    """Under autocast the weights stay float32, and so do their gradients."""
    inputs = {name: x.float() for name, x in problem(2, 9, 20, 4).items()}
    inputs["u"] = inputs["u"].bfloat16()
    ours = run("triton", inputs, {})
    assert (ours["out"].dtype, ours["d weight"].dtype) == (torch.bfloat16, torch.float32)
    assert_close(ours, run("reference", {name: x.double() for name, x in inputs.items()}, {}), 2.0**-7)


@pytest.mark.parametrize("taps", [1, 5])
def test_other_sizes_take_the_torch_path(taps: int) -> None:
    inputs = {name: x.float() for name, x in problem(1, 6, 5, taps).items()}
    assert torch.equal(conv("triton", **inputs)[0], conv("cpu", **inputs)[0])
    inputs = {name: x.double() for name, x in problem(1, 6, 5, 4).items()}
    assert torch.equal(conv("triton", **inputs)[0], conv("cpu", **inputs)[0])


def test_shapes_that_do_not_fit_are_refused() -> None:
    inputs = {name: x.float() for name, x in problem(2, 3, 5, 4).items()}
    for name in ("u", "bias", "initial_state"):
        with pytest.raises(HymbaError, match="causal_conv1d: "):
            conv("triton", **inputs | {name: inputs[name][..., :-1]})


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("steps", [1, 5, 18])
@pytest.mark.parametrize("ragged", ["", "lengths", "document_offsets"])
def test_the_state_is_written_in_place(taps: int, steps: int, ragged: str) -> None:
    """Into one layer's part of all layers' states, as a cache holds them."""
    inputs = {name: x.bfloat16() for name, x in problem(3, steps, 70, taps).items()}
    lengths, offsets = torch.tensor([steps, steps // 2, 0]), torch.arange(steps).expand(3, -1) % 4
    rest = {
        name: x.to(DEVICE) for name, x in {"lengths": lengths, "document_offsets": offsets}.items() if name == ragged
    }
    states = torch.randn(2, 3, 70, taps - 1).bfloat16().to(DEVICE)
    inputs["initial_state"] = states[1]
    with torch.no_grad():
        expected = conv("reference", **inputs, **rest)
        apart = conv("triton", **inputs, **rest)
        out, final = conv("triton", **inputs, **rest, final_state=states[1])
    assert final.data_ptr() == states[1].data_ptr()
    assert torch.equal(out, apart[0])
    assert torch.equal(final, apart[1])
    assert torch.equal(states[1], expected[1])


def test_a_row_is_what_it_is_alone() -> None:
    inputs = {name: x.bfloat16() for name, x in problem(3, 20, 70, 4).items()}
    with torch.no_grad():
        out, final = conv("triton", **inputs)
        for i in range(3):
            one = {name: x if name in ("weight", "bias") else x[i : i + 1] for name, x in inputs.items()}
            alone = conv("triton", **one)
            assert torch.equal(alone[0], out[i : i + 1])
            assert torch.equal(alone[1], final[i : i + 1])
