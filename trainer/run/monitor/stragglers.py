"""Ranks that the others wait for, by name."""

from __future__ import annotations

import logging
import time

import torch

logger = logging.getLogger("titanrepa")

SLOW = 1.5  # a rank is named when it takes so many times as long as the median one
WAITING = 0.1  # a rank is named when it spends this share of its time waiting for data


class Stragglers:
    """Warns of the rank that waits longest for data, and of one that computes far slower than the others."""

    def __init__(self) -> None:
        self._slow: int | None = None

    def __call__(self, step: int, ranks: list[list[float]]) -> dict[str, float]:
        """Looks at all ranks.

        Args:
            ranks: of each rank the share of its time spent waiting for data, and the seconds of a fixed computation.

        Returns:
            Scalars to show.
        """
        if len(ranks) < 2:
            return {}
        waits, probes = zip(*ranks)
        slowest = max(range(len(ranks)), key=lambda rank: waits[rank])
        if waits[slowest] > WAITING:
            logger.warning(
                f"step {step}: rank {slowest} spends {waits[slowest]:.0%} of its time waiting for data (the median "
                f"rank {sorted(waits)[len(waits) // 2]:.0%}), and all others wait for it; more loader.workers or a "
                "faster disk there would help"
            )
        slowest = max(range(len(ranks)), key=lambda rank: probes[rank])
        usual = sorted(probes)[(len(probes) - 1) // 2]
        named, self._slow = self._slow, slowest if probes[slowest] > SLOW * usual else None
        if self._slow is not None and named == slowest:  # once may be chance
            logger.warning(
                f"step {step}: rank {slowest} computes {probes[slowest] / usual:.1f} times slower than the median "
                "rank, and all others wait for it; look at its device's clock, heat and other users"
            )
        return {"speed/slowest_rank_ratio": probes[slowest] / usual}


def probe(device: torch.device) -> float:
    """Seconds of a fixed computation: what this rank's device is capable of right now. Some milliseconds."""
    size, count = (4096, 8) if device.type == "cuda" else (256, 8)
    x = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(3):  # the best of three: a hiccup is no straggler
        start = time.perf_counter()
        for _ in range(count):
            x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
