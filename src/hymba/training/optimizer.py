"""Which parameters are trained how: Muon for the matrices inside layers, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from hymba.model import is_matrix
from hymba.training.recipe import Recipe


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over the trainable parameters of `model`."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = {
        "params": [p for name, p in trainable if is_matrix(name, p)],
        "lr": recipe.matrix_lr or recipe.peak_lr,
        "weight_decay": recipe.weight_decay,
    }
    rest = {
        "params": [p for name, p in trainable if not is_matrix(name, p)],
        "lr": recipe.peak_lr,
        "weight_decay": 0.0,
    }
    adamw = partial(torch.optim.AdamW, betas=(recipe.betas[0], recipe.betas[1]), fused=True)
    if recipe.optimizer == "adamw":
        return adamw([matrices, rest])
    # This scale gives Muon's updates the size of AdamW's: one learning rate can suit both (arXiv 2502.16982).
    muon = torch.optim.Muon([matrices], momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return OptimizerPair(muon, adamw([rest]))


class OptimizerPair(torch.optim.Optimizer):
    """Two optimizers over different parameters, as one. It shares their groups, so a scheduler moves both."""

    def __init__(self, *pair: torch.optim.Optimizer) -> None:
        self.pair = pair
        super().__init__([group for part in pair for group in part.param_groups], defaults={})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step both."""
        if closure is not None:
            raise ValueError("a pair of optimizers takes no closure")
        for part in self.pair:
            part.step()
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return both states."""
        return {"pair": [part.state_dict() for part in self.pair]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for part, state in zip(self.pair, state_dict["pair"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.pair for group in part.param_groups]
