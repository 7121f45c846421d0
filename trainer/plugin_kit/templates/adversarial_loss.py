"""Describe the plugin and cite its source here."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from components.contracts import AdversarialLoss
from components.nn.precision import at_least_fp32
from components.registry import losses


@losses.register("template")
class Template(AdversarialLoss):
    """Hinge loss with a two-layer discriminator. Replace the network and this line, which listings show.

    Args:
        weight: weight of the generator's loss in the tokenizer's loss.
        width: channels of the hidden layer.
    """

    def __init__(self, *, weight: float = 0.1, width: int = 32) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"losses.template: width = {width}; expected at least 1")
        self.weight = weight
        self.network = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 1, 4, stride=2, padding=1),
        )

    def init_weights(self) -> None:
        """Fill every parameter and buffer: training constructs the module on the meta device first."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()

    def generator(self, x_hat: Tensor, step: int) -> Tensor:
        """Return the loss of reconstructions (B, 3, R, R) that the discriminator should take for images: a scalar."""
        return -self._logits(x_hat).mean()

    def discriminator(self, x: Tensor, x_hat: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the terms of the discriminator's loss, and scalars that are only logged; ``x_hat`` is detached."""
        real, fake = self._logits(x), self._logits(x_hat)
        hinge = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        return {"hinge": hinge}, {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}

    def units(self) -> Sequence[nn.Module]:
        """Return the sub-modules to compile and shard; they must contain every weight."""
        return [self.network]

    def _logits(self, x: Tensor) -> Tensor:
        return at_least_fp32(self.network(x))
