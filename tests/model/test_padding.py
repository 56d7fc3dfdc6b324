"""Padding has no effect, whatever stands there, NaN included; and a document is a run of one number."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from micro import micro_model
from torch import Tensor

from hymba.model import Hymba, quantize
from hymba.ops import use_backend
from hymba.ops.backend import missing

MODEL = micro_model(head_dim=16, v_head_dim=32, d_inner=96, hidden_size=48).requires_grad_(False)
BACKENDS = [name for name in ("reference", "cpu", "native") if name not in missing()]
EVERY_BACKEND = [*BACKENDS, *([] if "triton" in missing() else [pytest.param("triton", marks=pytest.mark.slow)])]
NAN = float("nan")

seeds = st.integers(0, 2**31)


def random_tokens(seed: int, rows: int, steps: int) -> Tensor:
    return torch.randint(0, 61, (rows, steps), generator=torch.Generator().manual_seed(seed))


def padding(lengths: Tensor, steps: int) -> Tensor:
    return (torch.arange(steps) >= lengths[:, None])[..., None]


@given(seeds, st.lists(st.integers(0, 12), min_size=1, max_size=4), st.sampled_from([NAN, float("inf")]))
def test_padded_embeddings_have_no_effect(seed: int, row_lengths: list[int], value: float) -> None:
    lengths, steps = torch.tensor(row_lengths), 12
    clean = MODEL.embed_tokens(random_tokens(seed, len(row_lengths), steps))
    dirty = clean.masked_fill(padding(lengths, steps), value)
    wanted, out = (MODEL(embeddings=x, lengths=lengths, output_hidden_states=True) for x in (clean, dirty))
    assert all(map(torch.equal, wanted.hidden_states, out.hidden_states))
    assert all(not x.masked_select(padding(lengths, steps)).any() for x in out.hidden_states)


@pytest.mark.parametrize(
    ("backend", "bits", "weights"),
    [*product(BACKENDS, [None, 8], [None, 4]), pytest.param("triton", 8, None, marks=pytest.mark.slow)],
)
def test_no_state_and_no_later_token_is_reached(backend: str, bits: int | None, weights: int | None) -> None:
    model = micro_model(head_dim=16, v_head_dim=32, d_inner=96, hidden_size=48).requires_grad_(False)
    if weights is not None:
        quantize(model, weights)
    draw = torch.Generator().manual_seed(0)
    chunks = [torch.randn(2, n, 48, generator=draw) for n in (7, 9, 1)]
    counts = [torch.tensor(n) for n in ([7, 3], [2, 9], [0, 1])]

    def run(value: float) -> list[Tensor]:
        cache, out = model.allocate_cache(2, 30, bits), []
        for x, lengths in zip(chunks, counts, strict=True):
            x = x.masked_fill(padding(lengths, x.shape[1]), value)
            out.append(model(embeddings=x, cache=cache, lengths=lengths).hidden)
        return [*out, cache.conv_state, cache.ssm_state]

    with use_backend(backend):
        for clean, dirty in zip(run(0.0), run(NAN), strict=True):
            torch.testing.assert_close(dirty, clean)
            assert dirty.isfinite().all()


def test_a_row_of_the_embedding_that_is_no_number_has_no_effect() -> None:
    model, lengths = micro_model(), torch.tensor([4, 2])
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 60, 60]])
    wanted = model(tokens, lengths=lengths).hidden.detach()
    with torch.no_grad():
        model.embed_tokens.weight[60] = NAN
    assert torch.equal(model(tokens, lengths=lengths).hidden, wanted)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_no_gradient_comes_from_padding(backend: str) -> None:
    model = micro_model(head_dim=16, v_head_dim=32, d_inner=96, hidden_size=48)
    lengths, clean = torch.tensor([6, 2]), torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(0))
    found = []
    for value in (0.0, NAN):
        x = clean.masked_fill(padding(lengths, 6), value).requires_grad_()
        with use_backend(backend):
            loss = model(embeddings=x, lengths=lengths).hidden.square().sum()
            found.append(torch.autograd.grad(loss, (x, *model.parameters()), allow_unused=True))
    for clean_grad, grad in zip(*found, strict=True):
        if clean_grad is not None:
            torch.testing.assert_close(grad, clean_grad)
    assert not found[1][0].masked_select(padding(lengths, 6)).any()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_a_number_that_comes_again_is_another_document(backend: str) -> None:
    tokens = random_tokens(0, 2, 14)
    again = torch.tensor([[0] * 4 + [1] * 5 + [0] * 5, [3] * 2 + [-1] * 2 + [3] * 2 + [-1] * 8])
    with use_backend(backend):
        out = MODEL(tokens, documents=again).hidden
        for row, cuts in enumerate(([0, 4, 9, 14], [0, 2, 4, 6, 14])):
            for start, end in pairwise(cuts):
                alone = MODEL(tokens[row : row + 1, start:end]).hidden[0]
                torch.testing.assert_close(out[row, start:end], alone, atol=1e-4, rtol=1e-4)


@given(seeds, st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6)), min_size=1, max_size=6), st.integers(0, 4))
def test_any_runs_with_padding_equal_each_alone(seed: int, runs: list[tuple[int, int]], padded: int) -> None:
    numbers = [number for number, size in runs for _ in range(size)]
    tokens = random_tokens(seed, 1, len(numbers) + padded)
    documents = torch.tensor([[*numbers, *[0] * padded]])
    out = MODEL(tokens, documents=documents, lengths=torch.tensor([len(numbers)])).hidden[0]
    starts = [i for i in range(len(numbers)) if i == 0 or numbers[i] != numbers[i - 1]]
    for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True):
        torch.testing.assert_close(out[start:end], MODEL(tokens[:, start:end]).hidden[0], atol=1e-4, rtol=1e-4)
    assert not out[len(numbers) :].any()


def test_the_same_in_a_quantised_model() -> None:
    model: Hymba = quantize_copy()
    tokens, documents = random_tokens(0, 1, 9), torch.tensor([[1] * 3 + [0] * 3 + [1] * 3])
    out = model(tokens, documents=documents).hidden
    torch.testing.assert_close(out[:, 6:], model(tokens[:, 6:]).hidden, atol=1e-3, rtol=1e-3)


def quantize_copy() -> Hymba:
    model = micro_model().requires_grad_(False)
    quantize(model, 8)
    return model
