"""Evaluation during training: metrics of samples from the averaged weights, computed by all ranks together."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from components import registry
from components.data.pixels import to_uint8
from components.distributed.parallel import World, gather_rows
from components.distributed.ranks import Ranks, patient_ranks
from components.evaluation import EvaluationError
from components.evaluation.comparison import compare
from components.evaluation.images import first_images
from components.evaluation.statistics import (
    FeatureStatistics,
    NetworkMetrics,
    StatisticsBuilder,
    compute_statistics,
)
from components.files.atomic import atomic_write
from components.files.weights import WeightsError
from components.finite import count_of, sound_rows
from components.optim.ema import Ema
from trainer.config import Config, ConfigError
from trainer.evaluation.metric_selection import make_networks
from trainer.evaluation.references import Reference, dataset_images, read_statistics, save_reference
from trainer.run import pictures
from trainer.run.parts import Parts

logger = logging.getLogger("titanrepa")


class TrainingEvaluation:
    """Periodic evaluation as configured in [evaluation]. The constructor reads all files, before the first step.

    Args:
        config: of the run.
        world: this process.

    Raises:
        ConfigError: weights or statistics are missing, or there are too few images.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.settings, self.world = config, config.evaluation, world
        self.folder = Path(config.run.dir) / "evaluation"
        e = self.settings
        if "denoiser" not in registry.recipes.get(config.recipe.name).cls.uses:
            raise ConfigError(
                f"evaluation.every = {e.every}, but recipe '{config.recipe.name}' has no denoiser to sample from; set "
                "it to 0 (to evaluate a tokenizer: python -m trainer evaluate --reconstruction)"
            )
        if not e.metrics and not e.encoders:
            raise ConfigError(f"evaluation.every = {e.every}, but evaluation.metrics and evaluation.encoders are empty")
        try:
            # Kept on the host between evaluations, to leave device memory to training.
            self.networks = make_networks(
                e.metrics, e.encoders, e.inception_weights, config.training.resolution, torch.device("cpu")
            )
            self.reference = Reference(e.reference)
            if e.reference != "dataset":
                statistics, about = read_statistics(e.reference)
                self.reference = Reference(e.reference, None, statistics, about)
                self.reference.check(self.networks, e.images, e.allow_singular)
        except (WeightsError, EvaluationError) as error:
            raise ConfigError(f"[evaluation] {error}") from error
        self.statistics: list[FeatureStatistics] = []  # of the reference, for each network

    def prepare(self, parts: Parts) -> None:
        """Compute the reference statistics, or load those computed at an earlier start of this run. Collective.

        Raises:
            ConfigError: the dataset has too few images, or training reads cached latents and there are no images.
        """
        e = self.settings
        if self.reference.name == "dataset":
            if parts.images is None:
                raise ConfigError(
                    'evaluation.reference = "dataset", but this run reads cached latents and has no images; '
                    "set it to a statistics file (made by python -m trainer evaluate --save-statistics)"
                )
            self.reference.images = first_images(dataset_images(self.config, parts.images), e.reference_images)
            try:
                self.reference.check(self.networks, e.images, e.allow_singular)
            except EvaluationError as error:
                raise ConfigError(f"[evaluation] {error}") from error
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self._kept()
        if self.reference.images is not None and not Ranks(None).first(kept.is_file):
            self._compute_reference(kept)
        if self.reference.images is not None:
            self.reference.statistics, self.reference.about = read_statistics(kept)
        for m in self.networks:
            pool = (
                torch.from_numpy(np.load(kept.with_suffix(".pool.npy"), allow_pickle=False))
                if m.needs_neighbors
                else None
            )
            self.statistics.append(FeatureStatistics(self.reference.known(m), pool))

    @torch.no_grad()
    def __call__(
        self, parts: Parts, ema: Ema | None, check_stop: Callable[[], None] | None = None
    ) -> tuple[dict[str, float | None], list[str]]:
        """Return values by name and warnings, the same on every rank. Collective.

        ``check_stop`` may raise, on all ranks at once, before each evaluation of the denoiser.

        Every rank makes the same number of sampler calls with the same batch size, since all ranks gather sharded
        weights together; surplus images are dropped. Image i does not depend on the rank that samples it.
        """
        e, world = self.settings, self.world
        sampler = pictures.image_sampler(self.config, parts, ema, check_stop)
        builders = [StatisticsBuilder(m, world, generated=True) for m in self.networks]
        disable = None if world.is_main else True
        self._to(world.device)
        try:
            with tqdm(total=e.images, unit="image", desc="evaluation", disable=disable, leave=False) as bar:
                for first in range(0, e.images, world.size * e.batch_size):
                    ids = range(first + world.rank * e.batch_size, first + (world.rank + 1) * e.batch_size)
                    condition = parts.sampling_condition(torch.tensor(ids, device=world.device))
                    images = sampler(ids, condition)
                    sound = gather_rows(sound_rows(images).float())[: e.images - first].tolist()
                    if faulty := [first + place for place, value in enumerate(sound) if not value]:
                        return self._without_values(faulty, first + len(sound))
                    for m, builder in zip(self.networks, builders):
                        self._add(m, builder, to_uint8(images), e.images - first)
                    bar.update(min(world.size * e.batch_size, e.images - first))
            statistics = [builder.build() for builder in builders]
            values, warnings = compare(
                self.networks, statistics, self.statistics, world.device, allow_singular=e.allow_singular
            )
        finally:
            self._to(torch.device("cpu"))
        return values, self.reference.warnings(self.networks) + warnings

    def _without_values(self, faulty: list[int], sampled: int) -> tuple[dict[str, float | None], list[str]]:
        names = [m.name(metric) for m in self.networks for metric in m.metrics]
        return dict.fromkeys(names), [f"no evaluation, as {count_of(faulty, sampled, 'samples')}"]

    def _add(self, m: NetworkMetrics, builder: StatisticsBuilder, images: torch.Tensor, left: int) -> None:
        """Add the features of all ranks in image order and in batches, as a single rank would."""
        features = m.with_keys(images) if "is" in m.metrics else m.network(images)
        gathered = {name: gather_rows(feature)[:left] for name, feature in features.items()}
        size = self.settings.batch_size
        for start in range(0, len(next(iter(gathered.values()))), size):
            builder.add({name: feature[start : start + size] for name, feature in gathered.items()})

    def _kept(self) -> Path:
        """File of the reference statistics; its name is a hash of everything they depend on."""
        images = self.reference.images
        settings = {
            "images": images.identity if images is not None else self.reference.name,
            "networks": [[m.metrics, m.identity] for m in self.networks],
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return self.folder / f"reference-{digest[:16]}.npz"

    def _compute_reference(self, kept: Path) -> None:
        if self.world.is_main:
            logger.info(
                f"computing reference statistics of {len(self.reference.images)} dataset images for [evaluation]"
            )
        self._to(self.world.device)
        try:
            common = {"batch_size": self.settings.batch_size, "world": self.world, "generated": False}
            statistics, caches = compute_statistics(self.reference.images, self.networks, self.folder, **common)
        finally:
            self._to(torch.device("cpu"))

        def write() -> None:
            for of_network in statistics:
                if of_network.pool is not None:
                    path = kept.with_suffix(".pool.npy")
                    with atomic_write(path, fsync=False, concurrent=True) as temporary, open(temporary, "wb") as file:
                        np.save(file, of_network.pool.numpy())
            save_reference(kept, self.networks, statistics)  # last: its presence marks the files as complete
            for cache in caches:
                cache.remove()

        patient_ranks().first(write)

    def _to(self, device: torch.device) -> None:
        for m in self.networks:
            m.network.to(device)
