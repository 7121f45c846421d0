"""MeanFlow (arXiv 2505.13447): average velocities, for sampling in one step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from components.contracts import (
    Batch,
    Condition,
    Denoiser,
    DenoiserOutput,
    Distribution,
    LatentShape,
    LossTerm,
    Modules,
    RandomNumbers,
    Recipe,
    Update,
)
from components.diffusion.flow import Flow, PathSample
from components.diffusion.losses import drop_condition, frozen_posterior, velocity_mse
from components.diffusion.samplers import Guidance, GuidedVelocity
from components.nn.precision import at_least_fp32, no_autocast
from components.registry import recipes


class OverInterval:
    """Wraps a denoiser for :class:`GuidedVelocity`: its velocity is the average over ``interval`` before t."""

    def __init__(self, denoiser: Denoiser, interval: float) -> None:
        self.denoiser, self.interval, self.null_condition = denoiser, interval, denoiser.null_condition

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> DenoiserOutput:
        return self.denoiser(x_t, t, condition, interval=torch.full_like(t, self.interval))


@torch.no_grad()
def sample_meanflow(
    denoiser: Denoiser,
    noise: Tensor,
    condition: Condition,
    *,
    steps: int,
    flow: Flow = Flow(),
    guidance: Guidance = Guidance(),
    guide: Denoiser | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Sample by z_r = z_t - (t - r) u(z_t, r, t) from t = 1 to 0 in ``steps`` steps; one is enough.

    Arguments and result are those of :func:`components.diffusion.samplers.sample_ode`. The recipe's own guidance is
    part of the network; ``guidance`` extrapolates average velocities on top of it.
    """
    times = flow.shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).tolist()
    x = noise.double()
    for t, r in zip(times[:-1], times[1:]):
        weak = None if guide is None else OverInterval(guide, t - r)
        average = GuidedVelocity(OverInterval(denoiser, t - r), condition, guidance, noise.dtype, weak)
        x = x - (t - r) * average(x, t)
    return x


