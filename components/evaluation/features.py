"""Features of images: computed in fixed units divided among the ranks, and cached so that they can be resumed.

A unit is a batch of consecutive images, so its values do not depend on the number of ranks. Each unit is one file,
written atomically, in a folder named by a hash of everything the values depend on; units computed with other settings
are in other folders and never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from components.data.images import printable
from components.distributed.ranks import patient_ranks
from components.evaluation import EvaluationError
from components.evaluation.images import ImageFiles, ImageSet
from components.files.atomic import atomic_write

FOLDER = ".evaluation"
THREADS = 4


class FeatureCache:
    """Cached units of one set of images and one network.

    Args:
        place: directory in which the cache folder is created.
        settings: JSON-compatible description of everything the values depend on: images, network, unit size.

    Raises:
        EvaluationError: ``place`` is not writable.
    """

    def __init__(self, place: str | Path, settings: dict[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True)
        self.folder = Path(place) / FOLDER / hashlib.sha256(text.encode()).hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(
                f"cannot write to {place}, where evaluation stores its progress ({error.strerror}); "
                "choose another folder with --output FOLDER/evaluation.json"
            ) from error

    def has(self, unit: int) -> bool:
        """Whether the unit is cached; removes it if the file is damaged."""
        if not self._path(unit).is_file():
            return False
        try:
            self.read(unit)
        except Exception:  # safetensors' own exception or an OSError
            self._path(unit).unlink(missing_ok=True)
            return False
        return True

    def read(self, unit: int) -> dict[str, Tensor]:
        """Read a unit's tensors by name, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self._path(unit))

    def write(self, unit: int, values: dict[str, Tensor]) -> None:
        """Atomically write a unit's values."""
        from safetensors.torch import save_file

        with atomic_write(self._path(unit), fsync=False, concurrent=True) as temporary:
            save_file({name: value.contiguous().cpu() for name, value in values.items()}, temporary)

    def remove(self) -> None:
        """Remove the units, and the parent folder if it is then empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()

    def _path(self, unit: int) -> Path:
        return self.folder / f"{unit:06d}.safetensors"


Compute = Callable[[Tensor], dict[str, Tensor]]


def extract(
    images: ImageSet,
    tasks: Sequence[tuple[Compute, FeatureCache]],
    *,
    batch_size: int,
    device: torch.device,
    title: str,
) -> list[Iterator[dict[str, Tensor]]]:
    """Compute the units missing in the caches in one pass over the images; return those of each cache, in order.

    Collective until it returns the iterators. A unit is the same batch on any rank, so values depend neither on the
    number of ranks nor on what was already cached.

    Args:
        images: N images.
        tasks: functions that map a batch uint8 (B, 3, H, W) on ``device`` to tensors to store, each with the cache for
            these images and this function.
        batch_size: images per unit.
        device: device to compute on.
        title: label of the progress bar.

    Raises:
        EvaluationError: an image cannot be read.
    """
    ranks = patient_ranks()
    units = range(-(-len(images) // batch_size))
    lacking = ranks.first(lambda: [{u for u in units if not cache.has(u)} for _, cache in tasks])
    missing = sorted(set().union(*lacking))
    mine = missing[ranks.rank :: ranks.size]
    disable = None if ranks.rank == 0 else True  # None: disabled unless on a terminal
    with tqdm(total=len(images), unit="image", desc=title, disable=disable, dynamic_ncols=True) as bar:
        bar.update(len(images) - sum(min(batch_size, len(images) - u * batch_size) for u in missing))
        if mine:
            for unit, batch in read_batches(images, mine, batch_size):
                batch = batch.to(device)
                for (compute, cache), lacks in zip(tasks, lacking):
                    if unit in lacks:
                        cache.write(unit, compute(batch))
                bar.update(min(len(batch) * ranks.size, len(images) - bar.n))
    ranks.first(lambda: None)  # barrier: all ranks' files exist
    return [map(cache.read, units) for _, cache in tasks]


def read_batches(images: ImageSet, units: Iterable[int], batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (u, batch uint8 (B, 3, H, W)) for each unit u of ``units``, reading ahead in threads.

    Unit u consists of the images [u * batch_size, (u + 1) * batch_size).

    Raises:
        EvaluationError: an image cannot be read, or its size differs from the first image's.
    """
    size = tuple(images[0].shape)

    def read(index: int) -> Tensor:
        image = images[index]
        if tuple(image.shape) != size:
            where = f"image {index} of {images.name}"
            if isinstance(images, ImageFiles):
                where = printable(images.files[index])
            raise EvaluationError(
                f"{where} has {image.shape[2]} x {image.shape[1]} pixels, the first one {size[2]} x {size[1]}; all "
                "must have the same size (for photographs use a dataset, which crops them: --reference dataset)"
            )
        return image

    with ThreadPoolExecutor(THREADS) as pool:

        def begin(unit: int) -> list:
            indices = range(unit * batch_size, min((unit + 1) * batch_size, len(images)))
            return [pool.submit(read, i) for i in indices]

        ahead = None
        try:
            for unit in units:
                current, ahead = ahead, (unit, begin(unit))
                if current is not None:
                    yield current[0], torch.stack([f.result() for f in current[1]])
            if ahead is not None:
                yield ahead[0], torch.stack([f.result() for f in ahead[1]])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
