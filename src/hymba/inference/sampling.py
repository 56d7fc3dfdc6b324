"""Choosing the next token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hymba.errors import HymbaError


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a text, and when to stop. The defaults draw from the model's own distribution.

    Raises:
        HymbaError: a number is out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens only
    top_p: float = 1.0  # then from the fewest of them that hold this much probability
    seed: int | None = None  # None: another text each time
    stop: tuple[str, ...] = ()  # texts that end the answer and are cut off
    stop_ids: tuple[int, ...] = ()  # tokens that end it, beside the model's own end-of-text

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise HymbaError(problem)

    def _problems(self) -> Iterator[str]:
        if self.max_new_tokens < 1:
            yield f"max_new_tokens must be 1 or more, not {self.max_new_tokens}"
        if not 0 <= self.temperature < float("inf"):
            yield f"temperature must be 0 or more, not {self.temperature}"
        if self.top_k is not None and self.top_k < 1:
            yield f"top_k must be 1 or more, not {self.top_k}"
        if not 0 < self.top_p <= 1:
            yield f"top_p must lie above 0 and be at most 1, not {self.top_p}"
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            yield f"seed must be a whole number from 0 to 2^63 - 1, not {self.seed}"

    def generator(self, device: torch.device) -> torch.Generator:
        """Return a source of randomness on `device`, begun at the seed if there is one."""
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> Tensor:
    """Choose one token a row.

    The logits are divided by the temperature, then cut to the `top_k` likeliest tokens, then to the fewest of
    those whose probabilities, summing to 1 among themselves, reach `top_p` (arXiv 1904.09751), all
    in at least float32.

    Args:
        logits: (B, vocab), any floating dtype.

    Returns:
        (B,) int64. At temperature 0 the likeliest token, the lowest id among equals.

    Raises:
        HymbaError: a logit is not a number.
    """
    if bool(logits.isnan().any()):
        raise HymbaError("the model gave NaN logits: its weights are damaged, or overflow in this dtype")
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The largest becomes 0, so that a tiny temperature overflows to −inf only.
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / params.temperature
    if params.top_k is None and params.top_p == 1:
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator).squeeze(-1)
    vocabulary = logits.shape[-1]
    scores, tokens = scores.topk(min(params.top_k or vocabulary, vocabulary), dim=-1)  # likeliest first
    probabilities = scores.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = torch.where(before < params.top_p, probabilities, 0)
    return tokens.gather(-1, torch.multinomial(kept, 1, generator=generator)).squeeze(-1)
