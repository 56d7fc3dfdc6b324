"""The Triton scan against its definition: values, states, all gradients; on a CPU interpreted, hence few and small."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import DEVICE, assert_close
from torch import Tensor

from hymba.errors import HymbaError
from hymba.ops.selective_scan import reference
from hymba.ops.selective_scan import triton as scan

pytestmark = pytest.mark.usefixtures("poisoned")

# Of a bfloat16: half its last place. The interpreter cuts where a GPU rounds.
BFLOAT16 = 2.0**-8 if DEVICE.type == "cuda" else 2.0**-7

Inputs = dict[str, Tensor]
Ragged = dict[str, Tensor | None]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments so short that small problems have several; where kernels are interpreted, few channels at a time."""
    cut = scan.Tiles(4, 4, 16, scan.BLOCK) if DEVICE.type == "cpu" else scan.Tiles(64, 8, 32, scan.BLOCK)
    monkeypatch.setattr(scan, "tiles", lambda *sizes: cut)


def problem(rows: int, steps: int, width: int, states: int, *, seed: int = 0) -> Inputs:
    """Inputs in float64 by argument name; steps of all sizes, and strides as the model has them."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return {
        "u": draw(rows, steps, width),
        "dt": 3 * draw(rows, steps, width) - 2,
        "A_log": draw(width, states),
        "B": draw(rows, steps, states),
        "C": draw(rows, steps, states + 2)[..., 1:-1],
        "D": draw(width),
        "dt_bias": draw(width),
        "gate": draw(rows, steps, width + 3)[..., 1:-2],
        "initial_state": draw(1, width, states).expand(rows, -1, -1),
    }


def narrowed(inputs: Inputs, dtype: torch.dtype, device: torch.device = DEVICE) -> Inputs:
    """The inputs in another dtype, strides kept as far as a copy keeps them."""
    return {name: x.to(device, dtype) for name, x in inputs.items()}


def run(scan_with: object, inputs: Inputs, ragged: Ragged) -> dict[str, Tensor]:
    """Both outputs and the gradient of every input under random output gradients, by name."""
    leaves = {key: x.detach().requires_grad_() for key, x in inputs.items()}
    y, final = scan_with(**leaves, **ragged)  # type: ignore[operator]
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g).bfloat16().to(x.device, x.dtype) for x in (y, final)]
    grads = torch.autograd.grad((y, final), list(leaves.values()), weights)
    return {"y": y, "final": final} | {f"d {key}": x for key, x in zip(leaves, grads, strict=True)}


def compare(inputs: Inputs, ragged: Ragged, tolerance: float) -> dict[str, Tensor]:
    """Hold the kernels' outputs and gradients against the definition's in float64; return the kernels'."""
    device_ragged = {name: None if x is None else x.to(DEVICE) for name, x in ragged.items()}
    ours = run(scan.selective_scan, narrowed(inputs, next(iter(inputs.values())).dtype), device_ragged)
    assert_close(
        ours, run(reference.selective_scan, narrowed(inputs, torch.float64, torch.device("cpu")), ragged), tolerance
    )
    return ours


@st.composite
def cases(draw: st.DrawFn, steps: tuple[int, ...] = (1, 2, 16, 19, 35)) -> tuple[Inputs, Ragged]:
    rows, count = draw(st.integers(1, 2)), draw(st.sampled_from(steps))
    width, states = draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([1, 2, 3]))
    if DEVICE.type == "cuda":
        width, states = draw(st.sampled_from([1, 64, 67, 200])), draw(st.sampled_from([1, 3, 8, 13, 16]))
    seed = draw(st.integers(0, 2**16))
    inputs = problem(rows, count, width, states, seed=seed)
    for optional in ("gate", "initial_state"):
        if draw(st.booleans()):
            del inputs[optional]
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, count + 1, (rows,), generator=g)
    offsets = torch.randint(0, draw(st.sampled_from([2, 9])), (rows, count), generator=g)
    return inputs, {
        "lengths": lengths if draw(st.booleans()) else None,
        "document_offsets": offsets if draw(st.booleans()) else None,
    }


