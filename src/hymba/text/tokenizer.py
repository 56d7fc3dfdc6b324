"""Tokenizers: the released LLaMA-2 one, small ones that we train, and decoding one token at a time."""

from __future__ import annotations

import codecs
import json
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from hymba.errors import HymbaError
from hymba.files import replacing
from hymba.text.chat import RELEASED_TEMPLATE
from hymba.text.pieces import end_at_spaces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS, EOS, PAD, UNK = "<s>", "</s>", "[PAD]", "<unk>"
SPECIAL_TOKENS = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}

# SentencePiece writes a space as this sign (U+2581).
SPACE = "\u2581"

BLOCK = 1 << 16  # characters read from a file at once
# Letters or signs in a row that are no word of any language, and what of them a tokenizer is trained on.
LONG_RUN = re.compile(r"([^\W\d_]{256})[^\W\d_]+|([^\w\s]{256})[^\w\s]+")

# A word takes along the one sign before it (a space, a newline, a quotation mark), punctuation the newlines
# after it. On hard-wrapped novels a token then holds 5 % more bytes than with the pattern of GPT-2.
WORDS = r"[^\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+\n*|\s+(?!\S)|\s+"


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer: `tokenizer.json`, or else a LLaMA-2 style `tokenizer.model`.

    Nothing is downloaded. The class is the plain fast tokenizer, which runs `tokenizer.json` as it stands;
    transformers' LlamaTokenizer rebuilds it and then differs from the release after special tokens.

    Raises:
        HymbaError: the directory or its tokenizer files are missing or unreadable.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise HymbaError(f"no such directory: {directory}")
    pieces = directory / "tokenizer.model"
    if not (directory / "tokenizer.json").is_file() and not pieces.is_file():
        raise HymbaError(f"{directory} has neither tokenizer.json nor tokenizer.model: copy the checkpoint's here")
    from transformers import PreTrainedTokenizerFast

    try:
        if (directory / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        return _wrap(read_sentencepiece(pieces), _chat_template(directory))
    except HymbaError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise HymbaError(f"the tokenizer in {directory} cannot be read ({error}): copy its files again") from error


def train_tokenizer(paths: Sequence[str | Path], vocab_size: int, directory: str | Path) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on UTF-8 text files, as :func:`train_tokenizer_from_iterator` does on texts.

    Args:
        vocab_size: the most tokens there may be, at least 259. Little text gives fewer: ask `len(tokenizer)`.

    Raises:
        HymbaError: no files, a file that is not readable UTF-8 text, or too small a vocabulary.
    """
    if not paths:
        raise HymbaError("no text files to train the tokenizer on: name at least one")
    texts = (text for path in paths for text in end_at_spaces(_read_blocks(path)))
    return train_tokenizer_from_iterator(texts, vocab_size, directory)


def train_tokenizer_from_iterator(
    texts: Iterable[str], vocab_size: int, directory: str | Path
) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on texts and save it in `directory`.

    Every text survives encoding and decoding unchanged, since all 256 bytes are tokens. Ids: `[PAD]` 0,
    `<s>` 1, `</s>` 2. Encoding puts `<s>` first; the chat template is the released one. Writes
    `tokenizer.json` and `tokenizer_config.json`, which AutoTokenizer loads too. Special tokens spelled in the
    texts are text like any other. Of more than 256 letters or signs in a row, the rest is left out.

    Args:
        texts: of moderate length each; 256 at a time are held in memory, beside the distinct words and their counts.
        vocab_size: the most tokens there may be, at least 259. Little text gives fewer: ask `len(tokenizer)`.

    Raises:
        HymbaError: too small a vocabulary, or what `texts` raises.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise HymbaError(f"vocab_size is {vocab_size}: the bytes and special tokens alone need {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The trainer keeps every distinct word, some 60 bytes for each of its letters.
    tokenizer.train_from_iterator((LONG_RUN.sub(r"\1\2", text) for text in texts), trainer)
    tokenizer.post_processor = _bos_first(tokenizer)
    _save(tokenizer, Path(directory))
    return load_tokenizer(directory)


def _read_blocks(path: str | Path) -> Iterator[str]:
    """A file's text in blocks, newlines as they are."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            yield from iter(lambda: file.read(BLOCK), "")
    except (OSError, UnicodeDecodeError) as error:
        raise HymbaError(f"cannot read {path} as UTF-8 text: {error}") from error


def _bos_first(tokenizer: Tokenizer) -> processors.TemplateProcessing:
    bos = [(BOS, tokenizer.token_to_id(BOS))]
    return processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=bos)


def _save(tokenizer: Tokenizer, directory: Path) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **SPECIAL_TOKENS,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": RELEASED_TEMPLATE,
    }
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        with replacing(directory / name) as path:
            path.write_text(text, encoding="utf-8")


def _wrap(tokenizer: Tokenizer, chat_template: str | None) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL_TOKENS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )


