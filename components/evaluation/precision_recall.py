"""Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), as ADM's suite defines them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from components.evaluation import EvaluationError

NEIGHBOURS = 3
ROWS = 1024  # rows of distances at once: 200 MB against 50,000 columns


class PrecisionRecall(NamedTuple):
    """``precision``: share of samples within the reference's manifold; ``recall``: the other way round."""

    precision: float
    recall: float


def precision_recall(
    samples: Tensor, reference: Tensor, k: int = NEIGHBOURS, *, rank: int = 0, world: int = 1
) -> PrecisionRecall:
    """A point is in a set's manifold if some member's ball, reaching to its k-th neighbour, holds it.

    Collective for ``world`` > 1: blocks of rows are dealt out to the ranks. The numbers are the same for every world
    size. Distances are exact to the features' rounding (ADM's suite computes them in float16 where they fit).

    Args:
        samples: features (N, D), the same on every rank.
        reference: features (M, D), likewise.
        k: neighbours, the point itself not counted.
        rank: of this process.
        world: ranks that call this together.

    Raises:
        EvaluationError: a set has no more than k images.
    """
    for name, points in (("the samples", samples), ("the reference", reference)):
        if len(points) <= k:
            raise EvaluationError(
                f"{len(points)} images of {name} are too few for precision and recall with {k} neighbours"
            )
    # Distances come from norms and products, which cancel where all points lie far from the origin.
    centre = reference.mean(0)
    samples, reference = samples - centre, reference - centre
    share = rank, world
    precision = _inside(samples, reference, _radii(reference, k, *share), *share)
    recall = _inside(reference, samples, _radii(samples, k, *share), *share)
    return PrecisionRecall(precision, recall)


def _radii(points: Tensor, k: int, rank: int, world: int) -> Tensor:
    """Squared distance of each point to its k-th neighbour, (N,)."""
    radii = points.new_zeros(len(points))
    for first in range(rank * ROWS, len(points), world * ROWS):
        rows = torch.arange(first, min(first + ROWS, len(points)), device=points.device)
        distances = _squared(points[rows], points)
        distances[rows - first, rows] = 0.0  # nearest of all: itself
        radii[rows] = distances.topk(k + 1, largest=False, sorted=True).values[:, k]
    return _summed(radii, world)


def _inside(points: Tensor, centres: Tensor, radii: Tensor, rank: int, world: int) -> float:
    """Share of ``points`` that lie in a ball around some centre."""
    count = torch.zeros((), dtype=torch.float64, device=points.device)
    for first in range(rank * ROWS, len(points), world * ROWS):
        count += (_squared(points[first : first + ROWS], centres) <= radii).any(1).sum()
    return float(_summed(count, world)) / len(points)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (N, M)."""
    return torch.addmm(b.square().sum(1), a, b.T, alpha=-2).add_(a.square().sum(1, keepdim=True)).clamp_(min=0)


def _summed(x: Tensor, world: int) -> Tensor:
    if world > 1:
        dist.all_reduce(x)
    return x
