"""Rows of a cache: copied, saved, put back and taken back, they continue as they would have."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from micro import micro_model

from hymba.model import Cache, Hymba
from hymba.model.rows import Undo, clear_row, copy_row, restore_row, save_row, view_rows

LENGTHS = [1, 4, 9, 17]  # the window is 5


@pytest.fixture(scope="module")
def model() -> Hymba:
    return micro_model(dtype=torch.float64).requires_grad_(False)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(61, (1, count), generator=torch.Generator().manual_seed(seed))


def run(model: Hymba, cache: Cache, row: int, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, cache=view_rows(cache, row, 1, int(cache.lengths[row]))).hidden


def alone(model: Hymba, *parts: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.cat(parts, dim=1)).hidden[:, -parts[-1].shape[1] :]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("bits", [None, 8])
def test_a_row_goes_on_elsewhere(model: Hymba, length: int, bits: int | None) -> None:
    first, second = tokens(length), tokens(6, seed=1)
    expected = None
    moves: list[Callable[[Cache], None]] = [
        lambda cache: copy_row(cache, 0, 2, length),
        lambda cache: restore_row(cache, 2, save_row(cache, 0, length)),
    ]
    for move in moves:
        cache = model.allocate_cache(3, 30, bits)
        run(model, cache, 2, tokens(13, seed=2))  # leaves something to be overwritten
        run(model, cache, 0, first)
        move(cache)
        assert cache.lengths.tolist() == [length, 0, length]
        moved, stayed = run(model, cache, 2, second), run(model, cache, 0, second)
        torch.testing.assert_close(moved, stayed, rtol=0, atol=0)
        expected = stayed if expected is None else expected
        torch.testing.assert_close(stayed, expected, rtol=0, atol=0)
        if bits is None:
            torch.testing.assert_close(moved, alone(model, first, second))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("bits", [None, 8])
def test_what_was_run_is_taken_back(model: Hymba, length: int, steps: int, bits: int | None) -> None:
    cache, twin = (model.allocate_cache(2, 30, bits) for _ in range(2))
    for one in (cache, twin):
        run(model, one, 1, tokens(length))
    undo = Undo(cache, 1, length, steps)
    run(model, cache, 1, tokens(steps, seed=5))
    undo()
    second = tokens(7, seed=6)
    torch.testing.assert_close(run(model, cache, 1, second), run(model, twin, 1, second), rtol=0, atol=0)
    assert cache.lengths.tolist() == [0, length + 7]


def test_a_cleared_row_starts_anew(model: Hymba) -> None:
    cache = model.allocate_cache(2, 30)
    run(model, cache, 1, tokens(14))
    clear_row(cache, 1, model.prefix())
    second = tokens(6, seed=3)
    torch.testing.assert_close(run(model, cache, 1, second), alone(model, second))


def test_a_snapshot_is_as_large_as_its_text(model: Hymba) -> None:
    cache = model.allocate_cache(1, 30)
    sizes = []
    for _ in range(3):
        run(model, cache, 0, tokens(5))
        sizes.append(save_row(cache, 0, int(cache.lengths[0])).nbytes)
    entry = 8 * (8 + 16)  # float64, key and value
    assert [b - a for a, b in pairwise(sizes)] == [5 * 3 * entry + 1 * entry, 5 * 3 * entry]
