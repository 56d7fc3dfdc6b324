"""Depthwise causal convolution followed by SiLU, as Mamba uses it (arXiv 2312.00752)."""

from __future__ import annotations

from torch import Tensor

from hymba.ops import gpu
from hymba.ops.backend import choose
from hymba.ops.causal_conv1d import cpu, native, reference

IMPLEMENTATIONS = {
    "reference": reference.causal_conv1d,
    "cpu": cpu.causal_conv1d,
    "native": native.causal_conv1d,
    "triton": gpu.deferred("hymba.ops.causal_conv1d.triton", "causal_conv1d"),
}


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
    """Convolve each channel with its own taps over the current and earlier steps, then apply SiLU.

    Args:
        u: (B, T, E) inputs. B and T may be 0; without steps the final state is the initial one.
        weight: (E, taps); the last tap weighs the current step.
        bias: (E,).
        initial_state: (B, E, taps − 1) inputs before step 0, oldest first; zeros when None.
        lengths: (B,) int64 in 0 … T, valid steps per row; all T when None. They decide the final state only. Later
            inputs reach neither it nor earlier outputs; for gradients they must be finite.
        document_offsets: (B, T) int64, each step's distance from the start of its packed document. A document sees
            `initial_state` before its first step and nothing of its neighbour.
        final_state: (B, E, taps − 1) takes the final state in place of a new tensor; it may be `initial_state` itself.
            Not with gradients.

    Returns:
        SiLU of the convolution, (B, T, E) in the dtype of `u`, and the final state (B, E, taps − 1): the last inputs
        before ``lengths``.
    """
    return choose(IMPLEMENTATIONS, u)(
        u,
        weight,
        bias,
        initial_state=initial_state,
        lengths=lengths,
        document_offsets=document_offsets,
        final_state=final_state,
    )


__all__ = ["IMPLEMENTATIONS", "causal_conv1d"]
