"""Computes features of a set of images in fixed units, divided among the ranks, into a cache."""

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
    """Compute the units missing in the cache, then yield the values of all units in order.

    Collective until it returns the iterator. A unit is the same batch on any rank, so values depend neither on the
    number of ranks nor on what was already cached.

    Args:
        images: N images.
        measure: maps a batch uint8 (B, 3, H, W) on ``device`` to tensors to store.
        cache: cache for these images and this function.
        batch_size: images per unit.
        device: device to compute on.
        title: label of the progress bar.

    Raises:
        EvaluationError: an image cannot be read.
    """
    ranks = Ranks(None)
    units = -(-len(images) // batch_size)
    missing = ranks.first(lambda: [u for u in range(units) if not cache.has(u)])
    mine = missing[ranks.rank :: ranks.size]
    disable = None if ranks.rank == 0 else True  # None: disabled unless on a terminal
    with tqdm(total=len(images), unit="image", desc=title, disable=disable, dynamic_ncols=True) as bar:
        bar.update(len(images) - sum(min(batch_size, len(images) - u * batch_size) for u in missing))
        if mine:
            for unit, batch in read_batches(images, mine, batch_size):
                cache.write(unit, measure(batch.to(device)))
                bar.update(min(len(batch) * ranks.size, len(images) - bar.n))
    ranks.first(lambda: None)  # barrier: all ranks' files exist
    return (cache.read(unit) for unit in range(units))
