"""Samples images by number: image i is the same for any number of ranks and after any restart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from components.contracts import Condition, Denoiser, DenoiserOutput, LatentShape, Modules, Recipe, Sampler
from components.data.pixels import bounded
from components.diffusion.random_numbers import generator
from components.diffusion.samplers import LEAST_STEPS, SAMPLERS, Guidance
from components.finite import sound_rows
from components.registry import nearest


@dataclass(frozen=True)
class SamplingPlan:
    """Sampling settings.

    Attributes:
        method: "euler" or "heun" for the ODE, "sde" for Euler-Maruyama, or a sampler of the recipe.
        steps: integrator steps; Heun evaluates the denoiser twice in each but the last.
        guidance: guidance scale, interval and kind.
        seed: seed of all noise.
        shift: timestep shift as in ``Flow.shift``; 0 uses the flow's own.
    """

    method: str = "euler"
    steps: int = 50
    guidance: Guidance = field(default_factory=Guidance)
    seed: int = 0
    shift: float = 0.0


def sampler_of(recipe: Recipe, method: str, steps: int) -> Sampler:
    """The sampler of this name: one of the recipe's, or euler, heun or sde.

    Raises:
        ValueError: there is none, which lists the valid names, or it needs more steps.
    """
    known = {**SAMPLERS, **recipe.samplers}
    if method not in known:
        raise ValueError(f"sampling.method = '{method}': no such sampler{nearest(method, known)}")
    if steps < LEAST_STEPS.get(method, 1):
        raise ValueError(f"sampling.steps = {steps}: the sampler '{method}' needs at least {LEAST_STEPS[method]}")
    return known[method]


def guidance_fault(guidance: Guidance, recipe: Recipe, m: Modules) -> str:
    """Why the denoiser cannot be guided in this way, and what to set before training; "": it can.

    Classifier-free guidance needs label dropout; internal guidance an early prediction, of all that is denoised.
    """
    if guidance.scale <= 1:
        return ""
    if guidance.kind == "classifier_free":
        return "" if m.denoiser.label_dropout else (
            "classifier-free guidance needs a denoiser trained with label dropout, but denoiser.label_dropout is 0; "
            "set it above 0"
        )  # fmt: skip
    if others := recipe.denoised(m):
        return (
            f"internal guidance is for latents alone, but the recipe also denoises {' and '.join(others)}; set "
            'guidance_kind = "classifier_free"'
        )
    return "" if m.denoiser.early_depth else (
        "internal guidance needs a denoiser that learned to predict the latent from an early block; an alignment head "
        "predicts features, compared by their direction (cosine), not latents. Set denoiser.early_depth (ditdh has it) "
        'and train again; set guidance_kind = "classifier_free"'
    )  # fmt: skip


class ImageSampler:
    """Samples latents with the denoiser and decodes them.

    What the recipe denoises together with the latent is integrated with the same guidance and then discarded.

    Args:
        plan: see :class:`SamplingPlan`.
        recipe: that the modules were trained with; it may bring its own sampler.
        m: denoiser; latent norm, whose inverse leads back to the tokenizer's scale; tokenizer; and flow, the path that
            the denoiser was trained on, with its shift.
        latent: shape of one latent.
        guide: weaker denoiser for autoguidance; None: guidance of the plan's kind.

    Raises:
        ValueError: there is no such sampler, or it needs more steps; guidance that the denoiser was not trained for
            (:func:`guidance_fault`); or a guide that denoises something else.
    """

    def __init__(
        self, plan: SamplingPlan, recipe: Recipe, m: Modules, latent: LatentShape, guide: Denoiser | None = None
    ) -> None:
        if guide is None and (fault := guidance_fault(plan.guidance, recipe, m)):
            raise ValueError(f"{fault}; or set the guidance scale to 1, or use a weaker checkpoint as guide")
        self.others = recipe.denoised(m)
        if guide is not None and guide.noisy_inputs != m.denoiser.noisy_inputs:
            raise ValueError("the guide and the denoiser must denoise the same class token, or both none")
        self.plan, self.sampler, self.latent = plan, sampler_of(recipe, plan.method, plan.steps), latent
        self.latent_norm, self.tokenizer = m.latent_norm, m.tokenizer
        self.dtype = next(m.denoiser.parameters()).dtype
        self.denoiser: Any = m.denoiser if not self.others else Joint(m.denoiser, latent, self.others)
        self.guide: Any = guide if guide is None or not self.others else Joint(guide, latent, self.others)
        self.flow = replace(m.flow, shift=plan.shift or m.flow.shift)

    @torch.no_grad()
    def __call__(self, ids: Sequence[int], condition: Condition) -> Tensor:
        """Sample images (B, 3, R, R) in [-1, 1], float32; one whose latent or pixels are not finite is NaN.

        The noise of image i is a function of (seed, i). The image may still differ in the last bits between batch
        sizes, because kernels sum in a different order.

        Args:
            ids: numbers of the B images.
            condition: of the B images, on the modules' device.
        """
        generators = [generator(self.plan.seed, "image", i) for i in ids]

        def noise(_: int = 0) -> Tensor:
            parts = [
                torch.stack([torch.randn(shape, generator=g) for g in generators])
                for shape in (self.latent, *self.others.values())
            ]
            whole = torch.cat([part.flatten(1) for part in parts], dim=1) if self.others else parts[0]
            return whole.to(condition.label.device, self.dtype)

        z = self.sampler(
            self.denoiser, noise(), condition, steps=self.plan.steps, flow=self.flow, guidance=self.plan.guidance,
            guide=self.guide, step_noise=noise,
        )  # fmt: skip
        if self.others:
            z = self.denoiser.split(z)[0]
        z = self.latent_norm.invert(z).to(self.dtype)
        sound = sound_rows(z).view(-1, 1, 1, 1)
        return bounded(torch.where(sound, self.tokenizer.decode(z).float(), torch.nan))


class Joint:
    """Wraps a denoiser of a latent and other tensors as a denoiser of one flat state (B, S) for the samplers.

    Args:
        denoiser: takes the others by name.
        latent: shape of one latent.
        others: shape per image by name of what is denoised together with the latent.
    """

    def __init__(self, denoiser: Denoiser, latent: LatentShape, others: dict[str, tuple[int, ...]]) -> None:
        self.denoiser, self.shapes, self.names = denoiser, [latent, *others.values()], list(others)
        self.null_condition, self.parameters = denoiser.null_condition, denoiser.parameters

    def split(self, state: Tensor) -> list[Tensor]:
        """Split a state (B, S) into the latent (B, C, h, w) and the others (B, *shape), in order."""
        parts = state.split([math.prod(shape) for shape in self.shapes], dim=1)
        return [part.unflatten(1, tuple(shape)) for part, shape in zip(parts, self.shapes)]

    def __call__(self, state: Tensor, t: Tensor, condition: Condition) -> DenoiserOutput:
        x, *others = self.split(state)
        out = self.denoiser(x, t, condition, **dict(zip(self.names, others)))
        velocities = [out.velocity, *(out.others[name] for name in self.names)]
        return DenoiserOutput(torch.cat([v.flatten(1) for v in velocities], dim=1), out.tokens)
