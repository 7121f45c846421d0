"""Reconstruction quality of the averaged tokenizer during training, computed by all ranks together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from components.contracts import Dataset
from components.data.pixels import to_float, to_uint8
from components.distributed.parallel import World, gather_rows
from components.evaluation.comparison import compare
from components.evaluation.features import read_batches
from components.evaluation.images import DatasetImages, first_images
from components.evaluation.psnr_ssim import psnr, ssim
from components.evaluation.statistics import FeatureStatistics, NetworkMetrics, StatisticsBuilder
from components.finite import count_of, sound_rows
from components.optim.ema import Ema
from trainer.config import Config, ConfigError
from trainer.config.schema import PluginTable
from trainer.evaluation.references import Reference
from trainer.evaluation.tokenizer_quality import make_metric
from trainer.run import pictures
from trainer.run.construct import check_first_item, make_plugin
from trainer.run.parts import Parts

NAMES = ("the reconstructions", "the originals")


class ReconstructionEvaluation:
    """Metrics of reconstructions as configured by ``evaluation.reconstruction``, defined as by ``evaluate``.

    Args:
        config: of the run.
        world: this process.
        images: the run's dataset, or None.
        networks: those of the samples' metrics, by whose labels the Frechet distances find theirs.

    Raises:
        ConfigError: there are no images to reconstruct.
        EvaluationError: there are too few.
        WeightsError: LPIPS lacks its weights.
    """

    def __init__(
        self, config: Config, world: World, images: Dataset | None, networks: Sequence[NetworkMetrics]
    ) -> None:
        self.settings, self.world = config.evaluation, world
        e = self.settings
        if e.heldout:
            table = PluginTable(name=config.dataset.name, **(config.dataset.options | e.heldout))
            images = make_plugin("evaluation.heldout", "dataset", table, config.training.resolution)
            check_first_item(images, config)
        if images is None:
            raise ConfigError(
                "evaluation.reconstruction needs images, but this run reads cached latents; remove it, or name images: "
                'evaluation.heldout = {path = "..."}'
            )
        named = DatasetImages(images, f"dataset {config.dataset.name}", f"{e.heldout}", strict=False)
        self.images = first_images(named, e.reconstruction_images)
        self.networks = [replace(m, metrics=("fd",) if m.label else ("fid",)) for m in networks if self._serves(m)]
        self.pixelwise = [name for name in ("psnr", "ssim", "lpips") if name in e.reconstruction]
        self.lpips = make_metric("lpips", config, torch.device("cpu")) if "lpips" in self.pixelwise else None
        Reference(named.name, self.images).check(self.networks, len(self.images), e.allow_singular)
        self._originals: list[FeatureStatistics] = []  # for each network, after the first evaluation

    def _serves(self, m: NetworkMetrics) -> bool:
        metric = {"": "rfid", "judge": "rfd_judge"}.get(m.label, "rfd")
        return metric in self.settings.reconstruction

    @torch.no_grad()
    def __call__(
        self, parts: Parts, ema: Ema | None, check_stop: Callable[[], None] | None = None
    ) -> tuple[dict[str, float | None], list[str]]:
        """Return values by name and warnings, the same on every rank. Collective.

        Every rank makes the same number of calls with the same batch size, since all ranks gather sharded weights
        together; surplus images are dropped.
        """
        world, total = self.world, len(self.images)
        sums = dict.fromkeys(self.pixelwise, 0.0)
        sides = "y" if self._originals else "xy"
        builders = {side: [StatisticsBuilder(m, world, generated=False) for m in self.networks] for side in sides}
        disable = None if world.is_main else True
        self._to(world.device)
        try:
            with tqdm(total=total, unit="image", desc="reconstructions", disable=disable, leave=False) as bar:
                for first, x in self._batches():
                    if check_stop is not None:
                        check_stop()
                    x, left = x.to(world.device), total - first
                    _, rebuilt = pictures.reconstruct(parts, ema, to_float(x))
                    sound = gather_rows(sound_rows(rebuilt).float())[:left].tolist()
                    if faulty := [first + place for place, value in enumerate(sound) if not value]:
                        said = f"no evaluation, as {count_of(faulty, first + len(sound), 'reconstructions')}"
                        return dict.fromkeys(self._names()), [said]
                    y, own = to_uint8(rebuilt), max(left - world.rank * len(x), 1)
                    for name in sums:
                        sums[name] += float(gather_rows(self._pixelwise(name, x, y, own))[:left].sum())
                    for side, each in builders.items():
                        for m, builder in zip(self.networks, each):
                            features = m.network(x if side == "x" else y)
                            builder.add({name: gather_rows(values)[:left] for name, values in features.items()})
                    bar.update(min(world.size * len(x), left))
            built = {side: [builder.build() for builder in each] for side, each in builders.items()}
            self._originals = built.get("x", self._originals)
            distances, warnings = compare(
                self.networks, built["y"], self._originals, world.device,
                allow_singular=self.settings.allow_singular, names=NAMES,
            )  # fmt: skip
        finally:
            self._to(torch.device("cpu"))
        values = {f"r{name}": value for name, value in distances.items()}
        for name, value in sums.items():  # the PSNR of equal images is infinite
            values[name] = value / total if math.isfinite(value) else None
        return values, [f"r{warning}" for warning in warnings]

    def _batches(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of the first image of all ranks, and this rank's batch uint8 (B, 3, R, R), always full."""
        size, rank, ranks = self.settings.batch_size, self.world.rank, self.world.size
        units = -(-len(self.images) // size)
        mine = [unit if unit < units else 0 for unit in range(rank, -(-units // ranks) * ranks, ranks)]
        for number, (_, x) in enumerate(read_batches(self.images, mine, size)):
            yield number * ranks * size, torch.cat([x, x[:1].expand(size - len(x), *x.shape[1:])])

    def _pixelwise(self, name: str, x: Tensor, y: Tensor, own: int) -> Tensor:
        """Values (B,) float64 of a metric of uint8 images (B, 3, R, R), of which the first ``own`` count."""
        if (of_images := {"psnr": psnr, "ssim": ssim}.get(name)) is not None:
            return of_images(x, y)
        return self.lpips(to_float(x[:own]), to_float(y[:own]), None).double().expand(len(x))  # the batch's mean

    def _names(self) -> list[str]:
        return [*(f"r{m.name(metric)}" for m in self.networks for metric in m.metrics), *self.pixelwise]

    def _to(self, device: torch.device) -> None:
        for network in (*(m.network for m in self.networks), *([self.lpips] if self.lpips is not None else [])):
            network.to(device)
