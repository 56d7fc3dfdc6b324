"""Drawing tokens from logits."""

from __future__ import annotations

from torch import Tensor

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
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, draws: Tensor
) -> Tensor:
    """Draw one token a row.

    The logits are divided by the temperature, then cut to the `top_k` likeliest tokens, then to the fewest of those
    whose probabilities, summing to 1 among themselves, reach `top_p` (arXiv 1904.09751), then to those at least `min_p`
    times as likely as the likeliest (arXiv 2407.01082), which always stays. The token is the first at which the
    probabilities of what is left, added in the order of ids, pass `draws` times their sum.

    Args:
        logits: (B, vocab), any floating dtype; −∞ is never drawn.
        temperature, top_p, min_p: (B,) float64; 0 for the first means the likeliest token.
        top_k: (B,) int64.
        draws: (B,) float64 in [0, 1).

    Returns:
        (B,) int64; −1 for a row with a NaN. Among equals the lower id comes first.
    """
    return choose(IMPLEMENTATIONS, logits)(logits, temperature, top_k, top_p, min_p, draws)


__all__ = ["IMPLEMENTATIONS", "draw_tokens"]
