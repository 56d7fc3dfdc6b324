"""Hymba's attention: causal, optionally windowed, with meta tokens that stay visible for ever (arXiv 2411.13676)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hymba.ops import gpu
from hymba.ops.attention import cpu, native, reference
from hymba.ops.attention.heads import Heads, QuantizedHeads, round_heads
from hymba.ops.attention.reference import Mask, Plan, attention_weights, visible, weigh_values
from hymba.ops.backend import choose

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.attention,
    "cpu": cpu.attention,
    "native": native.attention,
    "triton": gpu.deferred("hymba.ops.attention.triton", "attention"),
}


def attention(
    q: Tensor,
    k: Heads,
    v: Heads,
    *,
    query_positions: Tensor,
    key_positions: Tensor,
    window: int | None,
    num_meta: int,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Grouped-query softmax attention under Hymba's mask, scaled by 1/√K.

    Positions count the meta tokens: 0…M−1 are the meta tokens, the first text token is M, and −1 marks padding or an
    empty slot. Query i sees key j when j is not empty, j ≤ i, and, in a sliding layer, i − j ≤ window or j < M. With
    packed documents, positions restart at M in each, and a key is seen only from its own document or when it is a meta
    token. The order of the keys is free: a ring buffer needs no unrolling. B, T and S may be 0; a query that sees
    nothing gets zeros.

    Args:
        q: (B, T, H, K) queries, already rotated.
        k: (B, S, G, K) keys, already rotated; H is a multiple of G, and query heads 5g…5g+4 use KV head g when H = 5G.
        v: (B, S, G, V) values; V may differ from K. Keys and values are tensors in the dtype of `q`, or both quantised.
        query_positions: (B, T) int64.
        key_positions: (B, S) int64. What lies in empty slots, NaN included, has no effect.
        window: W, or None in a global layer. The token exactly W back is visible.
        num_meta: M.
        query_documents, key_documents: (B, T) and (B, S) int64 document numbers of a packed row, one for each
            document, or both None.
        plan: where implementations keep what they work out from these arguments, for other calls with the same; or
            None. It never changes the result.

    Returns:
        (B, T, H, V) in the dtype of `q`; rows of padding queries are zero.
    """
    return choose(IMPLEMENTATIONS, q)(
        q,
        k,
        v,
        query_positions=query_positions,
        key_positions=key_positions,
        window=window,
        num_meta=num_meta,
        query_documents=query_documents,
        key_documents=key_documents,
        plan=plan,
    )


__all__ = [
    "IMPLEMENTATIONS",
    "Heads",
    "Mask",
    "Plan",
    "QuantizedHeads",
    "attention",
    "attention_weights",
    "round_heads",
    "visible",
    "weigh_values",
]
