"""The definition of the causal convolution, tap by tap, and the state it leaves behind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.ops.precision import accumulate_dtype


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
    """Reference for :func:`hymba.ops.causal_conv1d.causal_conv1d`, same signature."""
    history = with_history(u, weight.shape[1], initial_state)
    steps, taps = u.shape[1], weight.shape[1]
    total: Tensor = bias.to(accumulate_dtype(u))
    for back in range(taps):
        earlier = history[:, taps - 1 - back : taps - 1 - back + steps]
        if document_offsets is not None and back > 0:
            earlier = _restart(earlier, history[:, : taps - 1], document_offsets, back)
        total = total + earlier * weight[:, taps - 1 - back]
    return F.silu(total.to(u.dtype)), state_left(history, taps, lengths, final_state)


def with_history(u: Tensor, taps: int, initial_state: Tensor | None) -> Tensor:
    """Return `u` behind its initial state: (B, taps − 1 + T, E)."""
    if initial_state is None:
        return F.pad(u, (0, 0, taps - 1, 0))
    return torch.cat((initial_state.transpose(1, 2).to(u.dtype).expand(u.shape[0], -1, -1), u), dim=1)


def state_left(history: Tensor, taps: int, lengths: Tensor | None, out: Tensor | None) -> Tensor:
    """Return the last taps − 1 inputs of each row, (B, E, taps − 1), in `out` if it is given."""
    if lengths is None:
        left = history[:, history.shape[1] - (taps - 1) :].transpose(1, 2)
    else:
        index = lengths[:, None] + torch.arange(taps - 1, device=history.device)
        left = history.gather(1, index[:, :, None].expand(-1, -1, history.shape[2])).transpose(1, 2)
    return left if out is None else out.copy_(left)


def _restart(earlier: Tensor, initial: Tensor, offsets: Tensor, back: int) -> Tensor:
    """Replace the inputs `back` steps ago that lie before a document's start by its initial inputs (B, taps − 1, E)."""
    index = (initial.shape[1] + offsets - back).clamp(0, initial.shape[1] - 1)
    before = initial.gather(1, index[:, :, None].expand(-1, -1, initial.shape[2]))
    return torch.where((offsets < back)[:, :, None], before, earlier)
