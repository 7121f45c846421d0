"""Tar shards of images with labels, in WebDataset's layout: names of shards, and an index of their images.

A sample is the members of one shard whose names are equal up to the first dot of the last part: an image, and a label
in ``.cls`` (text) or ``.json``. One pass over the headers finds the place of every image, so that images can be read in
any order. The index is stored beside the shards, or in ~/.cache/titanrepa if that folder cannot be written, and used
again as long as names, sizes and modification times of the shards are the same.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import glob
import hashlib
import io
import itertools
import json
import logging
import os
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from components.data import remote
from components.data.images import ImageError, extensions, printable
from components.data.loader import DataError
from components.files.atomic import atomic_write
from components.files.download import one_per_machine

logger = logging.getLogger("titanrepa")

FORMAT = 1
OPEN = 256  # shards that a process keeps open
HINT = "Set [dataset] path to a folder of .tar files, one file, or a pattern such as shards/{000000..000127}.tar"
BLOCK = 512  # bytes of a tar header; all members begin at a multiple


class Shard(NamedTuple):
    """A file of many images when the dataset was opened: absolute path, bytes, time of modification in ns."""

    path: str
    size: int
    modified: int

    @classmethod
    def of(cls, path: str) -> Shard:
        status = os.stat(path)
        return cls(path, status.st_size, status.st_mtime_ns)

    def check(self) -> None:
        """Raise :class:`ImageError` if the file was changed since."""
        try:
            unchanged = Shard.of(self.path) == self
        except OSError as error:
            raise ImageError(error.strerror or str(error)) from error
        if not unchanged:
            raise ImageError("the file was changed since the dataset was opened; start again")


class Index(NamedTuple):
    """Where the images of n samples are.

    Attributes:
        shards: in the order of their names.
        ends: (shards,), number of images in each shard and those before.
        offsets, sizes: (n,), first byte and length of each image in its shard.
        codes: (n,), number of each image's label in ``labels``.
        labels: distinct labels, as text.
        left_out: number of members and samples that are left out, by reason.
    """

    shards: list[Shard]
    ends: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    codes: np.ndarray
    labels: list[str]
    left_out: collections.Counter[str]

    def find(self, image: int) -> tuple[Shard, int, int]:
        """Shard, first byte and length of an image."""
        shard = self.shards[int(np.searchsorted(self.ends, image, side="right"))]
        return shard, int(self.offsets[image]), int(self.sizes[image])

    def read(self, image: int) -> bytes:
        """Content of an image's file; raises :class:`ImageError`."""
        shard, offset, size = self.find(image)
        try:
            content = os.pread(_open(shard).fileno(), size, offset)
        except OSError as error:
            raise ImageError(error.strerror or str(error)) from error
        if len(content) < size:
            raise ImageError(f"the shard ends after {len(content)} of its {size} bytes")
        return content

    def place(self, image: int) -> str:
        """The shard, and the member's name from the header before it."""
        shard, offset, _ = self.find(image)
        try:
            header = os.pread(_open(shard).fileno(), BLOCK, offset - BLOCK)
            return f"{shard.path}: {tarfile.TarInfo.frombuf(header, 'utf-8', 'surrogateescape').name}"
        except (OSError, ImageError, tarfile.TarError):
            return f"{shard.path}: byte {offset}"


def expand(pattern: str) -> list[str]:
    """Expand braces as a shell does: ``{a,b}``, and ``{000..127}`` with the first number's digits.

    Other braces stay, such as those of ``${NAME}`` and ``awk '{print}'`` in a command.
    """
    if not (found := re.search(r"(?<!\$)\{((?:\d+\.\.\d+)|(?:[^{},]*(?:,[^{},]*)+))\}", pattern)):
        return [pattern]
    before, inside, after = pattern[: found.start()], found[1], pattern[found.end() :]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = int(numbers[1]), int(numbers[2])
        width = len(numbers[1]) if numbers[1].startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        choices = inside.split(",")
    return [name for choice in choices for name in expand(before + choice + after)]


def find_shards(path: str, title: str, cache: str | None = None) -> list[str]:
    """Absolute paths of the shards that a folder, a file, a glob or brace pattern, URLs or commands name.

    Args:
        path: one of them, or several between ``::``.
        title: of the dataset, for messages.
        cache: folder of copies of remote shards; see :func:`components.data.remote.fetch`.

    Raises:
        DataError: there are none, some are missing, or a remote one cannot be fetched.
    """
    if os.path.exists(os.path.expanduser(path)):
        return _find_files(path, title)
    names: list[str] = []
    away: set[str] = set()
    for part in remote.split(path) or [path]:
        if remote.is_remote(part):
            names += expand(part)
            away |= {*expand(part)}
        else:
            names += _find_files(part, title)
    copies = remote.fetch([name for name in names if name in away], cache, title)
    return list(dict.fromkeys(copies.get(name, name) for name in names))


def _find_files(path: str, title: str) -> list[str]:
    root = os.path.abspath(os.path.expanduser(path))
    if os.path.isdir(root):
        found = sorted(glob.glob(os.path.join(glob.escape(root), "*.tar")))
        if not found:
            kinds = collections.Counter(os.path.splitext(name)[1] or "without extension" for name in os.listdir(root))
            holds = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "nothing"
            raise DataError(f"{title}: '{path}' holds no .tar files (it holds {holds}). {HINT}")
        return found
    names = [root] if os.path.isfile(root) else expand(root)
    found = list(itertools.chain.from_iterable(sorted(glob.glob(n)) if glob.has_magic(n) else [n] for n in names))
    missing = [name for name in found if not os.path.isfile(name)]
    if not found or missing:
        what = f"{len(missing)} of {len(found)} shards are missing, such as {missing[0]}" if found else "no such file"
        raise DataError(f"{title}: '{path}': {what} (looked from {os.getcwd()}). {HINT}")
    return found


