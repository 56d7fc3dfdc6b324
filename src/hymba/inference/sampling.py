"""Choosing the next token.

A token is drawn with noise that depends on the text's seed, the token's index in the continuation and the token's id
(:func:`hymba.ops.draw.draw_tokens`), and which tokens may be drawn is decided by the row's logits alone. So a draw
depends on nothing but the logits and the seed, and logits that differ by rounding, as between devices or batch sizes,
seldom change it.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hymba.errors import HymbaError
from hymba.ops.draw import draw_tokens

_NOT_A_NUMBER, _NOTHING = -1, -2  # in place of a token, by draw_tokens
_LEAST, _MOST = 2.0**-126, 2.0**127  # of the numbers that are applied to float32 logits


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a text, and when to stop. The defaults draw from the model's own distribution.

    Raises:
        HymbaError: a number is out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens only
    top_p: float = 1.0  # then from the fewest of them that hold this much probability (arXiv 1904.09751)
    seed: int | None = None  # None: another text each time
    stop: tuple[str, ...] = ()  # texts that end the answer and are cut off
    stop_ids: tuple[int, ...] = ()  # tokens that end it, beside the model's own end-of-text
    min_new_tokens: int = 0  # before which no token ends the text
    min_p: float = 0.0  # draw from tokens at least this likely beside the likeliest (arXiv 2407.01082)
    repetition_penalty: float = 1.0  # divides the logits of tokens in the prompt or the text (arXiv 1909.05858)
    presence_penalty: float = 0.0  # is taken from the logits of tokens in the text
    frequency_penalty: float = 0.0  # the same for each time that they are in it
    logit_bias: tuple[tuple[int, float], ...] = ()  # tokens and what is added to their logits
    ignore_eos: bool = False  # go on past the model's own end-of-text
    logprobs: int | None = None  # alternatives to report beside each new token; 0: the token's own alone
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt
    constraint: Grammar | None = None  # a grammar that the text must follow

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise HymbaError(problem)

    def _problems(self) -> Iterator[str]:
        if self.max_new_tokens < 1:
            yield f"max_new_tokens must be 1 or more, not {self.max_new_tokens}"
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            yield f"min_new_tokens must be from 0 to max_new_tokens, not {self.min_new_tokens}"
        if not 0 <= self.temperature < math.inf:
            yield f"temperature must be 0 or more, not {self.temperature}"
        if self.top_k is not None and self.top_k < 1:
            yield f"top_k must be 1 or more, not {self.top_k}"
        if not 0 < self.top_p <= 1:
            yield f"top_p must lie above 0 and be at most 1, not {self.top_p}"
        if not 0 <= self.min_p <= 1:
            yield f"min_p must be from 0 to 1, not {self.min_p}"
        if not _LEAST <= self.repetition_penalty <= _MOST:
            yield f"repetition_penalty must be above 0 and a float32 number, not {self.repetition_penalty}"
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= _MOST:
                yield f"{name} must be a finite float32 number, not {getattr(self, name)}"
        for token, bias in self.logit_bias:
            if token < 0 or not (abs(bias) <= _MOST or bias == -math.inf):
                yield f"logit_bias must be of token ids and float32 numbers, or -inf to ban one, not {token}: {bias}"
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) < 0:
                yield f"{name} must be 0 or more, not {getattr(self, name)}"
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            yield f"seed must be a whole number from 0 to 2^63 - 1, not {self.seed}"


class Grammar(Protocol):
    """What a text can be made to follow; see :class:`hymba.inference.constraint.Constraint`."""

    def begin(self) -> Matcher:
        """Return where a text stands before its first token."""


class Matcher(Protocol):
    """Where one text stands in the grammar that it follows."""

    def mask(self, vocab_size: int) -> Tensor:
        """Return (vocab_size,) bool: which tokens may follow."""

    def accept(self, token: int) -> None:
        """Take a token in."""


class SamplingState:
    """What the choice of a text's next token depends on besides the logits.

    Args:
        params: of the text.
        prompt: all ids before the continuation, those in a filled cache included.
        end_ids: tokens that end the text; `min_new_tokens` bans them at first.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], end_ids: Iterable[int] = ()) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.count = 0  # tokens chosen so far
        self._end_ids = sorted(token for token in set(end_ids) if token >= 0)
        self._prompt = prompt if params.repetition_penalty != 1 else ()
        penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        self._penalises = penalties != (1, 0, 0)
        self._seen: Tensor | None = None  # (vocab,) bool, in the prompt or the text
        self._counts: Tensor | None = None  # (vocab,) of the text
        self._matcher: Matcher | None = params.constraint.begin() if params.constraint else None

    @property
    def alters(self) -> bool:
        """Whether the next token's logits are changed before anything is drawn from them."""
        p = self.params
        return bool(self._penalises or p.logit_bias or self._matcher or self.count < p.min_new_tokens)

    def alter(self, logits: Tensor) -> None:
        """Apply penalties, bias and bans to the logits (vocab,) of the next token, in place."""
        p = self.params
        if self._penalises:
            self._penalise(logits)
        for token, bias in p.logit_bias:
            if token >= len(logits):
                raise HymbaError(f"logit_bias names token {token}, but the vocabulary has {len(logits)}")
            logits[token] += bias
        if self._matcher is not None:
            allowed = self._matcher.mask(len(logits)).to(logits.device, non_blocking=True)
            logits.masked_fill_(~allowed, -math.inf)
        ends = [token for token in self._end_ids if token < len(logits)]
        if self.count < p.min_new_tokens and ends:
            held = logits[ends]
            logits[ends] = -math.inf
            if bool(logits.amax() == -math.inf):  # the grammar allows nothing but the end
                logits[ends] = held

    def accept(self, token: int) -> None:
        """Take the token that was chosen into account."""
        self.count += 1
        if self._matcher is not None:
            self._matcher.accept(token)
        if self._counts is not None and self._seen is not None:
            self._counts[token] += 1
            self._seen[token] = True

    def _penalise(self, logits: Tensor) -> None:
        p = self.params
        if self._seen is None or self._counts is None:
            self._counts = torch.zeros_like(logits)
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            self._seen[torch.tensor(self._prompt, dtype=torch.int64, device=logits.device)] = True
        if p.repetition_penalty != 1:
            divided = torch.where(logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty)
            torch.where(self._seen, divided, logits, out=logits)
        logits -= p.presence_penalty * (self._counts > 0) + p.frequency_penalty * self._counts


