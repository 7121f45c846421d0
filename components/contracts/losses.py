"""Base classes of losses: reconstruction, adversarial and alignment.

Shapes: B images per micro-batch, R pixels per side, N tokens on the denoiser's grid, D_k features of encoder k.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from components.contracts.networks import Network
from components.contracts.records import Distribution, Posterior


class ReconstructionLoss(Network):
    """One term of the tokenizer's loss.

    Attributes:
        role: field of :class:`Modules` that holds losses of this kind.
        weight: factor of the term in the sum.
        metric: name of the perceptual distance that the loss computes, by which evaluation finds it; "": none.
        metric_options: options that the loss is constructed with for evaluation.
    """

    role: ClassVar[str] = "reconstruction"
    metric: ClassVar[str] = ""
    metric_options: ClassVar[dict[str, Any]] = {}

    weight: float

    @abstractmethod
    def forward(self, x: Tensor, x_hat: Tensor, posterior: Posterior) -> Tensor:
        """Images and reconstructions (B, 3, R, R) and their posterior -> scalar loss, unweighted."""
        raise NotImplementedError


class AdversarialLoss(Network):
    """A discriminator with its two losses. All of its parameters belong to a module in ``units()``.

    Attributes:
        role: field of :class:`Modules` that holds losses of this kind.
        weight: factor of the generator loss in the tokenizer's loss.
        adaptive: multiply ``weight`` by the ratio of two gradients of the decoder's last weight, that of the
            reconstruction losses and that of the generator loss; see :mod:`components.diffusion.adaptive_weight`. The
            tokenizer must name its ``last_layer``.
        adaptive_eps: added to the denominator.
        random_numbers: random numbers of a step by name, such as those of an augmentation, as a recipe declares its
            own. Both methods then get them as the keyword argument ``random``: (B, *shape) by name, one row per image.
    """

    role: ClassVar[str] = "discriminator"

    weight: float
    adaptive: bool = False
    adaptive_eps: float = 1e-6
    random_numbers: Mapping[str, Distribution] = {}

    @abstractmethod
    def generator(self, x_hat: Tensor, step: int) -> Tensor:
        """Generator loss of the reconstructions (B, 3, R, R): a scalar, zero before the start step."""
        raise NotImplementedError

    @abstractmethod
    def discriminator(self, x: Tensor, x_hat: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the terms of the discriminator's loss, which are summed, and scalars that are only logged, by name.

        ``x`` and ``x_hat`` are images and detached reconstructions (B, 3, R, R).
        """
        raise NotImplementedError


class AlignmentLoss:
    """Distance between projected denoiser tokens and target tokens, and the heads that project.

    Attributes:
        role: field of :class:`Modules` that holds losses of this kind.
        given: names of the constructor arguments that the trainer passes, none; options follow after a bare ``*``.
        tokenizer_weight: weight of the term in the tokenizer's loss.
        denoiser_weight: weight of the term in the denoiser's loss.
    """

    role: ClassVar[str] = "alignment"
    given: ClassVar[tuple[str, ...]] = ()

    tokenizer_weight: float
    denoiser_weight: float

    @abstractmethod
    def make_heads(self, width: int, embed_dims: Sequence[int], grid: int) -> nn.ModuleList:
        """Create the trainable heads, one per entry of ``embed_dims``: (B, N, width) -> (B, N, D_k).

        The recipe declares ``embed_dims`` (``Recipe.head_dims``).
        """
        raise NotImplementedError

    @abstractmethod
    def align(self, projected: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Pairs of projected tokens and targets (B, N, D_k) -> scalar loss, the mean over pairs.

        Training passes one pair per call and computes the weighted mean over encoders itself.
        """
        raise NotImplementedError

    def strength(self, step: int) -> float:
        """Schedule that multiplies both weights; steps count from 0. Where it is 0, neither encoders nor heads run.

        It must depend on the step alone, so that resuming is exact.
        """
        return 1.0
