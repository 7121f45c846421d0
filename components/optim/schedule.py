"""Learning-rate schedules."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Shape = Literal["constant", "linear", "cosine", "wsd", "piecewise"]


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule; a function of the step and the total number of steps alone.

    Attributes:
        lr: peak learning rate.
        shape: after warm-up: constant; linear or cosine decay to ``final_ratio * lr`` at the last step; wsd
            (warm-up, stable, decay; arXiv 2405.18392): constant, then decay to ``final_ratio * lr`` during the last
            ``decay_steps`` steps; piecewise: through ``points``.
        steps: total number of steps.
        warmup_steps: number of linear warm-up steps; the first step uses 1 / warmup_steps of what follows.
        final_ratio: final learning rate divided by ``lr``, in [0, 1].
        decay_steps: for wsd: steps of the decay, of which the first is already below ``lr``; it begins after warm-up.
        decay_shape: for wsd: linear, or 1-sqrt: falls by the square root of the decay's progress.
        points: for piecewise: (step, factor on ``lr``), with ascending steps; before the first and after the last
            point, the factor is theirs.
        between: for piecewise: linear interpolation between points, or constant until the next point.
    """

    lr: float
    shape: Shape = "constant"
    steps: int = 1
    warmup_steps: int = 0
    final_ratio: float = 0.0
    decay_steps: int = 0
    decay_shape: Literal["linear", "1-sqrt"] = "linear"
    points: Sequence[tuple[int, float]] = ()
    between: Literal["linear", "constant"] = "linear"

    def at(self, step: int, lr: float | None = None) -> float:
        """Learning rate of step ``step``, counted from 0; ``lr``: peak learning rate instead of the schedule's."""
        lr = self.lr if lr is None else lr
        if step < self.warmup_steps:
            reached = self._points(self.warmup_steps) if self.shape == "piecewise" else 1.0
            return lr * reached * (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return lr
        if self.shape == "piecewise":
            return lr * self._points(step)
        if self.shape == "wsd":
            decay_steps = max(1, min(self.decay_steps, self.steps - self.warmup_steps))
            done = max(0.0, min(1.0, (step + 1 - (self.steps - decay_steps)) / decay_steps))
            left = 1 - (math.sqrt(done) if self.decay_shape == "1-sqrt" else done)
        else:
            span = max(1, self.steps - 1 - self.warmup_steps)
            done = min(1.0, (step - self.warmup_steps) / span)
            left = 1 - done if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return lr * (self.final_ratio + (1 - self.final_ratio) * left)

    def _points(self, step: int) -> float:
        """Factor of a step by ``points``."""
        passed = bisect.bisect_right([at for at, _ in self.points], step)
        (start, factor), (end, following) = (
            self.points[max(0, passed - 1)],
            self.points[min(passed, len(self.points) - 1)],
        )
        if passed == 0 or start == end or self.between == "constant":
            return factor
        return factor + (following - factor) * (step - start) / (end - start)
