"""From noise to latents: Euler and Heun for the probability-flow ODE, Euler-Maruyama for the SDE.

SiT (arXiv 2401.08740); guidance only inside an interval of times: arXiv 2404.07724. Arithmetic in float64, the
network in its own dtype, as the published implementation does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from components.diffusion.flow import Flow

LAST_SDE_TIME = 0.04  # the SDE's last step goes from here to 0 without noise (REPA, appendix)
Warp = Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Guidance:
    """Guidance away from a worse velocity, at times in [low, high], both included: v = bad + scale (good - bad).

    Classifier-free guidance (arXiv 2207.12598) takes the velocity without label as the bad one.

    Attributes:
        scale: 1 turns guidance off.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def active(self, t: float) -> bool:
        return self.scale > 1.0 and self.low <= t <= self.high


class GuidedVelocity:
    """The velocity of a denoiser under guidance.

    Where guidance is active it costs one evaluation of 2B images, or one of B images by each of two networks.

    Args:
        denoiser: contract ``Denoiser``.
        labels: (B,) int64.
        dtype: what the network's inputs are cast to.
        guide: a weaker denoiser in the place of the one without labels (autoguidance, arXiv 2406.02507).
    """

    def __init__(self, denoiser, labels: Tensor, guidance: Guidance, dtype: torch.dtype, guide=None) -> None:
        self.denoiser, self.labels, self.guidance, self.dtype, self.guide = denoiser, labels, guidance, dtype, guide

    def __call__(self, x: Tensor, t: float, transform: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Velocity of x (B, C, h, w) at time t, in float64; ``transform(v, x)`` is applied before guidance."""

        def velocity(denoiser, x: Tensor, labels: Tensor) -> Tensor:
            times = torch.full((x.shape[0],), t, dtype=self.dtype, device=x.device)
            v = denoiser(x.to(self.dtype), times, labels).velocity.double()
            return v if transform is None else transform(v, x)

        if not self.guidance.active(t):
            return velocity(self.denoiser, x, self.labels)
        if self.guide is None:
            null = torch.full_like(self.labels, self.denoiser.null_label)
            good, bad = velocity(self.denoiser, torch.cat([x, x]), torch.cat([self.labels, null])).chunk(2)
        else:
            good, bad = velocity(self.denoiser, x, self.labels), velocity(self.guide, x, self.labels)
        return bad + self.guidance.scale * (good - bad)


@torch.no_grad()
def sample_ode(
    denoiser,
    noise: Tensor,
    labels: Tensor,
    *,
    steps: int,
    guidance: Guidance = Guidance(),
    heun: bool = False,
    guide=None,
    warp: Warp = None,
) -> Tensor:
    """Integrates dx/dt = v from t = 1 to 0 in ``steps`` steps, equal ones unless ``warp`` says otherwise.

    Args:
        noise: x at t = 1, (B, C, h, w) ~ N(0, I); its dtype is the network's.
        labels: (B,) int64.
        heun: second order: averages the slopes at both ends of every step but the last.
        guide: see :class:`GuidedVelocity`.
        warp: maps equally spaced times to those of the integrator; 0 and 1 to themselves, as ``Flow.shifted`` does.

    Returns:
        Normalised latents (B, C, h, w), float64.
    """
    velocity = GuidedVelocity(denoiser, labels, guidance, noise.dtype, guide)
    times = _times(torch.linspace(1, 0, steps + 1, dtype=torch.float64), warp)
    x = noise.double()
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        slope = velocity(x, t)
        if heun and i < steps - 1:
            # The interval is tested at the time evaluated (the published code tests t for both).
            slope = 0.5 * slope + 0.5 * velocity(x + (t_next - t) * slope, t_next)
        x = x + (t_next - t) * slope
    return x


@torch.no_grad()
def sample_sde(
    denoiser,
    noise: Tensor,
    labels: Tensor,
    *,
    steps: int,
    step_noise: Callable[[int], Tensor],
    flow: Flow,
    guidance: Guidance = Guidance(),
    guide=None,
    warp: Warp = None,
) -> Tensor:
    """Euler-Maruyama on the reverse SDE with diffusion 2t, from t = 1 to 0.04, then one step to 0 without noise.

    Args:
        noise: x at t = 1, (B, C, h, w) ~ N(0, I); its dtype is the network's.
        labels: (B,) int64.
        steps: evaluations of the denoiser, at least 2.
        step_noise: the N(0, I) noise of step i in [0, steps - 1), like ``noise``.
        flow: the path that the denoiser was trained on.
        guide: see :class:`GuidedVelocity`.
        warp: as in :func:`sample_ode`; the time before the last step is warped, too.

    Returns:
        Normalised latents (B, C, h, w), float64.
    """
    velocity = GuidedVelocity(denoiser, labels, guidance, noise.dtype, guide)
    times = [*_times(torch.linspace(1.0, LAST_SDE_TIME, steps, dtype=torch.float64), warp), 0.0]
    x = noise.double()
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        diffusion, dt, now = 2 * t, t_next - t, torch.tensor(t, dtype=torch.float64, device=x.device)
        x = x + dt * velocity(x, t, lambda v, y: v - 0.5 * diffusion * flow.score(v, y, now))  # noqa: B023
        if i < steps - 1:
            x = x + (diffusion * -dt) ** 0.5 * step_noise(i).double()
    return x


def _times(equal: Tensor, warp: Warp) -> list[float]:
    return (equal if warp is None else warp(equal)).tolist()
