"""AdamW."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from components.contracts import Optimizer, trained_parameters
from components.registry import optimizers

Fraction = Annotated[float, Field(ge=0, le=1)]


@optimizers.register("adamw")
class AdamW(Optimizer, torch.optim.AdamW):
    """AdamW (arXiv 1711.05101), PyTorch's fused implementation.

    Args:
        betas: beta1 and beta2, decay of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: decoupled weight decay; each step subtracts lr * weight_decay * weight.
    """

    def __init__(
        self,
        modules: nn.ModuleDict,
        lr: float,
        *,
        betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999],  # noqa: B006
        eps: Annotated[float, Field(gt=0)] = 1e-8,
        weight_decay: Annotated[float, Field(ge=0)] = 0.0,
    ) -> None:
        # Fused: one kernel per step, and the only AdamW that can skip a step based on a flag on the device.
        super().__init__(
            list(trained_parameters(modules).values()),
            lr=lr,
            betas=(betas[0], betas[1]),
            eps=eps,
            weight_decay=weight_decay,
            fused=True,
        )
