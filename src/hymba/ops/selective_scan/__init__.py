"""Mamba's selective state-space scan (arXiv 2312.00752, section 3.2 and algorithm 2)."""

from __future__ import annotations

from torch import Tensor

from hymba.ops import gpu
from hymba.ops.backend import choose
from hymba.ops.selective_scan import cpu, native, reference

IMPLEMENTATIONS = {
    "reference": reference.selective_scan,
    "cpu": cpu.selective_scan,
    "native": native.selective_scan,
    "triton": gpu.deferred("hymba.ops.selective_scan.triton", "selective_scan"),
}


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
    """Run the recurrence of N states per channel over the steps, and read it out.

    With δ_t = softplus(dt_t + dt_bias) and A = −exp(A_log)::

        s_t = exp(δ_t A) s_{t−1} + δ_t B_t u_t
        y_t = (C_t · s_t + D u_t) · SiLU(gate_t)

    Computed in float32, or in float64 where `u` is float64. Differentiable in every floating argument.

    Args:
        u: (B, T, E) inputs. B and T may be 0; without steps the final state is the initial one.
        dt: (B, T, E) step sizes before their bias and softplus.
        A_log: (E, N) logarithms of the decay rates.
        B, C: (B, T, N) input and output maps, shared by all channels.
        D: (E,) weight of the direct path.
        dt_bias: (E,).
        gate: (B, T, E), or None for no gate.
        initial_state: (B, E, N) state before step 0; zeros when None.
        lengths: (B,) int64 in 0 … T, valid steps per row; all T when None. Later steps have size zero: the state
            stands still, whatever their document offsets. Their inputs must be finite, as zero times NaN is NaN.
        document_offsets: (B, T) int64, each step's distance from the start of its packed document. A
            document's first step (offset 0) starts from `initial_state`, not from its neighbour's state.
        final_state: (B, E, N) takes the final state in place of a new tensor; it may be `initial_state` itself. Not
            with gradients.

    Returns:
        y, (B, T, E) in the dtype of `u`, and the final state (B, E, N) in float32 or wider. What y holds
        after a row's length has no meaning.
    """
    return choose(IMPLEMENTATIONS, u)(
        u,
        dt,
        A_log,
        B,
        C,
        D,
        dt_bias=dt_bias,
        gate=gate,
        initial_state=initial_state,
        lengths=lengths,
        document_offsets=document_offsets,
        final_state=final_state,
    )


__all__ = ["IMPLEMENTATIONS", "selective_scan"]
