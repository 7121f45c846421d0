"""Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), as defined by ADM's suite."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from components.evaluation import EvaluationError

NEIGHBORS = 3
ROWS = 1024  # rows of the distance matrix per block: 200 MB for 50,000 columns


class PrecisionRecall(NamedTuple):
    """``precision``: fraction of samples in the reference manifold; ``recall``: the same with the sets exchanged."""

    precision: float
    recall: float


def precision_recall(
    samples: Tensor, reference: Tensor, k: int = NEIGHBORS, *, rank: int = 0, world: int = 1
) -> PrecisionRecall:
    """Compute precision and recall from k-nearest-neighbor manifolds.

    A set's manifold is the union of balls around its points, each with the distance to the point's k-th nearest
    neighbor as radius. Collective if ``world`` > 1: ranks divide the rows of the distance matrix, and the result does
    not depend on ``world``. Distances are computed in the dtype of the features (ADM's suite uses float16 if possible).

    Args:
        samples: features (N, D), the same on every rank.
        reference: features (M, D), the same on every rank.
        k: number of neighbors, not counting the point itself.
        rank: rank of this process.
        world: number of ranks that call this together.

    Raises:
        EvaluationError: a set has k or fewer images.
    """
    for name, points in (("the samples", samples), ("the reference", reference)):
        if len(points) <= k:
            raise EvaluationError(
                f"{len(points)} images of {name} are too few for precision and recall with {k} neighbors"
            )
    # Center: distances computed from norms and dot products suffer cancellation far from the origin.
    center = reference.mean(0)
    samples, reference = samples - center, reference - center
    share = rank, world
    precision = _inside(samples, reference, _radii(reference, k, *share), *share)
    recall = _inside(reference, samples, _radii(samples, k, *share), *share)
    return PrecisionRecall(precision, recall)


def _radii(points: Tensor, k: int, rank: int, world: int) -> Tensor:
    """Squared distance of each point to its k-th nearest neighbor, (N,)."""
    radii = points.new_zeros(len(points))
    for first in range(rank * ROWS, len(points), world * ROWS):
        rows = torch.arange(first, min(first + ROWS, len(points)), device=points.device)
        distances = _squared(points[rows], points)
        distances[rows - first, rows] = 0.0  # exactly 0 to itself, so that it sorts first
        radii[rows] = distances.topk(k + 1, largest=False, sorted=True).values[:, k]
    return _summed(radii, world)


def _inside(points: Tensor, centers: Tensor, radii: Tensor, rank: int, world: int) -> float:
    """Fraction of ``points`` that lie in the ball around any center."""
    count = torch.zeros((), dtype=torch.float64, device=points.device)
    for first in range(rank * ROWS, len(points), world * ROWS):
        count += (_squared(points[first : first + ROWS], centers) <= radii).any(1).sum()
    return float(_summed(count, world)) / len(points)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (N, M) between points (N, D) and (M, D)."""
    return torch.addmm(b.square().sum(1), a, b.T, alpha=-2).add_(a.square().sum(1, keepdim=True)).clamp_(min=0)


def _summed(x: Tensor, world: int) -> Tensor:
    if world > 1:
        dist.all_reduce(x)
    return x
