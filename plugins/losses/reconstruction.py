"""Stateless terms of the tokenizer's loss: L1, L2 and KL divergence."""

from __future__ import annotations

from torch import Tensor

from components.contracts import Posterior, ReconstructionLoss
from components.nn.precision import at_least_fp32
from components.registry import losses


@losses.register("l1")
class L1(ReconstructionLoss):
    """Mean absolute error between image and reconstruction.

    Args:
        weight: weight in the tokenizer's loss.
    """

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, x_hat: Tensor, posterior: Posterior) -> Tensor:
        """Images x and x_hat, both (B, 3, R, R) -> scalar mean over all elements."""
        return (at_least_fp32(x) - at_least_fp32(x_hat)).abs().mean()


@losses.register("l2")
class L2(ReconstructionLoss):
    """Mean squared error between image and reconstruction.

    Args:
        weight: weight in the tokenizer's loss.
    """

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, x_hat: Tensor, posterior: Posterior) -> Tensor:
        """Images x and x_hat, both (B, 3, R, R) -> scalar mean over all elements."""
        return (at_least_fp32(x) - at_least_fp32(x_hat)).square().mean()


@losses.register("kl")
class KL(ReconstructionLoss):
    """KL divergence of the posterior from N(0, I), summed over latent elements and averaged over the batch.

    Args:
        weight: weight in the tokenizer's loss.
    """

    def __init__(self, *, weight: float = 1e-6) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, x_hat: Tensor, posterior: Posterior) -> Tensor:
        """Posterior over (B, C, h, w) -> scalar, in nats per image."""
        return Posterior(at_least_fp32(posterior.mean), at_least_fp32(posterior.logvar)).kl()
