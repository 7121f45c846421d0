"""Describe the plugin and cite its source here."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from components.contracts import Optimizer, trained_parameters
from components.distributed.parallel import local
from components.registry import optimizers


@optimizers.register("template")
class Template(Optimizer):
    """Sign of the momentum. Replace the update and this line, which listings show.

    Args:
        momentum: decay of the running average of the gradient.
    """

    def __init__(self, modules: nn.ModuleDict, lr: float, *, momentum: float = 0.9) -> None:
        super().__init__(list(trained_parameters(modules).values()), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient, unless ``found_inf`` is 1; reads no value on the host."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)  # sharded like p
                weight, buffer = local(p), local(self.state[p]["momentum"])  # this rank's rows
                momentum = buffer.lerp(local(p.grad), 1 - group["momentum"])
                for old, new in ((weight, weight - group["lr"] * momentum.sign()), (buffer, momentum)):
                    old.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, old, new))
