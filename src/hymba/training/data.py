"""From text files to tokens on disk."""

from __future__ import annotations

import codecs
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hymba.errors import HymbaError
from hymba.files import digest_files, replace_directory
from hymba.text import encode_documents, split_blocks

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".jsonl")
BLOCK = 1 << 16  # bytes read at once
OFFSETS = "offsets.bin"
TOKENS = "tokens.bin"
ABOUT = "about.json"


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents, end to end, memory-mapped.

    tokens: (sum of lengths,) uint16 or uint32; each document ends with EOS and has no BOS
    offsets: (documents + 1,) int64; document d is tokens[offsets[d] : offsets[d + 1]]
    num_bytes: UTF-8 bytes of the text
    fingerprint: of the files' content and the tokenizer that it was made from
    """

    tokens: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]
    num_bytes: int
    fingerprint: str

    @property
    def tokens_per_byte(self) -> float:
        """Stored tokens for each byte of text."""
        return len(self.tokens) / self.num_bytes

    @classmethod
    def open(cls, directory: Path) -> Corpus:
        """Map what `tokenise` wrote.

        Raises:
            HymbaError: the files are missing, damaged or cut short.
        """
        try:
            about = json.loads((directory / ABOUT).read_text(encoding="utf-8"))
            tokens = np.memmap(directory / TOKENS, dtype=about["dtype"], mode="r", shape=(about["tokens"],))
            offsets = np.memmap(directory / OFFSETS, dtype="int64", mode="r", shape=(about["documents"] + 1,))
            corpus = cls(tokens, offsets, about["num_bytes"], about["fingerprint"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise HymbaError(f"the tokens in {directory} are damaged ({error}): delete them") from error
        if int(offsets[-1]) != len(tokens):
            raise HymbaError(f"the tokens in {directory} are damaged (cut short): delete them")
        return corpus


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files named by `paths`, those in directories sorted, each once.

    Raises:
        HymbaError: a path leads nowhere, or a directory holds neither .txt nor .jsonl.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise HymbaError(f"no .txt or .jsonl file in {path}")
            found |= dict.fromkeys(inside)
        elif path.is_file():
            found[path] = None
        else:
            raise HymbaError(f"no data at {path}: give .txt files, .jsonl files or directories of them")
    if not found:
        raise HymbaError("no data: give .txt files, .jsonl files or directories of them")
    return list(found)


def split_held_out(files: Sequence[Path], names: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Return (files to train on, files whose name is one of `names`)."""
    present = {file.name for file in files}
    for name in names:
        if name not in present:
            raise HymbaError(f"held_out names {name!r}, which is not among the {len(files)} data files")
    train = [file for file in files if file.name not in names]
    if not train:
        raise HymbaError("every data file is held out: nothing is left to train on")
    return train, [file for file in files if file.name in names]


def read_documents(file: Path) -> Iterator[str]:
    """Yield the documents of a file: each line's "text" in a .jsonl, else the whole file as one.

    Raises:
        HymbaError: the file cannot be read, is not UTF-8 text, or holds no text; the message gives the line.
    """
    return map("".join, stream_documents(file))


def stream_documents(file: Path) -> Iterator[Iterator[str]]:
    """Yield the documents of a file as `read_documents` does, each as the blocks of its text.

    Take a document's blocks before asking for the next document. A .txt file of any size is read in bounded
    memory; of a .jsonl, one line is held at a time.
    """
    if not _is_jsonl(file):
        yield _read_blocks(file)
        return
    empty = True
    for number, line in enumerate(_read_lines(file), 1):
        if line.isspace():
            continue
        text = _parse_line(line, f"{file} line {number}")
        if text and not text.isspace():
            empty = False
            yield split_blocks(text)
    if empty:
        raise HymbaError(f"{file} holds no text")


def _is_jsonl(file: Path) -> bool:
    return file.suffix.lower() == ".jsonl"


