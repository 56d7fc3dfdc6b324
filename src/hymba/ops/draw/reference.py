"""The definition of drawing: a sort of all tokens for the cuts, Gumbel noise for the choice."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST, _MOST = 2.0**-126, 2.0**127  # temperatures beyond these are taken as these
_LN2 = 0.6931471805599453


def draw_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    indices: Tensor,
) -> Tensor:
    """Definition of :func:`hymba.ops.draw.draw_tokens`, same signature."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = logits.amax(dim=-1, keepdim=True)
    chosen = logits.argmax(dim=-1)
    if bool((temperature > 0).any()):
        scale = temperature.clamp(_LEAST, _MOST).float()[:, None]
        if bool(((top_k < logits.shape[-1]) | (top_p < 1) | (min_p > 0)).any()):
            rows, ids = _cut(logits, scale, top_k, top_p, min_p)
        else:
            rows, ids = (logits > -torch.inf).nonzero(as_tuple=True)
        scores = _depth(logits[rows, ids].double(), largest[rows, 0].double()) / scale[rows, 0].double()
        drawn = _draw(scores, rows, ids, _split_mix(seeds, indices), logits.shape)
        chosen = torch.where(temperature == 0, chosen, drawn)
    chosen = torch.where(largest[:, 0] == -torch.inf, -2, chosen)
    return torch.where(logits.isnan().any(dim=-1), -1, chosen)


def _depth(x: Tensor, largest: Tensor) -> Tensor:
    """Return x less the largest logit of its row: 0 for that one even if it is infinite."""
    return torch.where(x == largest, 0, x - largest)


def _draw(scores: Tensor, rows: Tensor, ids: Tensor, states: Tensor, shape: torch.Size) -> Tensor:
    """Return for each row the id with the largest sum of score and noise; scores, rows and ids are of one length."""

    def spread(values: Tensor) -> Tensor:
        return torch.full(shape, -torch.inf, dtype=torch.float64, device=scores.device).index_put((rows, ids), values)

    # torch's logarithms are fast, but their last bits differ between devices. They leave out what cannot win; nearly
    # always one token is left, and where there are more the noise itself decides.
    u = _uniform(states[rows], ids)
    rough = scores - (-u.log()).log()
    left = rough >= spread(rough).amax(dim=-1)[rows] - 1e-6
    scores, rows, ids, u = scores[left], rows[left], ids[left], u[left]
    return spread(scores + _noise(u)).argmax(dim=-1)


def _cut(logits: Tensor, scale: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and ids of the tokens that may be drawn."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    weights = (_depth(ordered, ordered[:, :1]) / scale).exp().double()
    among_k = torch.arange(logits.shape[-1], device=logits.device) < top_k[:, None]
    weights = torch.where(among_k, weights, 0)
    before = weights.cumsum(dim=-1) - weights
    allowed = (before < top_p[:, None] * weights.sum(dim=-1, keepdim=True)) | (top_p[:, None] >= 1)
    allowed &= (weights >= min_p[:, None]) & among_k
    allowed[:, 0] = True
    rows, places = (allowed & (ordered > -torch.inf)).nonzero(as_tuple=True)
    return rows, order[rows, places]


def gumbel(seeds: Tensor, indices: Tensor, ids: Tensor) -> Tensor:
    """Return standard Gumbel noise, a function of a text's seed, a token's index in it, and a token id.

    The noise is −log(−log(1 − v)) with v an odd multiple of 2^−53 between 0 and 1, so it lies between −3.7 and 36.8.
    The bits of v come from SplitMix64 (Steele, Lea and Flood, 2014) as a function of a counter: output `index` of the
    generator that starts from the seed starts another, the halves of whose outputs are the first 32 bits for two ids
    each; the other 20 are of an output of their own. Most tokens cannot win by their first bits, which is all that fast
    implementations look at. Every backend computes the noise with the same float64 operations in the same order, no
    product fused with a sum, so its bits are the same everywhere.

    Args:
        seeds, indices, ids: int64, of shapes that broadcast.

    Returns:
        float64.
    """
    return _noise(_uniform(_split_mix(seeds, indices), ids))


def _noise(u: Tensor) -> Tensor:
    return -_log(-_log(u))


def _uniform(states: Tensor, ids: Tensor) -> Tensor:
    """Return 1 − v for each token id, exactly."""
    first = (_split_mix(states, ids >> 1) >> 32 * (ids & 1)) & 0xFFFFFFFF
    odd = first << 21 | _shift(_split_mix(states, ids + (1 << 32)), 43) | 1
    return 1 - odd.double() * 2.0**-53


def _split_mix(state: Tensor, n: Tensor) -> Tensor:
    """Return output `n` of SplitMix64 started from `state`; int64 holds the bits of unsigned numbers."""
    x = state + (n + 1) * (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shift(x, 31)


def _shift(x: Tensor, count: int) -> Tensor:
    """Shift the bits to the right and zeros in from the left."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def _log(x: Tensor) -> Tensor:
    """Return the natural logarithm of positive float64 values: k ln 2 + 2 artanh((m − 1) / (m + 1)), with x = m 2^k and
    m from 0.707 to 1.414, and the series of artanh up to the power 19."""
    m, k = torch.frexp(x)
    low = m < 0.70703125
    m, k = torch.where(low, 2 * m, m), k - low.to(k.dtype)
    s = (m - 1) / (m + 1)
    z = s * s
    series = torch.full_like(z, 1 / 19)
    for power in range(17, 0, -2):
        series = series * z + 1 / power
    return k.double() * _LN2 + 2 * s * series
