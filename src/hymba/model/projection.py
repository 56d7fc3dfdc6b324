"""Projections and norms: the modules that hold weights, and the stretches of them that one kernel can run.

A stretch, such as a norm and the projection behind it, is one op (:mod:`hymba.ops.projection`) where calling its
modules would do just that. With an adapter in the place of a projection, or with a hook, it runs module by module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from hymba.ops.gated import gated_silu
from hymba.ops.linear import linear
from hymba.ops.precision import accumulate_dtype
from hymba.ops.projection import linear_residual, mean_of_norms_linear, norm_gated_linear, norm_linear
from hymba.ops.rms_norm import mean_of_norms, rms_norm


class Linear(nn.Linear):
    """A projection through :func:`hymba.ops.linear.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        return linear(x, self.weight, self.bias)


class StepProjection(Linear):
    """The projection to step sizes δ. Its bias is added in at least float32; see :func:`project_step`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, R) to (B, T, E), in at least float32: small step sizes would not survive bfloat16."""
        product = linear(x, self.weight)
        wide = accumulate_dtype(product)
        return product.to(wide) + self.bias.to(wide)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight; see :func:`hymba.ops.rms_norm.rms_norm`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return rms_norm(x, self.weight, self.eps)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter is a projection inside a layer: a matrix between two activations.

    Only these are decayed in training. All others are not: embeddings, meta tokens, norms, the convolution, A_log, D,
    biases.
    """
    return parameter.ndim == 2 and any(part.endswith("_proj") for part in name.split("."))


def project_norm(norm: RMSNorm, projection: Linear, x: Tensor) -> Tensor:
    """Return projection(norm(x)), (…, in) to (…, out)."""
    if are_bare(norm, projection):
        return norm_linear(x, norm.weight, norm.eps, projection.weight)
    return projection(norm(x))


def project_step(projection: StepProjection, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return projection(x), (B, T, R) to (B, T, E), and the bias (E,) that the scan has still to add to it.

    The scan adds the bias in float32 as it reads. An adapter or a hook in the way must see the whole linear map; then
    nothing is left to add.
    """
    if _run(_STEP, (projection,)):
        return linear(x, projection.weight), projection.bias
    steps = projection(x)
    return steps, steps.new_zeros(steps.shape[-1])


def project_gated(norm: RMSNorm, gate_proj: Linear, up_proj: Linear, x: Tensor) -> Tensor:
    """Return SiLU(gate_proj(n)) · up_proj(n) with n = norm(x), (…, in) to (…, out)."""
    if are_bare(norm, gate_proj, up_proj):
        return norm_gated_linear(x, norm.weight, norm.eps, gate_proj.weight, up_proj.weight)
    normed = norm(x)
    return gated_silu(gate_proj(normed), up_proj(normed))


def add_projection(projection: Linear, x: Tensor, stream: Tensor) -> Tensor:
    """Return stream + projection(x), x being (…, in) and the rest (…, out)."""
    if are_bare(projection):
        return linear_residual(x, projection.weight, stream)
    return stream + projection(x)


def add_projected_mean(
    norms: tuple[RMSNorm, RMSNorm], projection: Linear, x: Tensor, y: Tensor, stream: Tensor
) -> Tensor:
    """Return stream + projection of the mean of both norms, of `x` and of `y` (…, in); the rest is (…, out)."""
    weights = norms[0].weight, norms[1].weight
    if are_bare(projection):
        return mean_of_norms_linear(x, y, *weights, norms[0].eps, projection.weight, stream)
    return stream + projection(mean_of_norms(x, y, *weights, norms[0].eps))


def are_bare(*modules: nn.Module) -> bool:
    """Return whether calling these projections and norms runs their own op, without a bias, and nothing else."""
    return _run(_PLAIN, modules) and all(getattr(module, "bias", None) is None for module in modules)


def _run(forwards: tuple[Callable, ...], modules: Iterable[nn.Module]) -> bool:
    """Return whether calling each of these modules runs one of `forwards`, unwrapped and without hooks."""
    if torch.compiler.is_compiling():  # hooks are traced with the modules
        return False
    return not nn.modules.module._has_any_global_hook() and all(
        type(module).forward in forwards
        and "forward" not in vars(module)
        and not (module._forward_pre_hooks or module._forward_hooks)
        and not (module._backward_pre_hooks or module._backward_hooks)
        for module in modules
    )


_PLAIN = Linear.forward, RMSNorm.forward
_STEP = (StepProjection.forward,)
