"""Writes a dataset as tar shards that ``webdataset`` reads, resumable; see :mod:`components.data.packed`."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from components.contracts import Dataset
from components.data.crop import to_image
from components.data.image_dataset import ImageDataset
from components.data.images import FORMATS, printable
from components.data.loader import DataError, UnreadableCounter, check_item, start_worker, why_unreadable
from components.data.packed import CLASSES, RECORD, read_record
from components.diffusion.random_numbers import generator
from components.files.atomic import atomic_write
from components.files.lock import NAME as LOCK
from trainer.caching import cached
from trainer.config import ConfigError, PluginTable

ORIGINAL = "original"
NEIGHBORS = 64  # images that a worker reads one after the other
SAVED: dict[str, dict[str, Any]] = {  # how Pillow writes each format; colors at full resolution in JPEGs
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "subsampling": 0},
    "webp": {"format": "WEBP"},
}
EXTENSIONS = {name: extension for extension, name in reversed(FORMATS.items())}  # first of each format


class Choices(NamedTuple):
    """What to write: side of the crops, "png", "jpg", "webp" or "original", quality (0 to 100), images per shard."""

    size: int
    format: str
    quality: int
    shard_size: int


class Packed(NamedTuple):
    """An image as it is packed: number in the dataset, class, extension and content; ``problem`` if unreadable."""

    index: int
    label: int
    extension: str
    content: bytes
    problem: str = ""


class Packing:
    """Packs a dataset into a folder that this process owns.

    Args:
        out: the folder.
        dataset: constructed with the resolution ``choices.size``.
        table: its config.
        choices: what to write.
        max_unreadable: fraction of images that may be unreadable.

    Raises:
        ConfigError: the folder holds other files, or a packed dataset of other images or choices; lists them.
        DataError: the folder's record is damaged.
    """

    def __init__(
        self, out: Path, dataset: Dataset, table: PluginTable, choices: Choices, max_unreadable: float
    ) -> None:
        self.out, self.dataset, self.choices = out, dataset, choices
        self.counter = UnreadableCounter(max_unreadable)
        self.shards = -(-len(dataset) // choices.shard_size)
        self.settings = {
            "dataset": cached.describe("dataset", table),
            "class_names": list(dataset.class_names),
            "count": len(dataset),
            **choices._asdict(),
        }
        record = read_record(out)
        if record is None:
            if others := sorted(path.name for path in out.iterdir() if path.name != LOCK):
                shown = ", ".join(map(printable, others[:3]))
                raise ConfigError(f"--out {out}: the folder holds other files ({shown}); choose a new one")
            self._record({"probes": cached.probes(dataset), "complete": False})
        else:
            self._check(record)
        self.complete = bool(record and record["complete"] and not self.missing())

    def missing(self) -> list[int]:
        """Numbers of the shards that remain to be written."""
        return [number for number in range(self.shards) if not self._shard(number).is_file()]

    def rows(self, number: int) -> range:
        """Dataset indices of the images in shard ``number``."""
        first = number * self.choices.shard_size
        return range(first, min(first + self.choices.shard_size, len(self.dataset)))

    def run(self, workers: int, progress: Callable[[int], Any] = lambda images: None) -> None:
        """Write the missing shards.

        Args:
            workers: processes that read and encode; 0: this one.
            progress: called with the number of images after each.

        Raises:
            DataError: too many images are unreadable.
        """
        missing = self.missing()
        rows = [index for number in missing for index in self.rows(number)]
        images = itertools.chain.from_iterable(self._load(rows, workers))
        for number in missing:
            with atomic_write(self._shard(number)) as temporary, tarfile.open(temporary, "w") as tar:
                for image in (next(images) for _ in self.rows(number)):
                    self.counter.update(1, [image.problem] if image.problem else [])
                    if not image.problem:
                        _add(tar, f"{image.index:09d}{image.extension}", image.content)
                        _add(tar, f"{image.index:09d}.cls", str(image.label).encode())
                    progress(1)
        with atomic_write(self.out / CLASSES) as temporary:
            temporary.write_text(json.dumps(list(self.dataset.class_names), indent=0))
        self._record((read_record(self.out) or {}) | {"complete": True})

    def _load(self, rows: list[int], workers: int) -> DataLoader:
        """Lists of :class:`Packed`, in order; a worker reads neighbors, which share row groups of a Parquet file."""
        workers = workers if rows else 0
        return DataLoader(
            _Encoded(self.dataset, self.choices),
            batch_sampler=[rows[first : first + NEIGHBORS] for first in range(0, len(rows), NEIGHBORS)],
            collate_fn=list,
            num_workers=workers,
            worker_init_fn=start_worker,
            generator=generator("pack", "workers"),  # otherwise worker seeds come from the global generator
        )

    def _record(self, fields: dict[str, Any]) -> None:
        with atomic_write(self.out / RECORD) as temporary:
            temporary.write_text(json.dumps(fields | {"settings": self.settings}))

    def _check(self, record: dict[str, Any]) -> None:
        found = cached.differences(record["settings"], json.loads(json.dumps(self.settings)))
        if not found and not cached.recognized(record["probes"], self.dataset):
            found = ["its images (a sample was compared)"]
        if found:
            listed = "".join(f"\n  {line}" for line in found)
            raise ConfigError(
                f"--out {self.out}: the folder holds another packed dataset (packed -> now):{listed}\n"
                "Repeat the original command, choose another folder, or remove this one"
            )

    def _shard(self, number: int) -> Path:
        return self.out / f"shard-{number:06d}.tar"


class _Encoded:
    """View of a dataset as :class:`Packed` images."""

    def __init__(self, dataset: Dataset, choices: Choices) -> None:
        self.dataset, self.choices = dataset, choices

    def __getitem__(self, index: int) -> Packed:
        if self.choices.format == ORIGINAL:
            return _original(self.dataset, index)
        item = check_item(self.dataset[index], self.dataset, index, self.choices.size)
        if item.unreadable is not None:  # the item is another image, which has its own place
            return Packed(index, 0, "", b"", why_unreadable(item))
        file, options = io.BytesIO(), dict(SAVED[self.choices.format])
        if self.choices.format != "png":
            options["quality"] = self.choices.quality
        to_image(item.image).save(file, **options)
        return Packed(index, item.label, f".{self.choices.format}", file.getvalue())


def _original(dataset: ImageDataset, index: int) -> Packed:
    """The file of an image as it is, if it begins as an image does."""
    import PIL.Image

    try:
        source = dataset.encoded(index)
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        with PIL.Image.open(io.BytesIO(content)) as image:
            extension = EXTENSIONS.get(image.format)
        if extension is None:
            raise DataError(f"{image.format} is none of the formats that are read")
        return Packed(index, dataset.label(index), extension, content)
    except Exception as error:  # as in ImageDataset: one image must not end the work
        return Packed(index, 0, "", b"", f"{printable(dataset.place(index))} ({error})")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member without time and owner, so that equal images give equal shards."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def size_of(folder: Path) -> int:
    """Bytes of the shards in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.tar"))
