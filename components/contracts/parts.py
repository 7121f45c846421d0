"""Protocols that plugins implement, and :class:`Modules`, which holds the modules of a run.

Shapes: B images per micro-batch, R pixels per side, C latent channels of h x w, N = n x n tokens on the
denoiser's grid, D_k features of encoder k. Images that reach a model are float in [-1, 1].

Optional members of a plugin that is an ``nn.Module``:

- ``init_weights()``: initializes every parameter and buffer, using torch's global generator. The module is then
  constructed on the meta device and sharded before it gets memory. Without it, the module is constructed on the CPU.
  Loading a trained model skips it if the state dict holds every parameter and buffer.
- ``units()``: submodules to compile, checkpoint and shard separately; without it, the module is one unit. Units must
  be called only through ``forward``.
- ``keep_fp32 = True``, on the module or on a unit: compute in fp32 even in a bf16 run.
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
    """Encodes images to latents and decodes latents to images. Constructed from its options alone.

    Optional attributes; the trainer refuses a recipe that contradicts the first two:

    - ``trainable = False``: no part of the tokenizer can be trained.
    - ``frozen_encoder = True``: only the decoder can be trained. ``encode`` must not propagate gradients, and the
      encoder's parameters must not require them.
    - ``resolution``: image side in pixels, if the tokenizer supports only one.

    Attributes:
        factor: downsampling factor, pixels per latent position along each side.
        channels: latent channels C.
    """

    factor: int
    channels: int

    def encode(self, x: Tensor) -> Posterior:
        """Images (B, 3, R, R) in [-1, 1] -> posterior over latents (B, C, R / factor, R / factor)."""

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, h * factor, w * factor), nominally in [-1, 1]."""

    def load_weights(self) -> None:
        """Load the checkpoint named in the options, if any. Called once, after the module has left the meta device."""

    def units(self) -> Sequence[nn.Module]:
        """Submodules to compile, checkpoint and shard separately."""


@runtime_checkable
class Denoiser(Protocol):
    """Predicts the velocity of x_t. Constructed from ``(latent: LatentShape, num_classes: int)`` and options.

    A denoiser may denoise a vector together with the latent, such as REG's class token. It then has an attribute
    ``extra_dim``, the dimension D_e of the vector; ``__call__`` and ``tokens`` take the noised vector (B, D_e) as a
    fourth argument; and its hidden tokens are (B, 1 + N, width), the vector's token first. Training draws the vector's
    noise, and samplers integrate latent and vector as one state.

    Attributes:
        width: dimension of the hidden tokens.
        grid: tokens per side; N = grid ** 2.
        align_depth: index of the block, counted from 1, whose output ``tokens`` returns; or an ascending list.
        null_label: label of the unconditional class, ``num_classes``.
        label_dropout: probability of replacing a label with ``null_label`` in training.
    """

    width: int
    grid: int
    align_depth: int | Sequence[int]
    null_label: int
    label_dropout: float

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> DenoiserOutput:
        """Velocity and hidden tokens at x_t (B, C, h, w), t (B,) in [0, 1], labels (B,) int64 in [0, null_label]."""

    def tokens(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tokens:
        """Hidden tokens only: blocks after the last ``align_depth`` do not run."""

    def units(self) -> Sequence[nn.Module]:
        """Submodules to compile, checkpoint and shard separately."""


@runtime_checkable
class Encoder(Protocol):
    """A frozen visual encoder whose patch tokens are the alignment targets.

    Constructed from ``(resolution: int, grid: int)`` (image side in pixels, the denoiser's tokens per side) and
    options. Optional: a method ``embed(images) -> (B, D)``, one vector per image for evaluation (default: the mean of
    the tokens), and an attribute ``native_grid``, the ``grid`` that evaluation constructs the encoder with.

    Attributes:
        embed_dim: dimension D of a token.
    """

    embed_dim: int

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, R, R) in [-1, 1] -> patch tokens (B, grid * grid, D), in row-major order."""

    def load_weights(self) -> None:
        """Load the pretrained weights. Called once, after the module has left the meta device.

        Raises:
            WeightsError: if they cannot be loaded; the message lists every way to provide them.
        """


@runtime_checkable
class ReconstructionLoss(Protocol):
    """One term of the tokenizer's loss.

    Optional class attributes: ``metric``, name of the evaluation metric that the loss computes; and ``metric_options``.

    Attributes:
        weight: factor of the term in the sum.
    """

    weight: float

    def __call__(self, x: Tensor, x_hat: Tensor, posterior: Posterior) -> Tensor:
        """Images and reconstructions (B, 3, R, R) and their posterior -> scalar loss, unweighted."""


@runtime_checkable
class AdversarialLoss(Protocol):
    """A discriminator with its two losses. All of its parameters belong to a module in ``units()``.

    Attributes:
        weight: factor of the generator loss in the tokenizer's loss.
    """

    weight: float

    def generator(self, x_hat: Tensor, step: int) -> Tensor:
        """Generator loss of the reconstructions (B, 3, R, R): a scalar, zero before the start step."""

    def discriminator(self, x: Tensor, x_hat: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the terms of the discriminator's loss, which are summed, and scalars that are only logged, by name.

        ``x`` and ``x_hat`` are images and detached reconstructions (B, 3, R, R).
        """


