"""Models without weights, and initial ones (arXiv 2411.13676: deviation 0.02, meta tokens N(0, 1); SSM as in Mamba)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hymba.model.config import HymbaConfig
from hymba.model.hymba import HybridMixer, Hymba, RMSNorm, StepProjection

# Mamba draws its initial step sizes log-uniformly between these (arXiv 2312.00752, section 3.6).
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


class _Undrawn(TorchFunctionMode):
    """Leaves out what torch's modules draw for their weights: on the meta device that is nothing, for which torch would
    import its compiler, over a second and 80 MB."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def skeleton(config: HymbaConfig) -> Hymba:
    """Return a model on the meta device: every shape, and no memory."""
    with torch.device("meta"), _Undrawn():
        return Hymba(config)


@torch.no_grad()
def init_weights(model: Hymba, seed: int | None = None) -> Hymba:
    """Fill every weight of `model` in place and return it.

    Args:
        model: on a real device; its dtype is kept.
        seed: of torch's global generator; None continues the generator as it stands.
    """
    if seed is not None:
        torch.manual_seed(seed)
    for module in model.modules():
        init_module(module, model.config.initializer_range)
    return model


@torch.no_grad()
def init_module(module: nn.Module, std: float) -> None:
    """Fill the weights that belong to `module` itself, not to its children."""
    if isinstance(module, Hymba):
        if module.meta_tokens is not None:
            module.meta_tokens.normal_()
    elif isinstance(module, HybridMixer):
        _init_ssm(module)
    elif isinstance(module, RMSNorm):
        module.weight.fill_(1.0)
    elif isinstance(module, nn.Conv1d):
        bound = module.kernel_size[0] ** -0.5
        module.weight.uniform_(-bound, bound)
        if module.bias is not None:
            module.bias.uniform_(-bound, bound)
    elif isinstance(module, nn.Embedding):
        module.weight.normal_(std=std)
    elif isinstance(module, nn.Linear) and not isinstance(module, StepProjection):  # that one is the mixer's
        module.weight.normal_(std=std)
        if module.bias is not None:
            module.bias.zero_()


def _init_ssm(mixer: HybridMixer) -> None:
    """A = −(1 … N) on every channel (S4D-real), D = 1, and step sizes between DT_MIN and DT_MAX."""
    channels, states = mixer.A_log.shape
    counts = torch.arange(1, states + 1, dtype=torch.float32, device=mixer.A_log.device)
    mixer.A_log.copy_(counts.log().expand(channels, states))
    mixer.D.fill_(1.0)
    bound = mixer.dt_proj.in_features**-0.5
    mixer.dt_proj.weight.uniform_(-bound, bound)
    mixer.dt_proj.bias.copy_(_inverse_softplus(_step_sizes(channels, mixer.A_log.device)))


def _step_sizes(channels: int, device: torch.device) -> Tensor:
    span = math.log(DT_MAX) - math.log(DT_MIN)
    return (torch.rand(channels, device=device) * span + math.log(DT_MIN)).exp().clamp(min=DT_FLOOR)


def _inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))
