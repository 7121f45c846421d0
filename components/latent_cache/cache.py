"""On-disk cache of a dataset's tokenizer posteriors and encoder features, read by index.

A cache is a folder that covers n images in the dataset's order, s per shard (the last one may have fewer)::

    latents-00000.safetensors   images 0 to s - 1
    latents-00001.safetensors   images s to 2 s - 1
    ...
    latents-stats.safetensors   mean, std: float64 (C,), per channel, or (C, h, w) with ``per_position``; a valid file
                                for latent_norm.statistics
    index.json                  written last: without it the cache is incomplete

Tensors of a shard of m images; all but the last two have the cache's ``dtype``, one of fp16, bf16 and fp32:

========================  ============  ============================================================
mean, std                 (m, C, h, w)  posterior q(z|x) of the image: z = mean + std * noise
mean_flipped,             (m, C, h, w)  of the image mirrored left-right, if ``flipped``
std_flipped
features.LABEL            (m, N, D)     patch tokens of encoder LABEL, if there are ``features``
features_flipped.LABEL    (m, N, D)     of the mirrored image, if also ``flipped``
labels                    (m,)          class, int64
sums                      (3, C, h, w)  sums of mean, mean^2 and std^2 per position, float64, if ``per_position``
========================  ============  ============================================================

``index.json`` is one object; its ``own_crc32`` covers the other keys (:func:`write_json`):

- ``format`` 1, ``count`` n, ``shard_size`` s, ``latent`` [C, h, w], ``dtype``, ``flipped``, and the networks'
  ``precision`` ("bf16": autocast);
- ``num_classes``, ``class_names``, ``class_counts`` (images per class, or null);
- ``dataset``: name, options, resolution, flip (whether it allows mirroring), and ``probes``, small copies of some
  images that identify the dataset;
- ``tokenizer``: ``fingerprint`` (:func:`components.files.fingerprint.fingerprint`) and a human-readable ``origin``;
- ``features`` by label: ``fingerprint``, ``origin``, ``name`` and ``options`` of the encoder, ``shape`` [N, D];
- ``statistics``: ``mean`` and ``std`` of z per channel, in float64, before rounding to ``dtype``, over all images and
  mirrored copies: std^2 = E[std^2] + Var[mean];
- ``per_position``: true if the statistics are known per position, too;
- ``unreadable``: [index, path] of each image whose file could not be read; it has the latent and label of another
  image;
- ``shards``: ``file``, ``size`` in bytes and ``crc32`` of each, and ``sums`` of mean, mean^2 and std^2 per channel.

While a cache is being built, ``progress/`` holds its settings and a record of every finished shard.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.contracts import Cached, LatentShape
from components.data.loader import DataError
from components.files import manifest
from components.files.atomic import atomic_write

FORMAT = 1
INDEX, STATISTICS, PROGRESS = "index.json", "latents-stats.safetensors", "progress"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FLIPPED = "_flipped"
OWN_CRC32 = "own_crc32"
_CODES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}


class LatentCache:
    """Reads a complete cache by index from memory-mapped shards. Picklable; safe in forked workers.

    Args:
        path: folder of the cache.

    Attributes:
        index: content of ``index.json``.
        latent: shape of one latent.
        flipped: whether the cache has mirrored copies.
        replaced: indices of images that were replaced by another one.

    Raises:
        DataError: the cache is missing, incomplete or damaged; the message names the file.
    """

    # Maximum number of mapped shards per process; each costs a few kilobytes besides the pages that were read.
    open_shards = 512

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index = read_index(self.path)
        self.latent = LatentShape(*self.index["latent"])
        self.flipped: bool = self.index["flipped"]
        self.replaced = {index for index, _ in self.index["unreadable"]}
        for shard in self.index["shards"]:
            check_size(self.path / shard["file"], shard["size"])
        self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": collections.OrderedDict()}

    def __len__(self) -> int:
        return self.index["count"]

    @property
    def num_classes(self) -> int:
        return self.index["num_classes"]

    @property
    def class_names(self) -> list[str]:
        return self.index["class_names"]

    def class_counts(self) -> list[int]:
        """Images per class; caches of older versions do not record it, so their labels are read."""
        if self.index.get("class_counts") is None:
            counts = torch.zeros(self.num_classes, dtype=torch.int64)
            for number in range(len(self.index["shards"])):
                counts += self._shard(number).get_tensor("labels").bincount(minlength=self.num_classes)
            self.index["class_counts"] = counts.tolist()
        return self.index["class_counts"]

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of z per channel, (C,) float64 each."""
        mean, std = (self.index["statistics"][name] for name in ("mean", "std"))
        return torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)

    def position_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of z per channel and position, (C, h, w) float64 each.

        Raises:
            DataError: the cache was written without them, or their file is missing or damaged.
        """
        if not self.index.get("per_position"):
            raise DataError(
                f"latent_norm.per_position = true, but latent cache {self.path} has statistics per channel only: set "
                "latent_norm.statistics, or encode the dataset with --latent_norm.per_position=true"
            )
        file = open_shard(self.path / STATISTICS)
        return file.get_tensor("mean"), file.get_tensor("std")

    def read(self, index: int, flipped: bool = False, features: Sequence[str] = ()) -> tuple[Cached, int]:
        """Read the posterior and features, in the cache's dtype, and the class label of an image.

        Args:
            index: in [0, len).
            flipped: read those of the mirrored image.
            features: labels of the encoders whose features to read.

        Raises:
            IndexError: ``index`` is outside [0, len).
            DataError: the shard is damaged or missing; the message names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"latent cache {self.path}: index {index} is outside its {len(self)} images")
        number, row = divmod(index, self.index["shard_size"])
        suffix = FLIPPED if flipped else ""
        shard = self._shard(number)
        try:
            mean, std = (shard.get_slice(f"{name}{suffix}")[row] for name in ("mean", "std"))
            found = {label: shard.get_slice(f"features{suffix}.{label}")[row] for label in features}
            return Cached(mean, std, found), int(shard.get_slice("labels")[row])
        except Exception as error:
            raise DataError(f"{self._file(number)}: image {index} cannot be read: {error}") from error

    def _file(self, number: int) -> Path:
        return self.path / self.index["shards"][number]["file"]

    def _shard(self, number: int) -> Any:
        if self._process != os.getpid():  # forked: do not use the parent's maps
            self._open, self._process = collections.OrderedDict(), os.getpid()
        if number not in self._open:
            # Reading beyond the end of a truncated file through a map would kill the process with SIGBUS.
            check_size(self._file(number), self.index["shards"][number]["size"])
            self._open[number] = open_shard(self._file(number))
            if len(self._open) > self.open_shards:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


