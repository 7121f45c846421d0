"""Networks that compute the tensors of a latent cache from images, and the settings that determine its content."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from components.data.classes import Classes
from components.data.loader import DataError
from components.data.pixels import to_float
from components.distributed.parallel import World
from components.files.fingerprint import fingerprint
from components.finite import count_of, faulty_rows
from components.latent_cache.cache import DTYPES, FLIPPED, FORMAT
from trainer.caching import cached
from trainer.models.source import LoadedModel
from trainer.run.first_use import checked
from trainer.run.prepare import autocast_dtype, channels_last


@dataclass(frozen=True)
class Choices:
    """User settings of a cache.

    Attributes:
        dtype: of the cached tensors: fp16, bf16 or fp32.
        flip: also cache mirrored images.
        features: also cache the features of the config's encoders.
        batch_size: images per batch and rank; affects only speed, memory and rounding.
        shard_size: images per shard.
    """

    dtype: str = "fp16"
    flip: bool = False
    features: bool = False
    batch_size: int = 32
    shard_size: int = 4096


class Networks:
    """Computes the tensors of a shard from images.

    Args:
        source: loaded model with tokenizer and dataset, and with encoders if ``choices.features``.
        choices: see :class:`Choices`.
        world: this process.
    """

    def __init__(self, source: LoadedModel, choices: Choices, world: World) -> None:
        self.choices, self.device = choices, world.device
        m, training = checked(source.parts.modules, source.parts.places), source.config.training
        self.tokenizer = m.tokenizer
        self.encoders: dict[str, Callable] = m.encoders if choices.features else {}
        wanted = channels_last(source.config, world.device, compiled=False)
        self.layout = torch.channels_last if wanted else torch.contiguous_format
        self.tokenizer.to(memory_format=self.layout)
        self.autocast = autocast_dtype(source.config, world.device)
        with self._computing():
            x = torch.zeros(1, 3, training.resolution, training.resolution, device=world.device)
            self.shapes = {label: tuple(encoder(x).shape[1:]) for label, encoder in self.encoders.items()}
        self.latent = tuple(source.parts.latent)
        self.per_position = source.config.latent_norm.per_position

    def no_sums(self) -> Tensor:
        """Zero sums, in the shape of those that a call returns."""
        return torch.zeros(3, *(self.latent if self.per_position else self.latent[:1]), dtype=torch.float64)

    def tensors(self, rows: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor in a shard of ``rows`` images, by name."""
        dtype, found = DTYPES[self.choices.dtype], {"labels": (torch.int64, (rows,))}
        if self.per_position:
            found["sums"] = (torch.float64, (3, *self.latent))
        for suffix in self._suffixes():
            for name in ("mean", "std"):
                found[name + suffix] = (dtype, (rows, *self.latent))
            for label, shape in self.shapes.items():
                found[f"features{suffix}.{label}"] = (dtype, (rows, *shape))
        return found

    def __call__(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Encode uint8 images (b, 3, R, R); return the tensors of a shard by name, without labels, and latent sums.

        The sums (3, C) float64 are those of mean, mean^2 and std^2 over images and positions; with
        ``latent_norm.per_position``, they are (3, C, h, w), over images.
        """
        found, sums = {}, self.no_sums()
        images = images.to(self.device, non_blocking=True)
        with self._computing():
            for suffix in self._suffixes():
                x = to_float(images.flip(-1) if suffix else images)
                x = x.contiguous(memory_format=self.layout)
                posterior = self.tokenizer.encode(x)
                mean, std = posterior.mean.float(), posterior.std.float()
                wide = mean.double(), std.double()
                powers = torch.stack([wide[0], wide[0].square(), wide[1].square()])
                sums += powers.sum(1 if self.per_position else (1, 3, 4)).cpu()
                found |= {f"mean{suffix}": mean, f"std{suffix}": std}
                found |= {f"features{suffix}.{label}": encoder(x) for label, encoder in self.encoders.items()}
        return {name: self._stored(name, value) for name, value in found.items()}, sums

    def _stored(self, name: str, value: Tensor) -> Tensor:
        stored = value.to(DTYPES[self.choices.dtype])
        if faulty := faulty_rows(stored):
            why = (
                f"does not fit {self.choices.dtype}; encode with --dtype bf16 or fp32"
                if torch.isfinite(value).all()
                else "is not finite: the weights are broken, or --training.precision=fp32 is needed"
            )
            raise DataError(f"'{name}' {why} ({count_of(faulty, len(stored), 'images of the batch')})")
        return stored.cpu()

    def _suffixes(self) -> tuple[str, ...]:
        return ("", FLIPPED) if self.choices.flip else ("",)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.no_grad(), torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            yield


def settings(source: LoadedModel, choices: Choices, networks: Networks) -> dict[str, Any]:
    """Header of a cache's index: every setting that determines its content."""
    config, dataset = source.config, source.parts.dataset
    named = {
        label: cached.describe("encoder", config.encoders[label])
        | {
            "shape": list(shape),
            "fingerprint": fingerprint(networks.encoders[label]),
            "origin": cached.origin("encoder", config.encoders[label]),
        }
        for label, shape in networks.shapes.items()
    }
    about = {"resolution": config.training.resolution, "flip": dataset.flip, "probes": cached.probes(dataset)}
    return {
        "format": FORMAT,
        "count": len(dataset),
        "shard_size": choices.shard_size,
        "latent": list(networks.latent),
        "dtype": choices.dtype,
        "flipped": choices.flip,
        "precision": "bf16" if networks.autocast else "fp32",
        "num_classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "class_counts": list(Classes.of(dataset).counts) or None,
        "dataset": cached.describe("dataset", config.dataset) | about,
        "tokenizer": {"fingerprint": fingerprint(source.parts.modules.tokenizer), "origin": source.label},
        "features": named,
    } | ({"per_position": True} if networks.per_position else {})
