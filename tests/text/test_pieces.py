"""Cutting long texts: nothing is lost, and almost always no token changes."""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hymba.text import encode_documents, encode_text, end_at_spaces, load_tokenizer, split_blocks
from hymba.text import pieces as module

TINY = Path(__file__).parents[2] / "src/hymba/assets/tiny"
SENTENCE = "the night was cold, and nobody -- not even “he” -- came. What now? 漢字 naïve 1984 x_y"


def story(words: int, seed: int = 0) -> str:
    generator = random.Random(seed)
    ends = [" "] * 12 + ["\n", "\n\n", "  ", "\r\n", "\n    "]
    choices = SENTENCE.split()
    return "".join(generator.choice(choices) + generator.choice(ends) for _ in range(words))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("llama")
    (directory / "story.txt").write_text(story(2000), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "story.txt"),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return load_tokenizer(directory)


@pytest.fixture(params=["byte-level", "llama", "prefix space"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "llama":
        return request.getfixturevalue("llama")
    loaded = load_tokenizer(TINY)
    if request.param == "prefix space":
        loaded.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return loaded


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 300)
    monkeypatch.setattr(module, "ZONE", 200)
    monkeypatch.setattr(module, "WINDOW", 100)


def whole(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", ["lines", "one line", "no spaces", "one letter"])
def test_a_cut_changes_no_token(tokenizer: Any, kind: str) -> None:
    text = {
        "lines": story(3000),
        "one line": " ".join(story(3000).split()),
        "no spaces": "".join(story(3000).split()),
        "one letter": "漢" * 3000,
    }[kind]
    found = list(encode_documents(tokenizer, [split_blocks(text)]))
    assert len(found) > 5
    assert [token for ids, _, _ in found for token in ids] == whole(tokenizer, text)
    assert [last for _, _, last in found] == [False] * (len(found) - 1) + [True]
    assert sum(size for _, size, _ in found) == len(text.encode())


def test_at_the_size_in_use(tokenizer: Any) -> None:
    text = story(30_000)
    assert encode_text(tokenizer, text) == whole(tokenizer, text)


@pytest.mark.usefixtures("small_pieces")
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(alphabet=" \n\ta漢🙂.’</s>", min_size=600, max_size=1500))
def test_no_text_is_lost(text: str) -> None:
    tokenizer = load_once()
    assert tokenizer.decode(encode_text(tokenizer, text)) == text


def load_once(loaded: list[Any] = []) -> Any:  # noqa: B006
    if not loaded:
        loaded.append(load_tokenizer(TINY))
    return loaded[0]


@pytest.mark.usefixtures("small_pieces")
def test_a_text_with_no_place_to_cut_is_cut_all_the_same() -> None:
    """Each token is the whole rest of the piece, so that any cut changes tokens."""
    vocabulary = {"a" * n: n - 1 for n in range(1, 2001)}
    merges = [("a" * n, "a" * n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=merges)))
    ids = encode_text(tokenizer, "a" * 5000)
    assert sum(token + 1 for token in ids) == 5000


def test_documents_end_where_they_end(tokenizer: Any) -> None:
    documents = [story(n, n) for n in (1, 5, 40)]
    found = list(encode_documents(tokenizer, map(split_blocks, documents)))
    assert [ids for ids, _, _ in found] == [whole(tokenizer, text) for text in documents]
    assert all(last for _, _, last in found)


@given(st.lists(st.text(alphabet="ab \n", max_size=20), max_size=8))
def test_blocks_end_before_white_space(blocks: list[str]) -> None:
    moved = list(end_at_spaces(blocks))
    assert "".join(moved) == "".join(blocks)
    for block, following in pairwise(moved):
        assert not following or following[0] in " \n" or not {" ", "\n"} & set(block[1:])
