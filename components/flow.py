"""Interpolants between latents and noise: x_t = alpha(t) x_0 + sigma(t) e, and the velocity that the denoiser learns.

SiT (arXiv 2401.08740), section 2; REPA-E (arXiv 2504.10483) trains the linear path with uniform times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


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
        time: "uniform", or "lognormal": sigma / alpha is log-normal(0, 1), as EDM draws its noise levels.
    """

    path: Literal["linear", "cosine"] = "linear"
    time: Literal["uniform", "lognormal"] = "uniform"

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
            return u
        # u = 0 would be t = 0 exactly, but infinite on the way there in float32.
        ratio = torch.special.ndtri(u.clamp_min(torch.finfo(u.dtype).tiny)).exp()
        return ratio / (1 + ratio) if self.path == "linear" else torch.atan(ratio) * (2 / math.pi)

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
