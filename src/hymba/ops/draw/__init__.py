"""Drawing tokens from logits."""

from __future__ import annotations

from torch import Tensor

from hymba.errors import HymbaError
from hymba.ops import gpu
from hymba.ops.backend import choose
from hymba.ops.draw import native, reference

IMPLEMENTATIONS = {
    "reference": reference.draw_tokens,
    "cpu": reference.draw_tokens,
    "native": native.draw_tokens,
    "triton": gpu.deferred("hymba.ops.draw.triton", "draw_tokens"),
}


def draw_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    indices: Tensor,
) -> Tensor:
    """Draw one token a row.

    The logits are divided by the temperature, then cut to the `top_k` likeliest tokens, then to the fewest of those
    whose probabilities, summing to 1 among themselves, reach `top_p` (arXiv 1904.09751), then to those at least `min_p`
    times as likely as the likeliest (arXiv 2407.01082), which always stays. The token is the one left with the largest
    sum of its logit over the temperature and a Gumbel noise that depends on its id, the row's seed and the row's index
    alone (:func:`hymba.ops.draw.reference.gumbel`). This is the Gumbel-max method (arXiv 1411.0030): each token is
    drawn with its probability among those left, and logits that differ by rounding give another token at most twice as
    often as the total variation between their distributions. No method does better than once.

    Args:
        logits: (B, vocab), any floating dtype; −∞ is never drawn, and +∞ is the largest of numbers.
        temperature, top_p, min_p: (B,) float64. A temperature of 0 means the likeliest token; others are used as
            float32, those beyond its range as its smallest or largest.
        top_k: (B,) int64.
        seeds, indices: (B,) int64: of the row's text, and how many of its tokens were drawn before.

    Returns:
        (B,) int64; −1 for a row with a NaN, −2 for one where every logit is −∞. Among equals the lower id comes first.

    Raises:
        HymbaError: the logits are not (B, vocab), or an argument is not (B,).
    """
    rows = {x.shape for x in (temperature, top_k, top_p, min_p, seeds, indices)}
    if logits.dim() != 2 or rows != {logits.shape[:1]}:
        raise HymbaError(
            f"logits must be (rows, vocabulary) and the rest (rows,), not {tuple(logits.shape)} and {rows}"
        )
    return choose(IMPLEMENTATIONS, logits)(logits, temperature, top_k, top_p, min_p, seeds, indices)


__all__ = ["IMPLEMENTATIONS", "draw_tokens"]
