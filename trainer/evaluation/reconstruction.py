"""Reconstruction quality of a tokenizer: PSNR, SSIM, LPIPS, rFID, and Frechet distances on encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components import registry
from components.data.pixels import to_float, to_uint8
from components.distributed.parallel import World
from components.distributed.ranks import Ranks
from components.evaluation.extract import extract
from components.evaluation.feature_cache import FeatureCache
from components.evaluation.images import Images
from components.evaluation.measures import FRECHET, Summarizer, compare
from components.evaluation.reconstruction import psnr, ssim
from components.files.fingerprint import fingerprint
from components.nn.precision import parameter_dtype
from trainer.config import Config
from trainer.config.schema import PluginTable
from trainer.evaluation.comparison import check_counts
from trainer.evaluation.measured import Measured, network_warnings
from trainer.evaluation.references import Reference
from trainer.run.construct import make_plugin

METRICS = ("rfid", "psnr", "ssim", "lpips")


def make_lpips(config: Config, device: torch.device) -> Any:
    """Build the plugin lpips with the weight files that the config names, if any, for the input range "unit".

    Raises:
        WeightsError: its weights are missing; the message says how to obtain them.
    """
    plugin = registry.losses.get("lpips")
    given = next((t.options for t in config.losses.values() if registry.losses.get(t.name) is plugin), {})
    files = {key: value for key, value in given.items() if key in plugin.files}
    loss = make_plugin("losses.lpips", "loss", PluginTable(name="lpips", input_range="unit", **files))
    loss.load_weights()
    return loss.to(device)


def evaluate_reconstruction(
    tokenizer: Any,
    images: Images,
    metrics: Sequence[str],
    networks: Sequence[Measured],
    lpips: Any,
    place: Path,
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
        lpips: the LPIPS loss, or None if it is not among the metrics.
        place: folder for the feature cache, from which an interrupted evaluation resumes.
        batch_size: images per batch and rank.
        world: this process.
        allow_singular: compute distances with fewer images than features, with a warning.

    Returns:
        Values by name, warnings, and the feature caches, to remove at the end.

    Raises:
        EvaluationError: there are too few images, or an image cannot be read.
    """
    check_counts(networks, len(images), Reference(images.name, images), allow_singular)
    pixelwise = [name for name in ("psnr", "ssim", "lpips") if name in metrics]

    def measure(x: Tensor) -> dict[str, Tensor]:
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
                for name in m.metrics:
                    values[f"{m.label}/{side}/{FRECHET[name]}"] = features[FRECHET[name]]
        return values

    settings = {
        "reconstruction": fingerprint(tokenizer),
        "images": images.identity,
        "metrics": sorted(pixelwise),
        "lpips": fingerprint(lpips) if lpips is not None else None,
        "networks": [m.identity for m in networks],
        "batch_size": batch_size,
    }
    cache = FeatureCache(place, Ranks(None).first(lambda: settings))
    pairs = [
        [Summarizer(m.network, m.metrics, world.device, generated=False, main=world.is_main) for _ in "xy"]
        for m in networks
    ]
    sums = dict.fromkeys(pixelwise, 0.0)
    units = extract(
        images, torch.no_grad()(measure), cache, batch_size=batch_size, device=world.device, title="reconstructions"
    )
    for values in units if world.is_main else ():
        for name in sums:
            sums[name] += float(values[name].sum())
        for m, summarizers in zip(networks, pairs):
            for side, summarizer in zip("xy", summarizers):
                prefix = f"{m.label}/{side}/"
                summarizer.add({k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)})
    found: dict[str, float | None] = {}
    warnings = network_warnings(networks)
    for m, (x, y) in zip(networks, pairs):
        names = ("the reconstructions", "the originals")
        values, said = compare(
            m.metrics, y.summary(), x.summary(), world.device, allow_singular=allow_singular, names=names
        )
        found |= {f"r{m.name(metric)}": value for metric, value in values.items()}
        warnings += [f"r{m.name(metric)}: {text}" for metric, text in said]
    found |= Ranks(None).first(lambda: {name: total / len(images) for name, total in sums.items()})
    return found, warnings, [cache]


@torch.no_grad()
def reconstruct(tokenizer: Any, images: Tensor) -> Tensor:
    """Reconstruct uint8 images (B, 3, R, R) from their posterior means; returns the same shape and dtype."""
    x = to_float(images).to(parameter_dtype(tokenizer))
    return to_uint8(tokenizer.decode(tokenizer.encode(x).mean).float().clamp(-1, 1))
