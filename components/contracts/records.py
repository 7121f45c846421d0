"""Records that the core, recipes and plugins exchange.

Shapes: B images per micro-batch, R pixels per side, C latent channels of h x w, N = n x n tokens on the
denoiser's grid, D_k features of encoder k. Images that reach a model are float in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class LatentShape(NamedTuple):
    """Shape of one latent: C channels of ``height`` x ``width``."""

    channels: int
    height: int
    width: int


class Posterior(NamedTuple):
    """Diagonal Gaussian posterior q(z|x); ``mean`` and ``logvar`` are (B, C, h, w).

    Producers must clamp the log-variance to [-30, 20], so that ``std`` neither vanishes nor overflows.

    A tuple, as must be every record returned by the forward pass of a module that FSDP2 wraps: FSDP2 registers backward
    hooks only on tensors in tuples, lists and dicts (torch 2.11). With other containers it frees weights too early.
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_std(cls, mean: Tensor, std: Tensor) -> Posterior:
        """Create a posterior from the standard deviation; a ``std`` rounded to zero becomes the minimum, exp(-15)."""
        return cls(mean, (2 * std.log()).clamp(-30.0, 20.0))

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor) -> Tensor:
        """Return z = mean + std * noise, where ``noise`` is N(0, I) of shape (B, C, h, w)."""
        return self.mean + self.std * noise.to(self.mean.dtype)

    def kl(self) -> Tensor:
        """Return KL(q || N(0, I)) in nats, summed over the latent and averaged over the batch: a scalar."""
        kl = 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)
        return kl.flatten(1).sum(1).mean()


Tokens = Tensor | tuple[Tensor, ...]
"""Hidden tokens (B, N, width) after block ``align_depth``; a tuple in that order if it lists several blocks."""


Prediction = Literal["velocity", "data", "noise"]
"""What a denoiser's network predicts; whatever it is, the denoiser returns velocities."""


class Condition(NamedTuple):
    """What a denoiser is conditioned on, for a batch; the core passes it from the dataset to the denoiser.

    Attributes:
        label: class labels (B,), int64.
        more: further tensors (B, ...) by name, such as text tokens and their mask; those that the dataset provides.
    """

    label: Tensor
    more: dict[str, Tensor] = {}

    def combine(self, fn: Callable[..., Tensor], *others: Condition) -> Condition:
        """Apply ``fn`` to the tensors of one name in this condition and ``others``, for each name."""
        more = {name: fn(value, *(other.more[name] for other in others)) for name, value in self.more.items()}
        return Condition(fn(self.label, *(other.label for other in others)), more)

    def to(self, device: torch.device) -> Condition:
        return self.combine(lambda value: value.to(device))


class DenoiserOutput(NamedTuple):
    """Predicted ``velocity`` (B, C, h, w) and the hidden :data:`Tokens` after block ``align_depth``.

    ``others`` are the velocities of the tensors that are denoised together with the latent, by name. ``early`` is a
    weaker prediction of the velocity, from the tokens of block ``early_depth``; None if the denoiser makes none.
    """

    velocity: Tensor
    tokens: Tokens
    others: dict[str, Tensor] = {}
    early: Tensor | None = None


class LossTerm(NamedTuple):
    """One term of a loss: its weight in the sum, and its unweighted scalar value, which TensorBoard shows."""

    weight: float
    value: Tensor


class Batch(NamedTuple):
    """One micro-batch on one rank.

    Attributes:
        images: (B, 3, R, R) float in [-1, 1]; None with cached latents if no module needs images.
        condition: what the denoiser is conditioned on.
        posterior: cached posterior of a frozen tokenizer; None without a cache.
        features: cached patch tokens (B, N, D_k) by encoder label; None without a cache.
    """

    images: Tensor | None
    condition: Condition
    posterior: Posterior | None = None
    features: dict[str, Tensor] | None = None


class Cached(NamedTuple):
    """Latent cache entry of one image, or of a micro-batch (stacked), in the cache's dtype.

    ``mean`` and ``std`` (C, h, w) are those of the posterior; ``features`` are (N, D_k) by encoder label.
    """

    mean: Tensor
    std: Tensor
    features: dict[str, Tensor]


class DatasetItem(NamedTuple):
    """One item of a dataset: ``image`` uint8 (3, R, R) and its class ``label``.

    ``unreadable`` is the path of the unreadable file that this item replaces, if any, and ``reason`` says why it is. A
    dataset of cached latents sets ``cached``, and ``image`` only if a module needs images. ``condition`` holds further
    tensors that the denoiser is conditioned on, by name: the entries of :attr:`Condition.more` without their batch
    dimension.
    """

    image: Tensor | None
    label: int
    unreadable: str | None = None
    cached: Cached | None = None
    condition: dict[str, Tensor] = {}
    reason: str = ""


class Distribution(NamedTuple):
    """Distribution of random numbers that a recipe declares: one tensor of ``shape`` per image.

    Attributes:
        kind: "normal", N(0, I), or "uniform", U[0, 1).
        shape: per image; () for one number.
        key: seeds the generator together with the run's seed and the step; "": the name that the recipe declares.
    """

    kind: Literal["normal", "uniform"]
    shape: tuple[int, ...] = ()
    key: str = ""


RandomNumbers = dict[str, Tensor]
"""Random numbers of one micro-batch, (B, *shape) by name, as the recipe declares them."""
