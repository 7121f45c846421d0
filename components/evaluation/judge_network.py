"""Feature network for evaluation that consists of a dataset's own judge."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.contracts import Dataset
from components.data.pixels import to_float
from components.evaluation.statistics import NetworkMetrics
from components.nn.precision import full_fp32, no_autocast


class JudgeNetwork(nn.Module):
    """Adapts a dataset's judge to :class:`components.evaluation.statistics.FeatureNetwork`.

    The judge belongs to the dataset, not to a run: no run trains it or aligns with it.

    Args:
        dataset: with ``judge_dim`` > 0.
        name: of the dataset.
    """

    def __init__(self, dataset: Dataset, name: str) -> None:
        super().__init__()
        self.dataset = dataset
        self.dims = {"embedding": dataset.judge_dim}
        self.about = {"name": f"judge of dataset {name}", "sha256": dataset.judge_identity()}

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``embedding`` (B, D), float32, of images uint8 (B, 3, R, R)."""
        with no_autocast(images), full_fp32():
            return {"embedding": self.dataset.judge_features(to_float(images)).float()}


def judge_metrics(dataset: Dataset, name: str) -> NetworkMetrics:
    """The Frechet distance "fd_judge" on the judge of the dataset called ``name``."""
    return NetworkMetrics("judge", JudgeNetwork(dataset, name), ("fd",))
