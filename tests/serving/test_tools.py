"""Tool calls are taken out of the text, however it arrives; what only looks like one stays."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hymba.serving.tools import Call, CallReader, write_call

ONE = '<toolcall> {"name": "f", "arguments": {"x": [1, "ä"]}} </toolcall>'
TWO = '<toolcall>[{"name": "f", "arguments": {}}, {"name": "g"}]</toolcall>'


def read(pieces: list[str], names: tuple[str, ...] = ("f", "g")) -> tuple[str, list[tuple[str, object]]]:
    """The text, and the calls' names and arguments."""
    reader = CallReader(names)
    found = [*map(reader.push, pieces), reader.flush()]
    calls: list[Call] = [call for _, some in found for call in some]
    assert len({call.id for call in calls}) == len(calls)
    return "".join(text for text, _ in found), [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(
    ("text", "left", "calls"),
    [
        ("plain < text <tool", "plain < text <tool", []),
        (ONE, "", [("f", {"x": [1, "ä"]})]),
        (f"Wait. {ONE}\n{TWO}\n", "Wait. ", [("f", {"x": [1, "ä"]}), ("f", {}), ("g", {})]),
        (ONE.removesuffix(" </toolcall>"), "", [("f", {"x": [1, "ä"]})]),
        ('<toolcall> {"name": "h"} </toolcall>', '<toolcall> {"name": "h"} </toolcall>', []),
        ("<toolcall> nonsense </toolcall> more", "<toolcall> nonsense </toolcall> more", []),
        (
            '<toolcall> {"name": "f", "arguments": 5} </toolcall>',
            '<toolcall> {"name": "f", "arguments": 5} </toolcall>',
            [],
        ),
        ('<toolcall> {"name": "f", "arg', '<toolcall> {"name": "f", "arg', []),
        ("<toolcall>" + "[" * 50_000, "<toolcall>" + "[" * 50_000, []),
    ],
    ids=range(9),
)
def test_calls_are_found(text: str, left: str, calls: list) -> None:
    assert read([text]) == (left, calls)


@given(st.lists(st.integers(0, len(ONE) + 20), max_size=8))
def test_splitting_changes_nothing(cuts: list[int]) -> None:
    text = f"Wait <too {ONE} then"
    places = [0, *sorted(cuts), len(text)]
    pieces = [text[begin:end] for begin, end in pairwise(places)]
    assert read(pieces) == read([text]) == ("Wait <too then", [("f", {"x": [1, "ä"]})])


def test_without_functions_everything_is_text() -> None:
    assert read([ONE], ()) == (ONE, [])


def test_what_is_written_is_read() -> None:
    assert read([write_call("f", '{"x": "ä"}')]) == ("", [("f", {"x": "ä"})])
