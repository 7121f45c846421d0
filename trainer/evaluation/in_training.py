"""Evaluation during training: metrics of samples and reconstructions from the averaged weights, on all ranks."""

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
from components.contracts import Dataset
from components.data.classes import Classes
from components.data.pixels import to_float, to_uint8
from components.distributed.parallel import World, gather_rows
from components.distributed.ranks import Ranks, patient_ranks
from components.evaluation import EvaluationError
from components.evaluation.comparison import compare
from components.evaluation.images import first_images
from components.evaluation.judge_network import judge_metrics
from components.evaluation.statistics import (
    INCEPTION,
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
from trainer.evaluation.reconstruction_in_training import ReconstructionEvaluation
from trainer.evaluation.references import Reference, dataset_images, read_statistics, save_reference
from trainer.models.sample_folder import labels_of
from trainer.run import pictures
from trainer.run.parts import Parts

logger = logging.getLogger("titanrepa")


class TrainingEvaluation:
    """Periodic evaluation as configured in [evaluation]. The constructor reads all files, before the first step.

    Args:
        config: of the run.
        world: this process.
        images: the image dataset; None: training reads cached latents, and there are no images.

    Raises:
        ConfigError: weights or statistics are missing, or there are too few images, or a metric cannot be computed in
            this run.
    """

    def __init__(self, config: Config, world: World, images: Dataset | None) -> None:
        self.config, self.settings, self.world, self.images = config, config.evaluation, world, images
        self.folder = Path(config.run.dir) / "evaluation"
        e = self.settings
        self._refuse_impossible()
        inception = tuple(metric for metric in e.metrics if metric in INCEPTION)
        judges = [judge_metrics(images, config.dataset.name)] if {"fd_judge", "rfd_judge"} & {*e.wanted} else []
        try:
            # Kept on the host between evaluations, to leave device memory to training.
            networks = make_networks(
                inception or ("fid",) * ("rfid" in e.reconstruction),
                e.encoders,
                e.inception_weights,
                config.training.resolution,
                torch.device("cpu"),
            )
            self.reference = Reference(e.reference)
            self.networks = [m for m in networks if m.label or inception] if self.samples else []
            self.networks += judges if "fd_judge" in e.metrics else []
            if e.reference != "dataset" and self.networks:
                statistics, about = read_statistics(e.reference)
                self.reference = Reference(e.reference, None, statistics, about)
                self.reference.check(self.networks, e.images, e.allow_singular)
            self.reconstructions = None
            if e.reconstruction:
                self.reconstructions = ReconstructionEvaluation(config, world, images, [*networks, *judges])
        except (WeightsError, EvaluationError) as error:
            raise ConfigError(f"[evaluation] {error}") from error
        self.statistics: list[FeatureStatistics] = []  # of the reference, for each network

    def _refuse_impossible(self) -> None:
        """Raise ConfigError if a metric cannot be computed in this run."""
        e, config = self.settings, self.config
        denoises = "denoiser" in registry.recipes.get(config.recipe.name).cls.uses
        self.samples = denoises and bool(e.metrics or e.encoders)
        if not denoises and (e.metrics or not e.reconstruction):
            raise ConfigError(
                f"evaluation.every = {e.every}, but recipe '{config.recipe.name}' has no denoiser to sample from; set "
                "it to 0, or evaluate the tokenizer only: evaluation.metrics = [] and evaluation.reconstruction = "
                '["psnr", "rfid"]'
            )
        if not e.metrics and not e.encoders and not e.reconstruction:
            raise ConfigError(
                f"evaluation.every = {e.every}, but evaluation.metrics, evaluation.encoders and "
                "evaluation.reconstruction are empty"
            )
        if "rfd" in e.reconstruction and not e.encoders:
            raise ConfigError('evaluation.reconstruction has "rfd", but evaluation.encoders is empty')
        dataset = registry.datasets.get(config.dataset.name).cls
        judged = {"judged_right": dataset.has_judge, "fd_judge": dataset.judge_dim, "rfd_judge": dataset.judge_dim}
        for metric in e.wanted:
            if metric in judged and not judged[metric]:
                raise ConfigError(f"evaluation: '{metric}' needs a judge, which dataset '{config.dataset.name}' lacks")
            if metric in judged and self.images is None:
                raise ConfigError(
                    f"evaluation: '{metric}' needs the dataset's judge, but this run reads cached latents and its "
                    "images are not available"
                )

    def prepare(self, parts: Parts) -> None:
        """Compute the reference statistics, or load those computed at an earlier start of this run. Collective.

        Raises:
            ConfigError: the dataset has too few images, or training reads cached latents and there are no images.
        """
        e = self.settings
        if self.samples and e.labels == "dataset" and not parts.classes.counts:
            if parts.images is None:
                raise ConfigError(
                    'evaluation.labels = "dataset", but the cached latents of this run do not record how many images '
                    'each class has; use "balanced" or "random"'
                )
            # Counted by one rank: it may read every item.
            parts.classes = patient_ranks().first(lambda: Classes.of(parts.images, count=True))
        if not self.networks:
            return
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
                torch.from_numpy(np.load(kept.with_suffix(".pool.npy"), allow_pickle=False)) if m.needs_pool else None
            )
            self.statistics.append(FeatureStatistics(self.reference.known(m), pool))

    def __call__(
        self, parts: Parts, ema: Ema | None, check_stop: Callable[[], None] | None = None
    ) -> tuple[dict[str, float | None], list[str]]:
        """Return values by name and warnings, the same on every rank. Collective.

        ``check_stop`` may raise, on all ranks at once, before each evaluation of the denoiser and each batch of
        reconstructions.
        """
        values, warnings = self._of_samples(parts, ema, check_stop) if self.samples else ({}, [])
        if self.reconstructions is not None:
            found, said = self.reconstructions(parts, ema, check_stop)
            values, warnings = values | found, warnings + said
        return values, warnings

    @torch.no_grad()
    def _of_samples(
        self, parts: Parts, ema: Ema | None, check_stop: Callable[[], None] | None
    ) -> tuple[dict[str, float | None], list[str]]:
        """Metrics of samples.

        Every rank makes the same number of sampler calls with the same batch size, since all ranks gather sharded
        weights together; surplus images are dropped. Image i does not depend on the rank that samples it.
        """
        e, world = self.settings, self.world
        sampler = pictures.image_sampler(self.config, parts, ema, check_stop)
        builders = [StatisticsBuilder(m, world, generated=True) for m in self.networks]
        disable, right = None if world.is_main else True, 0.0
        self._to(world.device)
        try:
            with tqdm(total=e.images, unit="image", desc="evaluation", disable=disable, leave=False) as bar:
                for first in range(0, e.images, world.size * e.batch_size):
                    ids = range(first + world.rank * e.batch_size, first + (world.rank + 1) * e.batch_size)
                    condition = parts.sampling_condition(torch.tensor(ids), self._labels(parts, ids))
                    images = sampler(ids, condition)
                    sound = gather_rows(sound_rows(images).float())[: e.images - first].tolist()
                    if faulty := [first + place for place, value in enumerate(sound) if not value]:
                        return self._without_values(faulty, first + len(sound))
                    pixels = to_uint8(images)
                    for m, builder in zip(self.networks, builders):
                        self._add(m, builder, pixels, e.images - first)
                    if "judged_right" in e.metrics:
                        judged = self.images.judge(to_float(pixels)) == condition.label
                        right += float(gather_rows(judged.float())[: e.images - first].sum())
                    bar.update(min(world.size * e.batch_size, e.images - first))
            statistics = [builder.build() for builder in builders]
            values, warnings = compare(
                self.networks, statistics, self.statistics, world.device, allow_singular=e.allow_singular
            )
        finally:
            self._to(torch.device("cpu"))
        if "judged_right" in e.metrics:
            values["judged_right"] = right / e.images
        return values, self.reference.warnings(self.networks) + warnings

    def _labels(self, parts: Parts, ids: range) -> torch.Tensor:
        """Labels (B,) of the samples with these numbers, on the device."""
        classes, seed = parts.classes, self.config.training.seed
        labels = labels_of(ids, self.settings.labels, classes.with_images(parts.num_classes), seed, classes.counts)
        return torch.tensor(labels, device=self.world.device)

    def _without_values(self, faulty: list[int], sampled: int) -> tuple[dict[str, float | None], list[str]]:
        names = [m.name(metric) for m in self.networks for metric in m.metrics]
        names += ["judged_right"] * ("judged_right" in self.settings.metrics)
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
