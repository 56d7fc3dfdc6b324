"""Requests that begin alike have one key, and a key has one order of replicas."""

import json
from typing import Any

import pytest

from hymba.serving.affinity import BEGINNING, affinity_key, rank

REPLICAS = [f"replica {n}" for n in range(8)]
KEYS = [f"key {n}" for n in range(4000)]


def key(headers: dict[str, str] | None = None, **body: Any) -> str | None:
    return affinity_key(headers or {}, json.dumps(body).encode())


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": content} for n, content in enumerate(contents)]


def test_the_turns_of_a_conversation_have_one_key() -> None:
    system = {"role": "system", "content": "Be brief."}
    first = key(messages=[system, *turns("Who?")])
    assert first == key(messages=[system, *turns("Who?", "Me.", "Why?")], temperature=0.5)
    assert first != key(messages=[system, *turns("What?")])
    assert first != key(messages=turns("Who?"))


def test_a_long_common_beginning_is_one_key() -> None:
    rules = {"role": "system", "content": "All the rules. " * 100}
    assert key(messages=[rules, *turns("Who?")]) == key(messages=[rules, *turns("What?")])
    assert key(prompt="a" * BEGINNING + "b") == key(prompt="a" * BEGINNING + "c") != key(prompt="b")
    assert key(prompt=[5, 6, 7]) != key(prompt=[5, 6, 8])


def test_who_names_a_session_has_its_key() -> None:
    session = {"x-session-id": "7"}
    assert key(session, prompt="a") == key(session, prompt="b") == affinity_key(session, b"{")
    assert key(user="7", prompt="a") == key(user="7", prompt="b") != key(session)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"{}", b"\xff", b"[" * 100_000, b'{"user": 3}', b'{"user": ""}']
)
def test_what_belongs_to_nothing_has_no_key(body: bytes) -> None:
    assert affinity_key({}, body) is None


@pytest.mark.parametrize("messages", [3, "text", [], [3], [{"role": 3}], {"role": "user"}, ["\ud800"]])
def test_a_senseless_chat_has_a_key_all_the_same(messages: Any) -> None:
    assert len(rank(str(key(messages=messages)), REPLICAS)) == len(REPLICAS)


def test_replicas_share_keys_evenly_and_in_any_order() -> None:
    firsts = [rank(key, REPLICAS)[0] for key in KEYS]
    assert firsts == [rank(key, reversed(REPLICAS))[0] for key in KEYS]
    assert all(0.8 < firsts.count(name) * len(REPLICAS) / len(KEYS) < 1.2 for name in REPLICAS)


def test_a_replica_that_goes_moves_its_own_keys_only_and_evenly() -> None:
    left = REPLICAS[1:]
    for name in KEYS:
        assert rank(name, left) == [replica for replica in rank(name, REPLICAS) if replica != REPLICAS[0]]
    moved = [rank(name, REPLICAS)[1] for name in KEYS if rank(name, REPLICAS)[0] == REPLICAS[0]]
    assert all(0.5 < moved.count(name) * len(left) / len(moved) < 1.5 for name in left)
