"""Training on transformers' Trainer: pretraining from a recipe."""

from hymba.training.pretraining import pretrain
from hymba.training.recipe import Recipe

__all__ = ["Recipe", "pretrain"]
