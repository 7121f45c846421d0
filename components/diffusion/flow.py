"""Interpolants between latents and noise: x_t = alpha(t) x_0 + sigma(t) e, and the velocity that the denoiser learns.

SiT (arXiv 2401.08740), section 2; REPA-E (arXiv 2504.10483) trains the linear path with uniform times. The shift of
times is SD3's (arXiv 2403.03206), by the latent's dimensions as in RAE (arXiv 2510.11690).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from components.contracts.records import LatentShape  # contracts.parts knows Flow

SHIFT_BASE = 4096  # dimensions of a latent whose times are not shifted: 4 x 32 x 32 (RAE)


class Coefficients(NamedTuple):
    """alpha, sigma and their time derivatives at t; shaped like t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class PathPoint(NamedTuple):
    """The noised latent ``x_t`` and its target ``velocity`` d x_t / dt, both (B, C, h, w)."""

    x_t: Tensor
    velocity: Tensor


@dataclass(frozen=True)
class Flow:
    """A probability path and the distribution of training times on it.

    Attributes:
        path: "linear" (alpha = 1 - t, sigma = t) or "cosine" (alpha = cos(pi t / 2), sigma = sin(pi t / 2)).
        time: "uniform", or "lognormal": sigma / alpha is log-normal, as EDM draws its noise levels; on the linear path
            t is then logit-normal, as in SD3.
        mean, std: for "lognormal", of log(sigma / alpha).
        shift: factor by which sigma / alpha of every time is multiplied; 1 leaves times alone.
    """

    path: Literal["linear", "cosine"] = "linear"
    time: Literal["uniform", "lognormal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def coefficients(self, t: Tensor) -> Coefficients:
        """Of times in [0, 1] of any shape."""
        if self.path == "linear":
            one = torch.ones_like(t)
            return Coefficients(1 - t, t, -one, one)
        quarter = math.pi / 2
        cos, sin = torch.cos(t * quarter), torch.sin(t * quarter)
        return Coefficients(cos, sin, -quarter * sin, quarter * cos)

    def times(self, u: Tensor) -> Tensor:
        """Training times from uniform draws: the quantile function of the time distribution at u in (0, 1)."""
        if self.time == "uniform":
            return self.shifted(u)
        # u = 0 would be t = 0 exactly, but infinite on the way there in float32.
        normal = torch.special.ndtri(u.clamp_min(torch.finfo(u.dtype).tiny))
        ratio = (self.mean + self.std * normal).exp()
        return self.shifted(ratio / (1 + ratio) if self.path == "linear" else torch.atan(ratio) * (2 / math.pi))

    def shifted(self, t: Tensor) -> Tensor:
        """Times in [0, 1] with sigma / alpha multiplied by ``shift``; 0 and 1 stay where they are.

        On the linear path s t / (1 + (s - 1) t), as in SD3.
        """
        if self.shift == 1:
            return t
        if self.path == "linear":
            return self.shift * t / (1 + (self.shift - 1) * t)
        c = self.coefficients(t)
        return torch.atan2(self.shift * c.sigma, c.alpha) * (2 / math.pi)

    def at(self, x_0: Tensor, t: Tensor, noise: Tensor) -> PathPoint:
        """The point of the path from x_0 (t = 0) to noise (t = 1).

        Args:
            x_0: normalised latents (B, C, h, w).
            t: times (B,) in [0, 1].
            noise: N(0, I), like x_0.
        """
        c = self.coefficients(t.to(x_0.dtype).view(-1, *[1] * (x_0.ndim - 1)))
        noise = noise.to(x_0.dtype)
        return PathPoint(c.alpha * x_0 + c.sigma * noise, c.d_alpha * x_0 + c.d_sigma * noise)

    def score(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x_t) from the velocity (SiT, eq. 9); t in (0, 1], a scalar or broadcastable to x_t."""
        c = self.coefficients(t)
        ratio = c.alpha / c.d_alpha
        return (ratio * velocity - x_t) / (c.sigma.square() - ratio * c.d_sigma * c.sigma)


def dimension_shift(latent: LatentShape) -> float:
    """The shift for latents of this shape: the root of their dimensions over ``SHIFT_BASE`` (RAE).

    More dimensions, more noise: at the same t the noise hides less of a latent whose dimensions are redundant.
    """
    return math.sqrt(math.prod(latent) / SHIFT_BASE)
