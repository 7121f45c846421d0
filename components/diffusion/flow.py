"""Interpolants between latents and noise, x_t = alpha(t) x_0 + sigma(t) e, and the velocity target of the denoiser.

SiT (arXiv 2401.08740), section 2; REPA-E (arXiv 2504.10483) uses the linear path with uniform times. The timestep shift
is from SD3 (arXiv 2403.03206), its dependence on the latent dimension from RAE (arXiv 2510.11690).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from components.contracts.records import LatentShape  # not from components.contracts, which would be circular

SHIFT_BASE = 4096  # latent dimension without timestep shift: 4 x 32 x 32 (RAE)


class Coefficients(NamedTuple):
    """alpha, sigma and their time derivatives at t, with the shape of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class PathSample(NamedTuple):
    """Noisy latent ``x_t`` and velocity target ``velocity`` = d x_t / dt, both (B, C, h, w)."""

    x_t: Tensor
    velocity: Tensor


@dataclass(frozen=True)
class Flow:
    """A probability path and the distribution of training times.

    Attributes:
        path: "linear" (alpha = 1 - t, sigma = t) or "cosine" (alpha = cos(pi t / 2), sigma = sin(pi t / 2)).
        time: "uniform", or "lognormal": sigma / alpha is log-normal, like the noise levels of EDM; on the linear path,
            t is then logit-normal, as in SD3.
        mean, std: mean and standard deviation of log(sigma / alpha) for "lognormal".
        shift: timestep shift: factor that multiplies sigma / alpha at every time; 1 disables it.
    """

    path: Literal["linear", "cosine"] = "linear"
    time: Literal["uniform", "lognormal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def coefficients(self, t: Tensor) -> Coefficients:
        """Coefficients at times in [0, 1] of any shape."""
        if self.path == "linear":
            one = torch.ones_like(t)
            return Coefficients(1 - t, t, -one, one)
        quarter = math.pi / 2
        cos, sin = torch.cos(t * quarter), torch.sin(t * quarter)
        return Coefficients(cos, sin, -quarter * sin, quarter * cos)

    def times(self, u: Tensor) -> Tensor:
        """Training times from uniform samples u in [0, 1): the quantile function of the time distribution."""
        if self.time == "uniform":
            return self.shifted(u)
        # At u = 0, where t is 0, ndtri would be infinite.
        normal = torch.special.ndtri(u.clamp_min(torch.finfo(u.dtype).tiny))
        ratio = (self.mean + self.std * normal).exp()
        return self.shifted(ratio / (1 + ratio) if self.path == "linear" else torch.atan(ratio) * (2 / math.pi))

    def shifted(self, t: Tensor) -> Tensor:
        """Shift times in [0, 1] so that sigma / alpha is multiplied by ``shift``; 0 and 1 are fixed points.

        On the linear path this is s t / (1 + (s - 1) t), with s = ``shift``, as in SD3.
        """
        if self.shift == 1:
            return t
        if self.path == "linear":
            return self.shift * t / (1 + (self.shift - 1) * t)
        c = self.coefficients(t)
        return torch.atan2(self.shift * c.sigma, c.alpha) * (2 / math.pi)

    def sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> PathSample:
        """Sample of the path from x_0 (t = 0) to noise (t = 1) at time t.

        Args:
            x_0: normalized latents (B, C, h, w).
            t: times (B,) in [0, 1].
            noise: N(0, I), shaped like x_0.
        """
        c = self.coefficients(t.to(x_0.dtype).view(-1, *[1] * (x_0.ndim - 1)))
        noise = noise.to(x_0.dtype)
        return PathSample(c.alpha * x_0 + c.sigma * noise, c.d_alpha * x_0 + c.d_sigma * noise)

    def score(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Score grad log p_t(x_t) from the velocity (SiT, eq. 9); t in (0, 1], a scalar or broadcastable to x_t."""
        c = self.coefficients(t)
        ratio = c.alpha / c.d_alpha
        return (ratio * velocity - x_t) / (c.sigma.square() - ratio * c.d_sigma * c.sigma)


def dimension_shift(latent: LatentShape) -> float:
    """Timestep shift for latents of this shape: sqrt(C h w / ``SHIFT_BASE``) (RAE).

    Latents with more, redundant dimensions need more noise: at the same t, noise corrupts less of their information.
    """
    return math.sqrt(math.prod(latent) / SHIFT_BASE)
