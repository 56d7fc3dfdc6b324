"""The definition of Hymba's attention: the whole score matrix, one mask, one softmax."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Required, TypedDict, Unpack

import torch
from torch import Tensor

from hymba.ops.attention.heads import Heads, widen
from hymba.ops.precision import accumulate_dtype


@dataclass(frozen=True)
class Plan:
    """Where implementations keep what they work out from a mask, for the other layers that look through the same one.

    pattern: a name for the mask where sizes alone decide it, the same in every call that has this mask; else None.
    kept: by a name of the implementation's own.
    """

    pattern: Hashable | None = None
    kept: dict[str, Any] = field(default_factory=dict)


class Mask(TypedDict, total=False):
    """The keyword arguments of :func:`hymba.ops.attention.attention` that say which keys a query sees."""

    query_positions: Required[Tensor]
    key_positions: Required[Tensor]
    window: Required[int | None]
    num_meta: Required[int]
    query_documents: Tensor | None
    key_documents: Tensor | None
    plan: Plan | None


def visible(
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    window: int | None,
    num_meta: int,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Return the mask (B, T, S): True where a query sees a key. See :func:`hymba.ops.attention.attention`."""
    del plan  # the whole mask is too large to keep
    i, j = query_positions[:, :, None], key_positions[:, None, :]
    seen = (j >= 0) & (j <= i)
    if window is not None:
        seen &= (i - j <= window) | (j < num_meta)
    if query_documents is not None and key_documents is not None:
        seen &= (query_documents[:, :, None] == key_documents[:, None, :]) | (j < num_meta)
    return seen


def attention_weights(q: Tensor, k: Heads, seen: Tensor) -> Tensor:
    """Return the attention matrices (B, H, T, S) in at least float32; rows that see nothing are zero.

    Queries that see nothing and keys that no query sees have no effect, not even as NaN.
    """
    wide = accumulate_dtype(q)
    queries = (q.to(wide) * q.shape[-1] ** -0.5).masked_fill(~seen.any(2)[..., None, None], 0)
    keys = widen(k, wide).masked_fill(~seen.any(1)[..., None, None], 0)
    keys = keys.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("bthk,bshk->bhts", queries, keys)
    scores = scores.masked_fill(~seen[:, None], torch.finfo(wide).min)
    return scores.softmax(dim=-1) * seen[:, None]


def weigh_values(weights: Tensor, v: Heads) -> Tensor:
    """Return the sums (B, T, H, V) of the values (B, S, G, V) under attention matrices (B, H, T, S).

    Values that have no weight anywhere have no effect, not even as NaN.
    """
    unused = ~weights.detach().any(2).any(1)
    values = widen(v, weights.dtype).masked_fill(unused[..., None, None], 0)
    values = values.repeat_interleave(weights.shape[1] // v.shape[2], dim=2)
    with torch.autocast(weights.device.type, enabled=False):
        return torch.einsum("bhts,bshv->bthv", weights, values)


def attention(q: Tensor, k: Heads, v: Heads, **mask: Unpack[Mask]) -> Tensor:
    """Reference for :func:`hymba.ops.attention.attention`, same signature."""
    weights = attention_weights(q, k, visible(**mask))
    return weigh_values(weights, v).to(q.dtype)
