"""`rope_type` "dynamic_ntk": each row and each document has the rotary base of its own length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from micro import micro_config, micro_model
from torch import Tensor

from hymba.inference.runner import Runner
from hymba.model import Hymba

TRAINED = 12  # positions, three of them meta tokens: texts of ten tokens or more have a base of their own
MODEL = micro_model(dtype=torch.float64, rope_type="dynamic_ntk", orig_max_position_embeddings=TRAINED)
MODEL.requires_grad_(False)

seeds = st.integers(0, 2**31)
sizes = st.lists(st.integers(1, 25), min_size=1, max_size=4)


def random_tokens(seed: int, rows: int, steps: int) -> Tensor:
    return torch.randint(0, 61, (rows, steps), generator=torch.Generator().manual_seed(seed))


def with_fixed_base(length: int) -> Hymba:
    """The same model with the base of one length."""
    base = MODEL.config.rope_base(length)
    fixed = micro_model(dtype=torch.float64, rope_type="default", rope_theta=base)
    return fixed.requires_grad_(False)


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 9, 10, 25])
def test_the_base_is_that_of_the_largest_position(steps: int) -> None:
    tokens = random_tokens(0, 2, steps)
    wanted = with_fixed_base(3 + steps)(tokens).hidden
    close(MODEL(tokens).hidden, wanted)
    assert (MODEL.config.rope_base(3 + steps) > 10000) == (steps > TRAINED - 3)


def test_positions_count_by_their_largest() -> None:
    tokens, positions = random_tokens(0, 1, 4), torch.tensor([[0, 5, 30, 31]])
    close(MODEL(tokens, positions=positions).hidden, with_fixed_base(35)(tokens, positions=positions).hidden)
    padded = torch.cat((positions, torch.full((1, 3), 10**6)), dim=1)
    more = torch.cat((tokens, random_tokens(1, 1, 3)), dim=1)
    ours = MODEL(more, positions=padded, lengths=torch.tensor([4])).hidden[:, :4]
    close(ours, MODEL(tokens, positions=positions).hidden)


@given(seeds, sizes)
def test_padded_rows_equal_each_alone(seed: int, lengths: list[int]) -> None:
    tokens = random_tokens(seed, len(lengths), max(lengths) + 2)
    batch = MODEL(tokens, lengths=torch.tensor(lengths)).hidden
    cached = MODEL(tokens, lengths=torch.tensor(lengths), cache=MODEL.allocate_cache(len(lengths), 30)).hidden
    for row, length in enumerate(lengths):
        alone = MODEL(tokens[row : row + 1, :length]).hidden[0]
        close(batch[row, :length], alone)
        close(cached[row, :length], alone)


@given(seeds, sizes, st.integers(0, 3))
def test_packed_documents_equal_each_alone(seed: int, lengths: list[int], padding: int) -> None:
    tokens = random_tokens(seed, 2, sum(lengths) + padding)
    documents = torch.repeat_interleave(torch.arange(len(lengths) + 1), torch.tensor([*lengths, padding])).expand(2, -1)
    out = MODEL(tokens, documents=documents, lengths=torch.tensor([sum(lengths)] * 2), output_hidden_states=True)
    start = 0
    for length in lengths:
        alone = MODEL(tokens[:, start : start + length], output_hidden_states=True)
        close(out.hidden[:, start : start + length], alone.hidden)
        close(out.hidden_states[2][:, start : start + length], alone.hidden_states[2])
        start += length


def test_attention_matrices_of_packed_documents() -> None:
    tokens, documents = random_tokens(0, 1, 20), torch.tensor([[0] * 4 + [1] * 14 + [2] * 2])
    packed = MODEL(tokens, documents=documents, output_attentions=True).attentions
    for start, end in ((0, 4), (4, 18), (18, 20)):
        alone = MODEL(tokens[:, start:end], output_attentions=True).attentions
        for ours, theirs in zip(packed, alone, strict=True):
            assert ours.shape == (1, 3, 20, 23)
            close(ours[:, :, start:end, :3], theirs[..., :3])
            close(ours[:, :, start:end, 3 + start : 3 + end], theirs[..., 3:])
            assert not ours[:, :, start:end, 3 : 3 + start].any()
            assert not ours[:, :, start:end, 3 + end :].any()


@given(seeds, sizes, st.integers(1, 6), st.integers(1, 12))
def test_rows_decoded_together_equal_each_alone(seed: int, lengths: list[int], steps: int, chunk: int) -> None:
    """Cut into the same calls, a row does not see what the others' lengths are."""
    width = max(lengths)
    tokens, more = random_tokens(seed, len(lengths), width), random_tokens(seed + 1, len(lengths), steps)

    def run(rows: slice) -> Tensor:
        held = torch.tensor(lengths)[rows]
        cache, out = MODEL.allocate_cache(len(held), width + steps), []
        for start in range(0, width, chunk):
            piece = tokens[rows, start : start + chunk]
            counts = (held - start).clamp(0, piece.shape[1])
            MODEL(piece, cache=cache, lengths=counts)
        for i in range(steps):
            out.append(MODEL(more[rows, i : i + 1], cache=cache).hidden)
        return torch.cat(out, dim=1)

    together = run(slice(None))
    for row in range(len(lengths)):
        close(together[row : row + 1], run(slice(row, row + 1)))


@pytest.mark.parametrize("bits", [None, 8])
def test_a_row_of_the_engine_is_as_new_after_a_long_text(bits: int | None) -> None:
    runner, prompt, long = Runner(MODEL, 2, 40, bits), [1, 2, 3, 4], list(range(1, 31))
    fresh = runner.prefill(0, 0, prompt)
    runner.clear(0)
    whole = runner.prefill(0, 0, long)
    snapshot = runner.save(0, len(long))
    after = runner.prefill(0, len(long), [7])
    runner.clear(0)
    assert torch.equal(runner.prefill(0, 0, prompt), fresh)
    runner.restore(1, snapshot)
    close(runner.prefill(1, len(long), [7]), after)
    runner.move(1, 0, len(long) + 1)
    close(runner.prefill(0, len(long) + 1, [8]), runner.prefill(1, len(long) + 1, [8]))
    if bits is None:
        close(whole, MODEL.logits(MODEL(torch.tensor([long])).hidden[:, -1]))


def test_gradients_reach_the_meta_tokens_of_every_row() -> None:
    model = micro_model(dtype=torch.float64, rope_type="dynamic_ntk", orig_max_position_embeddings=TRAINED)
    tokens, lengths = random_tokens(0, 2, 20), [20, 5]
    model(tokens, lengths=torch.tensor(lengths)).hidden.square().sum().backward()
    batch = model.meta_tokens.grad.clone()
    model.zero_grad()
    for row, length in enumerate(lengths):
        model(tokens[row : row + 1, :length]).hidden.square().sum().backward()
    close(batch, model.meta_tokens.grad)
    model.zero_grad()
    documents = torch.tensor([[0] * 20 + [1] * 5])
    packed = torch.cat((tokens[0], tokens[1, :5]))[None]
    model(packed, documents=documents).hidden.square().sum().backward()
    close(model.meta_tokens.grad, batch)


def test_a_static_base_ignores_lengths() -> None:
    config = micro_config()
    assert config.rope_base(1) == config.rope_base(10**6)
    assert not config.dynamic_rope
