"""The modules, recipe and dataset of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from components.contracts import Dataset, LatentShape, Modules, Recipe


@dataclass
class Parts:
    """Everything that assembly builds for a run, except optimizers and the EMA.

    Attributes:
        recipe: the training algorithm, one step of it.
        modules: networks and losses; only those that the recipe uses are built.
        dataset: the training data, images or cached latents; None if it was not built.
        num_classes: number of class labels, without the null label.
        latent: shape of one latent.
        unused: config tables that the recipe does not use (``denoiser``, ``encoders``).
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
        """Dimension of the vector, such as a class token, that is denoised together with the latent; 0 without one."""
        return getattr(self.modules.denoiser, "extra_dim", 0)
