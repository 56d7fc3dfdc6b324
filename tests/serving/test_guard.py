"""What is forbidden never leaves, however the text arrives, and nothing else is kept back."""

from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import serving

from hymba.errors import HymbaError
from hymba.inference import Engine
from hymba.serving import PatternGuard, Settings


def stream(guard: PatternGuard, pieces: list[str]) -> tuple[str, bool]:
    """What leaves, and whether the text was blocked."""
    check = guard.begin()
    out = "".join(map(check.push, pieces)) + check.flush()
    return out, check.blocked


@pytest.mark.parametrize(
    ("pattern", "text", "out"),
    [
        ("bad", "a bad thing", "a "),
        ("bad", "a ba", "a ba"),
        (r"(?i)\bass\b", "An ASSistant", "An ASSistant"),
        (r"(?i)\bass\b", "An ASS.", "An "),
        (r"(?i)\bass\b", "An ass", "An "),
        (r"\d{3}-\d{4}", "call 555-123 or 555-1234", "call 555-123 or "),
        ("x+y", "xxxz xxy", "xxxz "),
    ],
)
def test_letter_by_letter_and_at_once(pattern: str, text: str, out: str) -> None:
    guard = PatternGuard([pattern])
    blocked = out != text
    assert stream(guard, list(text)) == stream(guard, [text]) == (out, blocked)
    assert guard.allows(text) is not blocked


@given(st.lists(st.text("abc ", max_size=3), max_size=12))
def test_splitting_changes_nothing(pieces: list[str]) -> None:
    guard = PatternGuard(["abca", r"\bcc\b"])
    assert stream(guard, pieces) == stream(guard, ["".join(pieces)])


@given(st.text("abc ", max_size=20))
def test_allowed_text_passes_whole(text: str) -> None:
    guard = PatternGuard(["abca"])
    out, blocked = stream(guard, list(text))
    assert (out, blocked) == ((text[: text.index("abca")], True) if "abca" in text else (text, False))


def test_only_what_may_become_a_match_is_held() -> None:
    check = PatternGuard(["abcd"]).begin()
    assert [check.push(letter) for letter in "xabyab"] == ["x", "", "", "aby", "", ""]
    assert check.held
    assert check.flush() == "ab"


def test_a_file_has_comments(tmp_path: Path) -> None:
    file = tmp_path / "guard.txt"
    file.write_text("# fruit\n\n(?i)banana\n", encoding="utf-8")
    assert not PatternGuard.from_file(file).allows("BANANAS # fruit")
    assert PatternGuard.from_file(file).allows("# fruit")


@pytest.mark.parametrize(
    ("text", "problem"),
    [("(", "is no regular expression"), ("a*", "is found in every text"), ("# nothing\n", "holds no pattern")],
)
def test_bad_files_are_told(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "guard.txt").write_text(text, encoding="utf-8")
    with pytest.raises(HymbaError, match=problem):
        PatternGuard.from_file(tmp_path / "guard.txt")


def test_answers_end_before_a_match(engine: Engine) -> None:
    forced = {"structured_outputs": {"regex": "A plain banana and more"}, "max_tokens": 40, "logprobs": 0}
    with serving(engine, Settings("tiny", guard=PatternGuard(["banana"]))) as live:
        [choice] = live.complete(**forced).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("A plain ", "content_filter")
        assert "A plain ".startswith("".join(choice["logprobs"]["tokens"]))
        streamed = live.complete(stream=True, **forced)
        assert '"content_filter"' in streamed.text
        assert "ban" not in streamed.text
        assert live.complete(**forced | {"structured_outputs": {"regex": "A plain ban"}}).json()["choices"][0][
            "text"
        ] == ("A plain ban")


def test_prompts_are_checked(engine: Engine) -> None:
    with serving(engine, Settings("tiny", guard=PatternGuard(["banana"]))) as live:
        before = engine.stats().steps
        answers: list[httpx.Response] = [
            live.chat("A banana?"),
            live.complete("A banana?"),
            live.complete(["banana"], echo=True),
        ]
        for answer in answers:
            [choice] = answer.json()["choices"]
            assert choice["finish_reason"] == "content_filter"
            assert (choice["message"]["content"] if "message" in choice else choice["text"]) == ""
            assert answer.json()["usage"]["completion_tokens"] == 0
        assert engine.stats().steps == before
