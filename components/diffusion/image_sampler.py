"""Samples images by number: image i is the same for any number of ranks and after any restart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from components.contracts import DenoiserOutput, LatentShape
from components.diffusion.draws import generator
from components.diffusion.flow import Flow
from components.diffusion.samplers import Guidance, sample_ode, sample_sde


@dataclass(frozen=True)
class SamplingPlan:
    """Sampling settings.

    Attributes:
        method: Euler or Heun for the ODE, or Euler-Maruyama for the SDE ("sde").
        steps: integrator steps, at least 2; Heun evaluates the denoiser twice in each but the last.
        guidance: guidance scale and interval.
        seed: seed of all noise.
        shift: timestep shift as in ``Flow.shift``; 0 uses the flow's own.
    """

    method: Literal["euler", "heun", "sde"] = "euler"
    steps: int = 50
    guidance: Guidance = field(default_factory=Guidance)
    seed: int = 0
    shift: float = 0.0


class ImageSampler:
    """Samples latents with the denoiser and decodes them.

    A vector that the denoiser denoises together with the latent (``extra_dim``) is integrated with the same guidance
    and then discarded.

    Args:
        plan: see :class:`SamplingPlan`.
        denoiser: contract ``Denoiser``.
        latent_norm: :class:`components.nn.latent_norm.LatentNorm`, whose inverse leads back to the tokenizer's scale.
        tokenizer: contract ``Tokenizer``.
        flow: path that the denoiser was trained on, with its shift.
        latent: shape of one latent.
        guide: weaker denoiser for autoguidance; None: classifier-free guidance.

    Raises:
        ValueError: classifier-free guidance for a denoiser trained without label dropout, or a guide whose
            ``extra_dim`` differs from the denoiser's.
    """

    def __init__(
        self,
        plan: SamplingPlan,
        denoiser: Any,
        latent_norm: Any,
        tokenizer: Any,
        flow: Flow,
        latent: LatentShape,
        guide: Any = None,
    ) -> None:
        if plan.guidance.scale > 1 and guide is None and not denoiser.label_dropout:
            raise ValueError(
                "classifier-free guidance needs a denoiser trained with label dropout, but denoiser.label_dropout is "
                "0; set the guidance scale to 1, or use a weaker checkpoint as guide"
            )
        extra_dim = getattr(denoiser, "extra_dim", 0)
        if guide is not None and getattr(guide, "extra_dim", 0) != extra_dim:
            raise ValueError("the guide and the denoiser must denoise the same class token, or both none")
        if extra_dim:
            denoiser, guide = Joint(denoiser, latent), None if guide is None else Joint(guide, latent)
        self.extra_dim = extra_dim
        self.plan, self.denoiser, self.latent_norm, self.tokenizer = plan, denoiser, latent_norm, tokenizer
        self.flow = replace(flow, shift=plan.shift or flow.shift)
        self.latent, self.guide = latent, guide

    @torch.no_grad()
    def __call__(self, ids: Sequence[int], labels: Tensor) -> Tensor:
        """Sample images (B, 3, R, R) in [-1, 1], float32.

        The noise of image i is a function of (seed, i). The image may still differ in the last bits between batch
        sizes, because kernels sum in a different order.

        Args:
            ids: numbers of the B images.
            labels: class labels (B,) int64, on the modules' device.
        """
        plan, device = self.plan, labels.device
        generators = [generator(plan.seed, "image", i) for i in ids]
        dtype = next(self.denoiser.parameters()).dtype

        def noise(_: int = 0) -> Tensor:
            drawn = torch.stack([torch.randn(self.latent, generator=g) for g in generators])
            if self.extra_dim:
                extra = torch.stack([torch.randn(self.extra_dim, generator=g) for g in generators])
                drawn = torch.cat([drawn.flatten(1), extra], dim=1)
            return drawn.to(device, dtype)

        common = {"steps": plan.steps, "guidance": plan.guidance, "guide": self.guide, "warp": self.flow.shifted}
        if plan.method == "sde":
            z = sample_sde(self.denoiser, noise(), labels, step_noise=noise, flow=self.flow, **common)
        else:
            z = sample_ode(self.denoiser, noise(), labels, heun=plan.method == "heun", **common)
        if self.extra_dim:
            z, _ = self.denoiser.split(z)
        z = self.latent_norm.invert(z).to(dtype)
        return self.tokenizer.decode(z).float().clamp(-1, 1)


class Joint:
    """Wraps a denoiser of a latent and a vector as a denoiser of one flat state (B, C h w + D_e) for the samplers.

    Args:
        denoiser: contract ``Denoiser`` with ``extra_dim`` D_e.
        latent: shape of one latent.
    """

    def __init__(self, denoiser: Any, latent: LatentShape) -> None:
        self.denoiser, self.latent = denoiser, latent
        self.null_label, self.parameters = denoiser.null_label, denoiser.parameters

    def split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Split a state (B, C h w + D_e) into latent (B, C, h, w) and vector (B, D_e)."""
        x, extra = state.split([math.prod(self.latent), self.denoiser.extra_dim], dim=1)
        return x.unflatten(1, tuple(self.latent)), extra

    def __call__(self, state: Tensor, t: Tensor, labels: Tensor) -> DenoiserOutput:
        x, extra = self.split(state)
        out = self.denoiser(x, t, labels, extra)
        return DenoiserOutput(torch.cat([out.velocity.flatten(1), out.extra], dim=1), out.tokens)