def _chat_template(directory: Path) -> str | None:
    config = directory / "tokenizer_config.json"
    if not config.is_file():
        return None
    template: str | None = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    return template


def read_sentencepiece(path: Path) -> Tokenizer:
    """Turn LLaMA-2's `tokenizer.model` into a tokenizer, with Hymba's `[PAD]` added after the last piece.

    The file is a protobuf message, ModelProto of sentencepiece_model.proto: pieces (field 1: text 1, score 2,
    type 3, which is 1 for normal, 2 unknown, 3 control), trainer (field 2: model type 3, which is 2 for BPE)
    and normaliser (field 3: character map 2, dummy prefix 3, removal of repeated spaces 4).

    Raises:
        HymbaError: the file is damaged, or is not a BPE with LLaMA-2's settings.
    """
    try:
        fields = list(_read_message(path.read_bytes()))
        entries = [dict(_read_message(value)) for number, value in fields if number == 1]
        settings = {number: dict(_read_message(value)) for number, value in fields if number in (2, 3)}
        trainer, normaliser = settings[2], settings[3]
        pieces = [(entry[1].decode("utf-8"), *struct.unpack("<f", entry[2]), entry.get(3, 1)) for entry in entries]
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise HymbaError(f"{path} is damaged or no SentencePiece model: copy it again") from error
    if trainer.get(3) != 2 or normaliser.get(2) or not normaliser.get(3, 1) or normaliser.get(4, 1):
        raise HymbaError(f"{path} is no LLaMA-2 style BPE (no normalisation, a space before every text)")
    vocabulary = {name: index for index, (name, _, _) in enumerate(pieces)}
    scores = {name: score for name, score, kind in pieces if kind == 1}
    special = [name for name, _, kind in pieces if kind in (2, 3)]
    return _llama_bpe(vocabulary, _merges(scores), [*special, PAD])


def _llama_bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], special: list[str]) -> Tokenizer:
    bpe = models.BPE(vocab=vocabulary, merges=merges, unk_token=UNK, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    tokenizer.post_processor = _bos_first(tokenizer)
    return tokenizer


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to build each piece from two others: higher scores first, then longer left halves.

    Scores rank the merges; ids do not (LLaMA-2 numbers its runs of spaces low and merges them last).
    """
    halves = [(piece[:cut], piece[cut:]) for piece in scores for cut in range(1, len(piece))]
    known = [pair for pair in halves if pair[0] in scores and pair[1] in scores]
    return sorted(known, key=lambda pair: (scores["".join(pair)], len(pair[0]), len(pair[1])), reverse=True)


def _read_message(data: bytes) -> Iterator[tuple[int, Any]]:
    """Read a protobuf message's (field number, value) pairs: ints for varints, bytes for everything else."""
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        value: int | bytes
        if key & 7 == 0:
            value, position = _read_varint(data, position)
        else:
            if key & 7 == 2:
                size, position = _read_varint(data, position)
            else:
                size = {1: 8, 5: 4}[key & 7]
            value, position = data[position : position + size], position + size
        if position > len(data):
            raise ValueError("message cut short")
        yield key >> 3, value


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """A little-endian base-128 number and the position after it."""
    value, shift = 0, 0
    while data[position] & 128:
        value |= (data[position] & 127) << shift
        position, shift = position + 1, shift + 7
    return value | data[position] << shift, position + 1


class TextStream:
    """Decode a growing sequence one token at a time, in constant time per token.

    Characters appear once all their bytes are there; bytes that form no character become U+FFFD. Leading
    spaces are kept, special tokens are dropped.

    Args:
        fresh: the stream begins a text rather than continues one, so the space that SentencePiece puts before
            every text is dropped. Byte-level tokenizers add no such space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, fresh: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._added = {str(token) for token in tokenizer.get_added_vocab()}
        self._letters = _byte_letters() if _is_byte_level(tokenizer) else None
        self._fresh = fresh and self._letters is None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that became certain with this token: often one word, sometimes nothing."""
        data = self.token_bytes(token_id)
        if self._fresh and data:
            data, self._fresh = data.removeprefix(b" "), False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The sequence has ended: U+FFFD for a character left unfinished, else nothing."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for anywhere in a text; none for special tokens."""
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        # A model's vocabulary may be padded past the tokenizer's: such an id has no text.
        if piece is None or token_id in self._special:
            return b""
        if piece in self._added:
            return piece.encode()
        if self._letters is not None:
            return bytes(self._letters[letter] for letter in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return piece.replace(SPACE, " ").encode()


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    return isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)


def _byte_letters() -> dict[str, int]:
    """The letter byte-level BPE writes for each byte: printable Latin-1 itself, or one from U+0100 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [letter for letter in alphabet if ord(letter) < 256]
    rest = sorted(set(range(256)) - {ord(letter) for letter in printable})
    return {letter: ord(letter) for letter in printable} | dict(zip(alphabet[len(printable) :], rest, strict=True))
