"""The C++ scan against its definition: every instruction level, values, states and all gradients, bit by thread."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels import assert_close
from torch import Tensor

from hymba.errors import HymbaError
from hymba.ops import native
from hymba.ops.selective_scan import IMPLEMENTATIONS
from hymba.ops.selective_scan import native as scan

pytestmark = pytest.mark.usefixtures("poisoned")

Case = tuple[dict[str, Tensor], dict[str, Tensor | None]]


def problem(rows: int, steps: int, width: int, states: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Inputs in float64 by argument name; steps of all sizes, and strides as the model has them."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return {
        "u": draw(rows, steps, width),
        "dt": 3 * draw(rows, steps, width) - 2,
        "A_log": draw(width, states),
        "B": draw(rows, steps, states),
        "C": draw(rows, steps, states),
        "D": draw(width),
        "dt_bias": draw(width),
        "gate": draw(rows, steps, width + 3)[..., 1:-2],
        "initial_state": draw(1, width, states).expand(rows, -1, -1),
    }


def run(name: str, inputs: dict[str, Tensor], ragged: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Both outputs and the gradient of every input under random output gradients, by name."""
    leaves = {key: x.detach().requires_grad_() for key, x in inputs.items()}
    y, final = IMPLEMENTATIONS[name](**leaves, **ragged)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).bfloat16().to(x.dtype) for x in (y, final)]
    grads = torch.autograd.grad((y, final), list(leaves.values()), weights)
    return {"y": y, "final": final} | {f"d {key}": x for key, x in zip(leaves, grads, strict=True)}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, steps = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 15, 16, 17, 40]))
    width, states = draw(st.sampled_from([1, 5, 16, 67, 130])), draw(st.sampled_from([1, 3, 4, 8, 13, 16, 32]))
    seed = draw(st.integers(0, 2**16))
    inputs = problem(rows, steps, width, states, seed=seed)
    for optional in ("gate", "initial_state"):
        if draw(st.booleans()):
            del inputs[optional]
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, steps + 1, (rows,), generator=g)
    offsets = torch.randint(0, draw(st.sampled_from([2, 9])), (rows, steps), generator=g)
    return inputs, {
        "lengths": lengths if draw(st.booleans()) else None,
        "document_offsets": offsets if draw(st.booleans()) else None,
    }


def test_equals_the_definition_in_float64(level: str) -> None:
    @given(cases())
    def check(case: Case) -> None:
        inputs, ragged = case
        assert_close(run("native", inputs, ragged), run("reference", inputs, ragged), 1e-12)

    check()


def test_float32_is_within_1e_5_of_float64(level: str) -> None:
    @given(cases())
    def check(case: Case) -> None:
        inputs, ragged = {name: x.float() for name, x in case[0].items()}, case[1]
        wide = {name: x.double() for name, x in inputs.items()}
        assert_close(run("native", inputs, ragged), run("reference", wide, ragged), 1e-5)

    check()


def test_bfloat16_is_rounded_once(level: str) -> None:
    @given(cases())
    def check(case: Case) -> None:
        low = {name: x.bfloat16() for name, x in case[0].items()}
        wide = {name: x.double() for name, x in low.items()}
        ours, theirs = run("native", low, case[1]), run("reference", wide, case[1])
        assert ours["y"].dtype == ours["d u"].dtype == ours["d A_log"].dtype == torch.bfloat16
        assert ours["final"].dtype == torch.float32
        assert_close(ours, theirs, 2.0**-8)

    check()


def test_mixed_dtypes_compute_in_float32(level: str) -> None:
    inputs = {name: x.float() for name, x in problem(2, 19, 20, 8).items()}
    inputs |= {name: inputs[name].bfloat16() for name in ("u", "gate")}
    wide = {name: x.double() for name, x in inputs.items()}
    ours = run("native", inputs, {})
    assert (ours["y"].dtype, ours["d u"].dtype, ours["d B"].dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert_close(ours, run("reference", wide, {}), 2.0**-8)


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_threads_change_no_bit(level: str, dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) for name, x in problem(3, 70, 333, 16).items()}
    ragged = {"lengths": torch.tensor([70, 41, 0]), "document_offsets": torch.arange(70).expand(3, -1) % 33}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run("native", inputs, ragged))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(result[name], x) for name, x in results[0].items())


def test_a_step_of_size_zero_leaves_the_state_still_to_the_bit(level: str) -> None:
    inputs = {name: x.float() for name, x in problem(2, 21, 40, 16).items()}
    _, final = scan.selective_scan(**inputs, lengths=torch.tensor([0, 0]))
    assert torch.equal(final, inputs["initial_state"])


def test_extremes_stay_finite_and_right(level: str) -> None:
    """Step sizes from none to enormous: decays from one to nothing."""
    inputs = {name: x.float() for name, x in problem(1, 8, 16, 4).items()}
    sizes = torch.tensor([-1e30, -200.0, -90.0, -30.0, 0.0, 30.0, 1e3, 1e9])
    inputs["dt"] = sizes[None, :, None].expand(1, 8, 16)
    inputs["gate"] = torch.tensor([-1e30, -200.0, -90.0, -1.0, 0.0, 90.0, 1e3, 1e9])[None, :, None].expand(1, 8, 16)
    ours, theirs = (IMPLEMENTATIONS[name](**inputs) for name in ("native", "reference"))
    for x, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, expected, atol=1e-6, rtol=1e-5)


def test_not_a_number_is_never_hidden(level: str) -> None:
    for name in ("u", "dt", "B", "C", "gate"):
        inputs = {key: x.float().clone() for key, x in problem(1, 3, 20, 8).items()}
        inputs[name][0, 1, 0] = torch.nan
        y, final = scan.selective_scan(**inputs)
        assert y[0, 1, 0].isnan(), name
        assert final.isnan().any() == (name in ("u", "dt", "B")), name
        assert not y[0, 0].isnan().any()


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_decode_in_place_equals_a_scan(level: str, dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) for name, x in problem(2, 1, 50, 16).items()}
    state = inputs.pop("initial_state").to(torch.promote_types(dtype, torch.float32)).contiguous()
    expected = scan.selective_scan(**inputs, initial_state=state)
    y, final = scan.selective_scan(**inputs, initial_state=state, final_state=state)
    assert final is state
    assert torch.equal(y, expected[0])
    assert torch.equal(state, expected[1])


@pytest.mark.usefixtures("level")
def test_shapes_that_do_not_fit_are_refused() -> None:
    inputs = problem(2, 3, 5, 4)
    for name in inputs:
        with pytest.raises(HymbaError, match="selective_scan: "):
            scan.selective_scan(**inputs | {name: inputs[name][..., :-1]})


def test_other_dtypes_take_the_torch_path() -> None:
    inputs = {name: x.half() for name, x in problem(1, 3, 5, 4).items()}
    assert "float16" in native.why_unfit(inputs["u"])
    assert torch.equal(scan.selective_scan(**inputs)[0], IMPLEMENTATIONS["cpu"](**inputs)[0])


def test_without_gradients_weights_are_read_as_they_are(level: str) -> None:
    @given(cases())
    def check(case: Case) -> None:
        low = {name: x.bfloat16() for name, x in case[0].items()}
        with torch.no_grad():
            y, final = scan.selective_scan(**low, **case[1])
        wanted = scan.selective_scan(**low, **case[1])
        assert torch.equal(y, wanted[0])
        assert torch.equal(final, wanted[1])

    check()
