"""Attention by torch's fused kernels, block by block, so that a sliding layer's cost grows with T·W and not with T²."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.ops.attention.heads import Heads, QuantizedHeads
from hymba.ops.attention.reference import Mask, Plan, visible
from hymba.ops.recording import is_recorded

# Queries taken together: many enough to keep the matrix units busy; in a sliding layer few enough that most of the
# block's keys are in the window of most of its queries.
BLOCK = 512
SMALLEST_BLOCK = 128


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
    """Fast path for :func:`hymba.ops.attention.attention`, same signature."""
    del plan
    mask: Mask = {
        "query_positions": query_positions,
        "key_positions": key_positions,
        "window": window,
        "num_meta": num_meta,
        "query_documents": query_documents,
        "key_documents": key_documents,
    }
    if torch.compiler.is_compiling():  # which keys a block needs depends on values
        return _block(q, k, v, None, mask)
    size = BLOCK if window is None else min(BLOCK, max(SMALLEST_BLOCK, window))
    outputs = []
    for start in range(0, max(q.shape[1], 1), size):
        block = slice(start, start + size)
        mask["query_positions"] = query_positions[:, block]
        mask["query_documents"] = None if query_documents is None else query_documents[:, block]
        needed = q.shape[1] > 1
        keys = _needed_keys(mask["query_positions"], key_positions, window, num_meta) if needed else None
        outputs.append(_block(q[:, block], k, v, keys, mask))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _block(q: Tensor, k: Heads, v: Heads, keys: Tensor | None, mask: Mask) -> Tensor:
    """Attend to the keys named by an index, or to all of them; `mask` is for these queries and for all keys."""
    positions, documents = _take(mask["key_positions"], keys), mask.get("key_documents")
    documents = None if documents is None else _take(documents, keys)
    seen = visible(**mask | {"key_positions": positions, "key_documents": documents})
    # What lies in empty slots may be NaN, which a mask turns into NaN and not into zero.
    own_k, own_v = _take_heads(k, keys, q.dtype), _take_heads(v, keys, q.dtype)
    empty = (positions < 0)[..., None, None]
    if torch.compiler.is_compiling() or is_recorded() or bool(empty.any()):
        own_k, own_v = own_k.masked_fill(empty, 0), own_v.masked_fill(empty, 0)
    return _fused(q, own_k, own_v, seen)


def _take(x: Tensor, keys: Tensor | None) -> Tensor:
    """Return the keys of (B, S, …) named by an index, or all of them."""
    return x if keys is None else x.index_select(1, keys)


def _take_heads(x: Heads, keys: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the keys or values named by an index, dequantised to `dtype` if they are quantised."""
    if isinstance(x, QuantizedHeads):
        return QuantizedHeads(_take(x.values, keys), _take(x.scales, keys)).dequantize(dtype)
    return _take(x, keys)


def _needed_keys(query_positions: Tensor, key_positions: Tensor, window: int | None, num_meta: int) -> Tensor | None:
    """Return the indices of the keys that this block's queries may see in some row, or None when it is all of them."""
    last = query_positions.amax(dim=1, keepdim=True)
    near = (key_positions >= 0) & (key_positions <= last)
    if window is not None:
        real = query_positions.masked_fill(query_positions < 0, torch.iinfo(torch.int64).max)
        near &= (key_positions >= real.amin(dim=1, keepdim=True) - window) | (key_positions < num_meta)
    needed = near.any(dim=0)
    return None if bool(needed.all()) else needed.nonzero()[:, 0]


def _fused(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Run one block through scaled_dot_product_attention.

    Flash attention on CPU serves only equal key and value widths, so the narrower of the two is padded with zeros;
    zeros change neither scores nor the columns that are kept.
    """
    key_width, value_width = q.shape[-1], v.shape[-1]
    width = max(key_width, value_width)
    sees_any = seen.any(dim=-1)
    # A query that sees nothing (padding) would be NaN: let it see everything, and clear it afterwards.
    blind = ~sees_any[..., None, None]
    q = q.masked_fill(blind, 0)
    mask = (seen | ~sees_any[..., None])[:, None]
    q, k, v = (F.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=key_width**-0.5, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)[..., :value_width].masked_fill(blind, 0)
