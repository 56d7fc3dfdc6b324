"""How well a model predicts text: loss, perplexity and bits per byte.

The text is read through windows. Each begins with BOS, holds `context` tokens, and stands `stride` tokens
behind the one before; it scores only the tokens that no earlier one has. So every token is scored exactly
once, and all but the first window's have `context − stride` to `context − 1` tokens of text before them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba import files
from hymba.errors import HymbaError
from hymba.model import Hymba, HymbaConfig
from hymba.text import encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_CONTEXT = 2048  # of the default: longer ones ask for much memory
BATCH_TOKENS = 2048  # tokens of one forward pass
LOGIT_ROWS = 512  # tokens whose logits are held at once


@dataclass(frozen=True)
class Score:
    """What a model needs to tell a text.

    nats: the sum of −ln p over all tokens.
    tokens: scored ones; BOS is not among them.
    num_bytes: of the text in UTF-8.
    """

    nats: float
    tokens: int
    num_bytes: int

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.num_bytes + other.num_bytes)

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Return e to the loss; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits for each byte of the text: comparable between tokenizers."""
        return self.nats / math.log(2) / self.num_bytes


def default_context(config: HymbaConfig) -> int:
    """Return the context that the model was trained at, or ``LONGEST_CONTEXT`` if that is less."""
    return min(config.orig_max_position_embeddings, LONGEST_CONTEXT)


def read_text(path: str | Path) -> str:
    """Return the text of a file, newlines as they are.

    Raises:
        HymbaError: the file cannot be read, is not UTF-8, or is empty.
    """
    text = files.read_text(path)
    if not text:
        raise HymbaError(f"{path} is empty: there is nothing to score")
    return text


def score_text(
    model: Hymba,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    context: int,
    stride: int,
    report: Callable[[int, int], None] = lambda done, total: None,
    cache_bits: int | None = None,
) -> Score:
    """Score a text, every byte of it counted, as :func:`score_tokens` does.

    What looks like a special token is text like any other.
    """
    tokens = encode_text(tokenizer, text)
    bos = model.config.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if bos is None:
        raise HymbaError("the model has no BOS token to begin a window with")
    nats = score_tokens(model, bos, tokens, context, stride, report, cache_bits)
    return Score(nats, len(tokens), len(text.encode()))


@torch.no_grad()
def score_tokens(
    model: Hymba,
    bos: int,
    tokens: Sequence[int],
    context: int,
    stride: int,
    report: Callable[[int, int], None] = lambda done, total: None,
    cache_bits: int | None = None,
) -> float:
    """Return the sum of −ln p, in nats, over `tokens` (T,), read through the windows described above.

    Args:
        context: tokens that the model reads at once, BOS included.
        stride: tokens that a window scores; `context` itself is fastest, a small one is kindest to the model.
        report: called with (tokens scored, all tokens) after each forward pass.
        cache_bits: 8 attends to keys and values in 8 bits, as decoding from such a cache does.

    Raises:
        HymbaError: context or stride is out of range, or there are no tokens.
    """
    _check(model.config, tokens, context, stride)
    device, total = model.device, len(tokens)
    text = torch.tensor([bos, *tokens], dtype=torch.int64, device=device)
    width = min(context, total)
    # A window that ends at e reads text[e − width : e], its first made BOS, and predicts up to text[e].
    ends = [*range(width, total, stride), total]
    fresh = [width, *(b - a for a, b in pairwise(ends))]
    rows = max(1, BATCH_TOKENS // width)
    nats, done, prefix = 0.0, 0, model.prefix()  # the weights do not change meanwhile
    for first in range(0, len(ends), rows):
        batch = list(zip(ends[first : first + rows], fresh[first : first + rows], strict=True))
        windows = torch.stack([text[end - width : end] for end, _ in batch])
        windows[:, 0] = bos
        if cache_bits is None:
            hidden = model(windows, prefix=prefix).hidden
        else:
            hidden = model(windows, cache=model.allocate_cache(len(batch), width, cache_bits, prefix)).hidden
        scored = torch.cat([row[width - new :] for row, (_, new) in zip(hidden, batch, strict=True)])
        targets = torch.cat([text[end - new + 1 : end + 1] for end, new in batch])
        nats += _sum_nats(model, scored, targets)
        report(done := done + len(targets), total)
    return nats


def _sum_nats(model: Hymba, hidden: Tensor, targets: Tensor) -> float:
    """Sum −ln p of targets (T,) given the hidden states (T, D), a few rows of logits at a time."""
    parts = zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    return math.fsum(float(F.cross_entropy(model.logits(h), t, reduction="sum")) for h, t in parts)


def _check(config: HymbaConfig, tokens: Sequence[int], context: int, stride: int) -> None:
    if not tokens:
        raise HymbaError("there are no tokens to score")
    if not 2 <= context <= config.max_position_embeddings:
        raise HymbaError(f"context must be 2 to {config.max_position_embeddings} tokens, not {context}")
    if not 1 <= stride <= context:
        raise HymbaError(f"stride must be 1 to the context ({context}), not {stride}")
