"""Tokens as a client sees them: ids, texts, bytes and log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from hymba.inference import TokenLogprob
from hymba.text import TextStream, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOWEST = -9999.0  # what JSON shows for a probability of zero

Entry = tuple[int, TokenLogprob | None]  # a token, and what is known of it: nothing of a text's first


class Vocabulary:
    """A tokenizer for many threads, and the bytes of its tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._stream = TextStream(tokenizer)
        self._special = set(tokenizer.all_special_ids)
        self._lock = Lock()

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the ids of a text, BOS first if `special`."""
        with self._lock:
            return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        contexts: Sequence[str] | None = None,
    ) -> str:
        """Return a conversation as the text of a prompt, by the checkpoint's template."""
        with self._lock:
            return render(messages, self.tokenizer, tools, contexts)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens that begin one, special ones left out."""
        stream = TextStream(self.tokenizer, fresh=True)
        return "".join(map(stream.push, tokens)) + stream.flush()

    def bytes_of(self, token: int) -> bytes:
        """Return a token's bytes; those of a special one are its name."""
        if token in self._special:
            return str(self.tokenizer.convert_ids_to_tokens(token)).encode()
        return self._stream.token_bytes(token)

    def text_of(self, token: int) -> str:
        """Return a token's text; its bytes, as OpenAI writes them, where they are no whole characters."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(vocabulary: Vocabulary, entries: Sequence[Entry]) -> dict[str, Any]:
    """Return the `logprobs` of a piece of a chat's answer."""

    def tell(token: int, logprob: float) -> dict[str, Any]:
        data = vocabulary.bytes_of(token)
        return {"token": vocabulary.text_of(token), "logprob": max(logprob, LOWEST), "bytes": list(data)}

    known = [entry for _, entry in entries if entry]
    content = [tell(e.token, e.logprob) | {"top_logprobs": [tell(*pair) for pair in e.top]} for e in known]
    return {"content": content}


class CompletionLogprobs:
    """Writes the `logprobs` of a completion, piece by piece; offsets count from the start of the choice's text."""

    def __init__(self, vocabulary: Vocabulary, fresh: bool) -> None:
        self._vocabulary = vocabulary
        self._stream = TextStream(vocabulary.tokenizer, fresh=fresh)
        self._offset = 0

    def write(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """Return the `logprobs` of the next piece."""
        return {
            "tokens": [self._vocabulary.text_of(token) for token, _ in entries],
            "token_logprobs": [max(entry.logprob, LOWEST) if entry else None for _, entry in entries],
            "top_logprobs": [self._top(entry) if entry else None for _, entry in entries],
            "text_offset": [self._place(token) for token, _ in entries],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """Return the likeliest tokens and the one that stands there; of two with one text the likelier."""
        top: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            text = self._vocabulary.text_of(token)
            top[text] = max(logprob, LOWEST, top.get(text, LOWEST))
        return top

    def _place(self, token: int) -> int:
        offset = self._offset
        self._offset += len(self._stream.push(token))
        return offset
