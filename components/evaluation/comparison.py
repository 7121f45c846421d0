"""Metrics from the statistics of two sets of images; Frechet distance as in FID (arXiv 1706.08500, equation 6)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from components.distributed.ranks import Ranks
from components.evaluation import EvaluationError
from components.evaluation.mind import MIND_IMAGES, monge_inception_distance
from components.evaluation.precision_recall import precision_recall
from components.evaluation.statistics import FRECHET, FeatureStatistics, Gaussian, NetworkMetrics, few_images

NAMES = ("the samples", "the reference")


def compare(
    networks: Sequence[NetworkMetrics],
    samples: Sequence[FeatureStatistics],
    reference: Sequence[FeatureStatistics],
    device: torch.device,
    *,
    allow_singular: bool = False,
    names: tuple[str, str] = NAMES,
    mind_images: int = MIND_IMAGES,
) -> tuple[dict[str, float | None], list[str]]:
    """Compute the metrics of every network. Collective.

    Args:
        networks: feature networks and their metrics.
        samples: statistics of the evaluated images for each network.
        reference: statistics of the reference images for each network.
        device: device on which precision, recall and MIND are computed.
        allow_singular: see :func:`frechet_distance`.
        names: names of the two sets in messages.
        mind_images: images of each side for MIND; 0: as many as the smaller side has.

    Returns:
        Values by name, None if one cannot be computed, and warnings "NAME: TEXT"; the same on every rank.
    """
    ranks, values, warnings = Ranks(None), {}, []
    for m, a, b in zip(networks, samples, reference):
        found, said = ranks.first(partial(_from_moments, m, a, b, allow_singular, names))
        if m.needs_neighbors:
            pools = a.pool.to(device), b.pool.to(device)
            found |= precision_recall(*pools, rank=ranks.rank, world=ranks.size)._asdict()
        if "mind" in m.metrics:
            pools = a.pool, b.pool
            found["mind"] = ranks.first(partial(monge_inception_distance, *pools, images=mind_images, device=device))
            if (count := min(map(len, pools))) < mind_images:
                said = [*said, f"mind: from {count} images of each side, not {mind_images}, which raises it"]
        values |= {m.name(metric): found[metric] for metric in m.metrics}
        warnings += said
    return values, warnings


def _from_moments(
    m: NetworkMetrics, a: FeatureStatistics, b: FeatureStatistics, allow_singular: bool, names: tuple[str, str]
) -> tuple[dict[str, float | None], list[str]]:
    """Frechet distances and Inception Score by metric, and warnings."""
    values: dict[str, float | None] = {"is": a.score}
    warnings: list[str] = []
    for metric, feature in ((x, FRECHET[x]) for x in m.metrics if x in FRECHET):
        try:
            values[metric], said = frechet_distance(
                a.moments[feature], b.moments[feature], allow_singular=allow_singular, names=names
            )
        except EvaluationError as error:
            values[metric], said = None, [str(error)]
        warnings += [f"{m.name(metric)}: {text}" for text in said]
    return values, warnings


class Frechet(NamedTuple):
    """``value`` = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2), clamped to >= 0; ``warnings`` about its validity."""

    value: float
    warnings: list[str]


def frechet_distance(
    samples: Gaussian, reference: Gaussian, *, allow_singular: bool = False, names: tuple[str, str] = NAMES
) -> Frechet:
    """Squared 2-Wasserstein distance between two Gaussians, in float64, on the device of ``samples``.

    Computes tr (C1 C2)^1/2 as tr (C1^1/2 C2 C1^1/2)^1/2 by symmetric eigendecompositions, which are real and also work
    for singular matrices. Takes a few seconds for D = 2048 on a CPU.

    Args:
        samples: moments of the evaluated images.
        reference: moments of the reference images.
        allow_singular: warn instead of raising if there are no more images than features.
        names: names of the two sets in messages.

    Raises:
        EvaluationError: the numbers of features differ, moments are not finite, all images have the same features, or
            there are no more images than features, so that the covariance is singular and the distance biased.
    """
    sides = list(zip((samples, reference), names))
    dim, warnings = len(samples.mean), []
    if len(reference.mean) != dim:
        raise EvaluationError(
            f"{sides[0][1]} have {dim} features, {sides[1][1]} {len(reference.mean)}: they are from different networks"
        )
    for g, name in sides:
        if not (torch.isfinite(g.mean).all() and torch.isfinite(g.covariance).all()):
            raise EvaluationError(f"the moments of {name} are not finite")
        too_few = few_images(g.count, dim, name)
        if too_few and not allow_singular:
            raise EvaluationError(too_few)
        warnings += [too_few] if too_few else []
    device = samples.mean.device
    m1, c1, m2, c2 = (x.to(device) for g, _ in sides for x in (g.mean, g.covariance))

    values, vectors = torch.linalg.eigh(c1)
    kept = values > _noise(values)
    ranks = [int(kept.sum()), int((lambda v: v > _noise(v))(torch.linalg.eigvalsh(c2)).sum())]
    for (g, name), rank in zip(sides, ranks):
        if rank == 0:
            raise EvaluationError(f"the images of {name} all have the same features: their covariance is zero")
        # rank == dim - 1 is normal: a final LayerNorm makes one feature dependent.
        if rank < dim - 1 and not few_images(g.count, dim, name):
            warnings.append(f"the covariance of {name} is singular: rank {rank} of {dim}; are there duplicate images?")
    # Drop eigenvalues of rounding size: 1e-16 would contribute a root of 1e-8 each.
    root = vectors[:, kept] * values[kept].sqrt()
    product = torch.linalg.eigvalsh(root.T @ c2 @ root)
    trace = product[product > _noise(product)].sqrt().sum()
    value = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * trace
    return Frechet(max(float(value), 0.0), warnings)


def _noise(values: Tensor) -> float:
    """Threshold below which ascending eigenvalues ``values`` are rounding errors."""
    return float(values[-1].clamp(min=0)) * len(values) * torch.finfo(values.dtype).eps