@recipes.register("meanflow")
class MeanFlow(Recipe):
    """Train a denoiser to predict average velocities, on a frozen tokenizer (MeanFlow); samples need one step.

    The average velocity u over [r, t] obeys u = v - (t - r) du/dt. The right side, without gradients, is the target;
    du/dt is a Jacobian-vector product, an additional pass that costs about two forward passes. Times are those of
    [flow] (published: time = "lognormal", time_mean = -0.4, time_std = 1). The denoiser must take an interval
    (``meanflow_sit``); sample with sampling.method = "meanflow".

    Args:
        interval_ratio: fraction of the images with r < t; the others have r = t, which is flow matching.
        power: p of the adaptive weight 1 / (squared error + epsilon)^p per image; 0: no weight. Published: 1.
        epsilon: c of the adaptive weight.
        omega: scale of the data's velocity in the guided target omega v + kappa u(class) + (1 - omega - kappa) u(null);
            the effective guidance scale is omega / (1 - kappa). 1 with ``kappa`` 0: no guidance.
        kappa: scale of the predicted velocity in the guided target.
        guidance_low: smallest t with a guided target.
        guidance_high: largest t with a guided target.

    Raises:
        ValueError: ``interval_ratio`` is not in [0, 1], ``power`` is negative, ``epsilon`` not positive, or ``kappa``
            not in [0, 1).
    """

    uses = frozenset({"tokenizer", "denoiser", "latent_norm"})
    trains = {"denoiser": ("denoiser",)}
    cached_latents = True
    samplers = {"meanflow": sample_meanflow}

    def __init__(
        self,
        *,
        interval_ratio: float = 0.25,
        power: float = 1.0,
        epsilon: float = 1e-3,
        omega: float = 1.0,
        kappa: float = 0.0,
        guidance_low: float = 0.0,
        guidance_high: float = 1.0,
    ) -> None:
        for allowed, key, value, expected in (
            (0 <= interval_ratio <= 1, "interval_ratio", interval_ratio, "a fraction in [0, 1]"),
            (power >= 0, "power", power, "at least 0"),
            (epsilon > 0, "epsilon", epsilon, "more than 0"),
            (0 <= kappa < 1, "kappa", kappa, "a number in [0, 1)"),
        ):
            if not allowed:
                raise ValueError(f"recipe.{key} = {value}: expected {expected}")
        self.interval_ratio, self.power, self.epsilon = interval_ratio, power, epsilon
        self.omega, self.kappa = omega, kappa
        self.guidance_low, self.guidance_high = guidance_low, guidance_high

    @property
    def guided(self) -> bool:
        return (self.omega, self.kappa) != (1, 0)

    def check(self, m: Modules) -> None:
        if "interval" not in m.denoiser.takes or not m.denoiser.keep_fp32:
            raise ValueError(
                "recipe.name = 'meanflow' needs a denoiser that takes an interval and keeps its weights in fp32 "
                "(keep_fp32); set denoiser.name = 'meanflow_sit'"
            )
        if self.guided and not m.denoiser.label_dropout:
            raise ValueError(
                f"recipe.omega = {self.omega} and recipe.kappa = {self.kappa} guide by the null label, but "
                "denoiser.label_dropout = 0; set it above 0 (published: 0.1), or set omega = 1 and kappa = 0"
            )

    def random_numbers(self, m: Modules, latent: LatentShape) -> dict[str, Distribution]:
        more = {"other_time": Distribution("uniform"), "interval": Distribution("uniform")}
        return super().random_numbers(m, latent) | more

    def step(self, m: Modules, batch: Batch, random: RandomNumbers, update: Update, step: int) -> None:
        first, second = m.flow.times(random["time"]), m.flow.times(random["other_time"])
        t = torch.maximum(first, second)
        interval = torch.where(random["interval"] < self.interval_ratio, t - torch.minimum(first, second), 0.0)
        z = frozen_posterior(m, batch).sample(random["posterior"])
        path = m.flow.sample(m.latent_norm(z), t, random["noise"])
        condition = drop_condition(m, batch.condition, random["label"])

        v = self.velocity(m, path, t, condition, random["label"]) if self.guided else path.velocity
        target = v - _map(interval, v) * derivative(m.denoiser, path.x_t, v, t, condition, interval)
        u = m.denoiser(path.x_t, t, condition, interval=interval).velocity
        terms = {"average_velocity": LossTerm(1.0, self.loss(u, target))}
        update("denoiser", terms, squared_error=velocity_mse(u.detach(), target))

    def loss(self, u: Tensor, target: Tensor) -> Tensor:
        """Squared error (B, C, h, w), summed over the latent, with the adaptive weight of each image: a scalar mean."""
        error = (at_least_fp32(u) - at_least_fp32(target)).square().flatten(1).sum(1)
        return (error / (error.detach() + self.epsilon) ** self.power).mean()

    @torch.no_grad()
    def velocity(self, m: Modules, path: PathSample, t: Tensor, condition: Condition, u: Tensor) -> Tensor:
        """Guided velocity (B, C, h, w), without gradients; unguided where the label is dropped or t is out of range."""
        both = condition.combine(lambda *values: torch.cat(values), m.denoiser.null_condition(condition))
        predicted = m.denoiser(torch.cat([path.x_t, path.x_t]), torch.cat([t, t]), both).velocity
        conditional, unconditional = at_least_fp32(predicted).chunk(2)
        v = self.omega * path.velocity + self.kappa * conditional + (1 - self.omega - self.kappa) * unconditional
        kept = (u >= m.denoiser.label_dropout) & (t >= self.guidance_low) & (t <= self.guidance_high)
        return torch.where(_map(kept, v), v, path.velocity)


def derivative(
    denoiser: Denoiser, x_t: Tensor, velocity: Tensor, t: Tensor, condition: Condition, interval: Tensor
) -> Tensor:
    """du/dt (B, C, h, w) along dx/dt = ``velocity`` with r constant, by forward-mode differentiation, no gradients.

    In at least fp32 also under autocast. Flash attention and compiled units do not support dual tensors.
    """
    with (
        torch.no_grad(), no_autocast(x_t), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"),
        forward_ad.dual_level(),
    ):  # fmt: skip
        one = torch.ones_like(t)
        x_t, t, interval = map(forward_ad.make_dual, (x_t, t, interval), (velocity, one, one))
        return forward_ad.unpack_dual(denoiser(x_t, t, condition, interval=interval).velocity).tangent


def _map(value: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) to broadcast over latents; numbers take the latents' dtype."""
    value = value.view(-1, *[1] * (like.ndim - 1))
    return value if value.dtype == torch.bool else value.to(like.dtype)
