"""The parts that a run is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from components.contracts import Dataset, LatentShape, Modules, Recipe


@dataclass
class Parts:
    """A run's parts, before optimizers.

    Attributes:
        recipe: the algorithm.
        modules: what it works on; only what it uses is built.
        dataset: what training reads: images, or cached latents; none if it was not asked for.
        latent: shape of one latent.
        unused: tables of the config that the recipe does not use.
        averages: copies of modules to average into, by name; sharded like the modules.
        images: the dataset itself; none where training reads cached latents and the images are not there.
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
        """Features of the vector that the denoiser denoises with the latent; 0: none."""
        return getattr(self.modules.denoiser, "extra_dim", 0)
