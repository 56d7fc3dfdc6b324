"""A run whose numbers are no longer finite: how it stops, and how it can go on."""

from __future__ import annotations

from pathlib import Path

from hymba.errors import HymbaError
from hymba.training.checkpoint import last_checkpoint, step_of
from hymba.training.recipe import Recipe
from hymba.training.run import DIVERGED, RUN, read_json, write_json


class DivergenceError(HymbaError):
    """Training gave numbers that are not finite.

    step: the first step known to have done so, counted from 1.
    """

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"training diverged: {what} not finite at step {step}")
        self.step = step


def explain(error: DivergenceError, recipe: Recipe, out: Path) -> HymbaError:
    """Return the error with advice on how to go on, and note in `out` that the advice may be followed."""
    write_json(out / RUN, (read_json(out / RUN) or {}) | {DIVERGED: error.step})
    rates = f"peak_lr ({recipe.peak_lr:g})"
    if recipe.matrix_lr is not None:
        rates += f" and matrix_lr ({recipe.matrix_lr:g})"
    checkpoint = last_checkpoint(out)
    if checkpoint is None:
        advice = f"lower {rates} and run again with the same --out to start over"
    elif error.step > step_of(checkpoint) + 1:
        advice = f"lower {rates} and run again with the same --out to go on from {checkpoint.name}"
    else:  # this step did not depend on the learning rate, but on the checkpoint
        advice = f"delete {checkpoint}, lower {rates} and run again with the same --out to go on from before it"
    return HymbaError(f"{error}: {advice}")
