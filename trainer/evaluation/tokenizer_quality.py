"""Reconstruction quality of a tokenizer: PSNR, SSIM, LPIPS, rFID, and Frechet distances on encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components import registry
from components.contracts import ReconstructionLoss
from components.data.pixels import bounded, to_float, to_uint8
from components.distributed.parallel import World
from components.distributed.ranks import Ranks
from components.evaluation.comparison import compare
from components.evaluation.features import FeatureCache, extract
from components.evaluation.images import ImageSet
from components.evaluation.psnr_ssim import psnr, ssim
from components.evaluation.statistics import NetworkMetrics, StatisticsBuilder
from components.files.fingerprint import fingerprint
from components.nn.precision import parameter_dtype
from trainer.config import Config, ConfigError
from trainer.config.schema import PluginTable
from trainer.evaluation.references import Reference
from trainer.run.construct import make_plugin

METRICS = ("rfid", "psnr", "ssim", "lpips")


def make_metric(name: str, config: Config, device: torch.device) -> Any:
    """Build the loss that computes a metric, with the weight files that the config names, if any.

    Raises:
        ConfigError: no loss computes it.
        WeightsError: its weights are missing; the message says how to obtain them.
    """
    found = (p for p in registry.losses if issubclass(p.cls, ReconstructionLoss) and p.cls.metric == name)
    plugin = next(found, None)
    if plugin is None:
        raise ConfigError(f"--metrics={name}: expected a loss plugin with metric = '{name}', found none; remove it")
    given = next((t.options for t in config.losses.values() if registry.losses.get(t.name) is plugin), {})
    files = {key: value for key, value in given.items() if key in plugin.files}
    options = files | plugin.cls.metric_options
    loss = make_plugin(f"losses.{plugin.name}", "loss", PluginTable(name=plugin.name, **options))
    loss.load_weights()
    return loss.to(device)


def evaluate_reconstruction(
    tokenizer: Any,
    images: ImageSet,
    metrics: Sequence[str],
    networks: Sequence[NetworkMetrics],
    lpips: Any,
    folder: Path,
    *,
    batch_size: int,
    world: World,
    allow_singular: bool = False,
) -> tuple[dict[str, float | None], list[str], list[FeatureCache]]:
    """Compute reconstruction metrics of a tokenizer. Collective.

    Reconstructions are decoded from posterior means and rounded to 8 bits.

    Args:
        tokenizer: frozen, on its device.
        images: originals, at the tokenizer's resolution.
        metrics: from :data:`METRICS`; rfid is computed on the network whose label is "".
        networks: feature networks for Frechet distances.
        lpips: the loss from :func:`make_metric`, or None if it is not among the metrics.
        folder: folder for the feature cache, from which an interrupted evaluation resumes.
        batch_size: images per batch and rank.
        world: this process.
        allow_singular: compute distances with fewer images than features, with a warning.

    Returns:
        Values by name, warnings, and the feature caches, to remove at the end.

    Raises:
        EvaluationError: there are too few images, or an image cannot be read.
    """
    originals = Reference(images.name, images)
    originals.check(networks, len(images), allow_singular)
    pixelwise = [name for name in ("psnr", "ssim", "lpips") if name in metrics]

    def compute(x: Tensor) -> dict[str, Tensor]:
        y = reconstruct(tokenizer, x)
        values = {}
        if "psnr" in pixelwise:
            values["psnr"] = psnr(x, y)
        if "ssim" in pixelwise:
            values["ssim"] = ssim(x, y)
        if "lpips" in pixelwise:
            values["lpips"] = lpips(to_float(x), to_float(y), None).double().expand(len(x))  # the batch's mean
        for m in networks:
            for side, batch in (("x", x), ("y", y)):
                features = m.network(batch)
                values |= {f"{m.label}/{side}/{name}": features[name] for name in m.features}
        return values

    settings = {
        "reconstruction": fingerprint(tokenizer),
        "images": images.identity,
        "metrics": sorted(pixelwise),
        "lpips": fingerprint(lpips) if lpips is not None else None,
        "networks": [m.identity for m in networks],
        "batch_size": batch_size,
    }
    cache = FeatureCache(folder, Ranks(None).first(lambda: settings))
    builders = {side: [StatisticsBuilder(m, world, generated=False) for m in networks] for side in "xy"}
    sums = dict.fromkeys(pixelwise, 0.0)
    tasks = [(torch.no_grad()(compute), cache)]
    (units,) = extract(images, tasks, batch_size=batch_size, device=world.device, title="reconstructions")
    for values in units if world.is_main else ():
        for name in sums:
            sums[name] += float(values[name].sum())
        for side, each in builders.items():
            for m, builder in zip(networks, each):
                builder.add({name: values[f"{m.label}/{side}/{name}"] for name in m.features})
    x, y = ([builder.build() for builder in each] for each in builders.values())
    names = ("the reconstructions", "the originals")
    distances, said = compare(networks, y, x, world.device, allow_singular=allow_singular, names=names)
    found = {f"r{name}": value for name, value in distances.items()}
    found |= Ranks(None).first(lambda: {name: total / len(images) for name, total in sums.items()})
    return found, originals.warnings(networks) + [f"r{warning}" for warning in said], [cache]


@torch.no_grad()
def reconstruct(tokenizer: Any, images: Tensor) -> Tensor:
    """Reconstruct uint8 images (B, 3, R, R) from their posterior means; returns the same shape and dtype."""
    x = to_float(images).to(parameter_dtype(tokenizer))
    return to_uint8(bounded(tokenizer.decode(tokenizer.encode(x).mean).float()))
