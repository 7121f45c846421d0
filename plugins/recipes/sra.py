"""SRA (arXiv 2505.02831): the denoiser's early tokens are aligned with later ones of its own average at less noise."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from components.contracts import (
    Batch,
    Denoiser,
    Distribution,
    LatentShape,
    LossTerm,
    Modules,
    RandomNumbers,
    Recipe,
    Update,
)
from components.diffusion.losses import drop_condition, frozen_posterior, velocity_terms
from components.monitor.phases import phase
from components.optim.ema import update_average
from components.registry import recipes


@recipes.register("sra")
class Sra(Recipe):
    """Train a denoiser aligned with an average of itself, the teacher, instead of an encoder (SRA).

    The tokens of the first block in ``denoiser.align_depth`` at time t are aligned with the teacher's tokens of the
    second, later block at time max(t - k, 0), with k ~ U[0, max_interval), the same noise and the same labels.

    Args:
        decay: decay of the teacher's average per step, in [0, 1).
        max_interval: largest difference k of the two times, in [0, 1].

    Raises:
        ValueError: ``decay`` or ``max_interval`` is out of range.
    """

    uses = frozenset({"tokenizer", "denoiser", "heads", "latent_norm", "alignment"})
    trains = {"denoiser": ("denoiser", "heads")}
    cached_latents = True
    copies = {"teacher": "denoiser"}

    def __init__(self, *, decay: float = 0.9999, max_interval: float = 0.2) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"recipe.decay = {decay}: expected a decay per step, in [0, 1)")
        if not 0 <= max_interval <= 1:
            raise ValueError(f"recipe.max_interval = {max_interval}: expected a difference of times, in [0, 1]")
        self.decay = decay
        self.max_interval = max_interval

    def check(self, m: Modules) -> None:
        depths = m.denoiser.align_depth
        if isinstance(depths, int) or len(depths) != 2:
            raise ValueError(
                f"recipe.name = 'sra' aligns one block with a later one, but denoiser.align_depth = {depths}; set it "
                "to the student's and the teacher's block, such as [8, 20]"
            )

    def head_dims(self, m: Modules) -> list[int]:
        return [m.denoiser.width]

    def random_numbers(self, m: Modules, latent: LatentShape) -> dict[str, Distribution]:
        return super().random_numbers(m, latent) | {"interval": Distribution("uniform")}

    def step(self, m: Modules, batch: Batch, random: RandomNumbers, update: Update, step: int) -> None:
        t = m.flow.times(random["time"])
        z = m.latent_norm(frozen_posterior(m, batch).sample(random["posterior"]))
        path = m.flow.sample(z, t, random["noise"])
        condition = drop_condition(m, batch.condition, random["label"])
        out = m.denoiser(path.x_t, t, condition)
        terms = velocity_terms(m, out, path)

        if strength := m.alignment.strength(step):
            with torch.no_grad(), phase("teacher"):
                teacher = cast(Denoiser, m.copies["teacher"])
                earlier = (t - self.max_interval * random["interval"]).clamp_min(0)
                _, target = teacher.tokens(m.flow.sample(z, earlier, random["noise"]).x_t, earlier, condition)
            tokens, _ = out.tokens
            value = m.alignment.align([m.heads[0](tokens)], [target])
            terms["align"] = LossTerm(m.alignment.denoiser_weight * strength, value)
        update("denoiser", terms)

    def after_step(self, m: Modules, finite: Tensor, step: int) -> None:
        update_average(m.copies["teacher"], m.denoiser, self.decay, finite)
