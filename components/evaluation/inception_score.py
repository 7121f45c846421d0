"""Streaming Inception Score (Salimans et al. 2016, arXiv 1606.03498), averaged over splits."""

from __future__ import annotations

import torch
from torch import Tensor

from components.evaluation import EvaluationError

SPLIT = 5000


class InceptionScore:
    """exp(mean KL(p(y|x) || p(y))) of each split of consecutive images, averaged over splits.

    As in ADM's suite: splits of 5000 images with equal weights, even if the last one is shorter.

    Args:
        split_size: images per split.
    """

    def __init__(self, split_size: int = SPLIT) -> None:
        self.split_size = split_size
        self._splits: list[tuple[int, Tensor, Tensor]] = []  # count, sum of p (classes,), sum of p log p ()

    def update(self, logits: Tensor) -> None:
        """Add the logits (B, classes) of the next images."""
        while len(logits):
            if not self._splits or self._splits[-1][0] == self.split_size:
                zero = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device)
                self._splits.append((0, zero, zero.sum()))
            count, p_sum, p_log_p = self._splits[-1]
            part, logits = logits.split([n := min(len(logits), self.split_size - count), len(logits) - n])
            log_p = part.double().log_softmax(1)
            p = log_p.exp()
            # If p underflows, p log p is 0, because the log-softmax is finite.
            self._splits[-1] = (count + n, p_sum + p.sum(0), p_log_p + (p * log_p).sum())

    def value(self) -> float:
        """The score, in [1, classes]; raises :class:`EvaluationError` if there are no images."""
        if not self._splits:
            raise EvaluationError("the Inception Score needs at least one image")
        scores = []
        for count, p_sum, p_log_p in self._splits:
            mean = p_sum / count
            kl = p_log_p / count - torch.special.xlogy(mean, mean).sum()
            scores.append(kl.exp())
        return float(torch.stack(scores).mean())
