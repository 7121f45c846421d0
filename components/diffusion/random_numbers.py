"""Random numbers of a training step, independent of the numbers of ranks and micro-batches and of resumes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from components.contracts import AdversarialLoss, Distribution, LatentShape, Modules, RandomNumbers, Recipe
from components.registry import PluginError, title

SAMPLERS = {"normal": torch.randn, "uniform": torch.rand}


def generator(*key: object) -> torch.Generator:
    """CPU generator seeded by a hash of ``key``: the same key yields the same numbers on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


def of_step(recipe: Recipe, m: Modules, latent: LatentShape) -> dict[str, Distribution]:
    """Random numbers of a step by name: those of the recipe, and as "discriminator.NAME" those of the discriminator."""
    own = m.discriminator.random_numbers if m.discriminator is not None else {}
    return recipe.random_numbers(m, latent) | {f"discriminator.{name}": each for name, each in own.items()}


def of_discriminator(loss: AdversarialLoss, random: RandomNumbers | None) -> dict[str, RandomNumbers]:
    """Keyword arguments of the loss's methods: ``random`` if it declares random numbers, else none.

    Args:
        random: those that the recipe's step received.

    Raises:
        PluginError: the recipe passes none on, but the loss needs them.
    """
    if not loss.random_numbers:
        return {}
    if random is None:
        raise PluginError(
            f"{title(loss)} needs random numbers, which the recipe does not pass on; it should call "
            "reconstruction(..., step, random) and discriminate(..., update, random)"
        )
    return {"random": {name: random[f"discriminator.{name}"] for name in loss.random_numbers}}


def draw(
    seed: int, step: int, positions: range, batch_size: int, declared: Mapping[str, Distribution]
) -> RandomNumbers:
    """Random numbers of a micro-batch: those at ``positions`` of the global batch of a step.

    Cost: the numbers of the whole global batch are drawn on the CPU and sliced (1M normals each for ``noise`` and
    ``posterior`` of 256 latents of 4 x 32 x 32, about 20 ms in total), outside the training thread. In return, no two
    ranks can use the same numbers.

    Args:
        seed: seed of the run.
        step: counted from 0.
        positions: positions of the micro-batch in the global batch, within [0, batch_size).
        batch_size: global batch size.
        declared: distributions by name, from :func:`of_step`.
    """
    rows, found = slice(positions.start, positions.stop), {}
    for name, d in declared.items():
        numbers = SAMPLERS[d.kind](batch_size, *d.shape, generator=generator(seed, step, d.key or name))
        found[name] = numbers[rows].clone()
    return found


def placeholders(
    declared: Mapping[str, Distribution], size: int, device: torch.device | str | None = None
) -> RandomNumbers:
    """Random numbers of ``size`` images for timing and estimates, from torch's global generator."""
    return {name: SAMPLERS[d.kind](size, *d.shape, device=device) for name, d in declared.items()}
