"""Sampling: the distribution it draws from, its cuts, its determinism."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hymba.errors import HymbaError
from hymba.inference import SamplingParams, sample

LOGITS = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()


def draw(logits: torch.Tensor, count: int = 4000, seed: int = 0, **params: float) -> torch.Tensor:
    """The share of each token among `count` draws of one row of logits."""
    chosen = SamplingParams(**params)
    tokens = sample(logits.expand(count, -1), chosen, torch.Generator().manual_seed(seed))
    return torch.bincount(tokens, minlength=logits.shape[-1]) / count


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({}, [0.5, 0.2, 0.2, 0.1]),
        ({"temperature": 0.5}, [25 / 34, 4 / 34, 4 / 34, 1 / 34]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 9}, [0.5, 0.2, 0.2, 0.1]),
        ({"top_p": 0.45}, [1, 0, 0, 0]),
        ({"top_p": 0.85}, [5 / 9, 2 / 9, 2 / 9, 0]),
        ({"top_k": 3, "top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"temperature": 1e-30}, [1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(params: dict[str, float], wanted: list[float]) -> None:
    assert torch.allclose(draw(LOGITS, **params), torch.tensor(wanted).float(), atol=0.03)


def test_top_k_keeps_k_even_among_equals() -> None:
    assert int((draw(torch.zeros(1, 10), top_k=3) > 0).sum()) == 3


def test_temperature_zero_takes_the_likeliest_of_each_row() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 5.0, -1.0]])
    assert sample(logits, SamplingParams(temperature=0), torch.Generator()).tolist() == [1, 0]


@given(st.integers(0, 2**40), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_a_seed_decides_the_draw(seed: int, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.9, seed=seed)
    first, second = (sample(logits, params, params.generator(torch.device("cpu"))) for _ in range(2))
    assert first.dtype == torch.int64
    assert first.equal(second)


def test_without_a_seed_draws_differ() -> None:
    params = SamplingParams()
    draws = {tuple(sample(torch.zeros(8, 1000), params, params.generator(torch.device("cpu"))).tolist()) for _ in "12"}
    assert len(draws) == 2


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, not 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_k": 0}, "top_k must be 1 or more"),
        ({"top_p": 0.0}, "top_p must lie above 0"),
        ({"top_p": 1.5}, "top_p must lie above 0"),
        ({"seed": -1}, "seed must be a whole number"),
    ],
)
def test_numbers_out_of_range_are_refused(params: dict[str, float], problem: str) -> None:
    with pytest.raises(HymbaError, match=problem):
        SamplingParams(**params)


def test_nan_logits_are_told() -> None:
    with pytest.raises(HymbaError, match="NaN logits"):
        sample(torch.tensor([[1.0, float("nan")]]), SamplingParams(temperature=0), torch.Generator())
