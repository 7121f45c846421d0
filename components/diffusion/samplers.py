"""Samplers: Euler and Heun for the probability-flow ODE, Euler-Maruyama for the SDE.

SiT (arXiv 2401.08740), with guidance limited to an interval of times (arXiv 2404.07724). The integrator computes in
float64 and the network in its own dtype, as in the published implementation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from components.contracts import Condition, DenoiserOutput, Sampler
from components.diffusion.flow import Flow

GuidanceKind = Literal["classifier_free", "internal"]
LAST_SDE_TIME = 0.04  # the SDE's last step goes from here to 0 without noise (REPA, appendix)


@dataclass(frozen=True)
class Guidance:
    """Guidance at times in [low, high], inclusive: v = bad + scale * (good - bad), away from a worse velocity ``bad``.

    In classifier-free guidance (arXiv 2207.12598), ``bad`` is the unconditional velocity; in internal guidance (arXiv
    2512.24176; RAEv2, arXiv 2605.18324), the denoiser's early prediction.

    Attributes:
        scale: guidance scale; 1 disables guidance.
        low: start of the time interval.
        high: end of the time interval.
        kind: where ``bad`` comes from, unless a guide is given.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0
    kind: GuidanceKind = "classifier_free"

    def active(self, t: float) -> bool:
        return self.scale > 1.0 and self.low <= t <= self.high


class GuidedVelocity:
    """Velocity of a denoiser with guidance.

    Cost while guidance is active: one evaluation of 2B images; of B images for internal guidance; or, with ``guide``,
    one of B images per network.

    Args:
        denoiser: contract ``Denoiser``.
        condition: of B images.
        guidance: see :class:`Guidance`.
        dtype: dtype that the network's inputs are cast to.
        guide: weaker denoiser that replaces the unconditional one (autoguidance, arXiv 2406.02507).
    """

    def __init__(self, denoiser, condition: Condition, guidance: Guidance, dtype: torch.dtype, guide=None) -> None:
        self.denoiser, self.condition, self.guidance, self.dtype, self.guide = (
            denoiser, condition, guidance, dtype, guide
        )  # fmt: skip

    def __call__(self, x: Tensor, t: float, transform: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Velocity at x (B, C, h, w) and time t, in float64; ``transform(v, x)`` is applied before guidance."""

        def evaluate(denoiser, x: Tensor, condition: Condition) -> DenoiserOutput:
            times = torch.full((x.shape[0],), t, dtype=self.dtype, device=x.device)
            return denoiser(x.to(self.dtype), times, condition)

        def transformed(v: Tensor, x: Tensor) -> Tensor:
            return v.double() if transform is None else transform(v.double(), x)

        if not self.guidance.active(t):
            return transformed(evaluate(self.denoiser, x, self.condition).velocity, x)
        if self.guide is not None:
            networks = self.denoiser, self.guide
            good, bad = (transformed(evaluate(network, x, self.condition).velocity, x) for network in networks)
        elif self.guidance.kind == "internal":
            out = evaluate(self.denoiser, x, self.condition)
            good, bad = transformed(out.velocity, x), transformed(out.early, x)
        else:
            null = self.denoiser.null_condition(self.condition)
            both = self.condition.combine(lambda *values: torch.cat(values), null)
            twice = torch.cat([x, x])
            good, bad = transformed(evaluate(self.denoiser, twice, both).velocity, twice).chunk(2)
        return bad + self.guidance.scale * (good - bad)


@torch.no_grad()
def sample_ode(
    denoiser,
    noise: Tensor,
    condition: Condition,
    *,
    steps: int,
    flow: Flow = Flow(),
    guidance: Guidance = Guidance(),
    guide=None,
    step_noise: Callable[[int], Tensor] | None = None,
    heun: bool = False,
) -> Tensor:
    """Integrate dx/dt = v from t = 1 to 0 in ``steps`` steps, equally spaced before the flow's timestep shift.

    Args:
        denoiser: contract ``Denoiser``.
        noise: x at t = 1, (B, C, h, w) ~ N(0, I), in the network's dtype.
        condition: of B images.
        steps: number of steps.
        flow: path that the denoiser was trained on, with the shift of the sampling times.
        guidance: see :class:`Guidance`.
        guide: see :class:`GuidedVelocity`.
        step_noise: not used.
        heun: second order: average the slopes at both ends of every step but the last.

    Returns:
        Normalized latents (B, C, h, w), float64.
    """
    velocity = GuidedVelocity(denoiser, condition, guidance, noise.dtype, guide)
    times = flow.shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).tolist()
    x = noise.double()
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        slope = velocity(x, t)
        if heun and i < steps - 1:
            # The guidance interval is tested at t_next here (the published code tests t for both slopes).
            slope = 0.5 * slope + 0.5 * velocity(x + (t_next - t) * slope, t_next)
        x = x + (t_next - t) * slope
    return x


@torch.no_grad()
def sample_sde(
    denoiser,
    noise: Tensor,
    condition: Condition,
    *,
    steps: int,
    flow: Flow = Flow(),
    guidance: Guidance = Guidance(),
    guide=None,
    step_noise: Callable[[int], Tensor],
) -> Tensor:
    """Integrate the reverse SDE with diffusion 2t by Euler-Maruyama from t = 1 to 0.04, then one step without noise.

    The flow's timestep shift also moves the time of the last step, 0.04.

    Args:
        steps: number of evaluations of the denoiser, at least 2.
        step_noise: returns the N(0, I) noise of step i in [0, steps - 1), shaped like ``noise``.
        denoiser, noise, condition, flow, guidance, guide: as in :func:`sample_ode`.

    Returns:
        Normalized latents (B, C, h, w), float64.
    """
    velocity = GuidedVelocity(denoiser, condition, guidance, noise.dtype, guide)
    times = [*flow.shifted(torch.linspace(1.0, LAST_SDE_TIME, steps, dtype=torch.float64)).tolist(), 0.0]
    x = noise.double()
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        diffusion, dt, now = 2 * t, t_next - t, torch.tensor(t, dtype=torch.float64, device=x.device)
        x = x + dt * velocity(x, t, lambda v, y: v - 0.5 * diffusion * flow.score(v, y, now))  # noqa: B023
        if i < steps - 1:
            x = x + (diffusion * -dt) ** 0.5 * step_noise(i).double()
    return x


SAMPLERS: dict[str, Sampler] = {
    "euler": sample_ode,
    "heun": functools.partial(sample_ode, heun=True),
    "sde": sample_sde,
}
"""Samplers of every recipe, by their name in ``sampling.method``."""
LEAST_STEPS = {"sde": 2}
