"""Cross entropy of a language model's head, without all of its logits at once."""

from __future__ import annotations

import torch
from torch import Tensor

from hymba.errors import HymbaError
from hymba.ops import gpu
from hymba.ops.backend import choose
from hymba.ops.cross_entropy import cpu, native, reference

IMPLEMENTATIONS = {
    "reference": reference.linear_cross_entropy,
    "cpu": cpu.linear_cross_entropy,
    "native": native.linear_cross_entropy,
    "liger": gpu.deferred("hymba.ops.cross_entropy.liger", "linear_cross_entropy"),
}


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum −ln p of `targets`, p being the softmax of x Wᵀ.

    Differentiable in `x` and `weight`.

    Args:
        x: (..., D) hidden states, any number of them, 0 included.
        weight: (vocabulary, D), the head.
        targets: (...) int64 token numbers; where one is negative there is no loss, whatever the hidden state is.

    Returns:
        The sum in nats, a number in at least float32. Logits are in the dtype of linear maps, the rest is in at least
        float32.

    Raises:
        HymbaError: a target is beyond the vocabulary, or the shapes do not fit together.
    """
    if x.shape[:-1] != targets.shape or x.shape[-1:] != weight.shape[1:]:
        shapes = ", ".join(str(tuple(v.shape)) for v in (x, weight, targets))
        raise HymbaError(f"linear_cross_entropy: hidden states, head and targets do not fit together: {shapes}")
    if targets.numel() and not torch.compiler.is_compiling():
        low, high = torch.stack(targets.aminmax()).tolist()  # one wait for the device
        if high >= weight.shape[0]:
            raise HymbaError(f"a target is {high}, the vocabulary has {weight.shape[0]} tokens")
        if low < 0:  # hidden states without a loss reach no gradient, not even as NaN
            x = x.masked_fill((targets < 0)[..., None], 0)
    return choose(IMPLEMENTATIONS, x)(x, weight, targets)


__all__ = ["IMPLEMENTATIONS", "linear_cross_entropy"]
