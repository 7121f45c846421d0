"""Tar shards of images with labels, such as WebDataset's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from components import registry
from components.data.image_dataset import ImageDataset
from components.data.images import printable, say_left_out
from components.data.loader import DataError
from components.data.packed import CLASSES, check_complete
from components.data.remote import fetch, is_remote
from components.data.shards import Index, find_shards, open_index


@registry.datasets.register("webdataset")
class WebDataset(ImageDataset):
    """Center-cropped images in tar shards, in WebDataset's layout.

    As WebDataset and ``python -m trainer pack`` write them. Members of one name up to the first dot are a sample: one
    image, and its label as text in ``.cls`` or under ``label_key`` in ``.json``. Labels that are all numbers are
    indices of classes; other labels are names of classes. The names, in the order of the indices, are those of
    ``classes`` or, beside local shards, ``classes.json`` (a JSON list); without it, they are the numbers up to the
    largest, or the labels, sorted. Samples without label or image are left out, and counted.

    The headers of the shards are read once, and the places of the images stored beside the shards. So samples can be
    read in any order, and a run is resumed exactly, on any number of GPUs. That takes files: shards by URL (http,
    https) or from a command (``pipe:aws s3 cp s3://bucket/{000..127}.tar -``, run by /bin/sh) are copied into
    ``cache`` once per machine, see :mod:`components.data.remote`. Compressed tars have no such places and are refused.
    For pixels, crop and unreadable images see :class:`components.data.image_dataset.ImageDataset`.

    Args:
        path: folder of .tar files, one such file, or a pattern of several in braces or with *, relative to the
            current folder: shards/train-{000000..000127}.tar; or such patterns of URLs and commands; or several of
            these, with :: between them.
        label_key: key of the label in .json members.
        classes: JSON list of the names of the classes: a file, URL or command.
        cache: folder of the copies of shards by URL or from commands, which must hold all of them; unset:
            ~/.cache/titanrepa/shards, or below $XDG_CACHE_HOME.
        flip: allow horizontal flips in training.
        decoder: as of image_folder.

    Raises:
        DataError: shards are missing, damaged or not yet complete, cannot be fetched, there is no sample, or a label is
            no class.
    """

    title = "dataset webdataset"
    suffixes = (".tar",)

    def __init__(
        self,
        resolution: int,
        *,
        path: registry.File,
        label_key: str = "label",
        classes: registry.File | None = None,
        cache: registry.File | None = None,
        flip: bool = True,
        decoder: Literal["exact", "fast"] = "exact",
    ) -> None:
        super().__init__(resolution, path, flip, decoder)
        shards = find_shards(path, self.title, cache)
        beside = None if is_remote(path) else Path(shards[0]).parent
        if beside is not None:
            check_complete(beside, self.title)
        self._index: Index = open_index(shards, label_key, self.title)
        say_left_out(f"{self.title}: {printable(path)}", self._index.left_out)
        if not len(self._index.codes):
            found = ", ".join(f"{count} {what}" for what, count in self._index.left_out.most_common(5))
            raise DataError(
                f"{self.title}: '{path}' has no images with a label ({found or 'its shards are empty'}); a sample is "
                f"an image (KEY.jpg) and its label, as text (KEY.cls) or under '{label_key}' in JSON (KEY.json); set "
                "[dataset] label_key to another key"
            )
        names, where = None, path
        if classes is not None:
            where = fetch([classes], cache, self.title)[classes] if is_remote(classes) else classes
            if (names := _names(Path(where).expanduser(), self.title)) is None:
                raise DataError(f"{self.title}: classes = '{classes}' does not exist")
        elif beside is not None:
            names, where = _names(beside / CLASSES, self.title), str(beside / CLASSES)
        self._set_labels(self._index.labels, self._index.codes, names, f"{self.title}: {where}")

    def encoded(self, index: int) -> bytes:
        return self._index.read(index)

    def place(self, index: int) -> str:
        return self._index.place(index)


def _names(file: Path, title: str) -> list[str] | None:
    """The names of the classes in a file; None if there is no file."""
    try:
        names = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{title}: {file} cannot be read: {error}. Repair or remove it") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{title}: {file}: expected a JSON list of the classes' names; repair or remove it")
    return names
