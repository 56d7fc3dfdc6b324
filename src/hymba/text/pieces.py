"""Tokenizing texts of any length in bounded memory.

The tokenizers library keeps 50 to 150 bytes for each byte of a text that it encodes, so a long text is cut into
pieces. A cut is made where the text around it gives the same tokens with the cut as without: at a line end if
one will do, else at other white space, else between any two characters. Where none of the places tried will do,
which takes unusual text (one word of thousands of letters, say), tokens at the cut differ from those of the whole
text, and a tokenizer that begins every text with a space adds one there. No text is lost in either case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 1 << 15  # characters of a piece, about; a text of less than twice as many stays whole
BATCH_BYTES = 1 << 19  # UTF-8 bytes encoded in one call, about: a call holds at most some 200 bytes for each
BATCH_PIECES = 1024
WINDOW = 128  # characters on either side of a cut whose tokens must not change
ZONE = 2048  # characters that are searched for a place to cut
TRIES = 8  # places tried of each kind


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text, as :func:`encode_documents` gives them."""
    ids: list[int] = []
    for piece, _, _ in encode_documents(tokenizer, [split_blocks(text)]):
        ids += piece
    return ids


def split_blocks(text: str) -> Iterator[str]:
    """Split a text into blocks of equal size, with no regard for its content."""
    return (text[start : start + PIECE] for start in range(0, len(text), PIECE))


def end_at_spaces(blocks: Iterable[str]) -> Iterator[str]:
    """Move the end of each block of a text back to before its last white space, so that words stay whole."""
    rest = ""
    for block in blocks:
        text = rest + block
        end = max(text.rfind(" "), text.rfind("\n"))
        if end <= 0:  # one word as long as a block: not worth keeping whole
            end = len(text)
        yield text[:end]
        rest = text[end:]
    if rest:
        yield rest


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[Iterable[str]]
) -> Iterator[tuple[list[int], int, bool]]:
    """Tokenize documents, each given as the blocks of its text, without holding more than a few pieces of them.

    Special tokens spelled in a text are text like any other, and no BOS or EOS is added.

    Yields:
        (token ids, UTF-8 bytes of their text, whether the document ends with them), piece by piece.
    """
    encoder = _PieceEncoder(tokenizer)
    batch: list[tuple[str, bool]] = []
    notes: list[tuple[int, bool]] = []
    held = 0
    for document in documents:
        for piece, joined, last in encoder.cut(document):
            size = len(piece.encode())
            batch.append((piece, joined))
            notes.append((size, last))
            held += size
            if held >= BATCH_BYTES or len(batch) >= BATCH_PIECES:
                yield from _with_notes(encoder.encode(batch), notes)
                batch, notes, held = [], [], 0
    if batch:
        yield from _with_notes(encoder.encode(batch), notes)


def _with_notes(encoded: list[list[int]], notes: list[tuple[int, bool]]) -> Iterator[tuple[list[int], int, bool]]:
    for ids, (size, last) in zip(encoded, notes, strict=True):
        yield ids, size, last


class _PieceEncoder:
    """Cuts texts into pieces and encodes a piece as it would be encoded after the one before it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # SentencePiece puts a space before every text. After a newline that is dropped again it adds none.
        word, twice = self._call(["x", "x x"])
        self.lead = "\n" if twice == word * 2 else ""
        self.lead_length = len(self._call([self.lead])[0]) if self.lead else 0

    def encode(self, pieces: list[tuple[str, bool]]) -> list[list[int]]:
        """Return the ids of each (piece, joined): a joined one continues the text before it."""
        encoded = self._call([self.lead + piece if joined else piece for piece, joined in pieces])
        return [ids[self.lead_length :] if joined else ids for ids, (_, joined) in zip(encoded, pieces, strict=True)]

    def cut(self, blocks: Iterable[str]) -> Iterator[tuple[str, bool, bool]]:
        """Yield (piece, joined, last) of a text: `joined` as `encode` takes it, `last` for the text's end."""
        text, joined = "", False
        for block in blocks:
            text += block
            while len(text) >= 2 * PIECE:
                end, exact = self._find_cut(text)
                yield text[:end], joined, False
                text, joined = text[end:], exact
        yield text, joined, True

    def _find_cut(self, text: str) -> tuple[int, bool]:
        """Return where to cut `text`, and whether the tokens stay as they were without the cut."""
        zone = text[PIECE - ZONE : PIECE]
        lines, spaces = ([m.start() + PIECE - ZONE for m in re.finditer(kind, zone)] for kind in (r"\n", r"[^\S\n]"))
        for place in (*_beside(lines), *_beside(spaces), *range(PIECE - 2 * TRIES, PIECE)):
            if self._is_exact(text, place):
                return place, True
        return next((places[-1] + 1 for places in (lines, spaces) if places), PIECE), False

    def _is_exact(self, text: str, place: int) -> bool:
        before, after = text[place - WINDOW : place], text[place : place + WINDOW]
        left, right, whole = self.encode([(before, True), (after, True), (before + after, True)])
        return left + right == whole

    def _call(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids


def _beside(places: list[int]) -> Iterator[int]:
    """The places before and after each of the last few characters at `places`."""
    for place in places[: -TRIES - 1 : -1]:
        yield place
        yield place + 1
