"""Inception Score (Salimans et al. 2016, arXiv 1606.03498) over splits, streaming."""

from __future__ import annotations

import torch
from torch import Tensor

from components.evaluation import EvaluationError

SPLIT = 5000


class InceptionScore:
    """exp of the mean KL(p(y|x) || p(y)), with p(y) of each split of images in order; then the mean over splits.

    As ADM's suite: splits of 5000 images, the last one shorter, each of equal weight.

    Args:
        split_size: images per split.
    """

    def __init__(self, split_size: int = SPLIT) -> None:
        self.split_size = split_size
        self._splits: list[tuple[int, Tensor, Tensor]] = []  # images, sum of p (classes,), sum of p log p ()

    def update(self, logits: Tensor) -> None:
        """Takes in the logits (B, classes) of the next images."""
        while len(logits):
            if not self._splits or self._splits[-1][0] == self.split_size:
                zero = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device)
                self._splits.append((0, zero, zero.sum()))
            count, p_sum, p_log_p = self._splits[-1]
            part, logits = logits.split([n := min(len(logits), self.split_size - count), len(logits) - n])
            log_p = part.double().log_softmax(1)
            p = log_p.exp()
            # p log p is 0 where p underflows; the log-softmax stays finite.
            self._splits[-1] = (count + n, p_sum + p.sum(0), p_log_p + (p * log_p).sum())

    def value(self) -> float:
        """In [1, classes]; raises :class:`EvaluationError` before the first image."""
        if not self._splits:
            raise EvaluationError("there are no images for an Inception Score")
        scores = []
        for count, p_sum, p_log_p in self._splits:
            mean = p_sum / count
            kl = p_log_p / count - torch.special.xlogy(mean, mean).sum()
            scores.append(kl.exp())
        return float(torch.stack(scores).mean())
