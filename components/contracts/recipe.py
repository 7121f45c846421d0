"""Base class of recipes, and :class:`Modules`, which holds the modules of a run.

Shapes: B images per micro-batch, C latent channels of h x w, N = n x n tokens on the denoiser's grid.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor, nn

from components.contracts.losses import AdversarialLoss, AlignmentLoss, ReconstructionLoss
from components.contracts.networks import Denoiser, Encoder, Network, Tokenizer
from components.contracts.records import Batch, Distribution, LatentShape, LossTerm, RandomNumbers

if TYPE_CHECKING:
    from components.diffusion.flow import Flow
    from components.nn.last_layer import LastLayer
    from components.nn.latent_norm import LatentNorm

Sampler = Callable[..., Tensor]
"""A sampler, called like :func:`components.diffusion.samplers.sample_ode`."""


class Update(Protocol):
    """Callback of a recipe that back-propagates one loss into one parameter group."""

    def __call__(self, group: str, terms: dict[str, LossTerm], **logged: Tensor) -> None:
        """Back-propagate the weighted sum of ``terms`` and log each of them; ``logged`` is only logged."""


@dataclass
class Modules:
    """The modules of a run, as passed to its recipe. Those that the recipe does not use are None or empty.

    Attributes:
        encoders: by the labels of their config tables.
        encoder_weights: relative weights of the encoders in the alignment loss; 1 where an encoder has none.
        reconstruction: by the labels of their config tables.
        copies: frozen copies of modules that the recipe declares, by name.
        state: tensors that the recipe keeps between steps, by name.
        last_layer: the tokenizer's last layer, if the weight of the generator loss adapts to its gradients.
    """

    # Typed as present, since recipes read only what they declare in `uses`.
    tokenizer: Tokenizer = None  # type: ignore[assignment]
    denoiser: Denoiser = None  # type: ignore[assignment]
    heads: nn.ModuleList = None  # type: ignore[assignment]
    latent_norm: LatentNorm = None  # type: ignore[assignment]
    encoders: dict[str, Encoder] = field(default_factory=dict)
    encoder_weights: dict[str, float] = field(default_factory=dict)
    reconstruction: dict[str, ReconstructionLoss] = field(default_factory=dict)
    discriminator: AdversarialLoss | None = None
    alignment: AlignmentLoss = None  # type: ignore[assignment]
    flow: Flow = None  # type: ignore[assignment]
    copies: dict[str, Network] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    last_layer: LastLayer | None = None

    def named(self) -> dict[str, nn.Module]:
        """Return every ``nn.Module`` by name: 'tokenizer', 'denoiser', 'encoders.dinov2', 'copies.teacher', ..."""
        found: dict[str, object] = {}
        for name, part in vars(self).items():
            if isinstance(part, dict):
                found |= {f"{name}.{key}": value for key, value in part.items()}
            else:
                found[name] = part
        return {name: part for name, part in found.items() if isinstance(part, nn.Module)}


class Recipe:
    """The training algorithm, one step of it, with all that belongs to it. Constructed from its options alone.

    Attributes:
        given: names of the constructor arguments that the trainer passes, none; options follow after a bare ``*``.
        uses: fields of :class:`Modules` that the recipe needs; the others are not built.
        trains: module names by parameter group.
        trains_decoder_alone: the losses train only the tokenizer's decoder. Other recipes that train the tokenizer
            train encoder and decoder.
        cached_latents: the recipe can train on a latent cache. Its tokenizer must be frozen, and it must get posterior
            and targets from :mod:`components.diffusion.losses`.
        copies: frozen copies of modules, such as a teacher: the copied module by the copy's name in
            ``Modules.copies``. A copy is sharded like its source, equals it before the first step, and is saved in
            checkpoints.
        samplers: samplers that belong to the recipe, by their name in ``sampling.method``, in addition to euler, heun
            and sde.
    """

    given: ClassVar[tuple[str, ...]] = ()
    uses: ClassVar[frozenset[str]]
    trains: ClassVar[dict[str, tuple[str, ...]]]
    trains_decoder_alone: ClassVar[bool] = False
    cached_latents: ClassVar[bool] = False
    copies: ClassVar[Mapping[str, str]] = {}
    samplers: ClassVar[Mapping[str, Sampler]] = {}

    @abstractmethod
    def step(self, m: Modules, batch: Batch, random: RandomNumbers, update: Update, step: int) -> None:
        """Compute the losses of one micro-batch and pass each to ``update``; must not change weights itself."""
        raise NotImplementedError

    def check(self, m: Modules) -> None:
        """Check requirements beyond the contracts before the run starts.

        Raises:
            ValueError: the message names the key to change.
        """

    def random_numbers(self, m: Modules, latent: LatentShape) -> dict[str, Distribution]:
        """Declare the random numbers of a step, by name; they do not depend on the numbers of ranks and micro-batches.

        By default those of a latent diffusion step: noise of the posterior's sample and of the path, uniform numbers
        for the time and for dropping the condition.
        """
        return {
            "posterior": Distribution("normal", latent),
            "noise": Distribution("normal", latent),
            "time": Distribution("uniform"),
            "label": Distribution("uniform"),
        }

    def denoised(self, m: Modules) -> dict[str, tuple[int, ...]]:
        """What is denoised together with the latent: shape per image by name, as in ``Denoiser.noisy_inputs``.

        Samplers integrate it together with the latent, and discard it.
        """
        return {}

    def head_dims(self, m: Modules) -> list[int]:
        """Output features of each alignment head; by default one per depth and encoder, in the order of the depths."""
        depths = 1 if isinstance(m.denoiser.align_depth, int) else len(m.denoiser.align_depth)
        return [encoder.embed_dim for encoder in m.encoders.values()] * depths

    def init_state(self, m: Modules) -> dict[str, Tensor]:
        """Initial values of the tensors kept between steps, by name; equal on all ranks, saved in checkpoints."""
        return {}

    def after_step(self, m: Modules, finite: Tensor, step: int) -> None:
        """Update copies and state after a step's optimizers.

        ``finite`` is a bool scalar on the device: false if the step was skipped. Copies and state must then stay as
        they are; reading it on the host would wait for the device.
        """
