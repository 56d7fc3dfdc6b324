"""From text files to tokens on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hymba.errors import HymbaError
from hymba.files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".jsonl")
PIECE = 1 << 18  # characters handed to the tokenizer at once: bounds its memory


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents, end to end, memory-mapped.

    tokens: (sum of lengths,) uint16 or uint32; each document ends with EOS and has no BOS
    offsets: (documents + 1,) int64; document d is tokens[offsets[d] : offsets[d + 1]]
    num_bytes: UTF-8 bytes of the text
    fingerprint: of the files and the tokenizer that it was made from
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
        """Map what `tokenise` wrote."""
        about = json.loads((directory / "about.json").read_text(encoding="utf-8"))
        tokens = np.memmap(directory / "tokens.bin", dtype=about["dtype"], mode="r")
        return cls(tokens, np.load(directory / "offsets.npy"), about["num_bytes"], about["fingerprint"])


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files named by `paths`, those in directories sorted, each once.

    Raises:
        HymbaError: a path leads nowhere, or a directory holds neither .txt nor .jsonl.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
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
        HymbaError: the file cannot be read, is not UTF-8 text, or holds no text; the message gives the place.
    """
    empty = True
    texts = _read_lines(file) if file.suffix == ".jsonl" else [read_text(file).removeprefix("\ufeff")]
    for line, text in enumerate(texts, 1):
        if "\0" in text:
            raise HymbaError(f"{file} is not text: it holds a zero byte")
        if file.suffix == ".jsonl":
            text = _parse_line(text, f"{file} line {line}") if text.strip() else ""
        if text.strip():
            empty = False
            yield text
    if empty:
        raise HymbaError(f"{file} holds no text")


def _read_lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise HymbaError(f"{file} is not UTF-8 text") from error
    except OSError as error:
        raise HymbaError(f"cannot read {file}: {error.strerror}") from error


def _parse_line(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise HymbaError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise HymbaError(f'{place} has no "text" field')
    return str(row["text"])


def cut_text(text: str, size: int = PIECE) -> Iterator[str]:
    """Cut a long text after line ends into pieces of at least `size` characters, the last one aside.

    Only a token across a cut is affected; a SentencePiece tokenizer adds its leading space once a piece.
    """
    start = 0
    while len(text) - start > size and (end := text.find("\n", start + size) + 1):
        yield text[start:end]
        start = end
    yield text[start:]


def tokenise(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    report: Callable[[int], None] = lambda _: None,
) -> Corpus:
    """Tokenise `files` into `directory`, or open what is there if it comes from the same files and tokenizer.

    `report` is called with the UTF-8 bytes of each piece done. Renamed from another name once it is complete.

    Raises:
        HymbaError: see `read_documents`.
    """
    mark = _fingerprint(files, tokenizer)
    about = directory / "about.json"
    if about.is_file() and json.loads(about.read_text(encoding="utf-8"))["fingerprint"] == mark:
        return Corpus.open(directory)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    offsets, num_bytes = [0], 0
    with (partial / "tokens.bin").open("wb") as out:
        for batch in _batches(text for file in files for text in read_documents(file)):
            pieces = [(piece, last) for text in batch for piece, last in _mark_last(cut_text(text))]
            encoded = tokenizer([p for p, _ in pieces], add_special_tokens=False, verbose=False)["input_ids"]
            length = offsets[-1]
            for (piece, last), ids in zip(pieces, encoded, strict=True):
                ids = [*ids, tokenizer.eos_token_id] if last else ids
                out.write(np.asarray(ids, dtype=dtype).tobytes())
                length += len(ids)
                offsets += [length] * last
                num_bytes += (size := len(piece.encode()))
                report(size)
    np.save(partial / "offsets.npy", np.asarray(offsets, dtype=np.int64))
    note = {"dtype": dtype, "num_bytes": num_bytes, "fingerprint": mark}
    (partial / "about.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return Corpus.open(directory)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Gather whole documents until they are worth a call of the tokenizer, which works on many at once."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if sum(map(len, batch)) >= PIECE or len(batch) >= 1024:
            yield batch
            batch = []
    if batch:
        yield batch


def _mark_last(pieces: Iterator[str]) -> Iterator[tuple[str, bool]]:
    before = next(pieces)
    for piece in pieces:
        yield before, False
        before = piece
    yield before, True


def _fingerprint(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest the files' names, sizes and times, and the tokenizer: what a cache of tokens depends on."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    described = json.dumps([stats, sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id])
    return hashlib.sha256(described.encode()).hexdigest()
