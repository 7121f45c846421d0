"""The parts of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from components.contracts import Dataset, LatentShape, Modules, Recipe


@dataclass
class Parts:
    """Parts of a run, without optimizers.

    Attributes:
        recipe: the training algorithm.
        modules: networks and losses; only those that the recipe uses are built.
        dataset: what training reads: images or cached latents; None if not requested.
        num_classes: number of classes.
        latent: shape of one latent.
        unused: tables of the config that the recipe does not use.
        averages: copies of modules for the EMA, by name; sharded like the modules.
        images: the image dataset; None if training reads cached latents and no images are available.
    """

    recipe: Recipe
    modules: Modules
    dataset: Dataset | None
    num_classes: int
    latent: LatentShape
    unused: list[str] = field(default_factory=list)
    averages: dict[str, nn.Module] = field(default_factory=dict)
    images: Dataset | None = None

    @property
    def extra_dim(self) -> int:
        """Dimension of the vector (a class token) that the denoiser denoises together with the latent; 0: none."""
        return getattr(self.modules.denoiser, "extra_dim", 0)
