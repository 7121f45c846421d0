"""Describe the plugin and cite its source here."""

from __future__ import annotations

from torch import Tensor

from components.contracts import Posterior, ReconstructionLoss
from components.nn.precision import at_least_fp32
from components.registry import losses


@losses.register("template")
class Template(ReconstructionLoss):
    """Charbonnier loss, a smooth absolute error. Replace the loss and this line, which listings show.

    Args:
        weight: weight in the tokenizer's loss.
        epsilon: error below which the loss is quadratic.
    """

    def __init__(self, *, weight: float = 1.0, epsilon: float = 1e-3) -> None:
        super().__init__()
        if epsilon <= 0:
            raise ValueError(f"losses.template: epsilon = {epsilon}; expected a positive number")
        self.weight = weight
        self.epsilon = epsilon

    def forward(self, x: Tensor, x_hat: Tensor, posterior: Posterior) -> Tensor:
        """Image and reconstruction (B, 3, R, R) and posterior -> scalar in at least fp32."""
        error = at_least_fp32(x_hat) - at_least_fp32(x)
        return (error.square() + self.epsilon**2).sqrt().mean() - self.epsilon
