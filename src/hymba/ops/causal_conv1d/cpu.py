"""The convolution as one fused call where no document boundary cuts it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hymba.ops.causal_conv1d import reference


def causal_conv1d(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    document_offsets: Tensor | None = None,
    final_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fast path for :func:`hymba.ops.causal_conv1d.causal_conv1d`, same signature."""
    if document_offsets is not None or not u.numel():
        rest = {"lengths": lengths, "document_offsets": document_offsets, "final_state": final_state}
        return reference.causal_conv1d(u, weight, bias, initial_state=initial_state, **rest)
    taps = weight.shape[1]
    history = reference.with_history(u, taps, initial_state)
    out = F.conv1d(history.transpose(1, 2), weight[:, None].to(u.dtype), bias.to(u.dtype), groups=u.shape[2])
    return F.silu(out).transpose(1, 2), reference.state_left(history, taps, lengths, final_state)
