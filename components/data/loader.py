"""Data loading on the host: deterministic order, worker processes, handling of unreadable files.

Training reads an endless stream of positions p = 0, 1, 2, ...; position p is entry p mod n of the permutation of
epoch p // n. Step k takes positions [k * B, (k + 1) * B), where B is the global batch size. Micro-batch i of rank r
takes the b = B / (world * accumulation) positions from k * B + (i * world + r) * b on. So the numbers of ranks and
micro-batches only divide the same global batches differently, and the only state is the number of samples consumed.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import numbers
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from components import registry
from components.contracts import Cached, Condition, Dataset, DatasetItem
from components.diffusion.random_numbers import generator

if TYPE_CHECKING:
    from torchdata.stateful_dataloader import StatefulDataLoader

logger = logging.getLogger(__name__)


class DataError(Exception):
    """The data is missing, empty, invalid, or too much of it is unreadable."""


class GlobalOrder:
    """Maps positions of the endless stream to samples: a pure function of (seed, position).

    Args:
        size: number of samples n in the dataset, at least 1.
        seed: seed of the run.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise DataError("the dataset is empty")
        self.size = size
        self.seed = seed
        self._permutations: dict[int, Tensor] = {}

    def at(self, position: int) -> tuple[int, int]:
        """Return (epoch, index into the dataset) of a stream position >= 0."""
        epoch, place = divmod(position, self.size)
        return epoch, int(self._permutation(epoch)[place])

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._permutations:
            # Keep two, because a batch may span two epochs. 10 MB each for ImageNet.
            for old in sorted(self._permutations)[:-1]:
                del self._permutations[old]
            self._permutations[epoch] = torch.randperm(self.size, generator=generator(self.seed, epoch, "order"))
        return self._permutations[epoch]


class MicroBatches:
    """Endless batch sampler of one rank's micro-batches, as lists of (epoch, index).

    Args:
        order: order of the samples.
        batch_size: global batch size B: images per step over all ranks and micro-batches.
        rank: index of this process among the data-parallel ranks.
        world: number of data-parallel ranks.
        accumulation: micro-batches per step and rank.
        consumed: number of samples that earlier steps consumed over all ranks; the stream starts there.

    Raises:
        DataError: B is not a multiple of ``world * accumulation``.
    """

    def __init__(
        self,
        order: GlobalOrder,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        consumed: int = 0,
    ) -> None:
        if batch_size < 1 or batch_size % (world * accumulation):
            raise DataError(
                f"a global batch of {batch_size} images cannot be divided equally among {world} ranks x "
                f"{accumulation} micro-batches; set training.batch_size to a multiple of {world * accumulation}"
            )
        self.order = order
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.accumulation = accumulation
        self.consumed = consumed
        self.size = batch_size // (world * accumulation)

    def positions(self) -> Iterator[int]:
        """Stream position of each micro-batch's first sample; the others follow consecutively."""
        for step in itertools.count(self.consumed, self.batch_size):
            for i in range(self.accumulation):
                yield step + (i * self.world + self.rank) * self.size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in self.positions():
            yield [self.order.at(p) for p in range(start, start + self.size)]


def check_item(item: Any, dataset: Dataset, index: int, resolution: int | None = None) -> DatasetItem:
    """Return an item of ``dataset`` if it is as the contract says; ``resolution`` None: images of any side.

    Raises:
        DataError: names the dataset, what was expected and what was found.
    """
    where = f"{registry.title(dataset)}[{index}]"
    if not isinstance(item, DatasetItem):
        raise DataError(f"{where} is a {type(item).__name__}, expected components.contracts.DatasetItem(image, label)")
    image, side = item.image, resolution or "R"
    right = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.dim() == 3 and len(image) == 3
    right = right and resolution in (None, image.shape[1]) and resolution in (None, image.shape[2])
    if not right and (image is not None or item.cached is None):
        got = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise DataError(
            f"{where}: image is {got}, expected torch.uint8 (3, {side}, {side}), R = training.resolution; crop it to "
            "the resolution that the dataset is constructed with"
        )
    if not isinstance(item.label, numbers.Integral):
        raise DataError(f"{where}: label is a {type(item.label).__name__}, expected int")
    if not 0 <= item.label < dataset.num_classes:
        raise DataError(f"{where}: label {item.label} is outside [0, {dataset.num_classes}), its num_classes")
    if lacking := [name for name in dataset.conditions if name not in item.condition]:
        raise DataError(f"{where}: condition has no '{lacking[0]}', which the dataset's `conditions` lists")
    return item


def why_unreadable(item: DatasetItem) -> str:
    """The unreadable file that an item replaces, and the reason if it is known."""
    return f"{item.unreadable} ({item.reason})" if item.reason else str(item.unreadable)


class TrainingView:
    """View of a dataset indexed by (epoch, index), with random horizontal flips determined by (seed, epoch, index).

    Args:
        dataset: see :class:`components.contracts.Dataset`.
        seed: seed of the run.
        resolution: side of the images; None: any.
    """

    def __init__(self, dataset: Dataset, seed: int, resolution: int | None = None) -> None:
        self.dataset, self.seed, self.resolution = dataset, seed, resolution

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> DatasetItem:
        """The sample, flipped with probability 0.5; raises :class:`DataError` if it violates the dataset contract."""
        epoch, index = key
        flip = self.dataset.flip and bool(torch.rand((), generator=generator(self.seed, epoch, index, "flip")) < 0.5)
        item = self.dataset.mirrored(index) if flip else self.dataset[index]
        return check_item(item, self.dataset, index, self.resolution)


