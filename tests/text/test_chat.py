"""Chat prompts in the released format, and cutting streamed answers at stop strings."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from hymba.errors import HymbaError
from hymba.text import STOP_STRINGS, StopCutter, render, train_tokenizer

USER = {"role": "user", "content": " What is 2 + 2?\n"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    directory: Path = tmp_path_factory.mktemp("chat")
    (directory / "text.txt").write_text("to be or not to be")
    return train_tokenizer([directory / "text.txt"], 300, directory)


def test_a_whole_conversation(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief. "},
        USER,
        {"role": "assistant", "content": "I ask the tool."},
        {"role": "tool", "content": '{"sum": 4}'},
    ]
    text = render(messages, tokenizer, tools=[{"name": "add", "why": "<é>"}], contexts=[" one ", "two"])
    assert text == (
        "<extra_id_0>System\nBe brief.\n"
        '\n<tool> {"name": "add", "why": "<é>"} </tool>\n'
        "\n<context> one </context>\n<context> two </context>\n\n"
        "<extra_id_1>User\nWhat is 2 + 2?\n"
        "<extra_id_1>Assistant\nI ask the tool.\n"
        '<extra_id_1>Tool\n{"sum": 4}\n'
        "<extra_id_1>Assistant\n"
    )


def test_the_shortest_conversation(tokenizer):
    prompt = "<extra_id_0>System\n\n<extra_id_1>User\nWhat is 2 + 2?\n"
    assert render([USER], tokenizer, add_generation_prompt=False) == prompt
    assert render([USER], tokenizer) == prompt + "<extra_id_1>Assistant\n"


def test_the_released_format_stands_in_for_a_missing_template(tokenizer, monkeypatch):
    shipped = render([USER], tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert render([USER], tokenizer) == shipped


def test_the_checkpoints_own_template_comes_first(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.role }};{% endfor %}")
    assert render([USER, USER], tokenizer) == "user;user;"
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('one turn only') }}")
    with pytest.raises(HymbaError, match="refuses this conversation: one turn only"):
        render([USER, USER], tokenizer)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one message"),
        ([USER, {"role": "bot", "content": "hi"}], "message 2 has the role 'bot': use one of system, user"),
        ([{"role": "user"}], "message 1 must be a mapping with the keys"),
        (["hello"], "message 1 must be a mapping"),
        ([{"role": "user", "content": None}], "content of type NoneType: give text"),
    ],
)
def test_bad_messages_are_named(tokenizer, messages, complaint):
    with pytest.raises(HymbaError, match=complaint):
        render(messages, tokenizer)


def cut(pieces: list[str], stops: tuple[str, ...] = STOP_STRINGS) -> tuple[str, bool]:
    cutter = StopCutter(stops)
    text = "".join(map(cutter.push, pieces)) + cutter.flush()
    return text, cutter.stopped


@pytest.mark.parametrize(
    ("pieces", "text", "stopped"),
    [
        (["Four.", "\n", "<extra", "_id_", "1>User\nAnd", " 3?"], "Four.\n", True),
        (["a</s>b"], "a", True),
        (["a <", "b> </", "i>"], "a <b> </i>", False),
        (["a <extra_id_2> <extra_id_"], "a <extra_id_2> <extra_id_", False),
        (["<</", "s", ">"], "<", True),
        ([], "", False),
    ],
)
def test_text_is_cut_at_a_stop_string_however_split(pieces, text, stopped):
    assert cut(pieces) == (text, stopped)


@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=5)),
    stops=st.lists(st.text("abc", min_size=1, max_size=4)),
)
def test_the_cut_does_not_depend_on_the_pieces(pieces, stops):
    whole = "".join(pieces)
    text, stopped = cut(pieces, tuple(stops))
    assert (text, stopped) == cut(list(whole), tuple(stops))
    assert whole.startswith(text)
    assert stopped == any(stop in whole for stop in stops)
    assert not any(stop in text for stop in stops)


def test_certain_text_is_not_held_back():
    cutter = StopCutter()
    assert cutter.push("Hello") == "Hello"
    assert cutter.push(" <") == " "
    assert cutter.push("b>") == "<b>"


@pytest.mark.parametrize("stops", ["</s>", ["a", ""]])
def test_bad_stop_strings_are_refused(stops):
    with pytest.raises(HymbaError, match="none of them empty"):
        StopCutter(stops)