def _read_blocks(file: Path) -> Iterator[str]:
    """Yield the text of a file in blocks, without a byte order mark, newlines as they are."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    empty, line = True, 1
    try:
        with file.open("rb") as raw:
            while block := raw.read(BLOCK):
                text = decoder.decode(block)
                if (zero := text.find("\0")) >= 0:
                    line += text.count("\n", 0, zero)
                    raise HymbaError(f"{file} is not text: it holds a zero byte in line {line}")
                line += text.count("\n")
                empty = empty and (not text or text.isspace())
                yield text
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise HymbaError(_describe_bad_byte(f"{file} is not UTF-8 text: line {line}", error)) from error
    except OSError as error:
        raise HymbaError(f"cannot read {file}: {error.strerror}") from error
    if empty:
        raise HymbaError(f"{file} holds no text")


def _read_lines(file: Path) -> Iterator[bytes]:
    """Yield the lines of a file, without a byte order mark."""
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines):
                yield line if number else line.removeprefix(codecs.BOM_UTF8) or b"\n"
    except OSError as error:
        raise HymbaError(f"cannot read {file}: {error.strerror}") from error


def _parse_line(line: bytes, place: str) -> str:
    """Return the "text" of a line of JSON."""
    if b"\0" in line:
        raise HymbaError(f"{place} holds a zero byte: remove it, or the line")
    try:
        # Numbers are not needed; as floats they may have any size and number of digits.
        row = json.loads(line.decode("utf-8"), parse_int=float)
    except UnicodeDecodeError as error:
        raise HymbaError(_describe_bad_byte(f"{place} is not UTF-8 text: it", error)) from error
    except json.JSONDecodeError as error:
        problem = f"{place} is not JSON: {error.msg} at column {error.colno}"
        raise HymbaError(f"{problem}; each line must be an object with a text, or blank") from error
    except RecursionError as error:
        raise HymbaError(f"{place} nests too many lists or objects to be read: remove them, or the line") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise HymbaError(f'{place} has no "text" field that holds a string: write {{"text": "…"}} on each line')
    if "\0" in text:
        raise HymbaError(f"{place}: its text holds a zero byte, written \\u0000: remove it, or the line")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        problem = f"{place}: its text holds half of a surrogate pair, written {half}, which is no character"
        raise HymbaError(f"{problem}: remove it, or the line") from error
    return text


def _describe_bad_byte(place: str, error: UnicodeDecodeError) -> str:
    return f"{place} holds the byte 0x{error.object[error.start]:02x}; convert the file to UTF-8"


def describe_data(files: Sequence[Path]) -> list[str]:
    """Return a digest of the content of each file, and whether it is read as JSON lines.

    Names and times do not count: data that was copied, moved or touched is the same data.
    """
    kinds = ("jsonl" if _is_jsonl(file) else "txt" for file in files)
    return [f"{kind}:{digest}" for kind, digest in zip(kinds, digest_files(files), strict=True)]


def describe_tokenizer(tokenizer: Tokenizer) -> str:
    """Return a digest of all that a tokenizer's ids depend on: vocabulary, merges, normalizer, added tokens and more.

    Padding and truncation are left out: they are set by each call.
    """
    state = {key: value for key, value in json.loads(tokenizer.to_str()).items() if key not in _SET_BY_CALLS}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


_SET_BY_CALLS = ("padding", "truncation")


def tokenise(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    report: Callable[[int], None] = lambda _: None,
    digests: Sequence[str] | None = None,
) -> Corpus:
    """Tokenize `files` into `directory`, or open what is there if it comes from the same content and tokenizer.

    Special tokens spelled in the text are text like any other. Memory is bounded, see :mod:`hymba.text.pieces`.
    `report` is called with the UTF-8 bytes of each piece done. Renamed from another name once it is complete.

    Args:
        digests: what `describe_data` returns for `files`, if it is known already.

    Raises:
        HymbaError: see `read_documents`.
    """
    described = [
        *(describe_data(files) if digests is None else digests),
        describe_tokenizer(tokenizer.backend_tokenizer),
        tokenizer.eos_token_id,
    ]
    fingerprint = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    try:
        kept = Corpus.open(directory)
    except HymbaError:
        kept = None
    if kept is not None and kept.fingerprint == fingerprint:
        return kept
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    about = _write_tokens(files, tokenizer, partial, report) | {"fingerprint": fingerprint}
    (partial / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    replace_directory(partial, directory)
    return Corpus.open(directory)


def _write_tokens(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, directory: Path, report: Callable[[int], None]
) -> dict[str, Any]:
    """Write the tokens and the offsets of the documents, and return what is to be noted about them."""
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    length = documents = num_bytes = 0
    with (directory / TOKENS).open("wb") as tokens, (directory / OFFSETS).open("wb") as offsets:
        offsets.write(np.int64(0).tobytes())
        texts = (document for file in files for document in stream_documents(file))
        for ids, size, last in encode_documents(tokenizer, texts):
            if last:
                ids.append(tokenizer.eos_token_id)
            tokens.write(np.asarray(ids, dtype=dtype).tobytes())
            length += len(ids)
            if last:
                offsets.write(np.int64(length).tobytes())
                documents += 1
            num_bytes += size
            report(size)
    return {"dtype": dtype, "tokens": length, "documents": documents, "num_bytes": num_bytes}
