"""The prefix cache against a plain dictionary: lookups, eviction, byte accounting, and the shape of the tree."""

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hymba.inference.prefix_cache import PrefixCache
from hymba.model.rows import Snapshot

TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=8)


def snapshot(tokens: int, nbytes: int = 8, logits: bool = False) -> Snapshot:
    state = torch.zeros(nbytes // 4)
    return Snapshot(tokens, (), state, torch.zeros(0), torch.zeros(1) if logits else None)


@given(st.lists(st.tuples(TEXTS, st.booleans()), max_size=12), TEXTS)
def test_the_longest_that_fits_is_found(held: list[tuple[list[int], bool]], prompt: list[int]) -> None:
    cache, kept = PrefixCache(10**6), {}
    for ids, logits in held:
        kept[tuple(ids)] = snapshot(len(ids), logits=logits)
        cache.add(ids, kept[tuple(ids)])
    fitting = [
        ids
        for ids, saved in kept.items()
        if ids == tuple(prompt[: len(ids)]) and (len(ids) < len(prompt) or saved.logits is not None)
    ]
    found, shared = cache.find(prompt)
    assert found is (kept[max(fitting, key=len)] if fitting else None)
    agree = (next((i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), len(ids)) for ids in kept)
    assert shared == max((min(count, len(prompt)) for count in agree), default=0)
    assert all(cache.has(ids) for ids in kept)
    assert cache.has(prompt) == (tuple(prompt) in kept)
    assert (cache.entries, cache.nbytes) == (len(kept), sum(saved.nbytes for saved in kept.values()))
    assert (cache.queries, cache.hits) == (1, bool(fitting))


def test_the_least_recently_used_goes_first() -> None:
    cache = PrefixCache(24)
    for ids in ([1], [1, 2], [3]):
        cache.add(ids, snapshot(len(ids)))
    assert cache.find([1, 5])[0] is not None
    cache.add([4], snapshot(1))
    assert [cache.has(ids) for ids in ([1], [1, 2], [3], [4])] == [True, False, True, True]
    assert cache.find([1, 2, 3])[1] == 1  # what held nothing is forgotten
    assert cache.nbytes == 24


@given(st.lists(st.tuples(TEXTS, st.integers(1, 9)), max_size=30))
def test_the_limit_is_kept(held: list[tuple[list[int], int]]) -> None:
    cache = PrefixCache(40)
    for ids, size in held:
        cache.add(ids, snapshot(len(ids), 8 * size))
        assert cache.nbytes <= 40
        assert cache.has(ids) or 8 * size > 40
        held_bytes = sum(node.snapshot.nbytes for node in cache._nodes() if node.snapshot)
        assert held_bytes == cache.nbytes


def test_an_answer_replaces_the_one_before_it() -> None:
    cache = PrefixCache(100)
    cache.add([1, 2], snapshot(2, 8))
    cache.add([1, 2], snapshot(2, 16))
    assert (cache.entries, cache.nbytes) == (1, 16)
    cache.clear()
    assert (cache.entries, cache.nbytes, cache.find([1, 2, 3])) == (0, 0, (None, 0))


class PlainCache:
    """What the tree must do, with a dictionary from text to snapshot, the least recently used first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held: dict[tuple[int, ...], Snapshot] = {}

    def add(self, ids: Sequence[int], saved: Snapshot) -> None:
        if saved.nbytes > self.limit:
            return
        self.held.pop(tuple(ids), None)
        self.held[tuple(ids)] = saved
        while self.nbytes > self.limit:
            del self.held[next(iter(self.held))]

    def find(self, ids: Sequence[int]) -> tuple[Snapshot | None, int]:
        shared = max((common(ids, held) for held in self.held), default=0)
        fitting = [
            held
            for held, saved in self.held.items()
            if held == tuple(ids[: len(held)]) and (len(held) < len(ids) or saved.logits is not None)
        ]
        if not fitting:
            return None, shared
        best = max(fitting, key=len)
        self.held[best] = self.held.pop(best)
        return self.held[best], shared

    @property
    def nbytes(self) -> int:
        return sum(saved.nbytes for saved in self.held.values())


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def check_tree(cache: PrefixCache, held: dict[tuple[int, ...], Snapshot]) -> None:
    """Every node is on the path of its own tokens, needed, and has the right snapshot."""
    left, found = [(cache._root, ())], {}
    while left:
        node, before = left.pop()
        path = (*before, *node.tokens.tolist())
        assert node.end == len(path)
        assert node is cache._root or (len(node.tokens) and (node.snapshot is not None or len(node.children) > 1))
        if node.snapshot is not None:
            found[path] = node.snapshot
        for first, child in node.children.items():
            assert (child.parent, int(child.tokens[0])) == (node, first)
            left.append((child, path))
    assert found == held
    assert (cache.entries, cache.nbytes) == (len(held), sum(saved.nbytes for saved in held.values()))


@pytest.mark.parametrize("limit", [10**6, 200])
@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_a_dictionary(limit: int, seed: int) -> None:
    draw = random.Random(seed)
    trunks = [[draw.randrange(3) for _ in range(60)] for _ in range(4)]
    cache, plain = PrefixCache(limit), PlainCache(limit)

    def text() -> list[int]:
        begin = draw.choice(trunks)[: draw.randrange(61)]
        return begin + [draw.randrange(3) for _ in range(draw.randrange(5))]

    for step in range(300):
        ids, known = text(), list(plain.held)
        ids = list(draw.choice(known)) if known and draw.random() < 0.2 else ids
        if draw.random() < 0.5:
            saved = snapshot(len(ids), 4 * draw.randrange(1, 12), logits=draw.random() < 0.5)
            cache.add(ids, saved)
            plain.add(ids, saved)
        else:
            found, wanted = cache.find(ids), plain.find(ids)
            assert found[0] is wanted[0]
            assert found[1] == wanted[1]
        assert cache.has(ids) == (tuple(ids) in plain.held)
        if draw.random() < 0.005:
            cache.clear()
            plain.held.clear()
        if step % 10 == 0:
            check_tree(cache, plain.held)


def test_splitting_an_edge_does_not_move_the_texts_behind_it() -> None:
    cache, texts = PrefixCache(1000), ([1, 1, 1, 1], [1, 1, 1, 2], [1, 2, 1, 1, 1], [1, 1, 2])
    kept = [snapshot(len(ids), logits=True) for ids in texts]
    for ids, saved in zip(texts, kept, strict=True):
        cache.add(ids, saved)
    assert [cache.find(ids)[0] for ids in texts] == kept
    check_tree(cache, {tuple(ids): saved for ids, saved in zip(texts, kept, strict=True)})


def test_the_empty_text_is_a_prefix_of_all() -> None:
    cache, empty = PrefixCache(100), snapshot(0)
    cache.add([], empty)
    assert cache.has([])
    assert cache.find([4, 5]) == (empty, 0)
