"""Feature networks with their metrics, and the statistics of images' features that the metrics are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from components.distributed.parallel import World
from components.evaluation import EvaluationError
from components.evaluation.features import FeatureCache, extract
from components.evaluation.images import ImageSet
from components.evaluation.inception_score import InceptionScore, content_keys
from components.finite import count_of, faulty_rows

# Features that each Frechet distance is computed on, and their suffixes in ADM's statistics files.
FRECHET = {"fid": "pool", "sfid": "spatial", "fd": "embedding"}
SUFFIXES = {"pool": "", "spatial": "_s"}
INCEPTION = ("fid", "sfid", "is", "precision", "recall", "mind")
KEYS = "content_keys"


class FeatureNetwork(Protocol):
    """A network that computes features of images.

    Attributes:
        dims: number of features by name.
        about: identifies the network in reports, caches and statistics files.
    """

    dims: dict[str, int]
    about: dict[str, Any]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Map images uint8 (B, 3, H, W) to features float (B, D) by name."""


@dataclass(frozen=True)
class NetworkMetrics:
    """A feature network and the metrics to compute from its features.

    Attributes:
        label: "" for Inception, otherwise the encoder's label.
        metrics: keys of :data:`FRECHET` or names in :data:`INCEPTION`.
    """

    label: str
    network: FeatureNetwork
    metrics: tuple[str, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """Identity of the network and its weights, independent of the path of its file."""
        return {key: value for key, value in self.network.about.items() if key != "file"}

    @property
    def features(self) -> list[str]:
        """Features that Frechet distances are computed on, in the order of the metrics."""
        return [FRECHET[metric] for metric in self.metrics if metric in FRECHET]

    @property
    def needs_pool(self) -> bool:
        """Whether the metrics need the features of every image, not only their moments."""
        return self.needs_neighbors or "mind" in self.metrics

    @property
    def needs_neighbors(self) -> bool:
        """Whether the metrics are based on nearest neighbors."""
        return "precision" in self.metrics or "recall" in self.metrics

    def with_keys(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images uint8 (B, 3, H, W), by name, and the keys that order images for the Inception Score."""
        return self.network(images) | {KEYS: content_keys(images)}

    def name(self, metric: str) -> str:
        """Name in reports: "fid", "fd_dinov2"."""
        return f"{metric}_{self.label}" if self.label else metric

    def suffix(self, feature: str) -> str:
        """Suffix of the keys mu and sigma of ``feature`` in a statistics file."""
        return f"_{self.label}" if self.label else SUFFIXES[feature]


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of D features.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64, unbiased (divided by N - 1).
        count: number of images N; None if a statistics file does not state it.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None


class Moments:
    """Accumulates mean and scatter matrix of a stream of feature vectors.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1983), which stays accurate if the mean is
    much larger than the standard deviation. Different batch sizes agree to about 1e-14; the same batches in the same
    order agree bitwise.

    Args:
        dim: number of features D.
        device: device of the D x D matrix (34 MB for D = 2048).
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add a batch (B, D), B >= 1, of finite features of any floating dtype."""
        x = features.to(self.mean)
        mean = x.mean(0)
        centered = x - mean
        self._merge(len(x), mean, centered.T @ centered)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(delta, delta, alpha=self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Moments of the data so far; raises :class:`EvaluationError` for fewer than two images."""
        if self.count < 2:
            raise EvaluationError(f"a covariance needs at least 2 images, got {self.count}")
        return Gaussian(self.mean.clone(), self.scatter / (self.count - 1), self.count)


def few_images(count: int | None, dim: int, name: str) -> str:
    """Message if ``count`` images are too few for a nonsingular covariance, otherwise ""."""
    if count is None or count > dim:
        return ""
    return (
        f"{count} images of {name} are too few for {dim} features: the covariance is singular and the distance "
        f"biased; use more than {dim}, and many more to compare with published numbers"
    )


@dataclass
class FeatureStatistics:
    """Statistics of a set of images under one network.

    Attributes:
        moments: moments by feature name.
        pool: features (N, 2048) float32 on the host; None unless precision, recall or MIND is computed.
        score: Inception Score; None unless it is computed.
    """

    moments: dict[str, Gaussian] = field(default_factory=dict)
    pool: Tensor | None = None
    score: float | None = None


class StatisticsBuilder:
    """Accumulates features, in the order of the images, into :class:`FeatureStatistics`.

    Only rank 0 computes moments and the Inception Score; all ranks keep the features for precision, recall and MIND.

    Args:
        m: the network and its metrics.
        world: this process, on whose device moments are computed.
        generated: whether these are generated images; only those have an Inception Score.
    """

    def __init__(self, m: NetworkMetrics, world: World, *, generated: bool) -> None:
        self.network, self.device = m.network, world.device
        features = m.features if world.is_main else []
        self._moments = {name: Moments(m.network.dims[name], world.device) for name in features}
        self._score = InceptionScore() if world.is_main and generated and "is" in m.metrics else None
        self._pool: list[Tensor] | None = [] if m.needs_pool else None
        self._count = 0

    def add(self, features: dict[str, Tensor]) -> None:
        """Add the features (B, D), by name, of the next images; for the Inception Score also :data:`KEYS`, (B,).

        Raises:
            EvaluationError: the features of an image are not finite; says how many and which image is the first.
        """
        for name, values in features.items():
            if name != KEYS and (faulty := faulty_rows(values, self._count)):
                raise EvaluationError(
                    f"'{name}' of {count_of(faulty, len(values), 'images of a batch')}, counted from 0; the weights of "
                    "the network or the images are invalid"
                )
        self._count += len(next(iter(features.values())))
        for name, moments in self._moments.items():
            moments.update(features[name].to(self.device))
        if self._score is not None:
            self._score.update(self.network.logits(features["pool"].to(self.device)), features[KEYS])
        if self._pool is not None:
            self._pool.append(features["pool"].float().cpu())

    def build(self) -> FeatureStatistics:
        """Statistics of the images so far."""
        return FeatureStatistics(
            {name: moments.gaussian() for name, moments in self._moments.items()},
            torch.cat(self._pool) if self._pool else None,
            self._score.value() if self._score is not None else None,
        )


def compute_statistics(
    images: ImageSet | None,
    networks: Sequence[NetworkMetrics],
    folder: Path,
    *,
    batch_size: int,
    world: World,
    generated: bool,
    known: Sequence[dict[str, Gaussian]] | None = None,
) -> tuple[list[FeatureStatistics], list[FeatureCache]]:
    """Compute the statistics of ``images`` that the metrics need, in one pass over them. Collective.

    Args:
        images: the images; None if all moments are known.
        networks: feature networks and their metrics.
        folder: folder for the feature caches, from which an interrupted computation resumes.
        batch_size: images per batch and rank; affects the values only through rounding in the networks.
        world: this process.
        generated: True for samples, False for the reference.
        known: moments by feature name for each network, which are not computed again.

    Returns:
        Statistics for each network, and the feature caches, to remove at the end.

    Raises:
        EvaluationError: an image cannot be read, or a feature is not finite.
    """
    known = known or [{}] * len(networks)
    found = [FeatureStatistics(dict(moments)) for moments in known]
    work = []  # of the networks whose features are needed: place in ``networks``, the network, its function and cache
    for place, (m, moments) in enumerate(zip(networks, known)):
        metrics = tuple(x for x in m.metrics if FRECHET.get(x) not in moments and (generated or x != "is"))
        if metrics:
            about = {"images": images.identity, "network": m.identity, "batch_size": batch_size, KEYS: "is" in metrics}
            compute = m.with_keys if "is" in metrics else m.network
            work.append((place, replace(m, metrics=metrics), (compute, FeatureCache(folder, about))))
    if not work:
        return found, []
    tasks = [task for *_, task in work]
    title = "samples" if generated else "reference"
    streams = extract(images, tasks, batch_size=batch_size, device=world.device, title=title)
    for (place, m, _), stream in zip(work, streams):
        builder = StatisticsBuilder(m, world, generated=generated)
        for values in stream:
            builder.add(values)
            if not world.is_main and not m.needs_pool:
                break
        built = builder.build()
        built.moments |= known[place]
        found[place] = built
    return found, [cache for _, cache in tasks]
