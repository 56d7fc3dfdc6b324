"""Choosing the next token.

A text's randomness is a number for each of its tokens, counted from its seed (:func:`uniform`), and what may be drawn
is decided by a row's logits alone: so a seed gives one text, on any device, in any batch, however its steps are cut.
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

_64_BITS = (1 << 64) - 1
_NOT_A_NUMBER, _NOTHING = -1, -2  # in place of a token


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
        if not 0 < self.repetition_penalty < math.inf:
            yield f"repetition_penalty must be above 0, not {self.repetition_penalty}"
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                yield f"{name} must be a finite number, not {getattr(self, name)}"
        for token, bias in self.logit_bias:
            if token < 0 or math.isnan(bias) or bias == math.inf:
                yield f"logit_bias must be of token ids and numbers, not {token}: {bias}"
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


def uniform(seed: int, index: int) -> float:
    """Return the number in [0, 1), a multiple of 2^-48, that decides a text's token `index`: SplitMix64 (Steele, Lea
    and Flood, 2014) as a function of a counter."""
    x = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _64_BITS
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _64_BITS
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _64_BITS
    return ((x ^ (x >> 31)) >> 16) / (1 << 48)


class SamplingState:
    """What the choice of one text's next token depends on beside the logits.

    Args:
        params: of the text.
        prompt: the ids it continues.
        end_ids: tokens that end it, which `min_new_tokens` puts off.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], end_ids: Iterable[int] = ()) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.count = 0  # tokens chosen so far
        self._end_ids = sorted(set(end_ids))
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
        if self.count < p.min_new_tokens and self._end_ids:
            held = logits[self._end_ids]
            logits[self._end_ids] = -math.inf
            if bool(logits.amax() == -math.inf):  # a grammar that lets nothing but the end follow
                logits[self._end_ids] = held

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

    The states are told nothing of it. A row's choice does not depend on the other rows.

    Args:
        logits: (B, vocab), any floating dtype.
        states: of the B texts.

    Returns:
        (B,) int64 on the device of `logits`, which is not waited for: :class:`Choice` reads them. −1 where a logit is
        not a number, −2 where nothing may follow.

    Raises:
        HymbaError: a bias names a token that is not there.
    """
    altered = any(state.alters for state in states)
    if altered:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        for row, state in zip(logits, states, strict=True):
            if state.alters:
                state.alter(row)
    vocabulary = logits.shape[-1]
    numbers = torch.tensor([_numbers(state, vocabulary) for state in states], dtype=torch.float64)
    # Not waiting is safe: what is copied from pageable memory has left it when the call returns.
    temperature, top_k, top_p, min_p, drawn = numbers.T.contiguous().to(logits.device, non_blocking=True)
    chosen = draw_tokens(logits, temperature, top_k.to(torch.int64), top_p, min_p, drawn)
    return torch.where(logits.amax(dim=-1) == -math.inf, _NOTHING, chosen) if altered else chosen


def _numbers(state: SamplingState, vocabulary: int) -> tuple[float, ...]:
    """Return what :func:`draw_tokens` is to know of a text: temperature, top_k, top_p, min_p, and what it draws."""
    p = state.params
    top_k = min(p.top_k or vocabulary, vocabulary)
    return p.temperature, top_k, p.top_p, p.min_p, uniform(state.seed, state.count)


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
