"""Learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule; a function of the step and the total number of steps alone.

    Attributes:
        lr: peak learning rate.
        shape: after warm-up: constant, or linear or cosine decay to ``final_ratio * lr`` at the last step.
        steps: total number of steps.
        warmup_steps: number of linear warm-up steps; the first step uses 1 / warmup_steps of what follows.
        final_ratio: final learning rate divided by ``lr``, in [0, 1].
    """

    lr: float
    shape: Shape = "constant"
    steps: int = 1
    warmup_steps: int = 0
    final_ratio: float = 0.0

    def at(self, step: int, lr: float | None = None) -> float:
        """Learning rate of step ``step``, counted from 0; ``lr``: peak learning rate instead of the schedule's."""
        lr = self.lr if lr is None else lr
        if step < self.warmup_steps:
            return lr * (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return lr
        span = max(1, self.steps - 1 - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / span)
        left = 1 - done if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return lr * (self.final_ratio + (1 - self.final_ratio) * left)
