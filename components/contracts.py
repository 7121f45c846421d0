"""What the parts promise each other: protocols, and the small records they return.

Shapes: B images per micro-batch, R pixels per side, C latent channels of h x w, N = n x n tokens on the
denoiser's grid, D_k features of encoder k. Images that reach a model are float in [-1, 1].

What a part that is an ``nn.Module`` may offer besides its protocol:

- ``init_weights()``: fills every parameter and every buffer, from torch's global generator. Then the part is made on
  the meta device, and no process ever holds a large one whole; without it, the part is made on the CPU as it is.
- ``units()``: sub-modules that are compiled, recomputed and sharded one by one; without it, the part as a whole.
  A unit is used through its ``forward`` alone.
- ``keep_fp32 = True`` (on the part or on a unit): it computes in fp32 whatever the precision of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from components.draws import Draws
    from components.flow import Flow
    from components.latent_norm import LatentNorm


class LatentShape(NamedTuple):
    """Shape of one image's latent: C channels of ``height`` x ``width``."""

    channels: int
    height: int
    width: int


class Posterior(NamedTuple):
    """Diagonal Gaussian q(z|x) of a tokenizer; both tensors (B, C, h, w).

    Producers must clamp the log-variance to [-30, 20], so that ``std`` neither vanishes nor overflows.

    A tuple, as is every record that a wrapped forward pass returns: FSDP2 finds the tensors that need a backward hook
    in tuples, lists and dicts alone (torch 2.11). In any other container its weights would be freed too early.
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_std(cls, mean: Tensor, std: Tensor) -> Posterior:
        """From a standard deviation; what was rounded to zero gets the least that there is."""
        return cls(mean, (2 * std.log()).clamp(-30.0, 20.0))

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor) -> Tensor:
        """z = mean + std * noise, with noise ~ N(0, I) of the latent's shape."""
        return self.mean + self.std * noise.to(self.mean.dtype)

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) in nats, summed over the latent, averaged over the batch: a scalar."""
        kl = 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)
        return kl.flatten(1).sum(1).mean()


Tokens = Tensor | tuple[Tensor, ...]
"""Hidden tokens (B, N, width) after one block; a tuple of them where ``align_depth`` lists several, in its order."""


class DenoiserOutput(NamedTuple):
    """``velocity`` (B, C, h, w) and the hidden :data:`Tokens` after block ``align_depth``.

    ``extra`` (B, D_e) is the velocity of the vector that is denoised with the latent, where there is one.
    """

    velocity: Tensor
    tokens: Tokens
    extra: Tensor | None = None


class Weighted(NamedTuple):
    """One term of a loss: its weight in the sum and its unweighted value (what TensorBoard shows)."""

    weight: float
    value: Tensor


class Batch(NamedTuple):
    """One micro-batch on one rank.

    Attributes:
        images: (B, 3, R, R) float in [-1, 1]; None on cached latents where nothing needs them.
        labels: (B,) int64.
        posterior: of a frozen tokenizer, where it is cached.
        features: patch tokens (B, N, D_k) of frozen encoders by label, those that are cached.
    """

    images: Tensor | None
    labels: Tensor
    posterior: Posterior | None = None
    features: dict[str, Tensor] | None = None


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


class Cached(NamedTuple):
    """What a latent cache holds of an image (or, stacked, of a micro-batch), in the cache's dtype.

    ``mean`` and ``std`` (C, h, w) of the posterior; ``features`` (N, D_k) by encoder label.
    """

    mean: Tensor
    std: Tensor
    features: dict[str, Tensor]


class Sample(NamedTuple):
    """One item of a dataset: ``image`` uint8 (3, R, R), its class, and the path of an unreadable file it replaces.

    A dataset of cached latents gives ``cached``, and no image where nothing needs it.
    """

    image: Tensor | None
    label: int
    unreadable: str | None = None
    cached: Cached | None = None


@runtime_checkable
class Dataset(Protocol):
    """Map-style images with class labels. Constructed from ``(resolution: int)`` and options.

    One that holds mirrored copies offers ``mirrored(index) -> Sample``; else training mirrors the image.

    Attributes:
        num_classes: labels are in [0, num_classes).
        class_names: one name per class.
        flip: whether training may mirror the images left-right.
    """

    num_classes: int
    class_names: Sequence[str]
    flip: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Update(Protocol):
    """Adds one loss's gradients to one group of parameters."""

    def __call__(self, group: str, terms: dict[str, Weighted], **extra: Tensor) -> None:
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

    A recipe whose tokenizer is frozen, and which asks :mod:`components.objectives` for posterior and targets, may say
    ``cached_latents = True``: then it can train on a latent cache. One that asks more of the parts than their contracts
    may offer ``check(m: Modules)``: it raises a ValueError that names the key to change, before the run starts.

    Attributes:
        uses: fields of :class:`Modules` that it needs; the others are not built.
        trains: parameter groups, each the names of the modules it updates.
    """

    uses: frozenset[str]
    trains: dict[str, tuple[str, ...]]

    def step(self, m: Modules, batch: Batch, draws: Draws, update: Update, step: int) -> None:
        """Builds the losses of one micro-batch and hands each to ``update``; changes no weight itself."""
