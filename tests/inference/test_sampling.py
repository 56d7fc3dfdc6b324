"""Sampling: the distribution it draws from, its cuts, its determinism."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hymba.errors import HymbaError
from hymba.inference import Choice, SamplingParams, SamplingState, sample

LOGITS = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
MANY: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.8, "top_k": 7},
    {"top_p": 0.8},
    {"top_p": 0.999999, "min_p": 0.001},
    {"repetition_penalty": 1.2, "logit_bias": ((3, 2.0),)},
]


def states(count: int, seed: int = 0, **params: Any) -> list[SamplingState]:
    """What `count` texts with seeds of their own have before their first token."""
    return [SamplingState(SamplingParams(seed=seed + i, **params), []) for i in range(count)]


def draw(logits: torch.Tensor, count: int = 4000, **params: Any) -> torch.Tensor:
    """The share of each token among `count` draws of one row of logits."""
    tokens = sample(logits.expand(count, -1), states(count, **params))
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
    assert sample(logits, states(2, temperature=0)).tolist() == [1, 0]


def test_min_p_keeps_what_is_likely_beside_the_likeliest() -> None:
    wanted = torch.tensor([5 / 9, 2 / 9, 2 / 9, 0])
    assert torch.allclose(draw(LOGITS, min_p=0.39), wanted, atol=0.03)
    assert draw(LOGITS, min_p=0.41).tolist() == [1, 0, 0, 0]


def test_cuts_beyond_the_likeliest_few_hundred() -> None:
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0))
    for params in ({"top_p": 0.99}, {"top_k": 3000}, {"top_k": 700, "top_p": 0.97}):
        share = draw(logits, 3000, **params)
        ordered, places = logits[0].sort(descending=True)
        kept = params.get("top_k", 5000)
        weights = ordered[:kept].softmax(-1)
        cut = int((weights.cumsum(-1) - weights < params.get("top_p", 1)).sum())
        assert set(share.nonzero()[:, 0].tolist()) <= set(places[:cut].tolist())
        assert (share > 0).sum() > 0.3 * cut


@given(st.lists(st.integers(0, len(MANY) - 1), min_size=1, max_size=6), st.integers(0, 99))
def test_a_row_does_not_depend_on_its_neighbours(chosen: list[int], seed: int) -> None:
    logits = 3 * torch.randn(len(chosen), 700, generator=torch.Generator().manual_seed(seed))
    rows = [SamplingState(SamplingParams(seed=seed + i, **MANY[which]), [3, 4]) for i, which in enumerate(chosen)]
    together = sample(logits, rows).tolist()
    assert together == [int(sample(logits[i : i + 1], [state])) for i, state in enumerate(rows)]


@given(st.integers(0, 2**40), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_a_seed_decides_the_draw(seed: int, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    first, second = (sample(logits, states(3, seed, temperature=0.7, top_k=20, top_p=0.9)) for _ in range(2))
    assert first.dtype == torch.int64
    assert first.equal(second)


def test_a_draw_depends_on_the_index_in_the_text() -> None:
    logits, (state,) = torch.zeros(1, 1000), states(1)
    drawn = []
    for _ in range(20):
        drawn.append(int(sample(logits, [state])))
        state.accept(drawn[-1])
    assert len(set(drawn)) > 15
    assert drawn[:1] == sample(logits, states(1)).tolist()


def test_without_a_seed_draws_differ() -> None:
    texts = {tuple(sample(torch.zeros(8, 1000), [SamplingState(SamplingParams(), []) for _ in range(8)])) for _ in "12"}
    assert len(texts) == 2


def test_penalties_follow_their_formulas() -> None:
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    state = SamplingState(params, [1, 2])
    first = torch.tensor([2.0, 2.0, -2.0, 1.0])
    state.alter(first)
    assert first.tolist() == [2.0, 1.0, -4.0, 1.0]
    for token in (3, 3, 1):
        state.accept(token)
    logits = torch.tensor([2.0, 2.0, -2.0, 1.0])
    state.alter(logits)
    assert logits.tolist() == [2.0, 1.0 - 0.5 - 0.25, -4.0, 0.5 - 0.5 - 0.5]


def test_the_end_is_put_off_and_bias_is_added() -> None:
    params = SamplingParams(temperature=0, min_new_tokens=1, logit_bias=((2, 3.0), (0, -100.0)))
    state, logits = SamplingState(params, [], end_ids=[1]), torch.tensor([[5.0, 9.0, 1.0, 3.0]])
    assert int(sample(logits, [state])) == 2
    state.accept(2)
    assert int(sample(logits, [state])) == 1
    assert logits.tolist() == [[5.0, 9.0, 1.0, 3.0]]
    with pytest.raises(HymbaError, match="logit_bias names token 9, but the vocabulary has 4"):
        sample(logits, states(1, logit_bias=((9, 1.0),)))


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
        ({"min_p": 1.5}, "min_p must be from 0 to 1"),
        ({"min_new_tokens": 200}, "min_new_tokens must be from 0 to max_new_tokens"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty must be above 0 and a float32 number"),
        ({"repetition_penalty": 1e39}, "repetition_penalty must be above 0 and a float32 number"),
        ({"presence_penalty": 1e39}, "presence_penalty must be a finite float32 number"),
        ({"logit_bias": ((5, 1e39),)}, "logit_bias must be of token ids and float32 numbers"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be a finite float32 number"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty must be a finite float32 number"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias must be of token ids and float32 numbers"),
        ({"logprobs": -1}, "logprobs must be 0 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(params: dict[str, float], problem: str) -> None:
    with pytest.raises(HymbaError, match=problem):
        SamplingParams(**params)


@pytest.mark.parametrize("altered", [{}, {"presence_penalty": 1.0}])
def test_nothing_to_draw_is_an_error_for_that_text_alone(altered: dict[str, float]) -> None:
    logits = torch.zeros(3, 5)
    logits[1] = -torch.inf
    tokens = sample(logits, states(3, top_p=0.9, **altered))
    assert tokens[1] == -2
    assert Choice(tokens[::2]).read() == tokens[::2].tolist()
    with pytest.raises(HymbaError, match="no token may follow"):
        Choice(tokens).read()


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e-46},
        {"temperature": 1e-320},
        {"temperature": 1e39},
        {"logit_bias": ((5, 1.7e38), (5, 1.7e38), (5, 1.7e38))},
        {"repetition_penalty": 2.0**-126},
        {"repetition_penalty": 2.0**127},
        {"presence_penalty": -1.7e38, "frequency_penalty": -1.7e38},
        {"presence_penalty": 1.7e38, "frequency_penalty": 1.7e38},
        {"stop_ids": (3072, 10**12, -1), "min_new_tokens": 5},
    ],
)
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_numbers_at_the_edge_of_float32(params: dict[str, Any], top_p: float) -> None:
    logits = torch.randn(1, 3072, generator=torch.Generator().manual_seed(0))
    state = SamplingState(SamplingParams(seed=1, top_p=top_p, **params), [1, 2, 3], params.get("stop_ids", ()))
    for _ in range(4):
        (token,) = Choice(sample(logits, [state])).read()
        assert 0 <= token < 3072
        state.accept(token)


def test_nan_logits_are_told() -> None:
    with pytest.raises(HymbaError, match="NaN logits"):
        Choice(sample(torch.tensor([[1.0, float("nan")]]), states(1, temperature=0))).read()
