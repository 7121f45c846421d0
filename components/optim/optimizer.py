"""Parameter groups: an optimizer with a learning-rate schedule and gradient clipping."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from components.contracts import Optimizer, trained_parameters
from components.distributed.parallel import local
from components.optim.schedule import Schedule


class ParameterGroup:
    """Parameters trained by one loss, with their optimizer.

    Args:
        name: as in the recipe's ``trains``.
        modules: by name; their parameters with ``requires_grad`` are trained.
        make: constructs the optimizer from the modules and the peak learning rate.
        schedule: learning-rate schedule.
        clip_norm: maximum gradient norm; larger gradients are scaled down. 0 disables clipping.

    Attributes:
        parameters: the trained parameters.
        names: their names, prefixed by the module's.
    """

    def __init__(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        make: Callable[[nn.ModuleDict, float], Optimizer],
        *,
        schedule: Schedule,
        clip_norm: float = 1.0,
    ) -> None:
        self.name = name
        self.modules = nn.ModuleDict(modules)
        named = trained_parameters(self.modules)
        self.names, self.parameters = list(named), list(named.values())
        self.schedule = schedule
        self.clip_norm = clip_norm
        self.optimizer = make(self.modules, schedule.lr)
        self._settings = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]

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
        for group, settings in zip(self.optimizer.param_groups, self._settings):
            # Loading a checkpoint restores the saved settings; the current run's take precedence.
            group.update(settings, lr=self.schedule.at(step, settings["lr"]))
        if norm is not None:
            device = self.parameters[0].device
            if self.clip_norm > 0:
                parts = [local(p.grad) for p in self.parameters if p.grad is not None]
                norm = norm.to(device, parts[0].dtype)
                torch._foreach_mul_(parts, (self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
            self.optimizer.found_inf = (~finite).float().to(device)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return self.schedule.at(step)
