"""The tree of prefixes: the longest snapshot that fits is found, and the oldest go when the bytes are used up."""

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
