"""What must hold for all lengths, paddings, chunkings and batchings: float32 within 1e-4 of the logits' range."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from micro import micro_model

MODEL = micro_model().requires_grad_(False)
VOCAB, WINDOW = MODEL.config.vocab_size, MODEL.config.sliding_window

lengths = st.integers(1, 30)
seeds = st.integers(0, 2**31)


def random_tokens(seed: int, rows: int, steps: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, steps), generator=torch.Generator().manual_seed(seed))


def logits(tokens: torch.Tensor, **arguments) -> torch.Tensor:
    return MODEL.logits(MODEL(tokens, **arguments).hidden)


def assert_same(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    span = (wanted.max() - wanted.min()).item()
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-4 * span)


@given(seeds, st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 3))
def test_any_chunking_equals_the_whole(seed, chunks, rows):
    tokens = random_tokens(seed, rows, sum(chunks))
    cache = MODEL.allocate_cache(rows, sum(chunks))
    pieces = [logits(piece, cache=cache) for piece in tokens.split(chunks, dim=1)]
    assert_same(torch.cat(pieces, dim=1), logits(tokens))
    assert cache.lengths.tolist() == [sum(chunks)] * rows


@given(seeds, st.integers(1, 8), st.integers(1, 8 * WINDOW))
def test_cached_equals_recomputed_far_past_the_window(seed, prompt, steps):
    tokens = random_tokens(seed, 1, prompt + steps)
    cache = MODEL.allocate_cache(1, prompt + steps)
    logits(tokens[:, :prompt], cache=cache)
    cached = [logits(tokens[:, t : t + 1], cache=cache) for t in range(prompt, prompt + steps)]
    assert_same(torch.cat(cached, dim=1), logits(tokens)[:, prompt:])


@given(seeds, st.lists(lengths, min_size=1, max_size=4), st.integers(1, 20), st.integers(0, 5))
def test_ragged_batch_equals_each_row_alone(seed, row_lengths, chunk, extra):
    """Right-padded rows, run in chunks through a cache, then a few common steps."""
    width = max(row_lengths)
    tokens = random_tokens(seed, len(row_lengths), width)
    more = random_tokens(seed + 1, len(row_lengths), extra)
    cache = MODEL.allocate_cache(len(row_lengths), width + extra)
    held = torch.tensor(row_lengths)
    outputs = []
    for start in range(0, width, chunk):
        piece = tokens[:, start : start + chunk]
        outputs.append(logits(piece, cache=cache, lengths=(held - start).clamp(0, piece.shape[1])))
    padded = torch.cat(outputs, dim=1)
    steps = [logits(more[:, i : i + 1], cache=cache) for i in range(extra)]
    for row, length in enumerate(row_lengths):
        alone = logits(torch.cat((tokens[row, :length], more[row]))[None])[0]
        assert_same(padded[row, :length], alone[:length])
        if extra:
            assert_same(torch.cat(steps, dim=1)[row], alone[length:])
    assert_same(
        torch.cat([logits(tokens, lengths=held)[i, :n] for i, n in enumerate(row_lengths)]),
        torch.cat([logits(tokens[i : i + 1, :n])[0] for i, n in enumerate(row_lengths)]),
    )


@given(seeds, st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_packed_documents_equal_each_alone(seed, sizes):
    tokens = random_tokens(seed, 1, sum(sizes))
    documents = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None]
    packed = logits(tokens, documents=documents)
    alone = [logits(piece) for piece in tokens.split(sizes, dim=1)]
    assert_same(packed, torch.cat(alone, dim=1))


@given(seeds, st.lists(st.integers(1, 12), min_size=2, max_size=5), st.data())
def test_changing_one_document_leaves_the_others_bit_for_bit(seed, sizes, data):
    changed = data.draw(st.integers(0, len(sizes) - 1))
    tokens = random_tokens(seed, 1, sum(sizes))
    documents = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None]
    other = torch.where(documents == changed, (tokens + 1) % VOCAB, tokens)
    before, after = logits(tokens, documents=documents), logits(other, documents=documents)
    untouched = documents[0] != changed
    assert torch.equal(before[0, untouched], after[0, untouched])
    assert not torch.equal(before[0, ~untouched], after[0, ~untouched])


@given(seeds, st.integers(1, 20), st.integers(1, 20), st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_selected_rows_continue_as_their_originals(seed, prompt, steps, rows):
    tokens = random_tokens(seed, 3, prompt + steps)
    cache = MODEL.allocate_cache(3, prompt + steps)
    logits(tokens[:, :prompt], cache=cache)
    copy = cache.select(torch.tensor(rows))
    continued = logits(tokens[rows, prompt:], cache=copy)
    assert_same(continued, logits(tokens[rows])[:, prompt:])
    assert_same(logits(tokens[:, prompt:], cache=cache), logits(tokens)[:, prompt:])


@given(seeds, st.integers(1, 12))
def test_future_tokens_change_nothing(seed, length):
    tokens = random_tokens(seed, 1, length + 3)
    assert_same(logits(tokens)[:, :length], logits(tokens[:, :length]))
