"""The learning rate over a run: warm-up, stable, decay."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class WarmupStableDecay:
    """The factor on the peak learning rate at each step, counted from 0.

    It rises linearly over `warmup_steps`, stays at 1, and falls over the last `decay_steps` to `floor`, which
    the last step has exactly: linearly, or as 1 − √ (arXiv 2405.18392). Hymba was trained so, with 1% of
    warm-up and 20% of decay (arXiv 2411.13676). Unlike a cosine, it can be cut short while it is stable.
    """

    steps: int
    warmup_steps: int
    decay_steps: int
    floor: float  # fraction of the peak
    shape: str = "linear"  # or "sqrt"

    @classmethod
    def of(cls, steps: int, *, warmup: float, decay: float, floor: float, shape: str) -> WarmupStableDecay:
        """Build a schedule of `steps` from the fractions `warmup` and `decay`."""
        return cls(steps, max(1, round(warmup * steps)), round(decay * steps), floor, shape)

    def __call__(self, step: int) -> float:
        """Return the factor at `step`."""
        rise = min(1.0, (step + 1) / self.warmup_steps)
        gone = step + 1 - (self.steps - self.decay_steps)
        if gone <= 0:
            return rise
        share = min(1.0, gone / self.decay_steps) if self.decay_steps else 0.0
        fall = 1 - share if self.shape == "linear" else 1 - math.sqrt(share)
        return min(rise, self.floor + (1 - self.floor) * fall)

    @property
    def decay_start(self) -> int:
        """The first step of the decay."""
        return self.steps - self.decay_steps

    def decay_from(self, step: int) -> None:
        """Begin the decay at `step`, earlier than planned, keeping its share of the whole run."""
        share = self.decay_steps / self.steps
        self.decay_steps = min(self.decay_steps, math.ceil(step * share / (1 - share)))
        self.steps = step + self.decay_steps
