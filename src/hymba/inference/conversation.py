"""A conversation whose cache is kept from turn to turn, so that each turn runs only what is new."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hymba.errors import HymbaError
from hymba.inference.generate import Continuation
from hymba.inference.sampling import SamplingParams
from hymba.model import Cache, Hymba, Prefix
from hymba.text import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Conversation:
    """Questions and answers under the checkpoint's chat template.

    A recurrent state cannot be cropped, so what the model wrote stays in the cache as it wrote it. A new turn
    adds what the template puts after the answer, less what the model has already written of it. The model's weights
    must not change meanwhile.

    Args:
        params: of every answer; give `hymba.text.STOP_STRINGS` as `stop`.
        system: the system prompt.
        cache_bits: 8 quantises the keys and values of the cache.
    """

    def __init__(
        self,
        model: Hymba,
        tokenizer: PreTrainedTokenizerBase,
        params: SamplingParams,
        system: str | None = None,
        cache_bits: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.params, self.cache_bits = model, tokenizer, params, cache_bits
        self.messages = [{"role": "system", "content": system}] if system else []
        self._prompt = ""  # all that was rendered before the last answer
        self._answer: Continuation | None = None
        self._cache: Cache | None = None
        self._read: list[int] = []  # ids that were run before the last answer
        self._prefix: Prefix | None = None  # the meta tokens' state, for every cache

    def ask(self, text: str) -> Continuation:
        """Add the user's turn and return the answer: iterate it, to its end or not, before the next `ask`.

        Raises:
            HymbaError: the question is empty, or the conversation no longer fits; it stays as it was.
        """
        if not text.strip():
            raise HymbaError("the question is empty")
        messages = [*self._settled(), {"role": "user", "content": text}]
        prompt = render(messages, self.tokenizer)
        tokens = self._tokens_behind(prompt)
        if tokens is None or self._cache is None:
            tokens, held = self._encode(prompt), []
            cache = self._new_cache(len(tokens) + self.params.max_new_tokens)
        else:
            cache, held = self._cache, self._held()
        answer = Continuation(self.model, self.tokenizer, tokens, self.params, cache, held=held)
        self.messages, self._prompt, self._answer, self._cache = messages, prompt, answer, cache
        self._read = held + tokens
        return answer

    def _held(self) -> list[int]:
        """Return the ids that the cache holds: all but the last token of the answer was run."""
        return self._read + (self._answer.tokens[:-1] if self._answer else [])

    @torch.no_grad()
    def _new_cache(self, max_length: int) -> Cache:
        if self._prefix is None:
            self._prefix = self.model.prefix()
        return self.model.allocate_cache(1, max_length, self.cache_bits, self._prefix)

    def _settled(self) -> list[dict[str, str]]:
        """Return the messages so far, the last answer included."""
        if self._answer is None:
            return self.messages
        return [*self.messages, {"role": "assistant", "content": self._answer.text}]

    def _tokens_behind(self, prompt: str) -> list[int] | None:
        """Return what must follow the tokens in the cache to make them `prompt`; None if nothing can."""
        answer = self._answer
        if answer is None or not answer.tokens or not prompt.startswith(self._prompt):
            return None
        if self._cache is None or int(self._cache.lengths) != len(self._held()):  # a step was interrupted
            return None
        behind, words = prompt[len(self._prompt) :], answer.text.strip()
        if words not in behind:
            return None
        # The last token was not run. One that stopped the answer need not be: the template closes it.
        unread = [] if answer.finish == "stop" else answer.tokens[-1:]
        written = "".join(answer.pieces if unread else answer.pieces[:-1])
        return unread + self._encode_behind(_rest(_behind(words, behind), _behind(words, written)))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _encode_behind(self, text: str) -> list[int]:
        """Encode text that continues another: without the space that SentencePiece puts before every text."""
        line, both = self._encode("\n"), self._encode("\n" + text)
        return both[len(line) :] if both[: len(line)] == line else self._encode(text)


def _behind(words: str, text: str) -> str:
    return text.partition(words)[2] if words else text


def _rest(closing: str, written: str) -> str:
    """Return what of `closing` is still to be written, spaces before the turn's mark left as the model set them."""
    for text in (closing, closing.lstrip()):
        for begun in (written, written.lstrip()):
            if text.startswith(begun):
                return text[len(begun) :]
    return closing
