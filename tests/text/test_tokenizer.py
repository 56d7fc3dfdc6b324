"""Tokenizers against SentencePiece itself, lossless round trips, and streamed decoding."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hymba.errors import HymbaError
from hymba.text import TextStream, load_tokenizer, render, train_tokenizer, train_tokenizer_from_iterator
from hymba.text.tokenizer import LONG_RUN

STORY = """\
CHAPTER I

    It was a bright cold day; the clocks were striking, and the night was falling over the old town.
“Who is there?” said the traveller -- and _nobody_ answered. "Don't open the door," the old man said.

""" + "\n".join(
    f"The {noun} of the {place} was {state}, and the {noun} knew that the {place} was not {state}."
    for noun in ("keeper", "daughter", "stranger", "captain")
    for place in ("house", "harbour", "forest", "castle")
    for state in ("lost", "sleeping", "burning", "forgotten")
)

ANY_TEXT = st.text(max_size=60) | st.text(alphabet=" \n\t\u2581\u2019aé漢🙂'“_-.the", max_size=60)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("story") / "story.txt"
    path.write_text(STORY, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(story: Path) -> PreTrainedTokenizerBase:
    return train_tokenizer([story], 400, story.parent / "trained")


@pytest.fixture(scope="module")
def pieces(story: Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model with LLaMA-2's settings, in a directory of its own."""
    directory = story.parent / "pieces"
    directory.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(story),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))


@pytest.fixture(scope="module")
def llama(story: Path, pieces: sentencepiece.SentencePieceProcessor) -> PreTrainedTokenizerBase:
    return load_tokenizer(story.parent / "pieces")


@pytest.fixture(params=["trained", "llama"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = request.getfixturevalue(request.param)
    return loaded


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return ids


@settings(max_examples=200)
@given(text=ANY_TEXT)
def test_tokenizer_model_gives_the_ids_of_sentencepiece(llama, pieces, text):
    assert ids_of(llama, text) == pieces.encode(text)


def test_tokenizer_model_follows_llama(llama, pieces):
    assert llama("the house").input_ids == [1, *pieces.encode("the house")]
    assert (llama.bos_token_id, llama.eos_token_id, llama.unk_token_id) == (1, 2, 0)
    assert llama.pad_token_id == pieces.get_piece_size() == len(llama) - 1
    assert llama(["the", "the old house"], padding=True).input_ids[0][0] == llama.pad_token_id


def test_a_saved_tokenizer_model_loads_as_tokenizer_json(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again(STORY).input_ids == llama(STORY).input_ids
    assert (again.pad_token_id, again.padding_side) == (llama.pad_token_id, "left")


def test_tokenizer_model_takes_the_chat_template_beside_it(story, pieces, tmp_path):
    shutil.copy(story.parent / "pieces" / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}!"}))
    assert render([{"role": "user", "content": "hi"}], load_tokenizer(tmp_path)) == "hi!"


@settings(max_examples=200)
@given(text=ANY_TEXT | st.sampled_from(["</s>", " <s> x[PAD]", "\r\n\r", "\x00"]))
def test_trained_tokenizer_is_lossless(trained, text):
    assert trained.decode(ids_of(trained, text)) == text


def test_trained_tokenizer_puts_bos_first_and_nothing_last(trained):
    ids = trained("the house").input_ids
    assert ids[0] == trained.bos_token_id == 1
    assert ids[1:] == ids_of(trained, "the house")
    assert (trained.pad_token_id, trained.eos_token_id, len(trained)) == (0, 2, 400)
    assert trained(["the", "the house"], padding=True).input_ids[0][0] == 0


def test_words_take_the_sign_before_them_and_punctuation_the_newlines_after(trained):
    split = trained.backend_tokenizer.pre_tokenizer.pre_tokenize_str('so the\nold "man" said.\n\n  It is 42')
    words = ["so", "Ġthe", "Ċold", 'Ġ"', "man", '"', "Ġsaid", ".ĊĊ", "Ġ", "ĠIt", "Ġis", "Ġ", "4", "2"]
    assert [word for word, _ in split] == words


def test_auto_tokenizer_loads_a_trained_one(trained, story):
    auto = AutoTokenizer.from_pretrained(story.parent / "trained")
    assert auto(STORY).input_ids == trained(STORY).input_ids
    assert auto.chat_template == trained.chat_template
    assert auto.padding_side == "left"


def test_training_twice_gives_the_same_files(story, trained, tmp_path):
    train_tokenizer([str(story)], 400, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (story.parent / "trained" / name).read_bytes()
    assert len(list((tmp_path / "again").iterdir())) == 2


@settings(max_examples=200)
@given(text=ANY_TEXT)
def test_a_stream_says_what_decode_says(trained, llama, text):
    for tokenizer in (trained, llama):
        stream = TextStream(tokenizer, fresh=True)
        ids = ids_of(tokenizer, text)
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_a_stream_never_emits_a_broken_character(tokenizer):
    stream = TextStream(tokenizer)
    said = [stream.push(token) for token in ids_of(tokenizer, "漢🙂")]
    assert "".join(said).strip(" ") == "漢🙂"
    assert "\ufffd" not in "".join(said) + stream.flush()
    assert "" in said


def test_a_stream_keeps_leading_spaces_and_drops_special_tokens(tokenizer):
    before, after = ids_of(tokenizer, "the"), ids_of(tokenizer, " house")
    stream = TextStream(tokenizer, fresh=True)
    assert "".join(map(stream.push, [1, *before, 1, *after, 2])) == tokenizer.decode([*before, *after])
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, after)).lstrip(" ") == "house"
    assert TextStream(tokenizer).push(after[0]).startswith(" ")


def test_a_stream_marks_bytes_that_form_no_character(tokenizer):
    ids = ids_of(tokenizer, "漢")
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, ids[:-1])).strip(" ") == ""
    assert stream.flush() == "\ufffd"
    assert "".join(map(stream.push, ids_of(tokenizer, "the"))).strip(" ") == "the"


