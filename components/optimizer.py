"""Parameter groups: AdamW, its learning-rate schedule and its gradient clipping, one set per module that learns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each step.

    Attributes:
        lr: peak.
        shape: after the warm-up: constant, or linear or cosine down to ``final_ratio * lr`` at the last step.
        steps: of the whole run.
        warmup_steps: steps of linear warm-up; the first step already has lr / warmup_steps.
        final_ratio: in [0, 1].
    """

    lr: float
    shape: Literal["constant", "linear", "cosine"] = "constant"
    steps: int = 1
    warmup_steps: int = 0
    final_ratio: float = 0.0

    def at(self, step: int) -> float:
        """Learning rate of step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return self.lr
        span = max(1, self.steps - 1 - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / span)
        left = 1 - done if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * (self.final_ratio + (1 - self.final_ratio) * left)


class ParameterGroup:
    """The parameters that one loss trains.

    Args:
        name: as in the recipe's ``trains``.
        modules: by name; their parameters with ``requires_grad`` are trained.
        schedule: learning rate of every step.
        betas, eps, weight_decay: of AdamW.
        clip_norm: gradient norm above which the gradients are scaled down; 0 never scales.
    """

    def __init__(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        *,
        schedule: Schedule,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip_norm: float = 1.0,
    ) -> None:
        self.name = name
        self.modules = nn.ModuleDict(modules)
        self.parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.schedule = schedule
        self.clip_norm = clip_norm
        # Fused: one kernel per step, and the only AdamW that can be told on the device to skip a step.
        self.settings = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.optimizer = torch.optim.AdamW(self.parameters, lr=schedule.lr, fused=True, **self.settings)

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def norm(self) -> Tensor:
        """L2 norm of all gradients, a scalar on their device."""
        return get_total_norm(self.gradients())

    def apply(self, step: int, norm: Tensor, finite: Tensor) -> float:
        """Clips, steps where ``finite``, and forgets the gradients; returns the learning rate.

        Args:
            step: counted from 0.
            norm: what :meth:`norm` returned.
            finite: bool scalar on the device; where false nothing changes, without a synchronisation.
        """
        if self.clip_norm > 0:
            clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        lr = self.schedule.at(step)
        for group in self.optimizer.param_groups:
            # A loaded optimizer brings the settings it was saved with; this run's count.
            group.update(self.settings, lr=lr)
        self.optimizer.found_inf = (~finite).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return lr
