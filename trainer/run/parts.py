"""The modules, recipe and dataset of a run."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from components.contracts import Condition, Dataset, Distribution, LatentShape, Modules, Recipe
from components.data.classes import Classes
from components.diffusion.random_numbers import of_step
from components.latent_cache.cache import LatentCache
from components.optim.ema import copy_values


@dataclass
class Parts:
    """Everything that assembly builds for a run, except optimizers and the EMA.

    Attributes:
        recipe: the training algorithm, one step of it.
        modules: networks and losses; only those that the recipe uses are built.
        dataset: the training data, images or cached latents; None if it was not built.
        num_classes: number of class labels, without the null label.
        latent: shape of one latent.
        places: table in the config of each of ``modules.named()``; seeds its initial weights.
        unused: config tables that the recipe does not use (``denoiser``, ``encoders``).
        averages: copies of modules for the EMA, by name; sharded like the modules.
        images: the image dataset; None if training reads cached latents and no images are available.
        cache: latent cache to train on, if any.
        classes: names and image counts of the training data's classes; empty if unknown.
        missing: one message per file that the run needs and that does not exist, with how to get it.
    """

    recipe: Recipe
    modules: Modules
    dataset: Dataset | None
    num_classes: int
    latent: LatentShape
    places: dict[str, str]
    unused: list[str] = field(default_factory=list)
    averages: dict[str, nn.Module] = field(default_factory=dict)
    images: Dataset | None = None
    cache: LatentCache | None = None
    classes: Classes = field(default_factory=Classes)
    missing: list[str] = field(default_factory=list)

    @property
    def random_numbers(self) -> dict[str, Distribution]:
        """Random numbers of a training step, by name."""
        return of_step(self.recipe, self.modules, self.latent)

    def balanced_labels(self, ids: Tensor) -> Tensor:
        """Labels (B,) of the samples with these numbers (B,): in turn the classes that have images."""
        labels = self.classes.with_images(self.num_classes)
        if len(labels) == self.num_classes:
            return ids % self.num_classes
        return torch.tensor(labels, device=ids.device)[ids % len(labels)]

    def sampling_condition(self, ids: Tensor, labels: Tensor | None = None) -> Condition:
        """Condition of the samples with these numbers (B,): their labels (by default the classes in turn) and more."""
        labels = self.balanced_labels(ids) if labels is None else labels
        dataset = self.dataset if self.images is None else self.images
        more = dataset.sampling_conditions(ids.tolist()) if dataset is not None else {}
        return Condition(labels, more).to(labels.device)

    def example_condition(self, size: int, device: torch.device | str = "cpu") -> Condition:
        """Condition of ``size`` images for timing and estimates, which run without a dataset."""
        denoiser = self.modules.denoiser
        label = torch.zeros(size, dtype=torch.int64)
        return (Condition(label) if denoiser is None else denoiser.example_condition(size)).to(device)

    def reset_copies(self) -> None:
        """Set the recipe's copies to the present values of their sources."""
        named = self.modules.named()
        for name, source in self.recipe.copies.items():
            copy_values(self.modules.copies[name], named[source])

    def on_meta(self) -> Parts:
        """Copy without memory, on the meta device. To be called before the modules are compiled or sharded."""
        memo = {}
        for module in self.modules.named().values():
            for tensor in (*module.parameters(), *module.buffers()):
                empty = torch.empty_like(tensor, device="meta", requires_grad=False)
                parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
        return replace(self, modules=copy.deepcopy(self.modules, memo))
