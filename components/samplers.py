"""From noise to latents: Euler and Heun for the probability-flow ODE, Euler-Maruyama for the SDE.

SiT (arXiv 2401.08740); guidance only inside an interval of times: arXiv 2404.07724. Arithmetic in float64, the
network in its own dtype, as the published implementation does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from components.flow import Flow

LAST_SDE_TIME = 0.04  # the SDE's last step goes from here to 0 without noise (REPA, appendix)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: v = v_null + scale (v_label - v_null) at times in [low, high], both included.

    Attributes:
        scale: 1 turns guidance off.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def active(self, t: float) -> bool:
        return self.scale > 1.0 and self.low <= t <= self.high


class GuidedVelocity:
    """The velocity of a denoiser under guidance; one evaluation of 2B images where guidance is active.

    Args:
        denoiser: contract ``Denoiser``.
        labels: (B,) int64.
        dtype: what the network's inputs are cast to.
    """

    def __init__(self, denoiser, labels: Tensor, guidance: Guidance, dtype: torch.dtype) -> None:
        self.denoiser, self.labels, self.guidance, self.dtype = denoiser, labels, guidance, dtype
        self.null = torch.full_like(labels, denoiser.null_label)

    def __call__(self, x: Tensor, t: float, transform: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Velocity of x (B, C, h, w) at time t, in float64; ``transform(v, x)`` is applied before guidance."""
        guided = self.guidance.active(t)
        x_in = torch.cat([x, x]) if guided else x
        labels = torch.cat([self.labels, self.null]) if guided else self.labels
        times = torch.full((x_in.shape[0],), t, dtype=self.dtype, device=x.device)
        v = self.denoiser(x_in.to(self.dtype), times, labels).velocity.double()
        if transform is not None:
            v = transform(v, x_in)
        if not guided:
            return v
        with_label, without = v.chunk(2)
        return without + self.guidance.scale * (with_label - without)


@torch.no_grad()
def sample_ode(
    denoiser,
    noise: Tensor,
    labels: Tensor,
    *,
    steps: int,
    guidance: Guidance = Guidance(),
    heun: bool = False,
) -> Tensor:
    """Integrates dx/dt = v from t = 1 to 0 in ``steps`` equal steps.

    Args:
        noise: x at t = 1, (B, C, h, w) ~ N(0, I); its dtype is the network's.
        labels: (B,) int64.
        heun: second order: averages the slopes at both ends of every step but the last.

    Returns:
        Normalised latents (B, C, h, w), float64.
    """
    velocity = GuidedVelocity(denoiser, labels, guidance, noise.dtype)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
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
) -> Tensor:
    """Euler-Maruyama on the reverse SDE with diffusion 2t, from t = 1 to 0.04, then one step to 0 without noise.

    Args:
        noise: x at t = 1, (B, C, h, w) ~ N(0, I); its dtype is the network's.
        labels: (B,) int64.
        steps: evaluations of the denoiser, at least 2.
        step_noise: the N(0, I) noise of step i in [0, steps - 1), like ``noise``.
        flow: the path that the denoiser was trained on.

    Returns:
        Normalised latents (B, C, h, w), float64.
    """
    velocity = GuidedVelocity(denoiser, labels, guidance, noise.dtype)
    times = [*torch.linspace(1.0, LAST_SDE_TIME, steps, dtype=torch.float64).tolist(), 0.0]
    x = noise.double()
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        diffusion, dt, now = 2 * t, t_next - t, torch.tensor(t, dtype=torch.float64, device=x.device)
        x = x + dt * velocity(x, t, lambda v, y: v - 0.5 * diffusion * flow.score(v, y, now))  # noqa: B023
        if i < steps - 1:
            x = x + (diffusion * -dt) ** 0.5 * step_noise(i).double()
    return x
