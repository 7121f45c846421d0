"""Streaming mean and covariance of features in float64, and statistics files in the format of ADM's suite."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.evaluation import EvaluationError
from components.files.atomic import atomic_write


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
        """Add a batch (B, D), B >= 1, of any floating dtype.

        Raises:
            EvaluationError: a feature is not finite; the message gives the image's index in the stream.
        """
        x = features.to(self.mean)
        bad = (~torch.isfinite(x).all(1)).nonzero()
        if len(bad):
            raise EvaluationError(
                f"the features of image {self.count + int(bad[0])} (counted from 0) are not finite; the image or the "
                "network's weights are invalid"
            )
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


def save_statistics(path: str | Path, statistics: dict[str, Gaussian], about: dict[str, Any]) -> None:
    """Atomically write an ``.npz`` file with ``mu``, ``sigma`` and ``count`` of each set of features.

    Args:
        path: the file.
        statistics: moments by key suffix: "" for Inception's pool features and "_s" for its spatial ones, as in ADM's
            reference batches.
        about: description of the features; stored as JSON under ``about``.
    """
    arrays: dict[str, Any] = {"about": np.array(json.dumps(about))}
    for ending, g in statistics.items():
        arrays |= {f"mu{ending}": g.mean.cpu().numpy(), f"sigma{ending}": g.covariance.cpu().numpy()}
        if g.count is not None:
            arrays[f"count{ending}"] = np.array(g.count)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, concurrent=True) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def read_statistics(path: str | Path) -> tuple[dict[str, Gaussian], dict[str, Any] | None]:
    """Read a file from :func:`save_statistics` or ADM's suite: moments by key suffix, and ``about`` (None for ADM).

    Raises:
        EvaluationError: the file cannot be read, or the shapes of its arrays do not match.
    """
    found: dict[str, Gaussian] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                ending = key.removeprefix("mu")
                if key == ending or f"sigma{ending}" not in file.files:
                    continue
                mean, covariance = (torch.from_numpy(np.atleast_1d(file[f"{k}{ending}"])) for k in ("mu", "sigma"))
                count = int(file[f"count{ending}"]) if f"count{ending}" in file.files else None
                found[ending] = Gaussian(mean.double(), covariance.double(), count)
            about = json.loads(str(file["about"])) if "about" in file.files else None
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(f"'{path}' cannot be read as an .npz of statistics ({error})") from error
    for ending, g in found.items():
        if g.mean.dim() != 1 or g.covariance.shape != (len(g.mean), len(g.mean)):
            raise EvaluationError(
                f"'{path}': mu{ending} is {tuple(g.mean.shape)}, but sigma{ending} is {tuple(g.covariance.shape)}; "
                "expected (D,) and (D, D)"
            )
    return found, about
