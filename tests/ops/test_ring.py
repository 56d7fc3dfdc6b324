"""Places in a ring, against a ring that is filled token by token, and the kernels against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import DEVICE
from torch import Tensor

from hymba.ops.attention import QuantizedHeads, round_heads
from hymba.ops.attention.heads import Heads
from hymba.ops.ring import POSITIONS, SLOTS, WRITES

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


def buffers(rows: int, dtype: torch.dtype, bits: int | None) -> list[Heads]:
    """Keys and values of two heads, in one larger tensor: as a part of the rows."""
    g = torch.Generator().manual_seed(rows)
    whole = [torch.randn(rows + 2, META + 9, 2, width, generator=g).to(DEVICE, dtype)[1:-1] for width in (6, 16)]
    return [x if bits is None else round_heads(x) for x in whole]


def parts(heads: list[Heads]) -> list[Tensor]:
    return [part for x in heads for part in ((x.values, x.scales) if isinstance(x, QuantizedHeads) else (x,))]


@pytest.mark.parametrize(("bits", "rounded"), [(None, False), (8, False), (8, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_written_where_the_definition_writes_them(
    bits: int | None, rounded: bool, dtype: torch.dtype
) -> None:
    """Keys rotated, so dense, and values a part of a wider projection; to the bit, in 8 bits too."""

    @given(rows=st.integers(1, 3), steps=st.integers(1, 12), padded=st.booleans(), data=st.data())
    @settings(max_examples=6)
    def check(rows: int, steps: int, padded: bool, data: st.DataObject) -> None:
        held, counts = (tensor([data.draw(st.integers(0, n)) for _ in range(rows)]) for n in (30, steps))
        places = SLOTS["reference"](held, counts if padded else None, steps, 9, META)
        g = torch.Generator().manual_seed(steps)
        wide = torch.randn(rows, steps, 80, generator=g).to(DEVICE, dtype)
        own: list[Heads] = [wide[..., :12].unflatten(-1, (2, 6)).contiguous(), wide[..., 16:48].unflatten(-1, (2, 16))]
        wide[0, 0] = 0  # no scale
        own = [round_heads(x) for x in own] if rounded else own  # type: ignore[arg-type]
        index = torch.arange(rows, device=DEVICE)[:, None]
        ours, theirs = buffers(rows, dtype, bits), buffers(rows, dtype, bits)
        WRITES["triton"](index, *places, own, ours)
        WRITES["reference"](index, *places, own, theirs)
        for x, y in zip(parts(ours), parts(theirs), strict=True):
            assert torch.equal(x, y)

    check()
