from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hymba.training.data import Corpus
from hymba.training.packing import IGNORED, PackedRows

BOS, PAD = 1_000_000, 1_000_001
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def corpus_of(lengths: list[int]) -> Corpus:
    """Documents whose tokens are all different: 0, 1, 2, …"""
    offsets = np.cumsum([0, *lengths])
    return Corpus(np.arange(offsets[-1], dtype=np.uint32), offsets, int(offsets[-1]), "")


def pieces_of(row: dict[str, Tensor]) -> list[list[int]]:
    """The runs of input ids between restarts of the positions, checked to be counted from 0."""
    ids, positions = row["input_ids"].tolist(), row["position_ids"].tolist()
    starts = [slot for slot, position in enumerate(positions) if position == 0]
    assert positions == [slot - max(s for s in starts if s <= slot) for slot in range(len(ids))]
    return [ids[start:stop] for start, stop in pairwise([*starts, len(ids)])]


@given(
    lengths=LENGTHS,
    seq_length=st.integers(2, 24),
    seed=st.none() | st.integers(0, 3),
    epoch=st.integers(0, 2),
)
def test_every_token_once_and_no_leakage(lengths: list[int], seq_length: int, seed: int | None, epoch: int) -> None:
    corpus = corpus_of(lengths)
    rows = PackedRows(corpus, seq_length, bos=BOS, pad=PAD, seed=seed)
    targets: list[int] = []
    for item in range(rows.rows_until(epoch), rows.rows_until(epoch + 1)):
        row = rows[item]
        assert all(values.shape == (seq_length,) and values.dtype == torch.int64 for values in row.values())
        labels = row["labels"].tolist()
        for piece in pieces_of(row):
            mine, labels = labels[: len(piece)], labels[len(piece) :]
            if PAD in piece:
                assert set(piece) == {PAD}
                assert set(mine) == {IGNORED}
                continue
            # BOS, then consecutive tokens of one document; each a target but BOS.
            assert piece[0] == BOS
            assert mine == [IGNORED, *piece[1:]]
            assert piece[1:] == list(range(piece[1], piece[1] + len(piece) - 1))
            document = np.searchsorted(corpus.offsets, piece[1:], side="right")
            assert len(set(document.tolist())) == 1
            targets += piece[1:]
    assert sorted(targets) == list(range(sum(lengths)))


@given(lengths=LENGTHS, seq_length=st.integers(3, 24))
def test_padding_is_one_slot_but_in_the_last_row(lengths: list[int], seq_length: int) -> None:
    rows = PackedRows(corpus_of(lengths), seq_length, bos=BOS, pad=PAD)
    for item in range(len(rows) - 1):
        assert (rows[item]["input_ids"] == PAD).sum() <= 1


def test_a_book_fills_consecutive_rows() -> None:
    rows = PackedRows(corpus_of([100]), 10, bos=BOS, pad=PAD)
    assert [rows[i]["input_ids"][1].item() for i in range(len(rows))] == list(range(0, 100, 9))


def test_epochs_cut_a_single_book_elsewhere() -> None:
    rows = PackedRows(corpus_of([1000]), 10, bos=BOS, pad=PAD, seed=0)
    per_epoch = rows.rows_until(1)
    cuts = [{rows[e * per_epoch + i]["input_ids"][1].item() % 9 for i in range(per_epoch - 2)} for e in (0, 1)]
    assert cuts[0] != cuts[1]


def test_an_item_depends_on_nothing_but_its_number() -> None:
    corpus = corpus_of([30, 5, 61])
    forward, backward = (PackedRows(corpus, 8, bos=BOS, pad=PAD, seed=3) for _ in range(2))
    items = list(range(forward.rows_until(3)))
    seen = {item: forward[item] for item in items}
    for item in reversed(items):
        assert all(torch.equal(values, seen[item][name]) for name, values in backward[item].items())
    other = PackedRows(corpus, 8, bos=BOS, pad=PAD, seed=4)
    assert any(not torch.equal(other[item]["input_ids"], seen[item]["input_ids"]) for item in items[:10])


def test_part_of_an_epoch() -> None:
    rows = PackedRows(corpus_of([900]), 10, bos=BOS, pad=PAD, seed=0)
    assert rows.rows_until(0.5) == round(rows.rows_until(1) / 2)
    assert rows.rows_until(1) < rows.rows_until(1.5) < rows.rows_until(2)


@pytest.mark.parametrize("seed", [None, 0])
def test_rows_fit_a_real_dataloader(seed: int | None) -> None:
    rows = PackedRows(corpus_of([50]), 10, bos=BOS, pad=PAD, seed=seed)
    batch = next(iter(torch.utils.data.DataLoader(rows, batch_size=3)))
    assert {name: tuple(values.shape) for name, values in batch.items()} == dict.fromkeys(
        ("input_ids", "position_ids", "labels"), (3, 10)
    )
