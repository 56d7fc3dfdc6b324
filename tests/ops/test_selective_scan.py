"""The fast scan against its definition, and the definition against the properties the model relies on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hymba.ops.backend import usable, use_backend
from hymba.ops.selective_scan import IMPLEMENTATIONS, cpu, selective_scan

FAST = [name for name in usable(IMPLEMENTATIONS) if name != "reference"]


@pytest.fixture(params=FAST)
def fast(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even small inputs into several panels of several blocks, the last of them partial."""
    monkeypatch.setattr(cpu, "_BLOCK_ELEMENTS", 48)
    monkeypatch.setattr(cpu, "_STEP_ELEMENTS", 16)
    monkeypatch.setattr(cpu, "_PANEL_BLOCKS", 2)


def problem(
    rows: int, steps: int, width: int, states: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Random inputs of a scan, by argument name, all requiring gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "u": draw(rows, steps, width),
        "dt": draw(rows, steps, width),
        "A_log": draw(width, states),
        "B": draw(rows, steps, states),
        "C": draw(rows, steps, states),
        "D": draw(width),
        "dt_bias": draw(width),
        "gate": draw(rows, steps, width),
        "initial_state": draw(rows, width, states),
    }
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def run(backend: str, inputs: dict[str, Tensor], **ragged: Tensor | None) -> dict[str, Tensor]:
    """Both outputs and the gradient of every input under random output gradients, by name."""
    with use_backend(backend):
        y, final = selective_scan(**inputs, **ragged)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (y, final)]
    grads = torch.autograd.grad((y, final), list(inputs.values()), weights)
    return {
        "y": y,
        "final_state": final,
        **{f"d {name}": grad for name, grad in zip(inputs, grads, strict=True)},
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        torch.testing.assert_close(
            ours[name],
            expected,
            atol=tolerance,
            rtol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@st.composite
def scans(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    rows, steps = draw(st.integers(1, 5)), draw(st.integers(1, 19))
    width, states = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**16))
    inputs = problem(rows, steps, width, states, seed=seed)
    for optional in ("gate", "initial_state"):
        if draw(st.booleans()):
            del inputs[optional]
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, steps + 1, (rows,), generator=generator)
    offsets = torch.randint(0, draw(st.sampled_from([2, 6])), (rows, steps), generator=generator)
    return inputs, {
        "lengths": lengths if draw(st.booleans()) else None,
        "document_offsets": offsets if draw(st.booleans()) else None,
    }


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.usefixtures("small_blocks")
def test_equals_the_definition(backend: str) -> None:
    @given(scans())
    def check(case: tuple[dict[str, Tensor], dict[str, Tensor | None]]) -> None:
        inputs, ragged = case
        assert_same(run(backend, inputs, **ragged), run("reference", inputs, **ragged), 1e-11)

    check()


def test_equals_the_definition_in_whole_blocks(fast: str) -> None:
    inputs = problem(3, 70, 160, 16, dtype=torch.float32)
    lengths, offsets = torch.tensor([70, 41, 0]), torch.arange(70).expand(3, -1) % 33
    ragged = {"lengths": lengths, "document_offsets": offsets}
    assert_same(run(fast, inputs, **ragged), run("reference", inputs, **ragged), 5e-5)


def test_gradients_are_the_slopes(fast: str, small_blocks: None) -> None:
    inputs = problem(2, 5, 3, 2)
    names = list(inputs)
    ragged = {
        "lengths": torch.tensor([5, 3]),
        "document_offsets": torch.tensor([[3, 4, 0, 1, 2], [0, 1, 0, 0, 0]]),
    }

    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**dict(zip(names, values, strict=True)), **ragged)

    with use_backend(fast):
        assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


def test_gradient_of_a_shared_initial_state(fast: str, small_blocks: None) -> None:
    """The meta tokens' state is one tensor, seen by every row and every packed document."""
    inputs = problem(3, 9, 4, 2)
    offsets = {"document_offsets": torch.arange(9).expand(3, -1) % 4}
    shared = inputs["initial_state"][:1].detach().requires_grad_()
    grads = []
    for backend in (fast, "reference"):
        with use_backend(backend):
            y, final = selective_scan(**inputs | {"initial_state": shared.expand(3, -1, -1)}, **offsets)
        grads.append(torch.autograd.grad(y.square().sum() + final.square().sum(), shared)[0])
    torch.testing.assert_close(grads[0], grads[1])


def test_parts_that_need_no_gradient(fast: str) -> None:
    inputs = problem(2, 6, 3, 2)
    detached = {name: x.detach() for name, x in inputs.items()}
    with use_backend(fast):
        y, _ = selective_scan(**detached | {"u": inputs["u"]})
        assert selective_scan(**detached)[0].grad_fn is None
    (grad,) = torch.autograd.grad(y.sum(), inputs["u"])
    whole, _ = selective_scan(**inputs)
    torch.testing.assert_close(grad, torch.autograd.grad(whole.sum(), inputs["u"])[0])