def test_a_stream_passes_over_ids_without_text(tokenizer):
    assert TextStream(tokenizer).push(len(tokenizer) + 7) == ""


def test_missing_tokenizers_are_named(tmp_path):
    with pytest.raises(HymbaError, match="no such directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(HymbaError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff\x00", b'{"model": {"type": "BPE"}}'])
def test_a_corrupt_tokenizer_json_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(HymbaError, match="cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_truncated_tokenizer_model_is_named(story, pieces, tmp_path, cut):
    whole = (story.parent / "pieces" / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole[:cut])
    with pytest.raises(HymbaError, match=r"damaged|LLaMA-2 style"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_model_of_another_kind_is_refused(story, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        input=str(story), model_prefix=str(tmp_path / "tokenizer"), vocab_size=60, minloglevel=2
    )
    with pytest.raises(HymbaError, match="no LLaMA-2 style BPE"):
        load_tokenizer(tmp_path)


def test_training_refuses_bad_input(story, tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\u00e9 au lait".encode("latin-1"))
    for paths, size, message in [
        ([story], 258, "need 259"),
        ([], 400, "no text files"),
        ([tmp_path / "absent.txt"], 400, "absent.txt as UTF-8"),
        ([latin], 400, "latin.txt as UTF-8"),
    ]:
        with pytest.raises(HymbaError, match=message):
            train_tokenizer(paths, size, tmp_path / "out")
    assert not (tmp_path / "out").exists()


MEASURE = """
import resource, sys
import transformers
from hymba.text import train_tokenizer
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
train_tokenizer([sys.argv[1]], 500, sys.argv[2])
print((peak() - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["words", "letters"])
def test_training_takes_little_memory(tmp_path, kind):
    """Whole, or in blocks of a million characters, these take 250 MiB and more."""
    letters = random.Random(0).choices("abcdefghijklmnop", k=4_000_000)
    text = "It was a cold morning and nobody was there. " * 400_000 if kind == "words" else "".join(letters)
    (tmp_path / "a.txt").write_text(text)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a.txt"), str(tmp_path)]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < 120


def test_blocks_do_not_cut_words(story, tmp_path, monkeypatch):
    train_tokenizer([story], 400, tmp_path / "whole")
    monkeypatch.setattr("hymba.text.tokenizer.BLOCK", 50)
    train_tokenizer([story], 400, tmp_path / "blocks")
    vocabularies = [json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("whole", "blocks")]
    words = [{token for token in v["model"]["vocab"] if token.strip("Ġ").isalpha()} for v in vocabularies]
    assert len(words[0] ^ words[1]) < 10


def test_endless_words_are_not_learned_whole(tmp_path):
    letters = "".join(random.Random(0).choices("abcdefgh", k=100_000))
    (tmp_path / "a.txt").write_text(letters + " " + "=-" * 50_000)
    tokenizer = train_tokenizer([tmp_path / "a.txt"], 300, tmp_path)
    assert tokenizer.decode(ids_of(tokenizer, letters)) == letters
    seen = LONG_RUN.sub(r"\1\2", f"{letters} {'=-' * 50_000} end")
    assert seen == f"{letters[:256]} {'=-' * 128} end"


def test_special_tokens_in_the_texts_are_trained_on_as_text(tmp_path):
    tokenizer = train_tokenizer_from_iterator(["a <s>struck</s> price [PAD] "] * 50, 300, tmp_path)
    assert not {0, 1, 2} & set(ids_of(tokenizer, "<s>struck</s>[PAD]"))
    assert len(ids_of(tokenizer, "<s>struck</s>")) < 8
