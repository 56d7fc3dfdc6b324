"""Drawing in Triton against the definition, on a GPU or interpreted."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st
from kernels import DEVICE
from torch import Tensor

from hymba.ops.draw import IMPLEMENTATIONS, reference

WIDTHS = (1, 2, 17, 600, 9000)
ours = IMPLEMENTATIONS["triton"]


def settings(rows: list[tuple[float, int, float, float, float]]) -> tuple[Tensor, ...]:
    """Temperature, top_k, top_p, min_p and draw of each row."""
    temperature, top_k, *others = zip(*rows, strict=True)
    top_p, min_p, draws = (torch.tensor(column, dtype=torch.float64).to(DEVICE) for column in others)
    return (
        torch.tensor(temperature, dtype=torch.float64).to(DEVICE),
        torch.tensor(top_k).to(DEVICE),
        top_p,
        min_p,
        draws,
    )


ROWS = st.tuples(
    st.sampled_from([0.0, 1e-30, 0.3, 1.0, 2.5, 40.0]),
    st.sampled_from([1, 2, 7, 100, 10**9]),
    st.sampled_from([1e-9, 0.3, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0]),
    st.floats(0, 1, exclude_max=True),
)


@how(max_examples=10)
@given(st.lists(ROWS, min_size=1, max_size=3), st.sampled_from(WIDTHS), st.integers(0, 999), st.booleans())
def test_equals_the_definition(
    rows: list[tuple[float, int, float, float, float]], width: int, seed: int, coarse: bool
) -> None:
    logits = 4 * torch.randn(len(rows), width, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    logits = logits.round() if coarse else logits  # with many equals
    logits[:, 1::5] = -torch.inf
    chosen = settings(rows)
    made, expected = ours(logits, *chosen), reference.draw_tokens(logits, *chosen)
    for i in (made != expected).nonzero()[:, 0].tolist():  # a draw may lie where two tokens meet, to a rounding
        near = [
            int(reference.draw_tokens(logits[i : i + 1], *(x[i : i + 1] for x in chosen[:4]), draw.view(1)))
            for draw in (chosen[4][i] + torch.tensor([-1e-5, 1e-5]).double().to(DEVICE)).clamp(0, 1 - 1e-9)
        ]
        assert int(made[i]) in near


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_what_it_is_alone(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 3001, generator=draw)).to(DEVICE, dtype)
    rows = [(0.9, 50, 0.95, 0.01, float(u)) for u in torch.rand(3, generator=draw)]
    alone = [ours(logits[i : i + 1], *settings(rows[i : i + 1])) for i in range(3)]
    assert torch.equal(ours(logits, *settings(rows)), torch.cat(alone))


def test_what_is_forbidden_is_not_drawn_and_nan_is_told() -> None:
    logits = torch.full((3, 40), -torch.inf)
    logits[0, 7], logits[1, 30], logits[1, 31], logits[2, 5] = 1.0, 2.0, 2.0, torch.nan
    logits = logits.to(DEVICE)
    for draw in (0.0, 0.49, 0.51, 1 - 2**-48):
        chosen = ours(logits, *settings([(1.0, 40, 1.0, 0.0, draw)] * 3)).tolist()
        assert chosen == [7, 30 if draw < 0.5 else 31, -1]
    assert ours(logits, *settings([(0.0, 40, 1.0, 0.0, 0.9)] * 3)).tolist() == [7, 30, -1]


def test_the_first_of_equals_wins_a_cut() -> None:
    logits, draws = torch.zeros(1, 9).to(DEVICE), (0.1, 0.5, 0.9)
    assert [int(ours(logits, *settings([(1.0, 3, 1.0, 0.0, u)]))) for u in draws] == [0, 1, 2]
    assert [int(ours(logits, *settings([(1.0, 9, 0.3, 0.0, u)]))) for u in draws] == [0, 1, 2]


def test_other_tensors_take_the_definition() -> None:
    logits = torch.randn(2, 30, dtype=torch.float64).to(DEVICE)
    rows = settings([(0.7, 9, 0.9, 0.0, 0.3)] * 2)
    assert torch.equal(ours(logits, *rows), reference.draw_tokens(logits, *rows))
