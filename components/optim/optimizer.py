"""Parameter groups: AdamW with a learning-rate schedule and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from components.distributed.parallel import local


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule.

    Attributes:
        lr: peak learning rate.
        shape: after warm-up: constant, or linear or cosine decay to ``final_ratio * lr`` at the last step.
        steps: total number of steps.
        warmup_steps: number of linear warm-up steps; the first step uses lr / warmup_steps.
        final_ratio: final learning rate divided by ``lr``, in [0, 1].
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
    """Parameters trained by one loss, with their optimizer.

    Args:
        name: as in the recipe's ``trains``.
        modules: by name; their parameters with ``requires_grad`` are trained.
        schedule: learning-rate schedule.
        betas, eps, weight_decay: AdamW hyperparameters.
        clip_norm: maximum gradient norm; larger gradients are scaled down. 0 disables clipping.

    Attributes:
        parameters: the trained parameters.
        names: their names, prefixed by the module's.
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
        named = [(name, p) for name, p in self.modules.named_parameters() if p.requires_grad]
        self.names = [name.replace("_checkpoint_wrapped_module.", "") for name, _ in named]
        self.parameters = [p for _, p in named]
        self.schedule = schedule
        self.clip_norm = clip_norm
        # Fused: one kernel per step, and the only AdamW that can skip a step based on a flag on the device.
        self.settings = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.optimizer = torch.optim.AdamW(self.parameters, lr=schedule.lr, fused=True, **self.settings)

    def has_gradients(self) -> bool:
        """Whether any parameter has a gradient; false for a discriminator before its start step."""
        return any(p.grad is not None for p in self.parameters)

    def norms(self) -> Tensor:
        """L2 norms of the full gradients, (n,) float64 in the order of ``names``; 0 for missing gradients.

        Collective: squared norms of sharded gradients are summed over ranks in one all-reduce. Requires
        :meth:`has_gradients`.
        """
        grads = [p.grad for p in self.parameters]
        parts = [local(g) for g in grads if g is not None]
        norms = iter(torch._foreach_norm(parts))
        zero = parts[0].new_zeros(())
        # float64, because squares of large norms could overflow.
        squares = torch.stack([zero if g is None else next(norms) for g in grads]).double().square()
        sharded = next((g for g in grads if isinstance(g, DTensor)), None)
        if sharded is not None:
            mesh = sharded.device_mesh
            squares = squares.to(mesh.device_type)
            dist.all_reduce(squares, group=mesh.get_group("shard"))
        return squares.sqrt()

    def apply(self, step: int, norm: Tensor | None, finite: Tensor) -> float:
        """Clip gradients, step the optimizer if ``finite``, and clear the gradients; return the learning rate.

        Args:
            step: counted from 0.
            norm: total gradient norm, a scalar; None if there are no gradients, then nothing is updated.
            finite: bool scalar on the device; if false, weights and optimizer state stay unchanged. Does not
                synchronize with the host.
        """
        lr = self.schedule.at(step)
        for group in self.optimizer.param_groups:
            # Loading a checkpoint restores the saved settings; the current run's take precedence.
            group.update(self.settings, lr=lr)
        if norm is not None:
            device = self.parameters[0].device
            if self.clip_norm > 0:
                parts = [local(p.grad) for p in self.parameters if p.grad is not None]
                norm = norm.to(device, parts[0].dtype)
                torch._foreach_mul_(parts, (self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
            self.optimizer.found_inf = (~finite).float().to(device)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return lr