class Loaded(NamedTuple):
    """Micro-batch on the host: ``images`` uint8 (b, 3, R, R), their ``condition``, ``unreadable`` files and reasons."""

    images: Tensor | None
    condition: Condition
    unreadable: list[str]
    cached: Cached | None = None


def collate(samples: Sequence[DatasetItem]) -> Loaded:
    """Stack samples; all must have the same fields and shapes."""
    first, cached = samples[0], None
    if first.cached is not None:
        rows = [s.cached for s in samples]
        features = {label: torch.stack([row.features[label] for row in rows]) for label in first.cached.features}
        cached = Cached(torch.stack([row.mean for row in rows]), torch.stack([row.std for row in rows]), features)
    return Loaded(
        None if first.image is None else _stack([s.image for s in samples]),
        Condition(
            torch.tensor([s.label for s in samples], dtype=torch.int64),
            {name: torch.stack([s.condition[name] for s in samples]) for name in first.condition},
        ),
        [why_unreadable(s) for s in samples if s.unreadable is not None],
        cached,
    )


def _stack(images: Sequence[Tensor]) -> Tensor:
    """Stack images (3, R, R) and keep their layout: a decoder's channels_last is what convolutions want, too."""
    if images[0].stride(0) != 1:
        return torch.stack(images)
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def make_loader(
    dataset: Dataset,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    accumulation: int = 1,
    consumed: int = 0,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    resolution: int | None = None,
) -> StatefulDataLoader:
    """Endless loader of one rank's :class:`Loaded` micro-batches; its ``batch_sampler`` is a :class:`MicroBatches`.

    It has no state to save: to resume, pass ``consumed``. Iterate over it through
    :class:`components.data.prefetch.Prefetcher`.

    Args:
        dataset: not empty; picklable where worker processes are not forked.
        seed: seed of the run; determines order and flips.
        batch_size, rank, world, accumulation, consumed: see :class:`MicroBatches`.
        workers: number of worker processes; 0 loads in the calling thread.
        prefetch: micro-batches prefetched by each worker.
        pin_memory: use page-locked host memory, for asynchronous copies to a GPU.
        resolution: side that images must have; None: any.

    Raises:
        DataError: the dataset is empty, or the batch cannot be divided equally.
    """
    from torchdata.stateful_dataloader import StatefulDataLoader

    order = GlobalOrder(len(dataset), seed)
    batches = MicroBatches(
        order, batch_size=batch_size, rank=rank, world=world, accumulation=accumulation, consumed=consumed
    )
    # The iterator never ends, so workers persist without persistent_workers, which would only add an exit hook that
    # waits five seconds per worker. With generator=None, worker seeds would be drawn from the global generator.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 on torch 2.15
        return StatefulDataLoader(
            TrainingView(dataset, seed, resolution),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            worker_init_fn=start_worker,
            generator=generator(seed, "workers"),
            prefetch_factor=prefetch if workers else None,
            snapshot_every_n_steps=None,
        )


def start_worker(_: int) -> None:
    """Set up signal handling in a worker process."""
    # Ctrl-C, a closed terminal, torchrun and Slurm signal every process of the job. Workers ignore that, so that the
    # trainer can finish its step and save; they exit with their loader or with the trainer.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # it is the trainer's
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_trainer, daemon=True).start()


def _obey_trainer() -> None:
    trainer = multiprocessing.parent_process().pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


class UnreadableCounter:
    """Counts images that were replaced because their file is unreadable; raises if there are too many.

    Args:
        max_rate: maximum fraction of unreadable images, in [0, 1].

    Attributes:
        seen: number of images seen.
        count: number of those that were replaced.
    """

    # Minimum number of images for a meaningful rate.
    enough = 1000

    def __init__(self, max_rate: float) -> None:
        self.max_rate = max_rate
        self.seen = 0
        self.count = 0
        self._logged: dict[str, None] = {}

    def update(self, seen: int, unreadable: Sequence[str]) -> None:
        """Add a batch of ``seen`` images with these unreadable files; warn once per path.

        Raises:
            DataError: ``count`` exceeds ``max_rate * max(seen, 1000)``.
        """
        self.seen += seen
        self.count += len(unreadable)
        for path in unreadable:
            if path not in self._logged:
                self._logged[path] = None
                logger.warning("unreadable image, replaced by another one: %s", path)
        if self.count > self.max_rate * max(self.seen, self.enough):
            latest = "\n".join(f"  {path}" for path in list(self._logged)[-5:])
            raise DataError(
                f"{self.count} of {self.seen} images are unreadable ({self.count / self.seen:.2%}), which exceeds "
                f"loader.max_unreadable = {self.max_rate:g}; the latest:\n{latest}\n"
                "Repair or remove these files, or raise loader.max_unreadable."
            )

    def state_dict(self) -> dict[str, int]:
        """Both counts."""
        return {"seen": self.seen, "count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen, self.count = state["seen"], state["count"]