def sample(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Choose one token a row by :func:`hymba.ops.draw.draw_tokens`, after penalties, bias and constraints.

    The states are not changed. A row's choice does not depend on the other rows.

    Args:
        logits: (B, vocab), any floating dtype.
        states: of the B texts.

    Returns:
        (B,) int64 on the device of `logits`, without waiting for a GPU: :class:`Choice` reads them. −1 where a logit is
        NaN, −2 where no token is allowed.

    Raises:
        HymbaError: a bias names a token that the vocabulary does not have.
    """
    if any(state.alters for state in states):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        for row, state in zip(logits, states, strict=True):
            if state.alters:
                state.alter(row)
    params, vocabulary = [state.params for state in states], logits.shape[-1]
    numbers = torch.tensor(
        [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]], dtype=torch.float64
    )
    ranks = [min(p.top_k or vocabulary, vocabulary) for p in params]
    counts = torch.tensor([ranks, [state.seed for state in states], [state.count for state in states]])
    # Not waiting is safe: pageable memory has been read when the call returns.
    temperature, top_p, min_p = numbers.to(logits.device, non_blocking=True)
    top_k, seeds, indices = counts.to(logits.device, non_blocking=True)
    return draw_tokens(logits, temperature, top_k, top_p, min_p, seeds, indices)


class Choice:
    """Tokens that :func:`sample` chose, (B,), on their way from the device while it goes on with something else."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens, self._arrived = tokens, None
        if tokens.is_cuda:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[int]:
        """Return the tokens, when they are there.

        Raises:
            HymbaError: for one of them a logit was not a number, or nothing may follow.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens = self._tokens.tolist()
        if _NOTHING in tokens:
            raise HymbaError("no token may follow: the constraint or the bias forbids them all")
        if _NOT_A_NUMBER in tokens:
            raise HymbaError("the model gave NaN logits: its weights are damaged, or overflow in this dtype")
        return tokens
