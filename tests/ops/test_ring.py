"""Places in a ring, against a ring that is filled token by token, and the kernels against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels import DEVICE
from torch import Tensor

from hymba.ops.ring import POSITIONS, SLOTS

META = 3
backends = pytest.mark.parametrize("name", ["reference", "triton"])
rings = st.integers(1, 9)


def tensor(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64).to(DEVICE)


@backends
@given(held=st.lists(st.integers(0, 40), min_size=1, max_size=4), ring=rings, data=st.data())
def test_each_slot_holds_the_newest_token_that_went_there(
    name: str, held: list[int], ring: int, data: st.DataObject
) -> None:
    used = data.draw(st.integers(0, ring))
    found = POSITIONS[name](tensor(held), used, ring, META)
    for row, count in zip(found.tolist(), held, strict=True):
        slots = [-1] * ring
        for token in range(count):
            slots[token % ring] = META + token
        assert row == [*range(META), *slots[:used]]


@backends
@given(
    held=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    steps=st.integers(1, 12),
    ring=rings,
    padded=st.booleans(),
    data=st.data(),
)
def test_tokens_go_where_they_are_looked_for(
    name: str, held: list[int], steps: int, ring: int, padded: bool, data: st.DataObject
) -> None:
    counts = [data.draw(st.integers(0, steps)) if padded else steps for _ in held]
    slots, tokens, real = SLOTS[name](tensor(held), tensor(counts) if padded else None, steps, ring, META)
    assert (tokens is None) == (steps <= ring)
    assert (real is None) == (not padded)
    columns = torch.arange(slots.shape[1], device=DEVICE).expand_as(slots)
    taken = columns if tokens is None else tokens
    kept = torch.ones_like(slots, dtype=torch.bool) if real is None else real
    for row, (length, count) in enumerate(zip(held, counts, strict=True)):
        placed = {int(t): int(s) for t, s, k in zip(taken[row], slots[row], kept[row], strict=True) if k}
        assert placed == {t: META + (length + t) % ring for t in range(max(0, count - ring), count)}
        assert len(set(slots[row].tolist())) == slots.shape[1]


def test_a_ring_of_eight_thousand_slots() -> None:
    lengths = tensor([0, 5, 8191, 9000])
    for ring, used in ((8192, 8192), (1025, 1025)):
        assert torch.equal(*(POSITIONS[name](lengths, used, ring, 128) for name in ("triton", "reference")))
        for steps in (1, 700, 2000):
            counts = lengths.clamp(max=steps)
            found, expected = (SLOTS[name](lengths, counts, steps, ring, 128) for name in ("triton", "reference"))
            assert [x is None for x in found] == [x is None for x in expected]
            pairs = zip(found, expected, strict=True)
            assert all(x is None or torch.equal(x, y) for x, y in pairs)
