from dataclasses import replace
from typing import Any

import pytest
import torch

from hymba.model import is_matrix
from hymba.training import Recipe
from hymba.training.optimizer import build_optimizer
from hymba.training.pretraining import build_model


@pytest.fixture
def model(recipe: Recipe, tokenizer: Any) -> Any:
    return build_model(recipe, tokenizer)


def test_matrices_are_the_projections_inside_layers(model: Any) -> None:
    matrices = {name for name, p in model.named_parameters() if is_matrix(name, p)}
    kinds = {name.split(".")[-2] if name.split(".")[-2] != "0" else name.split(".")[-3] for name in matrices}
    assert kinds == {*("in_proj", "out_proj", "x_proj", "dt_proj", "gate_proj", "up_proj", "down_proj")}
    assert len(matrices) == 7 * 3


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_parameter_once_and_only_matrices_decay(model: Any, recipe: Recipe, kind: str) -> None:
    optimizer = build_optimizer(model, replace(recipe, optimizer=kind, matrix_lr=2e-2))
    matrices, rest = optimizer.param_groups
    assert (matrices["lr"], rest["lr"]) == (2e-2, 1e-2)
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_muon_moves_a_matrix_as_far_as_adamw_would(model: Any, recipe: Recipe) -> None:
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    matrix = next(p for name, p in model.named_parameters() if "in_proj" in name)
    before = matrix.detach().clone()
    build_optimizer(model, replace(recipe, weight_decay=0.0)).step()
    size = (matrix - before).square().mean().sqrt().item()
    assert 0.1 * recipe.peak_lr < size < 0.4 * recipe.peak_lr


def test_a_pair_restores_its_state_and_stays_with_its_scheduler(model: Any, recipe: Recipe) -> None:
    optimizer = build_optimizer(model, recipe)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    other = build_optimizer(model, recipe)
    scheduler = torch.optim.lr_scheduler.LambdaLR(other, lambda step: 0.5)
    other.load_state_dict(saved)
    states = [part.state_dict()["state"] for part in (*optimizer.pair, *other.pair)]
    for mine, theirs in zip(states[:2], states[2:], strict=True):
        for key, values in mine.items():
            assert all(torch.equal(value, theirs[key][name]) for name, value in values.items())
    other.step()
    scheduler.step()
    assert [part.param_groups[0]["lr"] for part in other.pair] == [recipe.peak_lr / 2] * 2