@settings(max_examples=6 if DEVICE.type == "cpu" else 40)
@given(cases())
def test_float32_is_within_1e_5_of_float64(case: tuple[Inputs, Ragged]) -> None:
    compare(narrowed(case[0], torch.float32, torch.device("cpu")), case[1], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    inputs = narrowed(problem(2, 18, 5, 2), dtype, torch.device("cpu"))
    ours = compare(inputs, {"lengths": torch.tensor([18, 11])}, BFLOAT16 if dtype == torch.bfloat16 else BFLOAT16 / 8)
    assert ours["y"].dtype == ours["d u"].dtype == ours["d A_log"].dtype == dtype
    assert ours["final"].dtype == torch.float32


def test_mixed_dtypes_compute_in_float32() -> None:
    inputs = narrowed(problem(1, 17, 4, 2), torch.float32, torch.device("cpu"))
    inputs |= {name: inputs[name].bfloat16() for name in ("u", "gate")}
    device = {name: x.to(DEVICE) for name, x in inputs.items()}
    ours, theirs = (
        run(scan.selective_scan, device, {}),
        run(reference.selective_scan, narrowed(inputs, torch.float64), {}),
    )
    assert (ours["y"].dtype, ours["d u"].dtype, ours["d B"].dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert_close(ours, theirs, BFLOAT16)


def test_without_gradients_segments_and_single_steps_agree() -> None:
    """Eight steps and fewer have a kernel of their own: fed step by step it leaves what one scan does."""
    inputs = narrowed(problem(2, 37, 5, 3), torch.float32)
    ragged = {"document_offsets": torch.arange(37, device=DEVICE).expand(2, -1) % 11}
    with torch.no_grad():
        whole, final = scan.selective_scan(**inputs)
        state, pieces = inputs["initial_state"].contiguous(), []
        for first in range(0, 37, 5):
            piece = {name: inputs[name][:, first : first + 5] for name in ("u", "dt", "B", "C", "gate")}
            y, state = scan.selective_scan(**inputs | piece | {"initial_state": state}, final_state=state)
            pieces.append(y)
        packed = scan.selective_scan(**inputs, **ragged)
    assert_close({"y": torch.cat(pieces, 1), "state": state}, {"y": whole, "state": final}, 1e-6)
    expected = reference.selective_scan(**inputs, **ragged)
    assert_close(dict(zip("ys", packed, strict=True)), dict(zip("ys", expected, strict=True)), 1e-5)


@settings(max_examples=12 if DEVICE.type == "cpu" else 40)
@given(cases(steps=(1, 3, 8)))
def test_few_steps_without_gradients(case: tuple[Inputs, Ragged]) -> None:
    inputs, ragged = (
        narrowed(case[0], torch.float32),
        {k: None if v is None else v.to(DEVICE) for k, v in case[1].items()},
    )
    with torch.no_grad():
        ours, theirs = (f.selective_scan(**inputs, **ragged) for f in (scan, reference))
    assert_close(dict(zip("ys", ours, strict=True)), dict(zip("ys", theirs, strict=True)), 1e-5)


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("packed", [False, True])
def test_the_state_is_written_in_place(steps: int, packed: bool) -> None:
    inputs = narrowed(problem(2, steps, 5, 3), torch.float32)
    state = inputs.pop("initial_state").contiguous()
    offsets = torch.arange(steps, device=DEVICE).expand(2, -1) % 7 + 1 if packed else None
    with torch.no_grad():
        expected = scan.selective_scan(**inputs, initial_state=state, document_offsets=offsets)
        y, final = scan.selective_scan(**inputs, initial_state=state, document_offsets=offsets, final_state=state)
    assert final is state
    assert torch.equal(y, expected[0])
    assert torch.equal(state, expected[1])


@pytest.mark.parametrize("steps", [3, 20])
def test_a_step_of_size_zero_leaves_the_state_still_to_the_bit(steps: int) -> None:
    inputs = narrowed(problem(2, steps, 5, 3), torch.float32)
    with torch.no_grad():
        _, final = scan.selective_scan(**inputs, lengths=torch.tensor([0, 0], device=DEVICE))
    assert torch.equal(final, inputs["initial_state"])


@pytest.mark.parametrize("repeats", [1, 3])
def test_extremes_stay_finite_and_right(repeats: int) -> None:
    """Step sizes from none to enormous: decays from one to nothing."""
    inputs = narrowed(problem(1, 8 * repeats, 4, 2), torch.float32)
    sizes = torch.tensor([-1e30, -200.0, -90.0, -30.0, 0.0, 30.0, 1e3, 1e9], device=DEVICE)
    gates = torch.tensor([-1e30, -200.0, -90.0, -1.0, 0.0, 90.0, 1e3, 1e9], device=DEVICE)
    inputs["dt"] = sizes.repeat(repeats)[None, :, None].expand(1, -1, 4)
    inputs["gate"] = gates.repeat(repeats)[None, :, None].expand(1, -1, 4)
    with torch.no_grad():
        ours, theirs = (f.selective_scan(**inputs) for f in (scan, reference))
    for x, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, expected, atol=1e-6, rtol=1e-5)


def test_tiny_steps_keep_their_digits() -> None:
    """Where δ is tiny it is not 1 + e rounded: relative to itself it is as good as any other."""
    inputs = narrowed(problem(1, 1, 4, 2), torch.float32)
    inputs["dt"] = torch.tensor([-14.0, -9.0, -6.0, -3.0], device=DEVICE)[None, None] - inputs["dt_bias"]
    del inputs["initial_state"]
    with torch.no_grad():
        _, ours = scan.selective_scan(**inputs)
    _, theirs = reference.selective_scan(**narrowed(inputs, torch.float64))
    assert float((ours / theirs - 1).abs().max()) < 2e-6


@pytest.mark.parametrize("steps", [3, 9])
def test_not_a_number_is_never_hidden(steps: int) -> None:
    for name in ("u", "dt", "B", "C", "gate"):
        inputs = {key: x.clone() for key, x in narrowed(problem(1, steps, 5, 3), torch.float32).items()}
        inputs[name][0, 1, 0] = torch.nan
        with torch.no_grad():
            y, final = scan.selective_scan(**inputs)
        assert y[0, 1, 0].isnan(), name
        assert final.isnan().any() == (name in ("u", "dt", "B")), name
        assert not y[0, 0].isnan().any()


def test_a_row_s_neighbours_change_none_of_its_bits() -> None:
    inputs = narrowed(problem(3, 21, 5, 2), torch.float32)
    alone = {k: x[1:2] if k in ("u", "dt", "B", "C", "gate", "initial_state") else x for k, x in inputs.items()}
    with torch.no_grad():
        (y, final), (y_alone, final_alone) = scan.selective_scan(**inputs), scan.selective_scan(**alone)
    assert torch.equal(y[1:2], y_alone)
    assert torch.equal(final[1:2], final_alone)


def test_shapes_that_do_not_fit_are_refused() -> None:
    inputs = narrowed(problem(1, 3, 5, 4), torch.float32)
    for name in inputs:
        with pytest.raises(HymbaError, match="selective_scan: "):
            scan.selective_scan(**inputs | {name: inputs[name][..., :-1]})


def test_float64_takes_the_torch_path() -> None:
    inputs = narrowed(problem(1, 3, 5, 4), torch.float64)
    assert_close(run(scan.selective_scan, inputs, {}), run(reference.selective_scan, inputs, {}), 1e-12)


def test_rows_beyond_32_bits_are_left_to_the_torch_path() -> None:
    def inputs(stride: int) -> scan.Inputs:
        x, weights, maps = torch.empty(1, 3, stride, device="meta")[..., :5], torch.empty(5), torch.empty(1, 3, 4)
        return scan.Inputs(x, x, torch.empty(5, 4), maps, maps, weights, weights, x, None, None, None)

    assert inputs(2**30).are_long()
    assert not inputs(2**30 - 1).are_long()
