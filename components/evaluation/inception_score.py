"""Inception Score (Salimans et al. 2016, arXiv 1606.03498), averaged over splits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from components.evaluation import EvaluationError

SPLIT = 5000
AT_ONCE = 1000  # images whose probabilities are in memory at once, in float64


class InceptionScore:
    """exp(mean KL(p(y|x) || p(y))) of each split of the images, averaged over splits.

    As in ADM's suite: splits of 5000 images with equal weights, even if the last one is shorter. Unlike there, splits
    consist of images in the order of their keys (:func:`content_keys`), so they depend neither on the order of the
    images nor on their names: splits of images sorted by class would have few classes each, and a far lower score. The
    logits of all images are kept on the host, 4 KB each.

    Args:
        split_size: images per split.
    """

    def __init__(self, split_size: int = SPLIT) -> None:
        self.split_size = split_size
        self._logits: list[Tensor] = []  # (B, classes)
        self._keys: list[Tensor] = []  # (B,)

    def update(self, logits: Tensor, keys: Tensor | None = None) -> None:
        """Add the logits (B, classes) of the next images and their keys (B,) int64; None: they keep their order."""
        if keys is None:
            first = sum(map(len, self._logits))
            keys = torch.arange(first, first + len(logits))
        self._logits.append(logits.cpu())
        self._keys.append(keys.cpu())

    def value(self) -> float:
        """The score, in [1, classes]; raises :class:`EvaluationError` if there are no images."""
        if not any(map(len, self._logits)):
            raise EvaluationError("the Inception Score needs at least one image")
        if sum(map(len, self._logits)) <= self.split_size:  # one split: the order is irrelevant
            return float(_score(self._logits))
        order = torch.cat(self._keys).argsort(stable=True)
        splits = torch.cat(self._logits)[order].split(self.split_size)
        return float(torch.stack([_score(split.split(AT_ONCE)) for split in splits]).mean())


def content_keys(images: Tensor) -> Tensor:
    """Pseudorandom keys (B,) int64 of images uint8 (B, 3, H, W), functions of their pixels alone, on their device."""
    digests = [hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest() for image in images.cpu()]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], device=images.device)


def _score(batches: Sequence[Tensor]) -> Tensor:
    """Score () of the images in batches of logits (B, classes)."""
    zero = torch.zeros(batches[0].shape[1], dtype=torch.float64)
    count, p_sum, p_log_p = 0, zero, zero.sum()
    for logits in batches:
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        # If p underflows, p log p is 0, because the log-softmax is finite.
        count, p_sum, p_log_p = count + len(p), p_sum + p.sum(0), p_log_p + (p * log_p).sum()
    mean = p_sum / count
    return (p_log_p / count - torch.special.xlogy(mean, mean).sum()).exp()
