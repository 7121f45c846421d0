"""Writes a latent cache shard by shard, distributed over ranks, resumable; see :mod:`components.latent_cache.cache`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from components.contracts import Dataset, DatasetItem
from components.data.classes import Classes
from components.data.loader import DataError, UnreadableCounter, check_item, start_worker, why_unreadable
from components.diffusion.random_numbers import generator
from components.distributed.parallel import World
from components.distributed.ranks import patient_ranks
from components.files import manifest
from components.files.lock import NAME as LOCK
from components.latent_cache.cache import (
    INDEX,
    PROGRESS,
    STATISTICS,
    ShardWriter,
    open_shard,
    read_index,
    read_json,
    shard_name,
    write_json,
)
from trainer.caching import cached
from trainer.caching.networks import Choices, Networks, settings
from trainer.config import ConfigError
from trainer.models.source import LoadedModel

BEGUN = "settings.json"
RECORDED = ("size", "crc32", "sums")  # fields of a shard's progress file that go into the index


class Encoding:
    """Encodes a dataset into a latent cache. Collective: every rank creates one and calls the same methods.

    Args:
        out: folder of the cache.
        source: see :class:`trainer.caching.networks.Networks`.
        choices: see :class:`trainer.caching.networks.Choices`.
        world: this process.

    Raises:
        ConfigError: the folder holds other files, or a cache begun with other settings; lists them.
    """

    def __init__(self, out: Path, source: LoadedModel, choices: Choices, world: World) -> None:
        self.out, self.choices, self.world = out, choices, world
        self.dataset: Dataset = source.parts.dataset
        self.loader, self.resolution = source.config.loader, source.config.training.resolution
        self.networks = Networks(source, choices, world)
        self.settings = settings(source, choices, self.networks)
        self.shards = -(-len(self.dataset) // choices.shard_size)
        self.counter = UnreadableCounter(self.loader.max_unreadable)
        self.ranks = patient_ranks()
        self.ranks.first(self._begin)
        damaged = [number for rank in self.ranks.gather(self.ranks.each(self._damaged)) for number in rank]
        self.ranks.first(lambda: self._reopen(damaged))

    def rows(self, number: int) -> range:
        """Dataset indices of the images in shard ``number``."""
        first = number * self.choices.shard_size
        return range(first, min(first + self.choices.shard_size, len(self.dataset)))

    def missing(self) -> list[int]:
        """Shards of this rank that remain to be written."""
        if (self.out / INDEX).is_file():
            return []
        return [n for n in self._mine() if not self._record(n).is_file()]

    def run(self, progress: Callable[[int], Any] = lambda images: None) -> None:
        """Write the missing shards, then the index.

        Args:
            progress: called after each batch with its number of images.

        Raises:
            DataError: too many images are unreadable, or latents are not finite.
        """
        missing = self.missing()
        pieces = [rows for n in missing for rows in _pieces(self.rows(n), self.choices.batch_size)]
        batches = iter(self._load(pieces))
        for number in missing:
            self._make(number, batches, progress)
        self.ranks.gather(None)  # barrier: all ranks have written their shards
        self.ranks.first(self._finish)

    def _make(self, number: int, batches: Iterator[Numbered], progress: Callable[[int], Any]) -> None:
        rows = self.rows(number)
        sums, unreadable = self.networks.no_sums(), []
        with ShardWriter(self.out / shard_name(number), self.networks.tensors(len(rows))) as shard:
            for piece in _pieces(rows, self.choices.batch_size):
                batch = next(batches)
                try:
                    tensors, batch_sums = self.networks(batch.images)
                except DataError as error:
                    raise DataError(f"images {piece[0]} to {piece[-1]}: {error}") from error
                for name, tensor in {**tensors, "labels": batch.labels}.items():
                    shard.write(name, piece[0] - rows[0], tensor)
                sums += batch_sums
                unreadable += batch.unreadable
                self.counter.update(len(piece), batch.reasons)
                progress(len(piece))
            if self.networks.per_position:
                shard.write("sums", 0, sums)
                sums = sums.sum((2, 3))
            written = shard.commit()
        write_json(self._record(number), written | {"sums": sums.tolist(), "unreadable": unreadable})

    def _load(self, pieces: list[list[int]]) -> DataLoader:
        workers = self.loader.workers if pieces else 0
        return DataLoader(
            _NumberedImages(self.dataset, self.resolution),
            batch_sampler=pieces,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=self.world.device.type == "cuda",
            worker_init_fn=start_worker,
            prefetch_factor=self.loader.prefetch if workers else None,
            generator=generator("encode", "workers"),  # otherwise worker seeds come from the global generator
        )

    def _begin(self) -> None:
        """Create the folder, or check that it holds a cache with the same settings."""
        self.out.mkdir(parents=True, exist_ok=True)
        begun = self.out / PROGRESS / BEGUN
        if (self.out / INDEX).is_file():
            old = {key: value for key, value in read_index(self.out).items() if key in self.settings}
        elif begun.is_file():
            old = read_json(begun)
        else:
            others = sorted(path.name for path in self.out.iterdir() if path.name not in (PROGRESS, LOCK))
            if others:
                listed = ", ".join(others[:3])
                raise ConfigError(f"--out {self.out}: the folder holds other files ({listed}); choose a new one")
            begun.parent.mkdir(exist_ok=True)
            write_json(begun, self.settings)
            return
        if changed := Classes(tuple(old["class_names"])).difference(Classes(tuple(self.settings["class_names"]))):
            raise ConfigError(
                f"--out {self.out}: the folder holds a cache of other classes (cache -> now): {changed}. Restore the "
                "dataset, choose another folder, or remove this one"
            )
        found = cached.differences(_compared(old), _compared(self.settings))
        # The path of the weights may differ if the weights are the same.
        if any(".origin" not in line for line in found):
            listed = "".join(f"\n  {line}" for line in found)
            raise ConfigError(
                f"--out {self.out}: the folder holds a cache with other settings (cache -> now):{listed}\n"
                "Repeat the original command, choose another folder, or remove this one"
            )

    def _damaged(self) -> list[int]:
        """Finished shards of this rank that differ from their record.

        Cost: computes the checksums of a complete cache; in an incomplete one compares only file sizes.
        """
        complete = (self.out / INDEX).is_file()
        records = read_index(self.out)["shards"] if complete else None
        return [n for n in self._mine() if not (self._sound(n, records[n]) if complete else self._as_recorded(n))]

    def _sound(self, number: int, record: dict[str, Any]) -> bool:
        found = manifest.checksum(self.out / shard_name(number), sync=False)
        return not isinstance(found, str) and all(found[key] == record[key] for key in found)

    def _as_recorded(self, number: int) -> bool:
        if not self._record(number).is_file():
            return True  # not finished
        try:
            return (self.out / shard_name(number)).stat().st_size == read_json(self._record(number))["size"]
        except (OSError, DataError):
            return False

    def _reopen(self, damaged: Sequence[int]) -> None:
        """Turn a complete cache back into one in progress, in which the damaged shards are missing."""
        for number in damaged:
            self._record(number).unlink(missing_ok=True)
        if damaged and (self.out / INDEX).is_file():
            index = read_index(self.out)
            (self.out / PROGRESS).mkdir(exist_ok=True)
            write_json(self.out / PROGRESS / BEGUN, self.settings)
            for number in set(range(self.shards)) - set(damaged):
                record = {key: index["shards"][number][key] for key in RECORDED}
                here = self.rows(number)
                record["unreadable"] = [item for item in index["unreadable"] if item[0] in here]
                write_json(self._record(number), record)
            (self.out / INDEX).unlink()

    def _finish(self) -> None:
        """Write the statistics and the index, then delete the progress files."""
        if (self.out / INDEX).is_file():
            shutil.rmtree(self.out / PROGRESS, ignore_errors=True)
            return
        records = [read_json(self._record(number)) for number in range(self.shards)]
        images = len(self.dataset) * (1 + self.choices.flip)
        sums = torch.tensor([record["sums"] for record in records], dtype=torch.float64).sum(0)
        mean, std = _moments(sums / (images * self.networks.latent[1] * self.networks.latent[2]))
        if self.networks.per_position:
            shards = (open_shard(self.out / shard_name(number)) for number in range(self.shards))
            sums = sum(shard.get_tensor("sums") for shard in shards)
            _write_statistics(self.out / STATISTICS, *_moments(sums / images))
        else:
            _write_statistics(self.out / STATISTICS, mean, std)
        shards = [{"file": shard_name(n)} | {key: record[key] for key in RECORDED} for n, record in enumerate(records)]
        index = self.settings | {
            "statistics": {"mean": mean.tolist(), "std": std.tolist()},
            "unreadable": [item for record in records for item in record["unreadable"]],
            "shards": shards,
        }
        write_json(self.out / INDEX, index)
        shutil.rmtree(self.out / PROGRESS)

    def _record(self, number: int) -> Path:
        return self.out / PROGRESS / f"{number:05d}.json"

    def _mine(self) -> range:
        return range(self.world.rank, self.shards, self.world.size)


class Numbered(NamedTuple):
    """A batch: uint8 ``images`` (b, 3, R, R), ``labels`` (b,), [index, path] of each unreadable image, and why."""

    images: Tensor
    labels: Tensor
    unreadable: list[list]
    reasons: list[str]


class _NumberedImages:
    """Dataset that returns each item with its index."""

    def __init__(self, dataset: Dataset, resolution: int) -> None:
        self.dataset, self.resolution = dataset, resolution

    def __getitem__(self, index: int) -> tuple[int, DatasetItem]:
        return index, check_item(self.dataset[index], self.dataset, index, self.resolution)


def _collate(items: Sequence[tuple[int, DatasetItem]]) -> Numbered:
    return Numbered(
        torch.stack([sample.image for _, sample in items]),
        torch.tensor([sample.label for _, sample in items], dtype=torch.int64),
        [[index, sample.unreadable] for index, sample in items if sample.unreadable is not None],
        [why_unreadable(sample) for _, sample in items if sample.unreadable is not None],
    )


def _pieces(rows: range, size: int) -> list[list[int]]:
    return [list(rows[first : first + size]) for first in range(0, len(rows), size)]


def _compared(fields: dict[str, Any]) -> dict[str, Any]:
    """Settings without probes, which may differ in the last bit between image decoders, and what older caches lack."""
    fields = {key: value for key, value in fields.items() if key != "class_counts"}
    return fields | {"dataset": {key: value for key, value in fields["dataset"].items() if key != "probes"}}


def _moments(means: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of z from the means of mean, mean^2 and std^2."""
    mean, mean_of_squares, variance = means
    return mean, (variance + mean_of_squares - mean.square()).clamp_min(0).sqrt()


def _write_statistics(path: Path, mean: Tensor, std: Tensor) -> None:
    with ShardWriter(path, {"mean": (mean.dtype, mean.shape), "std": (std.dtype, std.shape)}) as file:
        file.write("mean", 0, mean)
        file.write("std", 0, std)
        file.commit()
