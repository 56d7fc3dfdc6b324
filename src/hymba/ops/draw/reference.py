"""The definition of drawing, by a sort of all tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_tokens(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, draws: Tensor
) -> Tensor:
    """Definition of :func:`hymba.ops.draw.draw_tokens`, same signature."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scale = torch.where(temperature == 0, 1, temperature).to(logits.dtype)[:, None]
    # The largest becomes 0, so that a tiny temperature overflows to −inf only.
    weights = ((logits - logits.amax(dim=-1, keepdim=True)) / scale).exp()
    order = logits.argsort(dim=-1, descending=True, stable=True)
    ordered = weights.gather(-1, order).double()
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    ordered = torch.where(ranks < top_k[:, None], ordered, 0)
    before = ordered.cumsum(dim=-1) - ordered
    allowed = (before < top_p[:, None] * ordered.sum(dim=-1, keepdim=True)) | (top_p[:, None] >= 1)
    allowed &= (ordered >= min_p[:, None]) & (ranks < top_k[:, None])
    allowed[:, 0] = True
    kept = torch.zeros_like(allowed).scatter(-1, order, allowed)
    sums = torch.where(kept, weights, 0).double().cumsum(dim=-1)
    drawn = torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True)[:, 0]
    chosen = torch.where(temperature == 0, logits.argmax(dim=-1), drawn)
    return torch.where(logits.isnan().any(dim=-1), -1, chosen)
