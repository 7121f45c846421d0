"""Runs something over a set of images in fixed units, shared among the ranks, into a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from components.distributed.ranks import Ranks
from components.evaluation.feature_cache import FeatureCache
from components.evaluation.images import Images, read_batches


def extract(
    images: Images,
    measure: Callable[[Tensor], dict[str, Tensor]],
    cache: FeatureCache,
    *,
    batch_size: int,
    device: torch.device,
    title: str,
) -> Iterator[dict[str, Tensor]]:
    """Fills the cache with what is missing, then gives every unit's values in order.

    Collective until the first value is given. A unit is the same batch whoever computes it, so the values do not
    depend on the number of ranks, nor on what was there before.

    Args:
        images: N of them.
        measure: batch of uint8 (B, 3, H, W) on ``device`` -> tensors to keep.
        cache: of this set and this measure.
        batch_size: images of a unit.
        device: where to compute.
        title: on the progress bar.

    Raises:
        EvaluationError: an image cannot be read.
    """
    ranks = Ranks(None)
    units = -(-len(images) // batch_size)
    missing = ranks.first(lambda: [u for u in range(units) if not cache.has(u)])
    mine = missing[ranks.rank :: ranks.size]
    disable = None if ranks.rank == 0 else True  # None: only on a terminal
    with tqdm(total=len(images), unit="image", desc=title, disable=disable, dynamic_ncols=True) as bar:
        bar.update(len(images) - sum(min(batch_size, len(images) - u * batch_size) for u in missing))
        if mine:
            for unit, batch in read_batches(images, mine, batch_size):
                cache.write(unit, measure(batch.to(device)))
                bar.update(min(len(batch) * ranks.size, len(images) - bar.n))
    ranks.first(lambda: None)  # every rank's files are there
    return (cache.read(unit) for unit in range(units))
