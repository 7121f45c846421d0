"""Monge Inception Distance (MIND; Berthet et al. 2026, arXiv 2605.06797), by torch-fidelity's procedure."""

from __future__ import annotations

import torch
from torch import Tensor

from components.evaluation import EvaluationError
from components.nn.precision import full_fp32

MIND_IMAGES = 5000
PROJECTIONS = 1000
SEED = 2020  # torch-fidelity's default
AT_ONCE = 50  # directions that are projected on and sorted together


def monge_inception_distance(
    samples: Tensor,
    reference: Tensor,
    *,
    images: int = MIND_IMAGES,
    projections: int = PROJECTIONS,
    seed: int = SEED,
    device: torch.device | str = "cpu",
) -> float:
    """3 D times the squared sliced 2-Wasserstein distance between two sets of features; at least 0.

    The distance between two sets of n numbers is the mean of the squared differences of the sorted numbers. It is
    averaged over projections of the features onto random unit vectors. Equal to torch-fidelity's
    ``mind_features_to_metric`` up to rounding: same subsets, same directions.

    Args:
        samples: features (N, D).
        reference: features (M, D).
        images: rows n of each side, drawn at random where a side has more; 0: min(N, M). The value falls as n rises, so
            values of different n are not comparable.
        projections: number of directions.
        seed: of the subsets and the directions.
        device: to compute on.

    Raises:
        EvaluationError: a side is empty, or the numbers of features differ.
    """
    if samples.shape[1] != reference.shape[1] or not min(len(samples), len(reference)):
        raise EvaluationError(
            f"MIND needs features of one network of at least one image of each side, got {tuple(samples.shape)} and "
            f"{tuple(reference.shape)}"
        )
    dim, count = samples.shape[1], min(len(samples), len(reference))
    count = min(count, images) if images else count
    generator = torch.Generator().manual_seed(seed)
    # Order: the subset of the samples, that of the reference, the directions.
    sides = [
        x[torch.randperm(len(x), generator=generator)[:count]] if len(x) > count else x for x in (samples, reference)
    ]
    directions = torch.randn(projections, dim, generator=generator)
    directions = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
    a, b = (x.to(device, torch.float32) for x in sides)
    total = torch.zeros((), dtype=torch.float64, device=device)
    with full_fp32():
        for chunk in directions.to(device).split(AT_ONCE):
            difference = (chunk @ a.T).sort(dim=1).values - (chunk @ b.T).sort(dim=1).values  # (directions, n)
            total += difference.double().square().mean(1).sum()
    return 3 * dim * float(total) / projections