def test_bfloat16_computes_in_float32(fast: str) -> None:
    inputs = problem(2, 24, 8, 4, dtype=torch.bfloat16)
    wide = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    low, high = run(fast, inputs), run("reference", wide)
    assert low["y"].dtype == torch.bfloat16
    assert low["final_state"].dtype == torch.float32
    for name, value in high.items():
        expected = value if name == "final_state" else value.bfloat16()
        # Output gradients are rounded on one side only, hence more than one unit in the last place.
        torch.testing.assert_close(
            low[name], expected, atol=0.06, rtol=0.02, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_autocast_does_not_round_inside(fast: str) -> None:
    inputs = problem(2, 12, 8, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = run(fast, inputs)
    assert_same(under, run(fast, inputs), 0.0)


@pytest.mark.parametrize("backend", usable(IMPLEMENTATIONS))
@pytest.mark.parametrize("cuts", [[1] * 11, [4, 7], [10, 1]])
def test_chunks_equal_the_whole(backend: str, cuts: list[int], small_blocks: None) -> None:
    inputs = {name: x.detach() for name, x in problem(2, 11, 4, 3).items()}
    with use_backend(backend):
        whole, final = selective_scan(**inputs)
        pieces, state = [], inputs["initial_state"]
        per_step = {name: inputs[name].split(cuts, dim=1) for name in ("u", "dt", "B", "C", "gate")}
        for k in range(len(cuts)):
            chunk = {name: parts[k] for name, parts in per_step.items()}
            y, state = selective_scan(**inputs | chunk | {"initial_state": state})
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("backend", usable(IMPLEMENTATIONS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", ["all", "none"])
def test_one_step_without_gradients(backend: str, dtype: torch.dtype, given: str) -> None:
    inputs = {name: x.detach() for name, x in problem(3, 1, 5, 4, dtype=dtype).items()}
    ragged = {"lengths": torch.tensor([1, 0, 1]), "document_offsets": torch.tensor([[0], [0], [4]])}
    if given == "none":
        del inputs["gate"], inputs["initial_state"]
        ragged = {}
    before = {name: x.clone() for name, x in inputs.items()}
    with use_backend("reference"):
        expected = selective_scan(**inputs, **ragged)
    with use_backend(backend), torch.no_grad():
        y, final = selective_scan(**inputs, **ragged)
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(final, expected[1])
    assert all(torch.equal(inputs[name], x) for name, x in before.items())


@pytest.mark.parametrize("backend", usable(IMPLEMENTATIONS))
def test_packed_documents_equal_each_alone(backend: str, small_blocks: None) -> None:
    inputs = {name: x.detach() for name, x in problem(1, 12, 4, 3).items()}
    sizes = [5, 1, 6]
    offsets = torch.cat([torch.arange(size) for size in sizes])[None]
    with use_backend(backend):
        packed, final = selective_scan(**inputs, document_offsets=offsets)
        per_step = {name: inputs[name].split(sizes, dim=1) for name in ("u", "dt", "B", "C", "gate")}
        alone = [selective_scan(**inputs | {n: x[k] for n, x in per_step.items()}) for k in range(len(sizes))]
    torch.testing.assert_close(packed, torch.cat([y for y, _ in alone], dim=1))
    torch.testing.assert_close(final, alone[-1][1])


@pytest.mark.parametrize("backend", usable(IMPLEMENTATIONS))
def test_padding_leaves_the_state_still(backend: str, small_blocks: None) -> None:
    inputs = {name: x.detach() for name, x in problem(3, 7, 4, 3).items()}
    lengths = [7, 3, 0]
    with use_backend(backend):
        # Offsets of zero in the padding must not restart a finished row.
        offsets = torch.where(torch.arange(7) < torch.tensor(lengths)[:, None], 5, 0)
        y, final = selective_scan(**inputs, lengths=torch.tensor(lengths), document_offsets=offsets)
        for row, length in enumerate(lengths):
            if length == 0:
                torch.testing.assert_close(final[row], inputs["initial_state"][row])
                continue
            batched = {n: inputs[n][row : row + 1, :length] for n in ("u", "dt", "B", "C", "gate")}
            state = inputs["initial_state"][row : row + 1]
            alone, state = selective_scan(**inputs | batched | {"initial_state": state})
            torch.testing.assert_close(y[row, :length], alone[0])
            torch.testing.assert_close(final[row], state[0])


@pytest.mark.parametrize("backend", usable(IMPLEMENTATIONS))
def test_a_case_worked_by_hand(backend: str) -> None:
    """One channel, one state, step size softplus(0) = ln 2, A = −1: the state halves at each step."""
    one, zero = torch.ones(1, 3, 1, dtype=torch.float64), torch.zeros(1, 3, 1, dtype=torch.float64)
    with use_backend(backend):
        y, final = selective_scan(
            one, zero, zero[0, :1], one, 2 * one, one[0, 0], dt_bias=zero[0, 0], initial_state=8 * one[:, :1]
        )
    ln2 = torch.tensor(2.0, dtype=torch.float64).log()
    states = torch.stack((4 + ln2, 2 + 1.5 * ln2, 1 + 1.75 * ln2))
    torch.testing.assert_close(y.flatten(), 2 * states + 1)
    torch.testing.assert_close(final.flatten(), states[-1:])


@pytest.mark.parametrize("backend", usable(IMPLEMENTATIONS))
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # at float32 the state given is too wide for the op
def test_the_final_state_goes_where_it_is_told(backend: str, steps: int, dtype: torch.dtype) -> None:
    inputs = {name: x.detach() for name, x in problem(2, steps, 5, 4, dtype=dtype).items()}
    place = torch.zeros(2, 4, 5, dtype=torch.float64).transpose(1, 2)
    with use_backend(backend), torch.no_grad():
        expected = selective_scan(**inputs)
        y, final = selective_scan(**inputs, final_state=place)
    assert final is place
    assert torch.equal(y, expected[0])
    assert torch.equal(place.to(dtype), expected[1])
