"""What the parts of a run promise each other, as protocols, and :class:`Modules`, which holds them.

Shapes: B images per micro-batch, R pixels per side, C latent channels of h x w, N = n x n tokens on the
denoiser's grid, D_k features of encoder k. Images that reach a model are float in [-1, 1].

What a part that is an ``nn.Module`` may offer besides its protocol:

- ``init_weights()``: fills every parameter and every buffer, from torch's global generator. Then the part is made on
  the meta device, and no process ever holds a large one whole; without it, the part is made on the CPU as it is.
  Loading a trained model skips it if the state dict holds every parameter and buffer.
- ``units()``: sub-modules that are compiled, recomputed and sharded one by one; without it, the part as a whole.
  A unit is used through its ``forward`` alone.
- ``keep_fp32 = True`` (on the part or on a unit): it computes in fp32 whatever the precision of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

from components.contracts.records import Batch, DatasetItem, DenoiserOutput, Draws, LossTerm, Posterior, Tokens

if TYPE_CHECKING:
    from components.diffusion.flow import Flow
    from components.nn.latent_norm import LatentNorm


@runtime_checkable
class Tokenizer(Protocol):
    """Images to latents and back. Constructed from its options alone.

    Recipes that want more of it than it offers are refused: ``trainable = False`` says that none of it learns,
    ``frozen_encoder = True`` that its decoder alone does (``encode`` passes no gradient on, and the encoder's
    parameters never require one). ``resolution`` is the images' side in pixels, where it takes one size only.

    Attributes:
        factor: pixels per latent position along each side.
        channels: latent channels C.
    """

    factor: int
    channels: int

    def encode(self, x: Tensor) -> Posterior:
        """(B, 3, R, R) in [-1, 1] -> posterior over (B, C, R / factor, R / factor)."""

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, h * factor, w * factor), nominally in [-1, 1]."""

    def load_weights(self) -> None:
        """Reads the checkpoint that the options name, if any. Called once, never on the meta device."""

    def units(self) -> Sequence[nn.Module]:
        """Sub-modules to compile, checkpoint and shard one by one."""


@runtime_checkable
class Denoiser(Protocol):
    """Predicts the velocity of x_t. Constructed from ``(latent: LatentShape, num_classes: int)`` and options.

    It may denoise a vector together with the latent, as REG's class token: then it has ``extra_dim``, the features D_e
    of the vector, and its methods take the noised vector (B, D_e) as a fourth argument. Its tokens are then
    (B, 1 + N, width), the vector's first. Training draws the noise, and samplers integrate latent and vector as one
    state.

    Attributes:
        width: features of a hidden token.
        grid: tokens per side; N = grid ** 2.
        align_depth: the block after which ``tokens`` are taken, counted from 1; or a list of several, rising.
        null_label: the label that means "no class"; ``num_classes`` when there is one.
        label_dropout: the probability with which training replaces a label by the null label.
    """

    width: int
    grid: int
    align_depth: int | Sequence[int]
    null_label: int
    label_dropout: float

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> DenoiserOutput:
        """x_t (B, C, h, w), t (B,) in [0, 1], labels (B,) int64 in [0, null_label]."""

    def tokens(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tokens:
        """The hidden tokens alone; blocks behind the last ``align_depth`` do not run."""

    def units(self) -> Sequence[nn.Module]:
        """Sub-modules to compile, checkpoint and shard one by one."""


@runtime_checkable
class Encoder(Protocol):
    """A frozen network whose patch tokens are the alignment target.

    Constructed from ``(resolution: int, grid: int)``, the images' side in pixels and the denoiser's tokens per
    side, and its options. It may offer ``embed(images) -> (B, D)``, one vector per image.

    Attributes:
        embed_dim: features D of a token.
    """

    embed_dim: int

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) in [-1, 1] -> (B, grid * grid, D) patch tokens, rows first."""

    def load_weights(self) -> None:
        """Reads its weights. Called once, never on the meta device.

        Raises:
            WeightsError: they cannot be had; the message says every way to provide them.
        """


@runtime_checkable
class ReconstructionLoss(Protocol):
    """A term of the tokenizer's loss. ``weight`` is its factor in the sum."""

    weight: float

    def __call__(self, x: Tensor, x_hat: Tensor, posterior: Posterior) -> Tensor:
        """Image and reconstruction (B, 3, R, R) and the posterior -> a scalar."""


