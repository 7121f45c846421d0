"""One training step: every loss backward, one check, then all optimizers and the EMA, or nothing at all."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from components import parallel
from components.contracts import Batch, Modules, Recipe, Weighted
from components.draws import Draws
from components.ema import Ema
from components.metrics import Metrics
from components.optimizer import ParameterGroup


class Step:
    """Runs a recipe's step over micro-batches and applies it whole.

    Losses of a step never see each other's updates, so the three backward passes can come before every optimizer;
    the numbers are those of stepping one after the other.

    Args:
        recipe: builds the losses.
        modules: the parts it works on.
        groups: what each loss trains, by name.
        ema: averages to move after each applied step; none: no averages.
        accumulation: micro-batches per step.
        autocast_dtype: bf16 for mixed precision; none: the modules' own dtype.
        metrics: where losses, norms and learning rates are reported.
    """

    def __init__(
        self,
        recipe: Recipe,
        modules: Modules,
        groups: dict[str, ParameterGroup],
        *,
        ema: Ema | None,
        accumulation: int,
        autocast_dtype: torch.dtype | None,
        metrics: Metrics,
        device: torch.device,
    ) -> None:
        self.recipe, self.modules, self.groups, self.ema = recipe, modules, groups, ema
        self.accumulation, self.metrics, self.device = accumulation, metrics, device
        self.autocast_dtype = autocast_dtype
        self._loss_sum = torch.zeros((), device=device)
        # What forward passes change: batch-norm statistics and the like. Undone if the step is not applied.
        changing = [modules.tokenizer, modules.latent_norm, modules.discriminator]
        self._buffers = [b for module in changing if module is not None for b in module.buffers()]

    def __call__(self, step: int, micro_batches: Iterable[tuple[Batch, Draws]]) -> Tensor:
        """One step, counted from 0.

        Returns:
            Bool scalar on the device: whether losses and gradients were finite on every rank, so that it was applied.
        """
        before = [b.clone() for b in self._buffers]
        self._loss_sum = torch.zeros((), device=self.device)
        for batch, draws in micro_batches:
            with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
                self.recipe.step(self.modules, batch, draws, self._update, step)

        gradients = [g for group in self.groups.values() for g in group.gradients()]
        parallel.average([*gradients, self._loss_sum])
        # A group without gradients (a discriminator before its start step) has its zero on the CPU.
        norms = {name: group.norm().to(self.device) for name, group in self.groups.items()}
        finite = torch.isfinite(torch.stack([self._loss_sum.double(), *(n.double() for n in norms.values())])).all()

        for name, group in self.groups.items():
            lr = group.apply(step, norms[name], finite)
            self.metrics.add(f"grad_norm/{name}", norms[name])
            self.metrics.add(f"lr/{name}", torch.tensor(lr))
        for buffer, old in zip(self._buffers, before):
            buffer.copy_(torch.where(finite, buffer, old))
        if self.ema is not None:
            self.ema.update(finite)
        self.metrics.add("skipped_steps", (~finite).float())
        return finite

    def _update(self, group: str, terms: dict[str, Weighted], **extra: Tensor) -> None:
        if group not in self.groups:
            raise KeyError(f"the recipe updates '{group}', but its `trains` names only {sorted(self.groups)}")
        total = torch.stack([weight * value for weight, value in terms.values()]).sum()
        for name, (_, value) in terms.items():
            self.metrics.add(f"{group}/{name}", value)
        for name, value in extra.items():
            self.metrics.add(f"{group}/{name}", value)
        self.metrics.add(f"{group}/loss", total)
        self._loss_sum = self._loss_sum + total.detach()
        # A discriminator before its start step has nothing to learn from.
        if total.requires_grad:
            with torch.autocast(self.device.type, enabled=False):
                (total / self.accumulation).backward()