def open_index(paths: list[str], label_key: str, title: str) -> Index:
    """The index of shards, from its file or, once per machine, from the headers of the shards.

    Args:
        paths: absolute, of the shards.
        label_key: key of the label in ``.json`` members.
        title: of the dataset, for messages.

    Raises:
        DataError: a shard cannot be read, is damaged or compressed, or a sample has several images.
    """
    shards = [Shard.of(path) for path in paths]
    key = json.dumps([FORMAT, paths, label_key, extensions()])
    name = f".titanrepa-index-{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:16]}.npz"
    places = [Path(paths[0]).parent / name, remote.cache_folder() / name]
    with one_per_machine(key):
        for place in places:
            if (index := _load(place, shards)) is not None:
                return index
        index = _scan_all(shards, label_key, title)
        for place in places:
            with contextlib.suppress(OSError):
                place.parent.mkdir(parents=True, exist_ok=True)
                _save(place, index)
                return index
    logger.warning(f"{title}: the index cannot be stored beside the shards or in {places[1].parent}; "
                   "every start reads the headers of all shards")  # fmt: skip
    return index


def _load(place: Path, shards: list[Shard]) -> Index | None:
    """A stored index if it is of these shards as they are now; otherwise None."""
    try:
        with np.load(place) as stored:
            head = json.loads(stored["head"].tobytes())
            if head["shards"] != [list(shard) for shard in shards]:
                return None
            arrays = [stored[name] for name in ("ends", "offsets", "sizes", "codes")]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    return Index(shards, *arrays, head["labels"], collections.Counter(head["left_out"]))


def _save(place: Path, index: Index) -> None:
    head = {"shards": [list(shard) for shard in index.shards], "labels": index.labels, "left_out": index.left_out}
    arrays = {"ends": index.ends, "offsets": index.offsets, "sizes": index.sizes, "codes": index.codes}
    content = io.BytesIO()
    np.savez(content, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
    with atomic_write(place, fsync=False, concurrent=True) as temporary:
        temporary.write_bytes(content.getvalue())


def _scan_all(shards: list[Shard], label_key: str, title: str) -> Index:
    codes: dict[str, int] = {}
    left_out: collections.Counter[str] = collections.Counter()
    rows: list[np.ndarray] = []
    logger.info(f"{title}: indexing {len(shards)} shards, once")
    for shard in shards:
        try:
            samples = _scan(shard.path, label_key, left_out)
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{title}: {printable(shard.path)} cannot be read: {error}. Repair or remove it") from error
        found = [(*image, codes.setdefault(label, len(codes))) for image, label in samples]
        rows.append(np.array(found, np.int64).reshape(-1, 3))
    ends = np.cumsum([len(found) for found in rows], dtype=np.int64)
    offsets, sizes, numbers = np.concatenate(rows).T
    return Index(
        shards, ends, offsets.copy(), sizes.astype(np.uint32), numbers.astype(np.int32), list(codes), +left_out
    )


def _scan(path: str, label_key: str, left_out: collections.Counter[str]) -> list[tuple[tuple[int, int], str]]:
    """Place and length of the image, and the label, of each sample of a shard; raises TarError if it is damaged."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # they would need much memory
            folder, name = os.path.split(member.name)
            stem, _, extension = name.partition(".")
            key, extension = f"{folder}/{stem}", f".{extension.lower()}"
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                left_out["links and special members"] += 1
            elif not stem:
                left_out["hidden"] += 1
            elif extension in extensions():
                if key in images:
                    raise tarfile.TarError(f"its sample '{key.lstrip('/')}' has several images; expected one")
                images[key] = (member.offset_data, member.size)
            elif extension == ".cls" or (extension == ".json" and key not in labels):
                if label := _label(tar.extractfile(member).read(), extension, label_key):
                    labels[key] = label
            elif extension != ".json":
                left_out[extension] += 1
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(BLOCK) != bytes(BLOCK):  # tarfile takes a damaged header for the end
            raise tarfile.TarError(f"it is damaged or cut off at byte {tar.offset}, where no end mark of tar is")
    left_out["images without a label"] += sum(key not in labels for key in images)
    left_out["labels without an image"] += sum(key not in images for key in labels)
    return [(place, labels[key]) for key, place in images.items() if key in labels]


def _label(content: bytes, extension: str, label_key: str) -> str:
    """The label in a .cls or .json member, as text; "" if there is none."""
    if extension == ".cls":
        return content.decode(errors="replace").strip()
    try:
        value: Any = json.loads(content)[label_key]
    except (ValueError, KeyError, TypeError):
        return ""
    return str(value).strip() if isinstance(value, (int, str)) and not isinstance(value, bool) else ""


@functools.lru_cache(OPEN)
def _open(shard: Shard) -> io.FileIO:
    """Open a shard; a file that was evicted is closed when its last reader is done."""
    shard.check()
    return open(shard.path, "rb", buffering=0)
