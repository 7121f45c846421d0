"""Metrics from features: summaries of image sets and their comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from components.distributed.ranks import Ranks
from components.evaluation import EvaluationError
from components.evaluation.frechet import frechet_distance
from components.evaluation.moments import Gaussian, Moments
from components.evaluation.precision_recall import precision_recall
from components.evaluation.scores import InceptionScore

# Features that each Frechet distance is computed on, and their suffixes in ADM's statistics files.
FRECHET = {"fid": "pool", "sfid": "spatial", "fd": "embedding"}
ENDINGS = {"pool": "", "spatial": "_s"}
INCEPTION = ("fid", "sfid", "is", "precision", "recall")


def needs_neighbors(metrics: tuple[str, ...]) -> bool:
    """Whether the metrics need the features of every image, not only their moments."""
    return "precision" in metrics or "recall" in metrics


@dataclass
class Summary:
    """Summary of a set of images under one network.

    Attributes:
        moments: moments by feature name.
        pool: features (N, 2048) float32 on the host; None unless precision or recall is computed.
        score: Inception Score; None unless it is computed.
    """

    moments: dict[str, Gaussian] = field(default_factory=dict)
    pool: Tensor | None = None
    score: float | None = None


class Summarizer:
    """Accumulates features, in the order of the images, into a :class:`Summary`.

    Only rank 0 computes moments and the Inception Score; all ranks keep the features for precision and recall.

    Args:
        network: see :class:`components.evaluation.networks.Network`.
        metrics: metrics computed on this network's features.
        device: device on which moments are computed.
        generated: whether these are generated images; only those have an Inception Score.
        main: whether this is rank 0.
    """

    def __init__(
        self, network: Any, metrics: tuple[str, ...], device: torch.device, *, generated: bool, main: bool
    ) -> None:
        self.network, self.device = network, device
        features = [FRECHET[m] for m in metrics if m in FRECHET] if main else []
        self._moments = {name: Moments(network.dims[name], device) for name in features}
        self._score = InceptionScore() if main and generated and "is" in metrics else None
        self._pool: list[Tensor] | None = [] if needs_neighbors(metrics) else None

    def add(self, features: dict[str, Tensor]) -> None:
        """Add the features (B, D), by name, of the next images."""
        for name, moments in self._moments.items():
            moments.update(features[name].to(self.device))
        if self._score is not None:
            self._score.update(self.network.logits(features["pool"].to(self.device)))
        if self._pool is not None:
            self._pool.append(features["pool"].float().cpu())

    def summary(self) -> Summary:
        """Summary of the images so far."""
        return Summary(
            {name: moments.gaussian() for name, moments in self._moments.items()},
            torch.cat(self._pool) if self._pool else None,
            self._score.value() if self._score is not None else None,
        )


def compare(
    metrics: tuple[str, ...],
    samples: Summary,
    reference: Summary,
    device: torch.device,
    *,
    allow_singular: bool = False,
    names: tuple[str, str] = ("", ""),
) -> tuple[dict[str, float | None], list[tuple[str, str]]]:
    """Compute metrics from two summaries. Collective.

    Args:
        metrics: metrics of one network.
        samples: summary of the generated images.
        reference: summary of the reference images.
        device: device on which precision and recall are computed.
        allow_singular: see :func:`components.evaluation.frechet.frechet_distance`.
        names: names of the two sets in messages.

    Returns:
        Values by metric, None if one cannot be computed, and (metric, warning) pairs; the same on every rank.
    """
    ranks = Ranks(None)

    def count() -> tuple[dict[str, float | None], list[tuple[str, str]]]:
        values: dict[str, float | None] = {}
        warnings: list[tuple[str, str]] = []
        for metric in metrics:
            if metric in FRECHET:
                feature = FRECHET[metric]
                pair = samples.moments[feature], reference.moments[feature]
                try:
                    found = frechet_distance(*pair, allow_singular=allow_singular, names=names)
                except EvaluationError as error:
                    values[metric], found = None, None
                    warnings.append((metric, str(error)))
                else:
                    values[metric] = found.value
                    warnings += [(metric, warning) for warning in found.warnings]
            elif metric == "is":
                values[metric] = samples.score
        return values, warnings

    values, warnings = ranks.first(count)
    if needs_neighbors(metrics):
        pools = samples.pool.to(device), reference.pool.to(device)
        found = precision_recall(*pools, rank=ranks.rank, world=ranks.size)
        values |= {name: value for name, value in found._asdict().items() if name in metrics}
    return {metric: values[metric] for metric in metrics}, warnings
