"""One text in the engine: what was asked for, how far it is, and who is told."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hymba.inference.sampling import SamplingParams, SamplingState
from hymba.text import StopCutter, TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model held a token: natural logarithms of its own distribution, before temperature and penalties.

    top: the likeliest tokens at that place and theirs, as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Update:
    """What one step of the engine added to a sequence.

    tokens: new ids. text: what became certain with them; what may be the beginning of a stop string is held back.
    logprobs: of each new token, if asked for. prompt_logprobs: with the first update, if asked for; None for the first
    token, which nothing precedes.
    finish: None while the text goes on; "stop" after a stop token or string, "length", "cancelled", or "error" with one
    line of `error`.
    """

    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish: str | None = None
    error: str | None = None


class Sequence:
    """A prompt and its continuation.

    Args:
        prompt: ids, at least one.
        params: of the continuation.
        listener: called with each :class:`Update`, in the engine's thread.

    tokens, text, finish, error: as far as they are known; the last two as in :class:`Update`.
    cached_tokens: of the prompt, that were found in the prefix cache.
    arrived, first_token_at, finished_at: seconds of :func:`time.monotonic`.
    """

    def __init__(
        self, prompt: Items[int], params: SamplingParams, listener: Callable[[Update], None] = lambda update: None
    ) -> None:
        self.prompt, self.params, self.listener = list(prompt), params, listener
        self.ids = list(prompt)  # and the new tokens
        self.text = ""
        self.finish: str | None = None
        self.error: str | None = None
        self.cached_tokens = 0
        self.arrived = time.monotonic()
        self.first_token_at: float | None = None
        self.finished_at: float | None = None
        self.cancelled = False
        # What the engine knows: the cache row, how many of `ids` it holds, and what follows them if that is known.
        self.row: int | None = None
        self.computed = 0
        self.logits: Tensor | None = None
        self._fresh: list[int] = []
        self._fresh_text = ""
        self._logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = []

    @property
    def tokens(self) -> list[int]:
        """The ids of the continuation so far."""
        return self.ids[len(self.prompt) :]

    def begin(self, tokenizer: PreTrainedTokenizerBase, end_ids: set[int], most: int) -> None:
        """Make ready to be continued by at most `most` tokens, or until one of `end_ids`."""
        self.state = SamplingState(self.params, self.prompt, end_ids)
        self._end_ids, self._most = end_ids, min(most, self.params.max_new_tokens)
        self._stream, self._cutter = TextStream(tokenizer), StopCutter(self.params.stop)

    @property
    def pending(self) -> list[int]:
        """The ids that the row does not hold yet."""
        return self.ids[self.computed :]

    def take(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Add a chosen token; set `finish` if the text ends with it."""
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        self.ids.append(token)
        self._fresh.append(token)
        self.state.accept(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        self._fresh_text += self._cutter.push(self._stream.push(token))
        if self._cutter.stopped or token in self._end_ids:
            self.finish = "stop"
        elif len(self.ids) - len(self.prompt) == self._most:
            self.finish = "length"
        if self.finish:
            self._fresh_text += self._cutter.push(self._stream.flush()) + self._cutter.flush()

    def fail(self, error: str) -> None:
        """End here with one line on what went wrong."""
        if self.finish is None:
            self.finish, self.error = "error", error

    def report(self) -> None:
        """Tell the listener what is new, if anything is."""
        ended = self.finish is not None and self.finished_at is None
        if not ended and not self._fresh:
            return
        if ended:
            self.finished_at = time.monotonic()
        self.text += self._fresh_text
        update = Update(
            tuple(self._fresh),
            self._fresh_text,
            tuple(self._logprobs),
            tuple(self.prompt_logprobs),
            self.finish,
            self.error,
        )
        self._fresh, self._fresh_text, self._logprobs, self.prompt_logprobs = [], "", [], []
        try:
            self.listener(update)
        except Exception:  # the others must not suffer
            logging.getLogger("hymba").exception("a listener failed: its text is cancelled")
            self.cancelled = True


def token_logprobs(logits: Tensor, tokens: Items[int], top: int) -> list[TokenLogprob]:
    """Return the log-probabilities of tokens, one a row of logits (B, vocab), each with the `top` likeliest beside."""
    scores = logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    own = scores.gather(-1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0].tolist()
    best = scores.topk(min(top, scores.shape[-1]), dim=-1) if top else None
    rows: Iterable[tuple[tuple[int, float], ...]] = (
        ((),) * len(tokens)
        if best is None
        else (tuple(zip(*pair, strict=True)) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True))
    )
    return [TokenLogprob(*found) for found in zip(tokens, own, rows, strict=True)]
