"""Whatever is drawn from a constraint's masks is what was asked for, with either kind of tokenizer."""

from __future__ import annotations

import gc
import json
import random
import re
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from transformers import PreTrainedTokenizerBase

from hymba.errors import HymbaError
from hymba.inference.constraint import KEPT, Constraint
from hymba.text import TextStream, load_tokenizer, train_tokenizer

STORY = '{"name": "The keeper of the house", "size": 12.5, "doors": [true, false, null]}\n  and so on, and so on. ' * 9
PADDED = 23  # ids past the tokenizer's, as a model's padded vocabulary has them


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("story") / "story.txt"
    path.write_text(STORY, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def byte_level(story: Path) -> PreTrainedTokenizerBase:
    return train_tokenizer([story], 320, story.parent / "byte_level")


@pytest.fixture(scope="module")
def pieces(story: Path) -> PreTrainedTokenizerBase:
    """SentencePiece with LLaMA-2's settings: byte tokens, and a sign for a space."""
    (story.parent / "pieces").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(story),
        model_prefix=str(story.parent / "pieces" / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return load_tokenizer(story.parent / "pieces")


@pytest.fixture(params=["byte_level", "pieces"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = request.getfixturevalue(request.param)
    return loaded


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    stream = TextStream(tokenizer)
    return "".join(map(stream.push, tokens)) + stream.flush()


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that continues another, without the space SentencePiece puts before every text."""
    line, both = (tokenizer(part, add_special_tokens=False).input_ids for part in ("\n", "\n" + text))
    assert both[: len(line)] == line
    return both[len(line) :]


def draw(tokenizer: PreTrainedTokenizerBase, constraint: Constraint, seed: int, complete: Callable[[str], bool]) -> str:
    """A text drawn at random from the masks. After a while it closes what is open rather than going on."""
    chance, matcher, tokens = random.Random(seed), constraint.begin(), []
    closing = {tokenizer.eos_token_id, *(token for sign in '"]}' for token in ids_of(tokenizer, sign))}
    for step in range(2000):
        mask = matcher.mask(len(tokenizer) + PADDED)
        assert bool(mask[tokenizer.eos_token_id]) == complete(text_of(tokenizer, tokens))
        allowed = mask.nonzero()[:, 0].tolist()
        assert max(allowed) < len(tokenizer)
        assert {tokenizer.eos_token_id} >= set(allowed) & set(tokenizer.all_special_ids)
        assert matcher.finished == (allowed == [tokenizer.eos_token_id])
        token = chance.choice(([t for t in allowed if t in closing] if step > 40 else []) or allowed)
        matcher.accept(token)
        if token == tokenizer.eos_token_id:
            return text_of(tokenizer, tokens)
        tokens.append(token)
    raise AssertionError(f"no end: {text_of(tokenizer, tokens)!r}")


def parses(schema: dict) -> Callable[[str], bool]:
    """Whether a text is JSON that `schema` accepts, and nothing stands around it."""
    validator = Draft202012Validator(schema)

    def complete(text: str) -> bool:
        try:
            return text == text.strip() and validator.is_valid(json.loads(text))
        except json.JSONDecodeError:
            return False

    return complete


def matches(pattern: str) -> Callable[[str], bool]:
    """Whether `pattern` matches a whole text. Where a character is unfinished the text so far ends with U+FFFD."""
    return lambda text: not text.endswith("\ufffd") and re.fullmatch(pattern, text) is not None


WORDS = st.text(alphabet='ab é漢🙂"\\\n/', max_size=4)
BOUNDS = st.tuples(st.integers(-1200, 1200), st.integers(0, 1500)).map(lambda pair: (pair[0], sum(pair)))


def number(kind: str, bounds: tuple[int, int], scale: int, exclusive: bool) -> dict:
    """Numbers between bounds, which for `number` may be fractions."""
    low, high = bounds if kind == "integer" else (bound / scale for bound in bounds)
    if exclusive:
        return {"type": kind, "exclusiveMinimum": low - 1, "exclusiveMaximum": high + 1}
    return {"type": kind, "minimum": low, "maximum": high}


NUMBERS = st.builds(number, st.sampled_from(["integer", "number"]), BOUNDS, st.sampled_from([1, 10, 16]), st.booleans())
LENGTHS = st.tuples(st.integers(0, 4), st.integers(0, 4)).map(
    lambda pair: {"type": "string", "minLength": pair[0], "maxLength": sum(pair)}
)
PATTERNS = st.sampled_from(["^[a-z]{2,5}$", "^[0-9]+-[é漢]*$", "^a*x[yz]", '^(yes|no|"so")$', r"^\d{3}\.\d$"])
ENUMS = st.lists(st.none() | st.booleans() | st.integers(-99, 99) | WORDS, min_size=1, max_size=4, unique_by=repr)
SIMPLE = st.one_of(
    st.sampled_from([{"type": t} for t in ("null", "boolean", "integer", "number", "string")]),
    NUMBERS,
    LENGTHS,
    PATTERNS.map(lambda pattern: {"type": "string", "pattern": pattern}),
    ENUMS.map(lambda values: {"enum": values}),
    WORDS.map(lambda value: {"const": value}),
)


def objects(inner: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    """Objects some of whose properties are required, with or without others beside them."""

    def build(properties: dict[str, dict], optional: list[bool], others: bool | dict) -> dict:
        required = [name for name, skip in zip(properties, optional, strict=False) if not skip]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": others,
        }

    others = st.just(False) | st.just({"type": "boolean"})
    return st.builds(build, st.dictionaries(WORDS, inner, max_size=3), st.lists(st.booleans(), max_size=3), others)


def arrays(inner: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    sizes = st.tuples(st.integers(0, 2), st.integers(0, 2))
    return st.builds(
        lambda items, size: {"type": "array", "items": items, "minItems": size[0], "maxItems": sum(size)}, inner, sizes
    )


SCHEMAS = st.recursive(
    SIMPLE,
    lambda inner: (
        objects(inner) | arrays(inner) | st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options})
    ),
    max_leaves=5,
)


@settings(max_examples=150)
@given(schema=SCHEMAS, seed=st.integers(0, 1 << 30))
def test_json_of_a_schema(byte_level, pieces, schema, seed):
    for tokenizer in (byte_level, pieces):
        complete = parses(schema)
        assert complete(draw(tokenizer, Constraint.json_schema(tokenizer, schema), seed, complete))


@given(seed=st.integers(0, 1 << 30))
def test_any_json_object(byte_level, pieces, seed):
    for tokenizer in (byte_level, pieces):
        complete = parses({"type": "object"})
        assert isinstance(json.loads(draw(tokenizer, Constraint.json_object(tokenizer), seed, complete)), dict)


ATOMS = st.sampled_from(["a", "é", "漢", "/", r"\.", "[a-c]", "[^a\n]", r"\d", r"\n", " ", "."])
REGEXES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["?", "*", "+", "{2}", "{1,3}"])).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    ),
    max_leaves=6,
)


@settings(max_examples=150)
@given(pattern=REGEXES, seed=st.integers(0, 1 << 30))
def test_a_regex(byte_level, pieces, pattern, seed):
    for tokenizer in (byte_level, pieces):
        assert matches(pattern)(draw(tokenizer, Constraint.regex(tokenizer, pattern), seed, matches(pattern)))


@pytest.mark.parametrize("style", [{}, {"separators": (",", ":")}])
def test_json_as_python_writes_it(tokenizer, style):
    value = {"name": 'The "house" of é漢', "sizes": [1, -2.5, 3e20], "open": {"door": True, "window": None}, "": []}
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "sizes": {"type": "array"}}}
    for constraint in (Constraint.json_schema(tokenizer, schema), Constraint.json_object(tokenizer)):
        matcher = constraint.begin()
        for token in ids_of(tokenizer, json.dumps(value, ensure_ascii=False, **style)):
            assert matcher.mask(len(tokenizer))[token]
            matcher.accept(token)
        assert matcher.finished


@pytest.mark.parametrize("text", [" {}", "{} ", "{}\n", "{ }", '{"a" :1}', '{"a":  1}', '{"a":1,\n"b":2}'])
def test_other_blanks_are_refused(byte_level, text):
    matcher = Constraint.json_object(byte_level).begin()
    with pytest.raises(HymbaError, match="not what the answer's grammar allows"):
        list(map(matcher.accept, byte_level(text, add_special_tokens=False).input_ids))


def test_what_the_mask_leaves_out_is_refused_and_changes_nothing(tokenizer):
    matcher = Constraint.regex(tokenizer, "ab|ad").begin()
    a, b, c, d = (ids_of(tokenizer, letter)[0] for letter in "abcd")
    for token in (b, c, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, len(tokenizer) + 5):
        with pytest.raises(HymbaError, match=f"token {token} "):
            matcher.accept(token)
    matcher.accept(a)
    with pytest.raises(HymbaError, match=f"token {c} "):
        matcher.accept(c)
    assert not matcher.finished
    matcher.accept(d)
    assert matcher.finished
    with pytest.raises(HymbaError, match=f"token {b} "):
        matcher.accept(b)
    matcher.accept(tokenizer.eos_token_id)


def test_a_vocabulary_of_any_size(tokenizer):
    matcher = Constraint.regex(tokenizer, "[^<>]*").begin()
    whole = matcher.mask(len(tokenizer))
    assert whole.dtype == torch.bool
    assert whole.shape == (len(tokenizer),)
    assert 200 < int(whole.sum()) < len(tokenizer)
    assert torch.equal(matcher.mask(len(tokenizer) + 100), torch.cat([whole, torch.zeros(100, dtype=torch.bool)]))
    assert torch.equal(matcher.mask(100), whole[:100])
    assert matcher.mask(len(tokenizer)) is not whole


def test_special_tokens_are_no_text(tokenizer):
    for token in tokenizer.all_special_tokens:
        assert ids_of(tokenizer, token)[0] in tokenizer.all_special_ids
        matcher = Constraint.regex(tokenizer, re.escape(token)).begin()
        for sign in token:
            assert not set(matcher.mask(len(tokenizer)).nonzero()[:, 0].tolist()) & set(tokenizer.all_special_ids)
            matcher.accept(ids_of(tokenizer, sign)[0])
        assert matcher.finished


def test_texts_of_one_constraint_do_not_disturb_each_other(tokenizer):
    constraint = Constraint.json_object(tokenizer)
    complete = parses({"type": "object"})
    alone = [draw(tokenizer, constraint, seed, complete) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda seed: draw(tokenizer, constraint, seed, complete), range(12))) == alone


def test_the_same_grammar_is_compiled_once_and_old_ones_are_let_go(tokenizer):
    first = Constraint.regex(tokenizer, "x0")
    assert Constraint.regex(tokenizer, "x0") is first
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    assert Constraint.json_schema(tokenizer, json.dumps(schema, indent=4)) is Constraint.json_schema(tokenizer, schema)
    for count in range(1, KEPT + 1):
        Constraint.regex(tokenizer, f"x{count}")
    assert Constraint.regex(tokenizer, "x0") is not first


def test_a_tokenizer_that_nobody_uses_is_let_go(story):
    tokenizer = train_tokenizer([story], 300, story.parent / "passing")
    Constraint.regex(tokenizer, "abc")
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "is not JSON"),
        ("[1, 2]", "a JSON schema is an object"),
        ("true", "a JSON schema is an object"),
        ({"type": "text"}, "text"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "5"),
        ({"type": "string", "pattern": "a("}, "a\\("),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"$ref": "#"}, "no text satisfies it"),
        ({"enum": []}, "is empty"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "a"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "items": {"type": "number"}, "uniqueItems": True}, "uniqueItems"),
        ({"type": {1, 2}}, "is not JSON"),
        ({"const": float("nan")}, "is not JSON"),
        ({"type": "number", "minimum": 10**400}, "out of range"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_named(byte_level, schema, message):
    with pytest.raises(HymbaError, match=message) as caught:
        Constraint.json_schema(byte_level, schema)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("levels", [60, 400, 100_000])
def test_a_deep_schema_is_followed_or_refused(byte_level, levels):
    text = '{"type": "array", "items": ' * levels + "{}" + "}" * levels
    if levels < 100:
        Constraint.json_schema(byte_level, text)
    else:
        with pytest.raises(HymbaError, match="recursion"):
            Constraint.json_schema(byte_level, text)


@pytest.mark.parametrize("pattern", ["a(", "[z-a]", "(?=a)b", r"(a)\1", "[a&&b]", "(" * 9999, "\\"])
def test_a_regex_that_cannot_be_followed_is_named(byte_level, pattern):
    with pytest.raises(HymbaError, match="this regex cannot be followed: ") as caught:
        Constraint.regex(byte_level, pattern)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("pattern", ["/", r"\/", "//.*", "#x", "a\nb", '"', r"\"", "<[1]>", r"%json \{\}", "a/ | /b"])
def test_a_regex_is_nothing_but_a_regex(byte_level, pattern):
    assert matches(pattern)(draw(byte_level, Constraint.regex(byte_level, pattern), 0, matches(pattern)))


def test_a_regex_of_nothing_lets_the_text_end_at_once(byte_level):
    assert Constraint.regex(byte_level, "").begin().mask(len(byte_level)).nonzero()[:, 0].tolist() == [2]


@pytest.mark.parametrize("pattern", ["^ab$", "^a|b$", "^(a|b)c$", r"\Aab\z"])
def test_anchors_stand_where_a_whole_match_puts_them(byte_level, pattern):
    complete = matches(pattern.replace(r"\z", r"\Z"))
    assert complete(draw(byte_level, Constraint.regex(byte_level, pattern), 0, complete))


def test_a_tokenizer_without_an_end_is_refused(story):
    tokenizer = train_tokenizer([story], 300, story.parent / "endless")
    tokenizer.eos_token = None
    with pytest.raises(HymbaError, match="names no end-of-text token"):
        Constraint.json_object(tokenizer)


def test_without_the_package_one_is_told_what_to_install(story, monkeypatch):
    tokenizer = train_tokenizer([story], 300, story.parent / "bare")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(HymbaError, match=r"pip install 'hymba\[serve\]'"):
        Constraint.json_object(tokenizer)
