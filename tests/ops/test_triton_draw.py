"""Drawing in Triton against the definition, on a GPU or interpreted."""

import pytest
import torch
from drawing import ROWS, SETTINGS, near, settings
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st
from kernels import DEVICE
from torch import Tensor

from hymba.ops.draw import IMPLEMENTATIONS, reference

WIDTHS = (1, 2, 17, 600, 9000)
ours = IMPLEMENTATIONS["triton"]


@how(max_examples=10)
@given(st.lists(ROWS, min_size=1, max_size=3), st.sampled_from(WIDTHS), st.integers(0, 999), st.booleans())
def test_equals_the_definition(rows: list[SETTINGS], width: int, seed: int, coarse: bool) -> None:
    logits = 4 * torch.randn(len(rows), width, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    logits = logits.round() if coarse else logits  # with many equals
    logits[:, 1::5] = -torch.inf
    chosen = settings(rows, DEVICE)
    made, expected = ours(logits, *chosen), reference.draw_tokens(logits, *chosen)
    for i in (made != expected).nonzero()[:, 0].tolist():
        assert int(made[i]) in near(logits[i : i + 1], rows[i])


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_takes_the_definitions_noise(scale: float) -> None:
    """Without cuts nothing can differ."""
    logits = scale * torch.randn(12, 3001, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rows = settings([(1.0, 10**9, 1.0, 0.0, seed * 10**16, seed) for seed in range(12)], DEVICE)
    assert torch.equal(ours(logits, *rows), reference.draw_tokens(logits, *rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_what_it_is_alone(dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(3, 3001, generator=torch.Generator().manual_seed(0))).to(DEVICE, dtype)
    rows = [(0.9, 50, 0.95, 0.01, seed, 9 - seed) for seed in range(3)]
    alone = [ours(logits[i : i + 1], *settings(rows[i : i + 1], DEVICE)) for i in range(3)]
    assert torch.equal(ours(logits, *settings(rows, DEVICE)), torch.cat(alone))


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((4, 40), -torch.inf)
    logits[0, 7], logits[1, 30], logits[1, 31], logits[2, 5] = 1.0, 2.0, 2.0, torch.nan
    logits = logits.to(DEVICE)
    for seed in range(5):
        chosen = ours(logits, *settings([(1.0, 40, 1.0, 0.0, seed, 0)] * 4, DEVICE)).tolist()
        assert (chosen[0], *chosen[2:]) == (7, -1, -2)
        assert chosen[1] in (30, 31)
    assert ours(logits, *settings([(0.0, 40, 1.0, 0.0, 0, 0)] * 4, DEVICE)).tolist() == [7, 30, -1, -2]


def test_the_first_of_equals_stays_in_a_cut() -> None:
    logits = torch.zeros(3, 9).to(DEVICE)
    for cut in ((3, 1.0), (9, 0.3)):
        drawn = set(ours(logits, *settings([(1.0, *cut, 0.0, seed, 0) for seed in range(3)], DEVICE)).tolist())
        assert drawn <= {0, 1, 2}
        assert len(drawn) > 1


def test_extreme_temperatures_and_infinite_logits() -> None:
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def draw(temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
        rows = settings([(temperature, top_k, top_p, 0.0, seed, 0) for seed in range(2)], DEVICE)
        return ours(logits, *rows), reference.draw_tokens(logits, *rows)

    for temperature in (5e-324, 1e-46):
        assert torch.equal(draw(temperature, 10**9, 0.9)[0], logits.argmax(-1))
    assert torch.equal(*draw(1e39, 10**9, 1.0))
    drawn, _ = draw(1e39, 10**9, 0.9)  # cut by id, not by logit: all are equally likely
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < 300
    assert torch.equal(draw(1.0, 0, 1.0)[0], logits.argmax(-1))
    logits[:, 7] = torch.inf
    assert draw(1.0, 50, 0.9)[0].tolist() == [7] * 2


def test_other_tensors_take_the_definition() -> None:
    logits = torch.randn(2, 30, dtype=torch.float64).to(DEVICE)
    rows = settings([(0.7, 9, 0.9, 0.0, 3, 1)] * 2, DEVICE)
    assert torch.equal(ours(logits, *rows), reference.draw_tokens(logits, *rows))
