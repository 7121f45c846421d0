"""REG (arXiv 2507.01467): REPA that also denoises the encoder's class token."""

from __future__ import annotations

import torch

from components.contracts import Batch, Distribution, LatentShape, LossTerm, Modules, RandomNumbers, Recipe, Update
from components.diffusion.losses import (
    alignment,
    class_tokens,
    drop_condition,
    encode_targets,
    frozen_posterior,
    velocity_mse,
    velocity_terms,
)
from components.registry import recipes


@recipes.register("reg")
class Reg(Recipe):
    """Train REPA with a denoiser that denoises the first encoder's class token together with the latent (REG).

    The denoiser must take a class token (``class_token_dim`` of ``sit``), and every encoder must have one.

    Args:
        class_weight: weight of the class token's velocity loss; the latent's weight is 1.
    """

    uses = frozenset({"tokenizer", "denoiser", "heads", "latent_norm", "encoders", "alignment"})
    trains = {"denoiser": ("denoiser", "heads")}

    def __init__(self, *, class_weight: float = 0.03) -> None:
        self.class_weight = class_weight

    def check(self, m: Modules) -> None:
        for label, encoder in m.encoders.items():
            if not encoder.own_embedding:
                raise ValueError(
                    f"recipe.name = 'reg' denoises and aligns the class token, but the encoder [encoders.{label}] "
                    "has none (own_embedding is false); use a vision transformer with a class token, such as dinov2"
                )
        label, encoder = next(iter(m.encoders.items()))
        shape = m.denoiser.noisy_inputs.get("class_token")
        if shape != (encoder.embed_dim,):
            raise ValueError(
                f"recipe.name = 'reg' needs a denoiser that takes [encoders.{label}]'s class token of "
                f"{encoder.embed_dim} features, but this one takes {shape[0] if shape else 'none'}; set "
                f"denoiser.class_token_dim = {encoder.embed_dim} (sit has that option)"
            )

    def denoised(self, m: Modules) -> dict[str, tuple[int, ...]]:
        return {"class_token": m.denoiser.noisy_inputs["class_token"]}

    def random_numbers(self, m: Modules, latent: LatentShape) -> dict[str, Distribution]:
        noise = Distribution("normal", m.denoiser.noisy_inputs["class_token"], key="extra")
        return super().random_numbers(m, latent) | {"class_noise": noise}

    def step(self, m: Modules, batch: Batch, random: RandomNumbers, update: Update, step: int) -> None:
        t = m.flow.times(random["time"])
        z = frozen_posterior(m, batch).sample(random["posterior"])
        path = m.flow.sample(m.latent_norm(z), t, random["noise"])
        classes = class_tokens(m, batch)
        class_path = m.flow.sample(classes[0], t, random["class_noise"])

        condition = drop_condition(m, batch.condition, random["label"])
        out = m.denoiser(path.x_t, t, condition, class_token=class_path.x_t)
        class_error = velocity_mse(out.others["class_token"], class_path.velocity)
        terms = velocity_terms(m, out, path) | {"class_velocity": LossTerm(self.class_weight, class_error)}
        # The class token comes first and is aligned like any other token.
        patches = encode_targets(m, batch, step)
        targets = [torch.cat([c[:, None], y], dim=1) for c, y in zip(classes, patches)]
        update("denoiser", terms | alignment(m, out.tokens, targets, m.alignment.denoiser_weight, step))