@runtime_checkable
class AdversarialLoss(Protocol):
    """A discriminator and its two losses; ``parameters()`` are the discriminator's, all of them within ``units()``."""

    weight: float

    def generator(self, x_hat: Tensor, step: int) -> Tensor:
        """What the tokenizer minimises: a scalar, zero before the start step."""

    def discriminator(self, x: Tensor, x_hat: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the discriminator minimises, as named scalars that are summed, and scalars that are only reported.

        ``x_hat`` comes detached.
        """


@runtime_checkable
class AlignmentLoss(Protocol):
    """Distance between projected denoiser tokens and encoder tokens, with one head per depth and encoder.

    It may offer ``strength(step: int) -> float``, the factor of both weights at a step, counted from 0: a schedule,
    and a function of the step alone, so that a resumed run goes on as it would have. At 0 neither encoders nor heads
    run.

    Attributes:
        tokenizer_weight: weight in the tokenizer's loss.
        denoiser_weight: weight in the denoiser's loss.
    """

    tokenizer_weight: float
    denoiser_weight: float

    def make_heads(self, width: int, embed_dims: Sequence[int], grid: int) -> nn.ModuleList:
        """Trainable heads, one per entry of ``embed_dims``: (B, N, width) -> (B, N, D_k).

        With several depths the encoders' dimensions come once for each depth, the first depth's first.
        """

    def align(self, projected: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Projected tokens and targets (B, N, D_k) in pairs -> a scalar, their mean.

        Training hands over one pair at a time, and weights the encoders.
        """


@runtime_checkable
class Dataset(Protocol):
    """Map-style images with class labels. Constructed from ``(resolution: int)`` and options.

    One that holds mirrored copies offers ``mirrored(index) -> DatasetItem``; else training mirrors the image.

    Attributes:
        num_classes: labels are in [0, num_classes).
        class_names: one name per class.
        flip: whether training may mirror the images left-right.
    """

    num_classes: int
    class_names: Sequence[str]
    flip: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> DatasetItem: ...


class Update(Protocol):
    """Adds one loss's gradients to one group of parameters."""

    def __call__(self, group: str, terms: dict[str, LossTerm], **extra: Tensor) -> None:
        """Back-propagates the weighted sum of ``terms`` and reports each of them; ``extra`` is only reported."""


@dataclass
class Modules:
    """The parts of a run, as a recipe sees them; a part the recipe does not use is None or empty.

    ``encoder_weights`` are each encoder's part in the alignment loss, by label; empty: all equal.
    """

    tokenizer: Any = None
    denoiser: Any = None
    heads: nn.ModuleList | None = None
    latent_norm: LatentNorm | None = None
    encoders: dict[str, Any] = field(default_factory=dict)
    encoder_weights: dict[str, float] = field(default_factory=dict)
    reconstruction: dict[str, Any] = field(default_factory=dict)
    discriminator: Any = None
    alignment: Any = None
    flow: Flow | None = None

    def named(self) -> dict[str, nn.Module]:
        """Every module by name: 'tokenizer', 'denoiser', 'encoders.dinov2', ..."""
        found: dict[str, Any] = {}
        for name, part in vars(self).items():
            if isinstance(part, dict):
                found |= {f"{name}.{key}": value for key, value in part.items()}
            else:
                found[name] = part
        return {name: part for name, part in found.items() if isinstance(part, nn.Module)}


class Recipe(Protocol):
    """One step of training, as a paper would write it. Constructed from its options alone.

    One whose losses reach the tokenizer's decoder alone says ``trains_decoder_alone = True``; others that train the
    tokenizer want both halves of it.

    A recipe whose tokenizer is frozen, and which asks :mod:`components.diffusion.losses` for posterior and targets, may
    say ``cached_latents = True``: then it can train on a latent cache. One that asks more of the parts than their
    contracts may offer ``check(m: Modules)``: it raises a ValueError that names the key to change, before the run
    starts.

    Attributes:
        uses: fields of :class:`Modules` that it needs; the others are not built.
        trains: parameter groups, each the names of the modules it updates.
    """

    uses: frozenset[str]
    trains: dict[str, tuple[str, ...]]

    def step(self, m: Modules, batch: Batch, draws: Draws, update: Update, step: int) -> None:
        """Builds the losses of one micro-batch and hands each to ``update``; changes no weight itself."""
