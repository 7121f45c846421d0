"""Data of a run: micro-batches with their random numbers, and what happens if they cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from components.contracts import Batch, RandomNumbers
from components.data.loader import DataError, GlobalOrder, UnreadableCounter, make_loader
from components.data.prefetch import Prefetcher
from components.diffusion.random_numbers import draw
from components.distributed.parallel import World
from components.distributed.ranks import Ranks
from trainer.config import Config
from trainer.run.parts import Parts


class Feed:
    """Prefetched micro-batches from one step on; a context manager.

    Args:
        config: of the run.
        world: this process.
        parts: dataset and the random numbers that the recipe declares.
        unreadable: counts replaced images.
        step: number of finished steps.
        consumed: number of samples that they consumed.

    Attributes:
        order: of the data.
        lost: error that ended the data of this rank; it is raised at once in a single process. With several, this rank
            repeats its last micro-batch, so that all ranks reach the end of the step, which they skip together.
    """

    def __init__(
        self, config: Config, world: World, parts: Parts, unreadable: UnreadableCounter, step: int, consumed: int
    ) -> None:
        c = config
        loader = make_loader(
            parts.dataset,
            seed=c.training.seed,
            batch_size=c.training.batch_size,
            rank=world.rank,
            world=world.size,
            accumulation=c.training.accumulation,
            consumed=consumed,
            workers=c.loader.workers,
            prefetch=c.loader.prefetch,
            pin_memory=world.device.type == "cuda",
            resolution=c.training.resolution,
        )
        self.order: GlobalOrder = loader.batch_sampler.order
        size = c.training.batch_size // (world.size * c.training.accumulation)
        declared = parts.random_numbers

        def random_numbers(position: int) -> RandomNumbers:
            steps, place = divmod(position - consumed, c.training.batch_size)
            here = range(place, place + size)
            return draw(c.training.seed, step + steps, here, c.training.batch_size, declared)

        self.accumulation, self.unreadable, self.world = c.training.accumulation, unreadable, world
        self.lost: Exception | None = None
        self._last: tuple[Batch, RandomNumbers] | None = None  # kept with several ranks only
        self._prefetcher = Prefetcher(loader, world.device, beside=random_numbers)

    @property
    def waited_s(self) -> float:
        """Total time in seconds that training has waited for data."""
        return self._prefetcher.waited_s

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: Any) -> None:
        self._prefetcher.close()

    def step(self) -> Iterator[tuple[Batch, RandomNumbers]]:
        """Micro-batches of the next step.

        Raises:
            DataError: too many images are unreadable; or any error of the dataset. See ``lost``.
        """
        counted = self.unreadable.state_dict()
        for _ in range(self.accumulation):
            try:
                if self.lost is None:
                    batch, random, unreadable = next(self._prefetcher)
                    self.unreadable.update(len(batch.condition.label), unreadable)
                    if self.world.size > 1:
                        self._last = batch, random
            except Exception as error:
                self.unreadable.load_state_dict(counted)  # the images of a step that does not count
                if self._last is None:
                    raise
                self.lost = error
            yield (batch, random) if self.lost is None else self._last

    def raise_lost(self) -> None:
        """Raise the error of the first rank whose data is lost, on every rank. Collective.

        Raises:
            DataError: on the other ranks.
        """
        found = Ranks(None).gather(None if self.lost is None else f"{type(self.lost).__name__}: {self.lost}")
        if self.lost is not None:
            raise self.lost
        rank, reason = next((rank, reason) for rank, reason in enumerate(found) if reason is not None)
        raise DataError(f"rank {rank} cannot read its data: {reason}")
