"""Drawing in C++ against the definition, and the definition against what is known of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hymba.ops import native
from hymba.ops.draw import draw_tokens, reference
from hymba.ops.draw import native as ours

WIDTHS = (1, 2, 15, 16, 17, 600, 5000)


def settings(rows: list[tuple[float, int, float, float, float]]) -> tuple[Tensor, ...]:
    """Temperature, top_k, top_p, min_p and draw of each row."""
    temperature, top_k, *others = zip(*rows, strict=True)
    top_p, min_p, draws = (torch.tensor(column, dtype=torch.float64) for column in others)
    return torch.tensor(temperature, dtype=torch.float64), torch.tensor(top_k), top_p, min_p, draws


ROWS = st.tuples(
    st.sampled_from([0.0, 1e-30, 0.3, 1.0, 2.5, 40.0]),
    st.sampled_from([1, 2, 7, 100, 10**9]),
    st.sampled_from([1e-9, 0.3, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0]),
    st.floats(0, 1, exclude_max=True),
)


@pytest.mark.parametrize("level", native.available())
@given(st.lists(ROWS, min_size=1, max_size=5), st.sampled_from(WIDTHS), st.integers(0, 999), st.booleans())
def test_native_equals_the_definition(
    level: str, rows: list[tuple[float, int, float, float, float]], width: int, seed: int, coarse: bool
) -> None:
    logits = 4 * torch.randn(len(rows), width, generator=torch.Generator().manual_seed(seed))
    logits = logits.round() if coarse else logits  # with many equals
    logits[:, 1::5] = -torch.inf
    chosen = settings(rows)
    with native.use_level(level):
        made = ours.draw_tokens(logits, *chosen)
    expected = reference.draw_tokens(logits, *chosen)
    for i in (made != expected).nonzero()[:, 0].tolist():  # a draw may lie where two tokens meet, to a rounding
        near = [
            int(reference.draw_tokens(logits[i : i + 1], *(x[i : i + 1] for x in chosen[:4]), draw.view(1)))
            for draw in (chosen[4][i] + torch.tensor([-1e-5, 1e-5]).double()).clamp(0, 1 - 1e-9)
        ]
        assert int(made[i]) in near


@pytest.mark.parametrize("level", native.available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_rows_change_nothing(level: str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(6, 3001, generator=draw)).to(dtype)
    rows = [(0.9, 50, 0.95, 0.01, float(u)) for u in torch.rand(6, generator=draw)]
    before, found = torch.get_num_threads(), []
    with native.use_level(level):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(ours.draw_tokens(logits, *settings(rows)))
        torch.set_num_threads(before)
        alone = [ours.draw_tokens(logits[i : i + 1], *settings(rows[i : i + 1])) for i in range(6)]
    assert torch.equal(*found)
    assert torch.equal(found[0], torch.cat(alone))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_what_is_forbidden_is_not_drawn_and_nan_is_told(backend: str) -> None:
    run = reference.draw_tokens if backend == "reference" else ours.draw_tokens
    logits = torch.full((3, 40), -torch.inf)
    logits[0, 7], logits[1, 30], logits[1, 31], logits[2, 5] = 1.0, 2.0, 2.0, torch.nan
    for draw in (0.0, 0.49, 0.51, 1 - 2**-48):
        chosen = run(logits, *settings([(1.0, 40, 1.0, 0.0, draw)] * 3)).tolist()
        assert chosen == [7, 30 if draw < 0.5 else 31, -1]
    assert run(logits, *settings([(0.0, 40, 1.0, 0.0, 0.9)] * 3)).tolist() == [7, 30, -1]


def test_the_first_of_equals_wins_a_cut() -> None:
    logits = torch.zeros(1000, 9)
    rows = settings([(1.0, 3, 1.0, 0.0, i / 1000) for i in range(1000)])
    for run in (draw_tokens, reference.draw_tokens):
        assert torch.bincount(run(logits, *rows), minlength=9).tolist() == [334, 333, 333, 0, 0, 0, 0, 0, 0]