@runtime_checkable
class AlignmentLoss(Protocol):
    """Distance between projected denoiser tokens and encoder tokens, with one head per depth and encoder.

    Optional: ``strength(step: int) -> float``, a schedule that multiplies both weights; steps count from 0. It must
    depend on the step alone, so that resuming is exact. Where it is 0, neither encoders nor heads run.

    Attributes:
        tokenizer_weight: weight of the term in the tokenizer's loss.
        denoiser_weight: weight of the term in the denoiser's loss.
    """

    tokenizer_weight: float
    denoiser_weight: float

    def make_heads(self, width: int, embed_dims: Sequence[int], grid: int) -> nn.ModuleList:
        """Create the trainable heads, one per entry of ``embed_dims``: (B, N, width) -> (B, N, D_k).

        With several depths, ``embed_dims`` repeats the encoders' dimensions once per depth, in the order of the depths.
        """

    def align(self, projected: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Pairs of projected tokens and targets (B, N, D_k) -> scalar loss, the mean over pairs.

        Training passes one pair per call and computes the weighted mean over encoders itself.
        """


@runtime_checkable
class Dataset(Protocol):
    """Map-style dataset of images with class labels. Constructed from ``(resolution: int)`` and options.

    Optional: ``mirrored(index) -> DatasetItem``, if the dataset stores mirrored copies (a latent cache). Without it,
    training flips the image.

    Attributes:
        num_classes: number of classes; labels are in [0, num_classes).
        class_names: one name per class.
        flip: whether random horizontal flips are allowed in training.
    """

    num_classes: int
    class_names: Sequence[str]
    flip: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> DatasetItem: ...


class Update(Protocol):
    """Callback of a recipe that back-propagates one loss into one parameter group."""

    def __call__(self, group: str, terms: dict[str, LossTerm], **extra: Tensor) -> None:
        """Back-propagate the weighted sum of ``terms`` and log each of them; ``extra`` is logged only."""


@dataclass
class Modules:
    """The modules of a run, as passed to its recipe. Those that the recipe does not use are None or empty.

    ``encoders``, ``encoder_weights`` and ``reconstruction`` are keyed by the labels of their config tables.
    ``encoder_weights`` are the encoders' relative weights in the alignment loss; 1 where an encoder has none.
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
        """Return every ``nn.Module`` by name: 'tokenizer', 'denoiser', 'encoders.dinov2', ..."""
        found: dict[str, Any] = {}
        for name, part in vars(self).items():
            if isinstance(part, dict):
                found |= {f"{name}.{key}": value for key, value in part.items()}
            else:
                found[name] = part
        return {name: part for name, part in found.items() if isinstance(part, nn.Module)}


class Recipe(Protocol):
    """The training algorithm, one step of it. Constructed from its options alone.

    Optional members:

    - ``trains_decoder_alone = True``: the losses train only the tokenizer's decoder. Other recipes that train the
      tokenizer train encoder and decoder.
    - ``cached_latents = True``: the recipe can train on a latent cache. Its tokenizer must be frozen, and it must get
      posterior and targets from :mod:`components.diffusion.losses`.
    - ``check(m: Modules)``: validates requirements beyond the contracts before the run starts; raises a ValueError
      that names the key to change.

    Attributes:
        uses: fields of :class:`Modules` that the recipe needs; the others are not built.
        trains: module names by parameter group.
    """

    uses: frozenset[str]
    trains: dict[str, tuple[str, ...]]

    def step(self, m: Modules, batch: Batch, draws: Draws, update: Update, step: int) -> None:
        """Compute the losses of one micro-batch and pass each to ``update``; must not change weights itself."""
