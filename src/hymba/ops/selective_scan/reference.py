"""The definition of the selective scan, one step at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    dt_bias: Tensor,
    gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    document_offsets: Tensor | None = None,
    final_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference for :func:`hymba.ops.selective_scan.selective_scan`, same signature."""
    (rows, steps, width), dtype = u.shape, u.dtype
    wide = torch.promote_types(dtype, torch.float32)
    u, dt, A_log, B, C, D, dt_bias = (x.to(wide) for x in (u, dt, A_log, B, C, D, dt_bias))
    A = -torch.exp(A_log)
    valid = valid_steps(lengths, rows, steps, u.device)
    delta = F.softplus(dt + dt_bias) * valid[..., None]
    initial = u.new_zeros(rows, width, A.shape[1]) if initial_state is None else initial_state.to(wide)

    state, outputs = initial, []
    for t in range(steps):
        if document_offsets is not None:
            restart = (document_offsets[:, t] == 0) & valid[:, t]
            state = torch.where(restart[:, None, None], initial, state)
        decay = torch.exp(delta[:, t, :, None] * A)  # (B, E, N)
        state = decay * state + (delta[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1))
    y = (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(u)) + D * u
    if gate is not None:
        y = y * F.silu(gate.to(wide))
    return y.to(dtype), state if final_state is None else final_state.copy_(state)


def valid_steps(lengths: Tensor | None, rows: int, steps: int, device: torch.device) -> Tensor:
    """Return (B, T) bool, true at the steps before each row's length."""
    if lengths is None:
        return torch.ones(rows, steps, dtype=torch.bool, device=device)
    return torch.arange(steps, device=device) < lengths[:, None]
