"""Small records that parts pass to each other.

Shapes: B images per micro-batch, R pixels per side, C latent channels of h x w, N = n x n tokens on the
denoiser's grid, D_k features of encoder k. Images that reach a model are float in [-1, 1].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


class LossTerm(NamedTuple):
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


class Cached(NamedTuple):
    """What a latent cache holds of an image (or, stacked, of a micro-batch), in the cache's dtype.

    ``mean`` and ``std`` (C, h, w) of the posterior; ``features`` (N, D_k) by encoder label.
    """

    mean: Tensor
    std: Tensor
    features: dict[str, Tensor]


class DatasetItem(NamedTuple):
    """One item of a dataset: ``image`` uint8 (3, R, R), its class, and the path of an unreadable file it replaces.

    A dataset of cached latents gives ``cached``, and no image where nothing needs it.
    """

    image: Tensor | None
    label: int
    unreadable: str | None = None
    cached: Cached | None = None


class Draws(NamedTuple):
    """The random numbers of one micro-batch of B images.

    ``posterior`` and ``noise`` are N(0, I) of (B, C, h, w); ``time`` and ``label`` are U[0, 1) of (B,); ``extra`` is
    N(0, I) of (B, D_e), the noise of what the denoiser denoises besides the latent, and empty where that is nothing.
    """

    posterior: Tensor
    noise: Tensor
    time: Tensor
    label: Tensor
    extra: Tensor = torch.empty(0)

    def to(self, device: torch.device, non_blocking: bool = False) -> Draws:
        return Draws(*(x.to(device, non_blocking=non_blocking) for x in self))