class ShardWriter:
    """Writes one safetensors shard in constant memory, with rows in any order; it appears when committed.

    Args:
        path: path of the shard; until :meth:`commit` the data is in ``<path>.partial``.
        tensors: dtype and shape by name.

    Raises:
        DataError: the file cannot be written, for example because the disk is full; every method may raise it.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self._rows: dict[str, tuple[int, int]] = {}  # offset of the first row, bytes per row
        header, end = {}, 0
        # Widest dtype first, so that every tensor is aligned to its element size.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            size = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            self._rows[name] = (end, size // shape[0])
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._base = 8 + len(text)
        with self._writing():
            self._file = open(self.partial, "wb")  # noqa: SIM115, closed by commit or __exit__
            self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, first: int, rows: Tensor) -> None:
        """Write CPU ``rows``, in the tensor's dtype, to the tensor ``name`` from row ``first`` on."""
        offset, size = self._rows[name]
        with self._writing():
            self._file.seek(self._base + offset + first * size)
            self._file.write(memoryview(rows.contiguous().reshape(-1).view(torch.uint8).numpy()))

    def commit(self) -> dict[str, Any]:
        """Flush the file to disk and move it into place; return its ``size`` and ``crc32``."""
        with self._writing():
            self._file.close()
            found = manifest.checksum(self.partial, sync=True)
            if isinstance(found, str):
                raise DataError(f"{self.partial} could not be read back: {found}")
            os.replace(self.partial, self.path)
            manifest.sync_folder(self.path.parent)
            return found

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.partial} cannot be written: {error.strerror}; fix this and run the same command to continue"
            ) from error

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # from flushing buffered data that cannot be written
            self._file.close()
        self.partial.unlink(missing_ok=True)


def shard_name(number: int) -> str:
    return f"latents-{number:05d}.safetensors"


def open_shard(path: Path) -> Any:
    """Open a memory-mapped safetensors file; raise a DataError that names the file if it is damaged."""
    from safetensors import safe_open

    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        raise DataError(f"{path} is damaged: {error}; {REPAIR}") from error


REPAIR = "run the same encode command again to rebuild damaged shards"
REMAKE = "remove the folder and encode the dataset again"


def check_size(path: Path, size: int) -> None:
    """Raise a DataError that names the file unless it has ``size`` bytes."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {REPAIR}") from error
    if found != size:
        raise DataError(f"{path} is damaged: {found} bytes, expected {size}; {REPAIR}")


def read_index(path: Path) -> dict[str, Any]:
    """Read the ``index.json`` of a cache.

    Raises:
        DataError: it is missing, damaged or of an unsupported format.
    """
    if not (path / INDEX).is_file():
        make = "create one with: python -m trainer encode SOURCE"
        if not path.is_dir():
            raise DataError(f"latent cache '{path}' does not exist (looked at {path.absolute()}); {make} --out {path}")
        if (path / PROGRESS).is_dir():
            raise DataError(f"latent cache '{path}' is incomplete; run the same encode command again to finish it")
        raise DataError(f"'{path}' is not a latent cache: it has no {INDEX}; {make}")
    index = read_json(path / INDEX)
    if index.get("format") != FORMAT:
        raise DataError(f"{path / INDEX} has format {index.get('format')}; this version reads format {FORMAT}")
    return index


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Atomically write fields and their CRC-32; the file is on disk when this returns."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(fields | {OWN_CRC32: _crc32(fields)}, indent=1))


def read_json(path: Path) -> dict[str, Any]:
    """Read the fields written by :func:`write_json`; raise a DataError that names the file if it is damaged."""
    try:
        fields = json.loads(path.read_bytes())
        crc32 = fields.pop(OWN_CRC32)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is damaged: not a complete JSON object; {REMAKE}") from error
    if crc32 != _crc32(fields):
        raise DataError(f"{path} is damaged: its CRC-32 does not match its content; {REMAKE}")
    return fields


def _crc32(fields: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(fields, sort_keys=True).encode()):08x}"
